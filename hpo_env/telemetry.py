"""What has been measured in each run so far: the signals of every interval, with look-back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import Array
from inner_models.signals import SIGNALS

_INDEX = {name: index for index, name in enumerate(SIGNALS)}


def combined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The signals of consecutive epochs, `[runs]` each, as those of one interval: the last validation loss there is,
    the means of the others, and for `update_ratio` the distance that a random walk of these steps would cover. What is
    too large to add up becomes infinite."""
    if len(parts) == 1:
        return dict(parts[0])
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        column = np.array([part[name] for part in parts if name in part])
        with np.errstate(over="ignore", invalid="ignore"):
            if name == "val_loss":
                found[name] = column[-1]
            elif name == "update_ratio":
                found[name] = np.sqrt(np.square(column).sum(axis=0))
            else:
                found[name] = column.mean(axis=0)
    return found


class Telemetry:
    """Signal histories of several runs, each at an interval of its own.

    Attributes:
        interval: `[runs]`, intervals finished.
        horizon: `[runs]`, intervals in the run.
    """

    def __init__(self, runs: int, horizon: int) -> None:
        self.interval = np.zeros(runs, np.int64)
        self.horizon = np.full(runs, horizon, np.int64)
        self._rows = np.arange(runs)
        self._history = np.full((len(SIGNALS), runs, horizon + 1), np.nan)
        self._now: Array | None = None  # `[signals, runs]`, looked up when first asked for

    def restart(self, runs: NDArray[np.int64], initial: Mapping[str, Array]) -> None:
        """Begin `runs` anew with what is known before training (`[len(runs)]` each; usually `val_loss`, or nothing)."""
        self._now = None
        self.interval[runs] = 0
        self._history[:, runs] = np.nan
        for index, name in enumerate(SIGNALS):
            if name in initial:
                self._history[index, runs, 0] = initial[name]

    def record(self, signals: Mapping[str, Array]) -> None:
        """Append one interval's signals, `[runs]` each. Missing names count as not measured (NaN).

        Past the horizon (a run that outlasts its stated length) the history grows and `interval` goes on.
        """
        self._now = None
        self.interval += 1
        if self.interval.max() >= self._history.shape[2]:
            self._history = np.concatenate([self._history, np.full_like(self._history, np.nan)], axis=2)
        for name, index in _INDEX.items():
            if name in signals:
                self._history[index, self._rows, self.interval] = signals[name]

    def value(self, name: str) -> Array:
        """The signal now, `[runs]`, to read only; NaN where not measured."""
        if self._now is None:
            self._now = self._history[:, self._rows, self.interval]
        signal: Array = self._now[_INDEX[name]]
        return signal

    def ago(self, signals: NDArray[np.int64], lags: NDArray[np.int64]) -> Array:
        """Signals, by their places in `SIGNALS`, as they were `lags` intervals ago, `[looks, runs]`; NaN where not
        measured or before the start.

        Args:
            signals, lags: `[looks]`.
        """
        at = self.interval - lags[:, None]
        values = self._history[signals[:, None], self._rows, np.maximum(at, 0)]
        return np.where(at < 0, np.nan, values)

    def first(self, signals: NDArray[np.int64]) -> Array:
        """The first value of signals, by their places in `SIGNALS`, `[looks, runs]`: that before training, or where it
        is not finite, that of the first interval."""
        before, after = self._history[signals, :, 0], self._history[signals, :, 1]
        return np.where(np.isfinite(before), before, after)

    def best(self, signals: NDArray[np.int64]) -> Array:
        """The lowest finite value so far of signals, by their places in `SIGNALS`, `[looks, runs]`; else infinity."""
        past = self._history[signals]
        return np.asarray(np.where(np.isfinite(past), past, np.inf).min(axis=2))

    def past(self, name: str) -> Array:
        """The signal's whole history, `[runs, intervals]`; NaN where not measured."""
        history: Array = self._history[_INDEX[name]]
        return history

    def load(self, interval: NDArray[np.int64], history: Mapping[str, Array]) -> None:
        """Take over another telemetry's `interval` and `past` of every signal."""
        self._now = None
        self.interval, self._history = interval, np.stack([history[name] for name in SIGNALS])
