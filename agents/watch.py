"""`Watch`: tells from a run's losses whether it has diverged. The tuner's guard and the judge's share it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

from hpo_env.rewards import DIVERGED

LOWERED = 0.25
"""Factor on the learning rate after a divergence."""

FRUITLESS = 3
"""After so many divergences in a row, all of finite losses or all of the validation loss alone, a learning rate of 1/64
has not helped: it was not that."""


class Finding(NamedTuple):
    """What a run's losses say.

    Attributes:
        verdict: what is wrong with the run, if anything.
        improved: whether it is at a new best: by validation loss, where there is one.
        taken_back: how many verdicts before this one were mistaken.
    """

    verdict: str | None = None
    improved: bool = False
    taken_back: int = 0


class Watch:
    """The losses of one run, the best and the first of each kind."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._in_a_row = 0  # more than FRUITLESS, and for good, once verdicts were taken back
        self._unmeasured = 0  # intervals in a row whose validation loss alone is not finite

    @property
    def validation_is_broken(self) -> bool:
        """Whether a validation loss that is not finite counts as not measured, since restoring did not help."""
        return self._unmeasured > FRUITLESS

    def check(self, signals: Mapping[str, float]) -> Finding:
        """Take in an interval's losses, `train_loss` and `val_loss` or one of them. Those of a diverged run are not
        remembered. If it comes out just as bad however often it is taken back, its losses have changed their meaning
        (an annealed term, an adversary), and from then on only one that is not finite is a divergence. Where it is
        validation alone that is not finite, however often, validation is what is broken, until it is finite again.
        """
        broken = [name for name, value in signals.items() if not math.isfinite(value)]
        alone = broken == ["val_loss"] and "train_loss" in signals
        self._unmeasured = min(self._unmeasured + 1, FRUITLESS + 2) if alone else 0
        if self.validation_is_broken:
            if self._unmeasured == FRUITLESS + 1:
                return Finding(taken_back=FRUITLESS)
            signals, broken = {"train_loss": signals["train_loss"]}, []
        if broken:
            if self._in_a_row <= FRUITLESS:
                self._in_a_row = 0
            return Finding(f"{' and '.join(broken)} not finite")
        verdict, taken_back = self._diverged(signals), 0
        if self._in_a_row > FRUITLESS:
            verdict = None
        elif verdict is None:
            self._in_a_row = 0
        else:
            self._in_a_row += 1
            if self._in_a_row <= FRUITLESS:
                return Finding(verdict)
            taken_back = FRUITLESS
            self._first, self._best = {}, {}
        name = "val_loss" if "val_loss" in signals else "train_loss"
        improved = signals[name] < self._best.get(name, math.inf)
        for key, value in signals.items():
            self._first.setdefault(key, value)
            self._best[key] = min(value, self._best.get(key, math.inf))
        return Finding(None, improved, taken_back)

    def state_dict(self) -> dict[str, Any]:
        counts = {"in_a_row": self._in_a_row, "unmeasured": self._unmeasured}
        return {"first": dict(self._first), "best": dict(self._best), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: it is damaged; everything stays as it was.
        """
        first, best, counts = state["first"], state["best"], (state["in_a_row"], state["unmeasured"])
        if first.keys() != best.keys() or not all(map(math.isfinite, [*first.values(), *best.values()])):
            raise ValueError(f"the guard's losses are damaged: {short(first)}, {short(best)}")
        for count, most in zip(counts, (FRUITLESS + 1, FRUITLESS + 2), strict=True):
            if type(count) is not int or not 0 <= count <= most:
                raise ValueError(f"the guard's count of divergences is damaged: {short(count)}")
        self._first, self._best = dict(first), dict(best)
        self._in_a_row, self._unmeasured = counts

    def _diverged(self, signals: Mapping[str, float]) -> str | None:
        """What is wrong with finite losses, if anything."""
        # All losses must be off, that of training among them (validation alone rises when a model overfits), or one
        # beyond all measure, if there is one: a loss that was only ever 0 gives none.
        far = [name for name, value in signals.items() if self._far_above(name, value)]
        lost = [name for name in far if name in self._best and 0 < DIVERGED * self._scale(name) < signals[name]]
        if self._best and (lost or ("train_loss" in far and len(far) == len(signals))):
            name = (lost or far)[-1]
            return f"{name} {signals[name]:.4g} is far above the run's best"
        return None

    def _far_above(self, name: str, value: float) -> bool:
        """It has risen by twice all that was gained, and to at least three times the best."""
        best, first = self._best.get(name), self._first.get(name)
        return best is None or first is None or value > best + 2 * max(first - best, abs(best))

    def _scale(self, name: str) -> float:
        return max(abs(self._first[name]), abs(self._best[name]))
