"""Small things that several tests use."""

from __future__ import annotations

import torch

from agents.policy import ControlPolicy, PolicyHeader
from agents.presets import MetaTrainingConfig
from inner_models.models import ModelSpec
from inner_models.tasks import Task, TaskDistribution
from tests.rules import RULES

TINY = TaskDistribution(
    entries=(("digits", ("mlp",)), ("wine", ("mlp",))),
    widths=(8, 8),
    depths=(1, 1),
    optimizers=("adamw",),
    horizons=(3, 5),
    examples=(128, 256),
    train_rows=(64, 96),
    eval_rows=128,
)
"""Tasks of a few milliseconds."""

_MLP = ModelSpec("mlp", 8, 1)
TINY_CONFIG = MetaTrainingConfig(
    timesteps=256, cohorts=2, replicas=8, rollout_steps=4, validate_every=128, validation_seeds=2, epochs=2,
    minibatch=32, learning_rate=1e-2, workers=0, tasks=TINY,
    validation=(
        Task("digits", _MLP, horizon=3, interval_examples=64, train_rows=64, eval_rows=64),
        Task("wine", _MLP, horizon=3, interval_examples=48, train_rows=64),
    ),
)  # fmt: skip
"""A meta-training of a few seconds: four rollouts of 64 decisions."""


def random_policy(seed: int = 0, scale: float = 1.0) -> ControlPolicy:
    """A policy whose decisions depend on what it sees."""
    header = PolicyHeader(hidden=(16,), base_rules={kind: rule.to_dict() for kind, rule in RULES.items()})
    generator = torch.Generator().manual_seed(seed)
    policy = ControlPolicy(header)
    for parameter in policy.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return policy.eval()
