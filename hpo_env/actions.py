"""Actions: how a decision moves each control's offset from a base schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import CONTROLS, SCALES, Array


@dataclass(frozen=True)
class Range:
    """How far decisions reach, in the control's scale units (natural log, logit).

    Attributes:
        first: largest move of the first decision, which chooses the start; from a start that is off, as far as the
            rule's value if that is further.
        step: largest move of a later decision.
        limit: largest offset from the base schedule; towards the rule's value, from there on.
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


def limits(peaks: Array, max_factor: float = math.inf, away: Array | float = 0.0) -> tuple[Array, Array]:
    """How low and how high offsets may be, `[runs, controls]`. From a start that is off, the limits lie as far on the
    other side of the rule's values as from a good start. An offset does not leave what the control's own range leaves
    room for: else it would have to come all the way back before anything moved again.

    Args:
        peaks: `[runs, controls]`, the base values, at their peaks over the run.
        max_factor: no offset exceeds the logarithm of this.
        away: `[runs, controls]`, how far the base values are above the rule's, in scale units.
    """
    down, up = SCALES.room(peaks)
    low = np.maximum(-np.minimum(_LIMIT + np.maximum(away, 0), math.log(max_factor)), down)
    high = np.minimum(np.minimum(_LIMIT - np.minimum(away, 0), math.log(max_factor)), up)
    return low, high


def move(
    offsets: Array,
    actions: Array,
    first: NDArray[np.bool_],
    within: tuple[Array, Array],
    away: Array | float = 0.0,
) -> Array:
    """New offsets after a decision. From a start that is off, the first one reaches at least to the rule's values.

    Args:
        offsets: `[runs, controls]`, in scale units.
        actions: `[runs, controls]` in -1..1 (clipped); NaN stays.
        first: `[runs]`, whether this is a run's first decision.
        within: as `limits` gives them.
        away: as for `limits`.
    """
    actions = np.where(np.isnan(actions), 0, np.clip(actions, -1, 1))
    reach = np.where(first[:, None], np.maximum(_FIRST, np.abs(away)), _STEP)
    return np.asarray(np.clip(offsets + reach * actions, *within))


def apply_offsets(base: Array, offsets: Array, max_factor: float = math.inf) -> Array:
    """Base values moved by `offsets` on their scales, `[runs, controls]`. A zero offset leaves a value as it is.

    Args:
        base: `[runs, controls]`.
        offsets: `[runs, controls]`.
        max_factor: no value (its odds, for a share) leaves the base by more than this, ranges and rounding included.
    """
    moved = _moved(base, offsets)
    if math.isfinite(max_factor):
        moved = np.clip(moved, *_within(base, max_factor))
    return np.where(offsets == 0, base, moved)


def _moved(base: Array, offsets: Array) -> Array:
    """`base` moved on the controls' scales, within their ranges.

    A small rate (the end of a cosine, a user's own) and a large batch that lie outside the range move from where they
    are; a rate above the range is brought into it.
    """
    moved = SCALES.from_scale(SCALES.to_scale(base) + offsets)
    low, high, multiple = SCALES.low, SCALES.high, SCALES.multiple
    outside = (base > 0) & (base < low) | (base > high) & (multiple > 0)
    outside &= ~SCALES.logit
    if not outside.any():
        return moved
    shifted = base * np.exp(offsets)
    whole = np.maximum(np.rint(shifted / np.maximum(multiple, 1)), 1) * multiple
    shifted = np.where(multiple > 0, whole, shifted)
    lowest = np.where(base < low, 0.0, low)
    return np.where(outside, np.clip(shifted, lowest, np.maximum(high, base)), moved)


def _within(base: Array, factor: float) -> tuple[Array, Array]:
    """The values within `factor` of `base`; on the odds, if it is a share."""
    odds = base / np.where(SCALES.logit, 1 - base, 1)
    shares = odds / (factor + odds), odds * factor / (1 + odds * factor)
    low, high = (
        np.where(SCALES.logit, share, value)
        for share, value in zip(shares, (base / factor, base * factor), strict=True)
    )
    whole = SCALES.multiple > 0
    return np.where(whole, np.ceil(low), low), np.where(whole, np.floor(high), high)
