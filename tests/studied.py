"""Studied tasks whose scores are known functions of their settings: nothing is trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agents.meta_dataset import Studied, sampled, to_unit
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import Array
from inner_models.models import ModelSpec
from inner_models.tasks import OptimizerName, Task
from tests.fabricated import run


def bowl(center: Array) -> Callable[[Array], Array]:
    """A loss whose logarithm is the squared distance from `center`."""
    return lambda places: np.exp(np.square(places - center).sum(axis=-1))


def studied(
    loss: Callable[[Array], Array],
    *,
    trials: int = 24,
    dataset: str = "wine",
    optimizer: OptimizerName = "adamw",
    features: dict[str, float] | None = None,
) -> Studied:
    """Trials with these losses, of settings in the unit cube."""
    places = np.stack([to_unit(trial, optimizer) for trial in sampled(optimizer, trials)])
    start = to_unit(calibrated(optimizer), optimizer)
    return Studied(
        Task(dataset, ModelSpec("mlp", 8, 1), optimizer, horizon=3, interval_examples=32, eval_rows=32),
        features or {},
        [run(value, seed, initial=100.0) for seed, value in enumerate(loss(places).tolist())],
        [run(float(loss(start)), seed, initial=100.0) for seed in range(3)],
    )
