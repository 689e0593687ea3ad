"""Worker processes get one thread each, and this process keeps its environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from inner_models.workers import one_thread_each


def test_the_environment_is_set_for_children_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with one_thread_each():
        code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS'])"
        seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen == ["1", "1"]
    assert dict(os.environ) == before
    assert before["OMP_NUM_THREADS"] == "7"
