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

from hpo_env.actions import apply_offsets, move
from hpo_env.base_schedules import BaseRule, BaseSchedule, shape
from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.observations import RunState, observe
from hpo_env.telemetry import Telemetry
from inner_models.signals import SIGNALS

_INDEX = {name: index for index, name in enumerate(CONTROLS)}


MAX_DECISIONS = 64
"""Decisions in a run, at most: the features of a longer run then look like those that a policy was trained on."""


def epochs_per_decision(epochs: int) -> int:
    """How many epochs make an interval in a run of `epochs`."""
    return -(-epochs // MAX_DECISIONS)


class ControlLoop:
    """Controls several runs of one kind (same optimizer, model size and length), each at an interval of its own.

    Args:
        runs: number of runs.
        horizon: intervals in a run.
        rule: gives the schedule that the actions deviate from.
        parameters: trainable parameters of the inner model.
        momentum_sgd: whether the inner optimizer is SGD.
        given: deviate from this schedule instead; the policy is still told how far a value is from the rule's.
        max_factor: largest factor (on dropout's odds, for dropout) by which a value may leave the base schedule.
    """

    def __init__(
        self,
        runs: int,
        *,
        horizon: int,
        rule: BaseRule,
        parameters: int,
        momentum_sgd: bool,
        given: BaseSchedule | None = None,
        max_factor: float = math.inf,
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 interval, not {horizon}")
        if not max_factor > 1:
            raise ValueError(f"max_factor must be above 1, not {max_factor}")
        self.rule, self.given = rule, given
        self._max_factor = max_factor
        size = (runs, len(CONTROLS))
        self.state = RunState(
            telemetry=Telemetry(runs, horizon),
            offsets=np.zeros(size),
            distances=np.zeros(size),
            actions=np.zeros(size),
            values=np.zeros(size),
            available=np.ones(size, bool),
            parameters=np.full(runs, float(parameters)),
            examples=np.full(runs, np.nan),
            momentum_sgd=np.full(runs, momentum_sgd),
        )
        self._shifts = np.zeros(size)
        self._lr_scale = np.ones(runs)
        self._fixed = np.full(size, np.nan)
        self._set_values()

    def restart(
        self,
        runs: Sequence[int],
        initial: Mapping[str, Array] | None = None,
        *,
        examples: Array | None = None,
        fixed: Sequence[Mapping[str, float]] | None = None,
        shifts: Array | None = None,
    ) -> None:
        """Begin `runs` anew.

        Args:
            initial: signals known before training, `[len(runs)]` each.
            examples: training examples of the whole run, `[len(runs)]`; NaN where not known.
            fixed: for each run, the controls that it does not have and the values they stand at.
            shifts: `[len(runs), controls]`, by how much the base schedule is off, in scale units.
        """
        rows, state = np.asarray(runs, np.int64), self.state
        state.telemetry.restart(rows, initial or {})
        state.offsets[rows], state.actions[rows] = 0, 0
        state.examples[rows] = np.nan if examples is None else examples
        self._shifts[rows] = 0 if shifts is None else shifts
        self._lr_scale[rows] = 1
        self._fixed[rows] = np.nan
        for row, names in zip(runs, fixed or [], strict=False):
            for name, value in names.items():
                self._fixed[row, _INDEX[name]] = value
        state.available[rows] = np.isnan(self._fixed[rows])
        self._set_values()

    def tell_examples(self, examples: float) -> bool:
        """The training examples of a whole run, for the runs where they were not known: their base follows.

        Returns:
            Whether there were such runs.
        """
        unknown = np.isnan(self.state.examples)
        if unknown.any():
            self.state.examples[unknown] = examples
            self._set_values()
        return bool(unknown.any())

    def observe(self) -> NDArray[np.float32]:
        """Observations, `[runs, features]`."""
        return observe(self.state)

    def decide(
        self, actions: Array, to_base: NDArray[np.bool_] | None = None, progress: float | None = None
    ) -> dict[str, Array]:
        """Take a decision in every run.

        Args:
            actions: `[runs, controls]` in -1..1; what moves a control that the run does not have is ignored.
            to_base: `[runs]`, which runs go back to the base schedule whatever their actions.
            progress: as for `values_at`; the middle of the coming interval when None.

        Returns:
            The values for the coming interval, `[runs]` each.
        """
        state = self.state
        actions = np.asarray(actions, np.float64)
        state.actions = np.where(state.available & ~np.isnan(actions), np.clip(actions, -1, 1), 0)
        first = state.telemetry.interval == 0
        state.offsets = move(state.offsets, state.actions, first, self._peaks()[0], self._max_factor)
        if to_base is not None:
            state.offsets[to_base] = 0
        self._set_values(progress)
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
            "examples": self.state.examples,
            "shifts": self._shifts,
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
        self.state.examples, self._shifts = arrays["examples"], arrays["shifts"]
        self._lr_scale = arrays["lr_scale"]
        self.state.telemetry.load(arrays["interval"], {name: arrays[f"history/{name}"] for name in SIGNALS})
        self._set_values()
        self.state.values = arrays["values"]

    def values(self) -> dict[str, Array]:
        """The values in use, `[runs]` each."""
        return {name: self.state.values[:, index].copy() for name, index in _INDEX.items()}

    def take_back(self) -> None:
        """Undo the first decision, before anything was trained: the offsets are 0 again."""
        self.state.offsets[:], self.state.actions[:] = 0, 0
        self._set_values()

    def values_at(self, progress: float) -> dict[str, Array]:
        """The values that the last decision gives the stretch around `progress` (0..1 of the run), `[runs]` each."""
        self._set_values(progress)
        return self.values()

    def _peaks(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """The base values, the learning rate at its peak, and the rule's, `[runs]` each."""
        rule = self.rule.peaks(self.state.examples, self.state.parameters)
        if self.given is None:
            base = rule
        else:
            base = {name: np.full(len(self._shifts), getattr(self.given, name)) for name in CONTROLS}
        return apply_offsets(base, self._shifts), rule

    def _set_values(self, progress: float | None = None) -> None:
        telemetry, state = self.state.telemetry, self.state
        if progress is None:  # a run that outlasts its length holds the end
            at = (np.minimum(telemetry.interval, telemetry.horizon - 1) + 0.5) / telemetry.horizon
        else:
            at = np.full(len(state.offsets), progress)
        base, rule = self._peaks()
        away = [control.to_scale(base[name]) - control.to_scale(rule[name]) for name, control in CONTROLS.items()]
        state.distances = state.offsets + np.stack(away, axis=1)
        base["lr"] = base["lr"] * self._lr_scale * shape(at, (self.given or self.rule).warmup)
        moved = apply_offsets(base, state.offsets, self._max_factor)
        state.values = np.where(state.available, np.stack([moved[name] for name in CONTROLS], axis=1), self._fixed)
