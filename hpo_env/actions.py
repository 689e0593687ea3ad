"""Actions: how a decision moves each control's offset from a base schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import CONTROLS, Array, Hyperparameter


@dataclass(frozen=True)
class Range:
    """How far decisions reach, in the control's scale units (natural log, logit).

    Attributes:
        first: largest move of the first decision, which chooses the start.
        step: largest move of a later decision.
        limit: largest offset from the base schedule.
    """

    first: float
    step: float
    limit: float


RANGES: dict[str, Range] = {
    "lr": Range(first=math.log(30), step=math.log(2.5), limit=math.log(100)),
    "batch_size": Range(first=math.log(4), step=math.log(2), limit=math.log(16)),
    "weight_decay": Range(first=math.log(30), step=math.log(3), limit=math.log(300)),
    "dropout": Range(first=2.5, step=1.0, limit=5.0),
    "augmentation": Range(first=2.5, step=1.0, limit=5.0),
    "label_smoothing": Range(first=2.5, step=1.0, limit=5.0),
}

_FIRST, _STEP, _LIMIT = (
    np.array([getattr(RANGES[name], part) for name in CONTROLS]) for part in ("first", "step", "limit")
)


def move(
    offsets: Array, actions: Array, first: NDArray[np.bool_], peaks: Mapping[str, Array], max_factor: float = math.inf
) -> Array:
    """New offsets after a decision. An offset does not leave what the control's own range leaves room for: else it
    would have to come all the way back before anything moved again.

    Args:
        offsets: `[runs, controls]`, in scale units.
        actions: `[runs, controls]` in -1..1 (clipped); NaN stays.
        first: `[runs]`, whether this is a run's first decision.
        peaks: control -> `[runs]`, the base value, at its peak over the run.
        max_factor: no offset exceeds the logarithm of this.
    """
    actions = np.where(np.isnan(actions), 0, np.clip(actions, -1, 1))
    reach = np.where(first[:, None], _FIRST, _STEP)
    limit = np.minimum(_LIMIT, math.log(max_factor))
    room = np.array([control.room(peaks[name]) for name, control in CONTROLS.items()]).transpose(1, 2, 0)
    return np.asarray(np.clip(offsets + reach * actions, np.maximum(-limit, room[0]), np.minimum(limit, room[1])))


def apply_offsets(base: Mapping[str, Array], offsets: Array, max_factor: float = math.inf) -> dict[str, Array]:
    """Base values moved by `offsets` on each control's scale. A zero offset leaves the base value as it is.

    Args:
        base: control -> `[runs]`.
        offsets: `[runs, controls]`.
        max_factor: no value (its odds, for a share) leaves the base by more than this, ranges and rounding included.
    """
    values = {}
    for column, (name, control) in zip(offsets.T, CONTROLS.items(), strict=True):
        moved = _moved(control, np.asarray(base[name], np.float64), column)
        if math.isfinite(max_factor):
            low, high = _within(control, base[name], max_factor)
            moved = np.clip(moved, low, high)
        values[name] = np.where(column == 0, base[name], moved)
    return values


def _moved(control: Hyperparameter, base: Array, offset: Array) -> Array:
    """`base` moved on the control's scale, within the control's range.

    A small rate (the end of a cosine, a user's own) and a large batch that lie outside the range move from where they
    are; a rate above the range is brought into it.
    """
    moved = control.from_scale(control.to_scale(base) + offset)
    if control.scale != "log":
        return moved
    outside = (base > 0) & (base < control.low) | (base > control.high) & (control.multiple > 0)
    if not outside.any():
        return moved
    shifted = base * np.exp(offset)
    if control.multiple:
        shifted = np.maximum(np.rint(shifted / control.multiple), 1) * control.multiple
    lowest = np.where(base < control.low, 0.0, control.low)
    return np.where(outside, np.clip(shifted, lowest, np.maximum(control.high, base)), moved)


def _within(control: Hyperparameter, base: Array, factor: float) -> tuple[Array, Array]:
    """The values within `factor` of `base`; on the odds, if it is a share."""
    if control.scale == "logit":
        odds = base / (1 - base)
        return odds / (factor + odds), odds * factor / (1 + odds * factor)
    low, high = base / factor, base * factor
    return (np.ceil(low), np.floor(high)) if control.multiple else (low, high)
