"""Rewards: pure functions of validation losses. The test split is never seen here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import Array

FLOOR = 1e-3
"""Share of the initial loss below which a fall no longer counts, so that a loss near zero gives no endless reward."""

CEILING = 10.0
"""Multiple of the initial loss at which a loss is capped, so that a diverged run gives a finite penalty."""

DIVERGED = 100.0
"""Multiple of the initial loss from which a run counts as diverged."""


def log_fall(previous: Array, current: Array, initial: Array) -> Array:
    """r_t = log(clip(V_{t-1}) + f) - log(clip(V_t) + f), with f = FLOOR V_0 and clip(V) = min(V, CEILING V_0).

    Args:
        previous, current, initial: validation losses V_{t-1}, V_t, V_0, `[runs]`. A non-finite V counts as the cap.

    Returns:
        `[runs]`, finite; it telescopes, so that an episode's return is the fall of the log loss over the run.
    """
    floor, cap = FLOOR * initial, CEILING * initial
    before = np.fmin(np.where(np.isfinite(previous), previous, cap), cap)
    after = np.fmin(np.where(np.isfinite(current), current, cap), cap)
    tiny = np.finfo(np.float64).tiny
    return np.asarray(np.log(before + floor + tiny) - np.log(after + floor + tiny))


def diverged(train_loss: Array, val_loss: Array, initial: Array) -> NDArray[np.bool_]:
    """Whether a run is lost: a loss is not finite, or validation is at DIVERGED times its initial value."""
    with np.errstate(invalid="ignore"):
        return ~np.isfinite(train_loss) | ~np.isfinite(val_loss) | (val_loss > DIVERGED * initial)


def leave_one_out(rewards: Array) -> Array:
    """Each replica's reward less the mean of the others': r_i - mean_{j != i} r_j, `[replicas]`; 0 for one replica."""
    count = len(rewards)
    if count < 2:
        return np.zeros_like(rewards)
    return np.asarray(rewards - (rewards.sum() - rewards) / (count - 1))
