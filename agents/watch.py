"""`Watch`: tells from a run's losses whether it has diverged. The tuner's guard and the judge's share it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo_env.rewards import DIVERGED

LOWERED = 0.25
"""Factor on the learning rate after a divergence."""


class Watch:
    """The losses of one run, the best and the first of each kind."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._best: dict[str, float] = {}

    def check(self, signals: Mapping[str, float]) -> tuple[str | None, bool]:
        """Take in an interval's losses, `train_loss` and `val_loss` or one of them.

        Returns:
            What is wrong with the run, if anything (such losses are not remembered), and whether the run is at a new
            best: by validation loss, where there is one.
        """
        broken = [name for name, value in signals.items() if not math.isfinite(value)]
        if broken:
            return f"{' and '.join(broken)} not finite", False
        # All losses must be off, that of training among them (validation alone rises when a model overfits), or one
        # beyond all measure, if there is one: a loss that was only ever 0 gives none.
        far = [name for name, value in signals.items() if self._far_above(name, value)]
        lost = [name for name in far if name in self._best and 0 < DIVERGED * self._scale(name) < signals[name]]
        if self._best and (lost or ("train_loss" in far and len(far) == len(signals))):
            name = (lost or far)[-1]
            return f"{name} {signals[name]:.4g} is far above the run's best", False
        name = "val_loss" if "val_loss" in signals else "train_loss"
        improved = signals[name] < self._best.get(name, math.inf)
        for key, value in signals.items():
            self._first.setdefault(key, value)
            self._best[key] = min(value, self._best.get(key, math.inf))
        return None, improved

    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self._first), "best": dict(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first, self._best = dict(state["first"]), dict(state["best"])

    def _far_above(self, name: str, value: float) -> bool:
        """It has risen by twice all that was gained, and to at least three times the best."""
        best, first = self._best.get(name), self._first.get(name)
        return best is None or first is None or value > best + 2 * max(first - best, abs(best))

    def _scale(self, name: str) -> float:
        return max(abs(self._first[name]), abs(self._best[name]))
