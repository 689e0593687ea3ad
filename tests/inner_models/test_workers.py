"""Worker processes get one thread each, this process keeps its environment, and memory is given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import psutil
import pytest

from inner_models.workers import give_back_memory, one_thread_each


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such call")
def test_freed_memory_is_given_back() -> None:
    """In pieces, each too small for a mapping of its own, with something that lives on in between."""
    process = psutil.Process()
    held = [np.ones(8_000) for _ in range(2_000)]
    kept = held[::100]
    del held
    before = process.memory_info().rss
    give_back_memory()
    assert before - process.memory_info().rss > 50 * 2**20
    assert all(array.all() for array in kept)
