"""Policies whose reasons are known: linear ones, in a few features."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from agents.policy import ControlPolicy, PolicyHeader
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from tests.rules import RULES

INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}


def linear_policy(weights: Mapping[str, Mapping[str, float]], *, scale: float = 1.0) -> ControlPolicy:
    """action on a control = scale * sum of weights[feature][control] * feature."""
    header = PolicyHeader(
        hidden=(),
        base_rules={kind: rule.to_dict() for kind, rule in RULES.items()},
        trained_ranges={feature.name: (feature.low, feature.high) for feature in FEATURES},
    )
    policy = ControlPolicy(header)
    linear = policy.network[-1]
    assert isinstance(linear, nn.Linear)
    linear.weight.data.zero_()
    linear.bias.data.zero_()
    for feature, moves in weights.items():
        for control, weight in moves.items():
            linear.weight.data[list(CONTROLS).index(control), INDEX[feature]] = scale * weight
    return policy.eval()
