"""Meta-features: a task as numbers that can be compared with those of other tasks.

Descriptors (Brazdil et al. 2003, "Ranking Learning Algorithms"; Feurer et al. 2015, "Initializing Bayesian
Hyperparameter Optimization via Meta-Learning") need the training split alone. Landmarks (Pfahringer et al. 2000,
"Meta-Learning by Landmarking Various Learning Algorithms") are losses after a short part of a run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import get_args

import numpy as np
from scipy.stats import kurtosis, skew

from hpo_env.base_schedules import calibrated
from hpo_env.differences import relative_difference
from hpo_env.hyperparameters import CONTROLS, Array
from inner_models.batched_training import BatchedTraining
from inner_models.datasets import Modality, Split
from inner_models.models import Dropout, ModelKind, build_model
from inner_models.replicated_layers import parameter_count
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import Task, prepare

ROWS = 2000
"""Training rows that moments are taken over, at most."""

PARTS = 32
"""A landmark's interval is this part of a run."""

INTERVALS = 2

LR_FACTORS = (0.1, 1.0, 10.0)
"""On the calibrated schedule's learning rate: one landmark each."""

LANDMARK_COST = len(LR_FACTORS) * INTERVALS / PARTS
"""Of the landmarks, in full runs; more in runs of fewer than `PARTS` intervals of two micro-batches."""


@lru_cache(maxsize=4096)
def meta_features(task: Task) -> dict[str, float]:
    """The meta-features of `task`, all finite, by name: the same names for every task.

    The landmarks train, at `LANDMARK_COST`. Neither the test split nor a random generator of the caller's is touched.
    """
    return {**descriptors(task), **landmarks(task)}


def descriptors(task: Task) -> dict[str, float]:
    """What is known before training. Sizes are natural logarithms."""
    data = prepare(task)
    train = data.dataset.train
    model = build_model(task.model, data.dataset)
    parameters = parameter_count(model)
    examples = data.interval_examples * task.horizon
    return {
        "rows": math.log(len(train)),
        "inputs": math.log(train.inputs[0].numel()),
        "outputs": math.log(train.targets[0].numel() if data.loss == "mse" else data.dataset.outputs),
        "examples": math.log(examples),
        "epochs": math.log(examples / len(train)),
        "horizon": math.log(task.horizon),
        "parameters": math.log(parameters),
        "rows_per_parameter": math.log(len(train) / parameters),
        "width": math.log(task.model.width),
        "depth": math.log(task.model.depth),
        "has_dropout": float(any(isinstance(module, Dropout) for module in model.modules())),
        "layer_norm": float(task.model.normalization == "layer"),
        "sgd": float(task.optimizer == "sgd"),
        "regression": float(data.loss == "mse"),
        **{kind: float(task.model.kind == kind) for kind in get_args(ModelKind)},
        **{modality: float(data.dataset.modality == modality) for modality in get_args(Modality)},
        **_moments(Split(train.inputs[:ROWS], train.targets[:ROWS])),
    }


def _moments(rows: Split) -> dict[str, float]:
    """Of the inputs' columns, means over columns; and of the targets. Tokens have no moments."""
    targets = rows.targets.flatten().numpy()
    found = dict.fromkeys(("skewness", "kurtosis", "correlation", "dimension", "target_skewness"), 0.0)
    if rows.targets.is_floating_point():
        found["balance"], found["target_skewness"] = 1.0, float(_squashed(skew(targets)))
    else:
        shares = np.unique(targets, return_counts=True)[1] / len(targets)
        found["balance"] = float(-(shares * np.log(shares)).sum() / math.log(max(2, len(shares))))
    if rows.inputs.is_floating_point():
        columns = rows.inputs.flatten(1).double().numpy()
        columns = columns[:, columns.std(axis=0) > 1e-6]
        count = columns.shape[1]
        if not count:
            return found
        columns = (columns - columns.mean(axis=0)) / columns.std(axis=0)
        spectrum = np.linalg.svd(columns, compute_uv=False) ** 2
        shares = spectrum / spectrum.sum()
        found["skewness"] = float(np.mean(_squashed(np.abs(skew(columns)))))
        found["kurtosis"] = float(np.mean(_squashed(kurtosis(columns))))
        # Root mean square: the squared shares sum to that of all squared correlations, over their number.
        found["correlation"] = math.sqrt(max(0.0, count * (shares**2).sum() - 1) / max(1, count - 1))
        found["dimension"] = float(np.exp(-(shares * np.log(np.maximum(shares, 1e-12))).sum()) / count)
    return found


def _squashed(moment: Array) -> Array:
    """A moment that outliers may make huge: its logarithm, sign kept."""
    return np.asarray(np.sign(moment) * np.log1p(np.abs(moment)))


def landmarks(task: Task) -> dict[str, float]:
    """How the losses change within the first intervals at each of `LR_FACTORS`, as relative differences (in -2..2, 2
    where not finite): of the validation loss to that before training, and of the validation to the training loss."""
    examples = prepare(task).interval_examples * task.horizon
    part = max(2 * MICRO_BATCH, examples // PARTS)
    training = BatchedTraining(replace(task, interval_examples=part), [0] * len(LR_FACTORS))
    schedule = calibrated(task.optimizer)
    values = {name: np.full(len(LR_FACTORS), getattr(schedule, name)) for name in CONTROLS}
    values["lr"] = values["lr"] * LR_FACTORS
    before = training.evaluate("val")
    found = {}
    for interval in range(1, INTERVALS + 1):
        signals = training.advance(values)
        falls = relative_difference(signals["val_loss"], before)
        gaps = relative_difference(signals["val_loss"], signals["train_loss"])
        for factor, fall, gap in zip(LR_FACTORS, falls, gaps, strict=True):
            found[f"val_{interval}_lr_x{factor:g}"] = float(fall) if math.isfinite(fall) else 2.0
            found[f"gap_{interval}_lr_x{factor:g}"] = float(gap) if math.isfinite(gap) else 2.0
    return found
