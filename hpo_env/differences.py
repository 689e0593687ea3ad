"""Relative differences between measurements of a run: of one signal at two times, or of two signals."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import Array
from hpo_env.telemetry import Telemetry
from inner_models.signals import SIGNALS

Share = Literal["eighth", "third"]
When = int | Share | Literal["first", "best"]
"""So many intervals ago; that share of the run ago; the run's first value; its lowest one."""

Look = tuple[str, When]
"""A signal, and when."""

Pair = tuple[Look, Look]

SHARES: dict[Share, int] = {"eighth": 8, "third": 3}
"""How many of these make a run."""

_TINY = float(np.finfo(np.float64).tiny)


def relative_difference(a: Array, b: Array) -> Array:
    """r(a, b) = 2 (a - b) / (|a| + |b|), in -2..2; 0 where both are 0; NaN where either is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.maximum(np.maximum(np.abs(a), np.abs(b)), _TINY)
        a, b = a / largest, b / largest
        return np.asarray(2 * (a - b) / np.maximum(np.abs(a) + np.abs(b), _TINY))


class Differences:
    """The relative differences of several pairs, looked up and computed at once: with few runs, time goes into the
    number of calls."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._pairs = list(dict.fromkeys(pairs))
        looks = list(dict.fromkeys(look for pair in self._pairs for look in pair))
        self._ago = [look for look in looks if isinstance(look[1], int) or look[1] in get_args(Share)]
        first, best = ([look for look in looks if look[1] == when] for when in ("first", "best"))
        order = [*self._ago, *first, *best]
        self._a, self._b = np.array([[order.index(look) for look in pair] for pair in self._pairs]).T
        self._signals, self._first, self._best = (
            np.array([list(SIGNALS).index(signal) for signal, _ in part], np.int64) for part in (self._ago, first, best)
        )
        self._lags = lru_cache(self._lags_in)

    def places(self, pairs: Iterable[Pair]) -> NDArray[np.int64]:
        """Where these pairs stand in what a call returns."""
        return np.array([self._pairs.index(pair) for pair in pairs], np.int64)

    def __call__(self, telemetry: Telemetry) -> Array:
        """`[pairs, runs]`, NaN where one of the two is not measured (yet) or not finite. All runs are equally long."""
        then = telemetry.ago(self._signals, self._lags(int(telemetry.horizon[0])))
        seen = np.concatenate([then, telemetry.first(self._first), telemetry.best(self._best)])
        return relative_difference(seen[self._a], seen[self._b])

    def _lags_in(self, horizon: int) -> NDArray[np.int64]:
        """How many intervals ago, in a run of `horizon` intervals."""
        shares: dict[When, int] = {name: max(1, round(horizon / parts)) for name, parts in SHARES.items()}
        return np.array([when if isinstance(when, int) else shares[when] for _, when in self._ago], np.int64)
