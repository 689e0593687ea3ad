"""Base rules of the tests' own: the calibrated one's numbers may change."""

from __future__ import annotations

import math

import numpy as np

from hpo_env.base_schedules import BaseRule, BaseSchedule
from hpo_env.hyperparameters import CONTROLS

RULES = {
    "adamw": BaseRule(
        {
            "lr": (math.log(0.008), -0.2, -0.25),
            "batch_size": (math.log(64), 0.2, 0.1),
            "weight_decay": (math.log(0.2), -0.3, 0.1),
            "dropout": (-2.5, -0.4, 0.2),
            "augmentation": (-3.0, 0.3, -0.2),
            "label_smoothing": (-2.0, -0.2, 0.3),
        }
    ),
    "sgd": BaseRule(
        {
            "lr": (math.log(0.02), -0.3, -0.2),
            "batch_size": (math.log(48), 0.1, 0.2),
            "weight_decay": (math.log(0.01), -0.2, 0.3),
            "dropout": (-2.0, -0.3, 0.1),
            "augmentation": (-2.5, -0.2, 0.1),
            "label_smoothing": (-3.0, 0.2, -0.1),
        },
        warmup=0.1,
    ),
}
"""For each optimizer, one in which every control depends on the length and the size of the run."""


def flat(schedule: BaseSchedule) -> BaseRule:
    """The rule that gives `schedule` to every run; its values must lie in the controls' ranges."""
    rows = {n: (float(c.to_scale(np.asarray(getattr(schedule, n)))), 0.0, 0.0) for n, c in CONTROLS.items()}
    return BaseRule(rows, schedule.warmup)
