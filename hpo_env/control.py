"""The control loop: telemetry in, observation out; action in, hyperparameter values out.

The environments and the tuner share this one class; it is what makes a policy trained in one apply in the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpo_env.actions import BaseSchedule, apply_offsets, move
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.observations import RunState, observe
from hpo_env.telemetry import Telemetry
from inner_models.signals import SIGNALS

_INDEX = {name: index for index, name in enumerate(CONTROLS)}


class ControlLoop:
    """Controls several runs of one kind (same optimizer, model size and length), each at an interval of its own.

    Args:
        runs: number of runs.
        horizon: intervals in a run.
        base: the schedule that the actions deviate from.
        parameters: trainable parameters of the inner model.
        momentum_sgd: whether the inner optimizer is SGD.
        max_factor: largest factor (on dropout's odds, for dropout) by which a value may leave the base schedule.
    """

    def __init__(
        self,
        runs: int,
        *,
        horizon: int,
        base: BaseSchedule,
        parameters: int,
        momentum_sgd: bool,
        max_factor: float = math.inf,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 interval, not {horizon}")
        if not max_factor > 1:
            raise ValueError(f"max_factor must be above 1, not {max_factor}")
        self.base = base
        self._max_factor = max_factor
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
        actions = np.asarray(actions, np.float64)
        state.actions = np.where(state.available & ~np.isnan(actions), np.clip(actions, -1, 1), 0)
        state.offsets = move(state.offsets, state.actions, state.telemetry.interval == 0, self._max_factor)
        self._set_values()
        return self.values()

    def scale_lr(self, run: int, factor: float) -> None:
        """Multiply a run's base learning rate, so that neither the policy's reach nor `max_factor` undoes it."""
        self._lr_scale[run] *= factor

    def record(self, signals: Mapping[str, Array]) -> None:
        """Take in the signals of the interval that has just been trained, `[runs]` each."""
        self.state.telemetry.record(signals)

    def state_dict(self) -> dict[str, Any]:
        """All that changes over a run, as tensors."""
        arrays = {
            "offsets": self.state.offsets,
            "actions": self.state.actions,
            "values": self.state.values,
            "lr_scale": self._lr_scale,
            "interval": self.state.telemetry.interval,
            **{f"history/{name}": self.state.telemetry.past(name) for name in SIGNALS},
        }
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a loop made with the same arguments."""
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in state.items()}
        if arrays["offsets"].shape != self.state.offsets.shape:
            raise ValueError(f"the state is one of {len(arrays['offsets'])} runs, not {len(self.state.offsets)}")
        self.state.offsets, self.state.actions = arrays["offsets"], arrays["actions"]
        self.state.values, self._lr_scale = arrays["values"], arrays["lr_scale"]
        self.state.telemetry.load(arrays["interval"], {name: arrays[f"history/{name}"] for name in SIGNALS})

    def values(self) -> dict[str, Array]:
        """The values in use, `[runs]` each."""
        return {name: self.state.values[:, index].copy() for name, index in _INDEX.items()}

    def _set_values(self) -> None:
        telemetry = self.state.telemetry
        coming = np.minimum(telemetry.interval, telemetry.horizon - 1)  # a run that outlasts its length holds the end
        base = self.base.values((coming + 0.5) / telemetry.horizon)
        base["lr"] = base["lr"] * self._lr_scale
        moved = apply_offsets(base, self.state.offsets, self._max_factor)
        self.state.values = np.where(
            self.state.available, np.stack([moved[name] for name in CONTROLS], axis=1), self._fixed
        )
