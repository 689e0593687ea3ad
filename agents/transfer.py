"""How well what was studied on some tasks transfers to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from hpo_env.hyperparameters import Array

from .meta_dataset import Studied
from .warm_start import WarmStart


def normalized_regret(value: float, trials: Array) -> float:
    """Regret of a log loss, or of a score: 0 is the best of the random trials, 1 a random one on average.

    Args:
        trials: the same of these, `[trials]`, not all alike.
    """
    return float((value - trials.min()) / (trials.mean() - trials.min()))


def transfer_order(start: WarmStart, target: Studied, studied: Sequence[Studied]) -> float:
    """Spearman's correlation of how far studied tasks are from a target with how badly their best trials do there.

    Args:
        target: with the same trials.
        studied: what `start` was fitted to.

    Returns:
        -1..1; 0 where all are equally far, or do equally well.
    """
    own = [one for one in studied if one.task.optimizer == target.task.optimizer]
    distances, transfer = start.distances(target.task), target.scores[[int(one.scores.argmin()) for one in own]]
    if min(np.ptp(distances), np.ptp(transfer)) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(distances), rankdata(transfer))[0, 1])


def best_on_average(optimizer: str, studied: Sequence[Studied]) -> int:
    """The trial with the least mean score over all tasks with an optimizer."""
    return int(np.mean([one.scores for one in studied if one.task.optimizer == optimizer], axis=0).argmin())


def held_out(studied: Sequence[Studied], folds: int) -> list[tuple[list[Studied], list[Studied]]]:
    """Split tasks by data set, `folds` times: what is left, and what is held out. Each data set is held out once.

    Raises:
        ValueError: fewer data sets than folds.
    """
    names = sorted({one.task.dataset for one in studied})
    if len(names) < folds:
        raise ValueError(f"{folds} folds need as many data sets, not {len(names)}; study more tasks")
    names = np.random.default_rng(0).permutation(names).tolist()
    split: list[tuple[list[Studied], list[Studied]]] = []
    for fold in range(folds):
        out = set(names[fold::folds])
        rest = [one for one in studied if one.task.dataset not in out]
        split.append((rest, [one for one in studied if one.task.dataset in out]))
    return split
