from __future__ import annotations

import torch

from agents.policy import ControlPolicy, PolicyHeader
from hpo_env.actions import calibrated


def random_policy(seed: int = 0, scale: float = 1.0) -> ControlPolicy:
    """A policy whose decisions depend on what it sees."""
    header = PolicyHeader(hidden=(16,), base_schedules={kind: calibrated(kind).to_dict() for kind in ("adamw", "sgd")})
    generator = torch.Generator().manual_seed(seed)
    policy = ControlPolicy(header)
    for parameter in policy.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return policy.eval()
