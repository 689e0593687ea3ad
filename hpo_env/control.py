"""The control loop: telemetry in, observation out; action in, hyperparameter values out.

The environments and the tuner share this one class; it is what makes a policy trained in one apply in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hpo_env.actions import BaseSchedule, apply_offsets, move
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.observations import RunState, observe
from hpo_env.telemetry import Telemetry

_INDEX = {name: index for index, name in enumerate(CONTROLS)}


class ControlLoop:
    """Controls several runs of one kind (same optimizer, model size and length), each at an interval of its own.

    Args:
        runs: number of runs.
        horizon: intervals in a run.
        base: the schedule that the actions deviate from.
        parameters: trainable parameters of the inner model.
        momentum_sgd: whether the inner optimizer is SGD.
    """

    def __init__(self, runs: int, *, horizon: int, base: BaseSchedule, parameters: int, momentum_sgd: bool) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 interval, not {horizon}")
        self.base = base
        shape = (runs, len(CONTROLS))
        self.state = RunState(
            telemetry=Telemetry(runs, horizon),
            offsets=np.zeros(shape),
            actions=np.zeros(shape),
            values=np.zeros(shape),
            available=np.ones(shape, bool),
            parameters=np.full(runs, float(parameters)),
            momentum_sgd=np.full(runs, momentum_sgd),
        )
        self._lr_scale = np.ones(runs)
        self._fixed = np.full(shape, np.nan)
        self._set_values()

    def restart(
        self,
        runs: Sequence[int],
        initial: Mapping[str, Array] | None = None,
        *,
        fixed: Sequence[Mapping[str, float]] | None = None,
        lr_scale: Array | None = None,
    ) -> None:
        """Begin `runs` anew.

        Args:
            initial: signals known before training, `[len(runs)]` each.
            fixed: for each run, the controls that it does not have and the values they stand at.
            lr_scale: `[len(runs)]`, factors on the base schedule's learning rate.
        """
        rows, state = np.asarray(runs, np.int64), self.state
        state.telemetry.restart(rows, initial or {})
        state.offsets[rows], state.actions[rows] = 0, 0
        self._lr_scale[rows] = 1 if lr_scale is None else lr_scale
        self._fixed[rows] = np.nan
        for row, names in zip(runs, fixed or [], strict=False):
            for name, value in names.items():
                self._fixed[row, _INDEX[name]] = value
        state.available[rows] = np.isnan(self._fixed[rows])
        self._set_values()

    def observe(self) -> NDArray[np.float32]:
        """Observations, `[runs, features]`."""
        return observe(self.state)

    def decide(self, actions: Array) -> dict[str, Array]:
        """Take a decision in every run.

        Args:
            actions: `[runs, controls]` in -1..1; what moves a control that the run does not have is ignored.

        Returns:
            The values for the coming interval, `[runs]` each.
        """
        state = self.state
        state.actions = np.where(state.available, np.clip(np.nan_to_num(np.asarray(actions, np.float64)), -1, 1), 0)
        state.offsets = move(state.offsets, state.actions, state.telemetry.interval == 0)
        self._set_values()
        return self.values()

    def record(self, signals: Mapping[str, Array]) -> None:
        """Take in the signals of the interval that has just been trained, `[runs]` each."""
        self.state.telemetry.record(signals)

    def shift(self, name: str, amount: float) -> None:
        """Move a control's offset in every run outside of any decision (the tuner's guard does)."""
        action = np.zeros_like(self.state.offsets)
        action[:, _INDEX[name]] = amount
        self.state.offsets = self.state.offsets + np.where(self.state.available, action, 0)
        self._set_values()

    def values(self) -> dict[str, Array]:
        """The values in use, `[runs]` each."""
        return {name: self.state.values[:, index].copy() for name, index in _INDEX.items()}

    def _set_values(self) -> None:
        telemetry = self.state.telemetry
        coming = np.minimum(telemetry.interval, telemetry.horizon - 1)  # a run that outlasts its length holds the end
        base = self.base.values((coming + 0.5) / telemetry.horizon)
        base["lr"] = base["lr"] * self._lr_scale
        moved = apply_offsets(base, self.state.offsets)
        self.state.values = np.where(
            self.state.available, np.stack([moved[name] for name in CONTROLS], axis=1), self._fixed
        )
