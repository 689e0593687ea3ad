"""The mean of several policies acts as they do on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.mean_policy import mean_policy
from agents.policy import OBSERVATION_CLIP, ControlPolicy, PolicyHeader
from agents.policy_file import of_controls
from hpo_env.observations import FEATURES
from tests.rules import RULES
from tests.tiny import random_policy

WIDTHS = [(16, 8), (5, 12), (7, 7)]


def members(widths: Sequence[tuple[int, ...]] = WIDTHS) -> list[ControlPolicy]:
    """Policies of several sizes, each with a normalization of its own."""
    policies = []
    for seed, hidden in enumerate(widths):
        generator = torch.Generator().manual_seed(seed)
        policy = ControlPolicy(PolicyHeader(hidden=hidden, base_rules={k: rule.to_dict() for k, rule in RULES.items()}))
        for tensor in policy.parameters():
            tensor.data = torch.randn(tensor.shape, generator=generator) / 4
        policy.mean.copy_(0.1 * torch.randn(len(FEATURES), generator=generator))
        policy.std.copy_(0.8 + 0.4 * torch.rand(len(FEATURES), generator=generator))
        policies.append(policy.eval())
    return policies


@pytest.mark.parametrize("widths", [WIDTHS, WIDTHS[:2], [(6,), (9,)], [(), ()], [(4, 3, 2), (2, 3, 4)]])
def test_it_acts_as_its_members_do_on_average(widths: Sequence[tuple[int, ...]]) -> None:
    policies = members(widths)
    seen = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (64, len(FEATURES))).astype(np.float32))
    assert ((seen - policies[0].mean) / policies[0].std).abs().max() < OBSERVATION_CLIP
    mean = mean_policy(policies)
    expected = torch.stack([policy.means(seen) for policy in policies]).mean(0)
    torch.testing.assert_close(mean.means(seen), expected, rtol=1e-4, atol=1e-5)
    assert (expected - policies[0].means(seen)).abs().max() > 0.1
    assert mean.header.hidden == tuple(map(sum, zip(*widths, strict=True)))


def test_it_is_a_policy_file_like_any_other(tmp_path: Path) -> None:
    mean = mean_policy(members())
    mean.save(tmp_path / "mean.safetensors")
    loaded = ControlPolicy.load(tmp_path / "mean.safetensors")
    seen = np.random.default_rng(0).uniform(-1, 1, (8, len(FEATURES))).astype(np.float32)
    np.testing.assert_array_equal(loaded.act(seen)[0], mean.act(seen)[0])
    assert loaded.header == mean.header


def test_the_mean_of_equals_is_each_of_them() -> None:
    policy = random_policy(seed=3)
    seen = np.random.default_rng(0).uniform(-1, 1, (8, len(FEATURES))).astype(np.float32)
    np.testing.assert_allclose(mean_policy([policy] * 3).act(seen)[0], policy.act(seen)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_its_strength_is_its_own(strength: float) -> None:
    policies = members()
    policies[0].header = replace(policies[0].header, strength=0.5)
    seen = np.random.default_rng(0).uniform(-1, 1, (8, len(FEATURES))).astype(np.float32)
    seen[:, [feature.name for feature in FEATURES].index("first_decision")] = np.arange(8) < 4
    whole = mean_policy(policies, 1.0).act(seen)[0]
    np.testing.assert_allclose(
        mean_policy(policies, strength).act(seen)[0], whole * np.array([[1.0]] * 4 + [[strength]] * 4)
    )


def test_its_header_tells_of_all() -> None:
    policies = members()
    for seed, policy in enumerate(policies):
        policy.header = replace(
            policy.header,
            required_signals=("val_loss",) if seed else ("train_loss",),
            trained_ranges={"horizons": (8 - seed, 16 + seed), **({"progress": (0.0, 0.5)} if seed == 1 else {})},
            training={"preset": "tiny", "seed": seed, "timesteps": 100 + seed, "seconds": 10},
            scores={"timesteps": 5},
        )
    header = mean_policy(policies).header
    assert header.required_signals == ("train_loss", "val_loss")
    assert header.trained_ranges == {"horizons": (6, 18), "progress": (0.0, 0.5)}
    each = [{"seed": seed, "timesteps": 100 + seed} for seed in range(3)]
    assert header.training == {"preset": "tiny", "seconds": 30, "timesteps": 303, "mean_of": each}
    assert header.scores == {}


def test_what_has_no_mean() -> None:
    one, other = members()[:2]
    with pytest.raises(ValueError, match="at least two policies, not 1"):
        mean_policy([one])
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"strength of a policy must lie in 0..1, not {strength}"):
            mean_policy([one, other], strength)
    with pytest.raises(ValueError, match="different numbers of layers"):
        mean_policy([one, *members([(4,)])])
    other.header = replace(one.header, base_rules={**one.header.base_rules, "sgd": RULES["adamw"].to_dict()})
    with pytest.raises(ValueError, match="different base rules"):
        mean_policy([one, other])
    fewer = ("lr", "batch_size", "weight_decay", "dropout")
    four = ControlPolicy(replace(one.header, **of_controls(fewer)))
    with pytest.raises(ValueError, match="different controls"):
        mean_policy([one, four])
