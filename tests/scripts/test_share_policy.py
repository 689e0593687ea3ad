"""The door through which policies are shared."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from agents import ControlPolicy, hub
from agents.tuner import pretrained_path
from scripts import common, share_policy
from tests.agents.fake_hub import TOKEN, fake_hub
from tests.scripts.doors import Door, one_line
from tests.test_architecture import ROOT

REPO = "somebody/tuner"


def test_there_and_back(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, out = ControlPolicy.load(pretrained_path()), tmp_path / "pulled.safetensors"
    with fake_hub(tmp_path / "cache") as running:
        for call in (hub.push, hub.pull):
            monkeypatch.setattr(share_policy, call.__name__, partial(call, endpoint=running.endpoint, token=TOKEN))
        push = partial(door, share_policy, "push", "--repo", REPO, "--results")
        one_line(push(ROOT / "pyproject.toml", status=2), "--results", "pyproject.toml is not what")
        push(ROOT / "results/meta_test.json")
        repository = running.repositories[REPO]
        assert b"`letter/mlp`" in repository.commits[repository.refs["main"]]["README.md"]

        pull = partial(door, share_policy, "pull", "--repo", REPO, "--out", out)
        one_line(pull(status=2), "may change", repository.refs["main"])
        one_line(pull("--digest", "0", status=2), f"holds the policy {shipped.digest}, not 0")
        assert not out.exists()
        pull("--revision", repository.refs["main"], "--digest", shipped.digest)
    assert ControlPolicy.load(out).header == shipped.header


@pytest.mark.parametrize(("given", "nearest"), [("pusj", "push"), ("onx", "onnx")])
def test_a_mistyped_command_is_told_the_nearest(door: Door, given: str, nearest: str) -> None:
    one_line(door(share_policy, "--quiet", given, status=2), f"unknown command {given!r}; did you mean {nearest!r}?")


def test_quiet(door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet: list[bool] = []
    monkeypatch.setattr(share_policy, "export", lambda *_: quiet.append(common.console.quiet))
    own = ("--policy", policy, "--out", tmp_path / "policy.onnx")
    door(share_policy, "--quiet", "onnx", *own)
    door(share_policy, "onnx", *own, "--quiet")
    door(share_policy, "onnx", *own)
    assert quiet == [True, True, False]


def test_onnx(door: Door, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    door(share_policy, "onnx", "--policy", policy, "--out", tmp_path / "policy.onnx")
    onnx.checker.check_model(str(tmp_path / "policy.onnx"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    one_line(door(share_policy, "onnx", "--out", tmp_path / "b.onnx", status=2), "pip install 'hyperpilot[onnx]'")
