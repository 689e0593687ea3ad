"""The door that makes one policy out of several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agents import ControlPolicy
from agents.mean_policy import mean_policy
from agents.meta_validation import MetaValidation, validation_seeds
from agents.presets import PRESETS
from scripts import average_policies
from tests.scripts.doors import Door, one_line
from tests.tiny import random_policy


def test_a_mean_and_its_score(door: Door, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(members):
        random_policy(seed, scale=0.3).save(path)
    out = tmp_path / "mean"
    average_policies.main(average_policies.Config(policies=tuple(members), out=out, preset="smoke"))
    text = capsys.readouterr().out

    found, expected = (
        ControlPolicy.load(out / "policy.safetensors"),
        mean_policy(list(map(ControlPolicy.load, members))),
    )
    for name, tensor in expected.state_dict().items():
        np.testing.assert_array_equal(found.state_dict()[name], tensor, err_msg=name)
    preset = PRESETS["smoke"]
    score = MetaValidation(preset.validation, validation_seeds(preset.validation_seeds))(expected)
    assert found.header.scores["log_ratio_iqm"] == score.log_ratio_iqm
    assert found.header.scores["log_ratios"] == score.log_ratios
    assert f"their mean: log ratio to calibrated {score.log_ratio_iqm:+.4f}" in text
    assert text.count("log ratio to calibrated") >= len(members) + 1
    assert "average_policies.py --policies a.safetensors b.safetensors" in found.header.training["command"]
    assert json.loads((out / "config.json").read_text())["policies"] == list(map(str, members))
    one_line(door(average_policies, "--policies", *members, "--out", out, status=2), "already holds a run")


def test_a_single_policy_has_no_mean(door: Door, tmp_path: Path) -> None:
    random_policy().save(tmp_path / "a.safetensors")
    text = door(average_policies, "--policies", tmp_path / "a.safetensors", "--out", tmp_path / "mean", status=2)
    one_line(text, "at least two policies, not 1")
    assert not (tmp_path / "mean").exists()
