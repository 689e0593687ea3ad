"""Settings of a meta-training, and the presets of `scripts/train_agent.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hpo_env.env import Variation
from inner_models.splits import META_TRAIN, META_TRAIN_SMALL, META_VALIDATION, META_VALIDATION_SMALL
from inner_models.tasks import Task, TaskDistribution


@dataclass(frozen=True)
class MetaTrainingConfig:
    """A meta-training run.

    Attributes:
        timesteps: decisions in all, rounded up to whole rollouts.
        cohorts: tasks under way at a time.
        replicas: runs of each task.
        rollout_steps: decisions of each run between two PPO updates.
        epochs, minibatch, learning_rate, gae_lambda, clip, entropy, log_std: PPO's settings; the discount is 1, and the
            learning rate falls linearly to zero.
        averaging: decay of the exponential moving average of the policy's weights, update by update; the average is
            what is scored and saved.
        strength: of the policy that is scored and saved (`PolicyHeader`); meta-training itself is without.
        validate_every: decisions between two meta-validations.
        validation_seeds: runs of each meta-validation task.
        workers: processes that train inner models on the CPU.
        variation: what episodes draw besides their task.
        tasks, validation: where the tasks come from.
    """

    timesteps: int
    cohorts: int
    replicas: int
    rollout_steps: int
    validate_every: int
    validation_seeds: int
    epochs: int = 6
    minibatch: int = 1024
    learning_rate: float = 3e-4
    gae_lambda: float = 0.99
    clip: float = 0.2
    entropy: float = 0.0
    log_std: float = -1.4
    averaging: float = 0.5
    strength: float = 1.0
    workers: int = 2
    variation: Variation = field(default_factory=Variation)
    tasks: TaskDistribution = META_TRAIN
    validation: tuple[Task, ...] = META_VALIDATION


PRESETS: dict[str, MetaTrainingConfig] = {
    "smoke": MetaTrainingConfig(
        timesteps=24_576, cohorts=8, replicas=16, rollout_steps=16, validate_every=8_192, validation_seeds=8,
        minibatch=512, learning_rate=1e-3, variation=Variation(blind_probability=0.5),
        tasks=META_TRAIN_SMALL, validation=META_VALIDATION_SMALL,
    ),
    "demo": MetaTrainingConfig(
        timesteps=81_920, cohorts=8, replicas=16, rollout_steps=16, validate_every=16_384, validation_seeds=8,
        minibatch=512, learning_rate=1e-3, variation=Variation(blind_probability=0.5),
        tasks=META_TRAIN_SMALL, validation=META_VALIDATION_SMALL,
    ),
    "default": MetaTrainingConfig(
        timesteps=737_280, cohorts=16, replicas=16, rollout_steps=32, validate_every=49_152, validation_seeds=8,
        epochs=8, minibatch=1024, learning_rate=6e-4, averaging=0.9, strength=0.6,
        variation=Variation(mask_probability=0.15, start_probability=0.2, blind_probability=0.7,
                            untold_probability=0.2, unmeasured_probability=0.1),
    ),
}  # fmt: skip
"""`smoke`: one to two minutes on 2 cores, to see that all works. `demo`: a few minutes. `default`: half an hour to two
hours, by the processor.
"""


def effective_config(config: MetaTrainingConfig, seed: int, device: str) -> dict[str, Any]:
    """All settings of a meta-training, as they are written into its folder."""
    return {"seed": seed, "device": device, **asdict(config)}
