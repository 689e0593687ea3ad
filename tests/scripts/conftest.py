from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts.common import run_main
from tests.scripts.doors import Door
from tests.tiny import random_policy


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    """Run a script's main with arguments; returns what it printed on standard error and asserts the exit status."""

    def call(script: ModuleType, *arguments: object, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        if status == 0:
            run_main(script.Config, script.main)
        else:
            with pytest.raises(SystemExit) as exit_:
                run_main(script.Config, script.main)
            assert exit_.value.code == status
        return capsys.readouterr().err

    return call


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.safetensors"
    random_policy().save(path)
    return path
