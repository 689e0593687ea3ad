"""Hostile policy files at the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import apply_policy
from tests.faults.hostile import HOSTILE
from tests.scripts.doors import Door, one_line

SAMPLE = (
    "nothing", "torch.save", "a link to a pipe", "a folder", "a link to nothing", "a name of two lines", "deep lists",
    "NaN weights", "a newer version", "text from right to left",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_a_broken_policy_is_one_line(door: Door, tmp_path: Path, name: str) -> None:
    path = HOSTILE[name](tmp_path)
    one_line(door(apply_policy, "--policy", path, "--task", "wine/mlp", "--out", tmp_path / "out", status=2))
    assert not (tmp_path / "out").exists()
