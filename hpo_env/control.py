"""The control loop: telemetry in, observation out; action in, hyperparameter values out.

The environments and the tuner share this one class; it is what makes a policy trained in one apply in the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo_env.actions import apply_offsets, limits, move
from hpo_env.base_schedules import BaseRule, BaseSchedule, lr_factor, shape
from hpo_env.hyperparameters import CONTROLS, SCALES, Array, by_name, in_columns
from hpo_env.observations import RunState, observe
from hpo_env.telemetry import Telemetry, combined
from inner_models.signals import SIGNALS

_INDEX = {name: index for index, name in enumerate(CONTROLS)}
_LR, _BATCH = _INDEX["lr"], _INDEX["batch_size"]


_LARGEST = 1e9
"""No value that anybody gives is larger."""

_PLAUSIBLE: dict[str, Callable[[Tensor], Tensor]] = {
    "offsets": torch.isfinite,
    "actions": lambda x: x.abs() <= 1,
    "values": lambda x: torch.isfinite(x) & (x >= 0),
    "examples": lambda x: torch.isnan(x) | (x > 0),
    "batch_size": lambda x: torch.isnan(x) | (x > 0),
    "shifts": torch.isfinite,
    "lr_scale": lambda x: (x >= 0) & (x <= 1),
    "interval": lambda x: x >= 0,
}
"""What the tensors of a loop's state may hold; histories hold anything."""

MAX_DECISIONS = 64
"""Decisions in a run, at most: the features of a longer run then look like those that a policy was trained on."""


def epochs_per_decision(epochs: int) -> int:
    """How many epochs make an interval in a run of `epochs`."""
    return -(-epochs // MAX_DECISIONS)


class Intervals:
    """Gathers the epochs of a run into the intervals between decisions.

    Args:
        epochs: epochs in the run. It may go on for longer: a decision is then due after each.

    Attributes:
        horizon: intervals in the run.
        epoch: epochs finished.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs, self.epoch = epochs, 0
        self._per_decision = epochs_per_decision(epochs)
        self.horizon = -(-epochs // self._per_decision)
        self._parts: list[Mapping[str, Array]] = []

    @property
    def progress(self) -> float:
        """Where the middle of the coming epoch lies, 0..1 of the run."""
        return (self.epoch + 0.5) / self.epochs

    def finish_epoch(self, signals: Mapping[str, Array]) -> dict[str, Array] | None:
        """Take in an epoch's signals, `[runs]` each. Returns those of the interval, if the epoch ends one."""
        self._parts.append(signals)
        self.epoch += 1
        if not self._is_over(self.epoch):
            return None
        finished, self._parts = combined(self._parts), []
        return finished

    def state_dict(self) -> dict[str, Any]:
        """All that changes over a run, as plain values."""
        parts = [{name: values.tolist() for name, values in part.items()} for part in self._parts]
        return {"epoch": self.epoch, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any], runs: int = 1) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: it is not one of `runs` runs of as many epochs; everything stays as it was.
        """
        epoch = state["epoch"]
        parts = [{name: np.array(values, np.float64) for name, values in part.items()} for part in state["parts"]]
        if type(epoch) is not int or epoch < 0:
            raise ValueError(f"epoch must be a whole number, not {epoch!r}")
        if len(parts) != (0 if self._is_over(epoch) else epoch % self._per_decision):
            raise ValueError(f"epoch {epoch} does not come with the signals of {len(parts)} epochs")
        if any(name not in SIGNALS or values.shape != (runs,) for part in parts for name, values in part.items()):
            raise ValueError("the signals since the last decision are not those of this run")
        self.epoch, self._parts = epoch, list(parts)

    def _is_over(self, epoch: int) -> bool:
        """Whether an interval ends with the `epoch`-th epoch."""
        return epoch % self._per_decision == 0 or epoch >= self.epochs


class ControlLoop:
    """Controls several runs of one kind (same optimizer, model size and length), each at an interval of its own.

    Args:
        runs: number of runs.
        horizon: intervals in a run.
        rule: gives the schedule that the actions deviate from.
        parameters: trainable parameters of the inner model.
        momentum_sgd: whether the inner optimizer is SGD.
        given: deviate from this schedule instead; the policy is still told how far a value is from the rule's.
        max_factor: largest factor (on the odds, for a share) by which a value may leave the base schedule.
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
        self._batch_size = np.full(runs, np.nan)
        self._rebase()

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
            fixed: for each run, the controls that it does not have and the values they stand at; 0 for a batch size
                that is not known.
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
        self._batch_size[rows] = np.where(self._fixed[rows, _BATCH] > 0, self._fixed[rows, _BATCH], np.nan)
        in_use = state.values
        self._rebase()
        others = np.setdiff1d(np.arange(len(in_use)), rows)
        state.values[others] = in_use[others]  # those of the interval just trained, until the next decision

    @property
    def knows_examples(self) -> bool:
        """Whether the training examples of every run are known."""
        return not any(map(math.isnan, self.state.examples))

    def tell_examples(self, examples: float) -> bool:
        """The training examples of a whole run, for the runs where they were not known: their base follows.

        Returns:
            Whether there were such runs.
        """
        unknown = np.isnan(self.state.examples)
        if not unknown.any():
            return False
        self.state.examples[unknown] = examples
        self._rebase()
        return True

    def tell_batch_size(self, batch_size: float, *, may_raise_lr: bool = True) -> None:
        """The rows of an optimizer step, for the runs where they stay and were not known: their base follows."""
        unknown = np.isnan(self._batch_size) & ~self.state.available[:, _BATCH]
        if unknown.any():
            usual = self.rule.peaks(self.state.examples, self.state.parameters)["batch_size"]
            self._batch_size[unknown] = batch_size if may_raise_lr else np.minimum(batch_size, usual[unknown])
            self._rebase()

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
        before = state.offsets
        state.offsets = move(before, state.actions, first, self._within, self._away)
        if to_base is not None:
            state.offsets[to_base] = 0
        self._set_values(progress, before)
        return self.values()

    @property
    def without_action(self) -> dict[str, Array]:
        """The values that the last decision would have given had it moved nothing, `[runs]` each."""
        return by_name(self._without_action)

    def scale_lr(self, run: int, factor: float) -> None:
        """Multiply a run's base learning rate, so that neither the policy's reach nor `max_factor` undoes it."""
        self._lr_scale[run] *= factor

    def record(self, signals: Mapping[str, Array]) -> None:
        """Take in the signals of the interval that has just been trained, `[runs]` each."""
        self.state.telemetry.record(signals)

    def state_dict(self) -> dict[str, Any]:
        """What is given, and all that changes over a run, as tensors."""
        arrays = {
            "offsets": self.state.offsets,
            "actions": self.state.actions,
            "values": self.state.values,
            "examples": self.state.examples,
            "batch_size": self._batch_size,
            "shifts": self._shifts,
            "lr_scale": self._lr_scale,
            "interval": self.state.telemetry.interval,
            **{f"history/{name}": self.state.telemetry.past(name) for name in SIGNALS},
        }
        given = self.given.to_dict() if self.given else None
        return {"given": given, **{name: torch.from_numpy(array.copy()) for name, array in arrays.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a loop made with the same arguments; what it was given counts, not what this one
        was, but for a batch size that stays.

        Raises:
            ValueError, TypeError, AttributeError: it is not one, or it is damaged; the loop is as it was.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"the loop's state lacks or has too many of {', '.join(state.keys() ^ own.keys())[:200]}")
        if (state["given"] is None) != (self.given is None):
            raise ValueError("the loop's state is of a run that was given values, or of one that was not")
        given = BaseSchedule(**{n: float(v) for n, v in state["given"].items()}) if self.given else None
        if given and max(given.to_dict().values()) > _LARGEST:
            raise ValueError(f"the loop's state is damaged: {given}")
        longest = int(state["interval"].max())  # of a run that has outlasted its length: so has its history
        columns = max(self.state.telemetry.horizon.max(), longest, state["history/train_loss"].shape[-1] - 1) + 1
        tensors = {name: tensor for name, tensor in state.items() if name != "given"}
        for name, tensor in tensors.items():
            history, mine = name.startswith("history/"), own[name]
            shape = (len(mine), columns) if history else tuple(mine.shape)
            if (tensor.dtype, tuple(tensor.shape)) != (mine.dtype, shape):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {mine.dtype} {shape}")
            if not history and not _PLAUSIBLE[name](tensor).all():
                raise ValueError(f"{name} is damaged: {tensor.tolist()}")
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}
        self.given = given
        self.state.offsets, self.state.actions = arrays["offsets"], arrays["actions"]
        self.state.examples, self._shifts = arrays["examples"], arrays["shifts"]
        told = self._fixed[:, _BATCH]
        self._batch_size = np.where(told > 0, told, arrays["batch_size"])
        self._lr_scale = arrays["lr_scale"]
        self.state.telemetry.load(arrays["interval"], {name: arrays[f"history/{name}"] for name in SIGNALS})
        self._rebase()
        self.state.values = arrays["values"]

    def values(self) -> dict[str, Array]:
        """The values in use, `[runs]` each."""
        return by_name(self.state.values)

    def take_back(self) -> None:
        """Undo the first decision, before anything was trained: the offsets are 0 again."""
        self.state.offsets[:], self.state.actions[:] = 0, 0
        self._set_values()

    def values_at(self, progress: float) -> dict[str, Array]:
        """The values that the last decision gives the stretch around `progress` (0..1 of the run), `[runs]` each."""
        self._set_values(progress)
        return self.values()

    def _rebase(self) -> None:
        """Set the base values, the learning rate at its peak, and how far they are from the rule's."""
        rule = in_columns(self.rule.peaks(self.state.examples, self.state.parameters))
        factor = lr_factor(self._batch_size, rule[:, _BATCH], self.state.momentum_sgd)
        rule[:, _LR] = np.minimum(rule[:, _LR] * factor, CONTROLS["lr"].high)
        base = rule if self.given is None else np.array([[getattr(self.given, name) for name in CONTROLS]])
        self._base = apply_offsets(np.broadcast_to(base, rule.shape), self._shifts)
        self._away = SCALES.to_scale(self._base) - SCALES.to_scale(rule)
        self._within = limits(self._base, self._max_factor, self._away)
        self._set_values()

    def _set_values(self, progress: float | None = None, before: Array | None = None) -> None:
        """Set the values in use; and, at a decision, those that the offsets `before` it would give."""
        telemetry, state = self.state.telemetry, self.state
        if progress is None:  # a run that outlasts its length holds the end
            at = (np.minimum(telemetry.interval, telemetry.horizon - 1) + 0.5) / telemetry.horizon
        else:
            at = np.full(len(state.offsets), progress)
        state.distances = state.offsets + self._away
        base = self._base.copy()
        base[:, _LR] *= self._lr_scale * shape(at, (self.given or self.rule).warmup)
        offsets = np.array([state.offsets, state.offsets if before is None else before])
        moved = apply_offsets(base, offsets, self._max_factor)
        state.values, self._without_action = np.where(state.available, moved, self._fixed)
