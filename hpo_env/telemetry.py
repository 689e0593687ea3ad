"""What has been measured in each run so far: the signals of every interval, with look-back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import Array
from inner_models.signals import SIGNALS


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
        self._history = {name: np.full((runs, horizon + 1), np.nan) for name in SIGNALS}

    def restart(self, runs: NDArray[np.int64], initial: Mapping[str, Array]) -> None:
        """Begin `runs` anew with what is known before training (`[len(runs)]` each; usually `val_loss`, or nothing)."""
        self.interval[runs] = 0
        for name, history in self._history.items():
            history[runs] = np.nan
            if name in initial:
                history[runs, 0] = initial[name]

    def record(self, signals: Mapping[str, Array]) -> None:
        """Append one interval's signals, `[runs]` each. Missing names count as not measured (NaN).

        Past the horizon (a run that outlasts its stated length) the history grows and `interval` goes on.
        """
        self.interval += 1
        length = next(iter(self._history.values())).shape[1]
        if self.interval.max() >= length:
            grown = np.full((len(self._rows), length), np.nan)
            self._history = {name: np.concatenate([h, grown], axis=1) for name, h in self._history.items()}
        for name, history in self._history.items():
            if name in signals:
                history[self._rows, self.interval] = signals[name]

    def value(self, name: str, lag: int = 0) -> Array:
        """The signal `lag` intervals ago, `[runs]`; NaN where not measured or before the start."""
        at = self.interval - lag
        return np.where(at >= 0, self._history[name][self._rows, np.maximum(at, 0)], np.nan)

    def past(self, name: str) -> Array:
        """The signal's whole history, `[runs, intervals]`; NaN where not measured."""
        return self._history[name]

    def load(self, interval: NDArray[np.int64], history: Mapping[str, Array]) -> None:
        """Take over another telemetry's `interval` and `past` of every signal."""
        self.interval, self._history = interval, dict(history)
