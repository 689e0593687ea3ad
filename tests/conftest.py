from __future__ import annotations

import os
from typing import Any

# Before torch is imported: the models here are too small for a second thread, which other tests can use.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test takes two all the same: threads that wait do not keep a core from the other process that runs tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On processors without AVX-512, MKL's sums otherwise depend on where tensors lie in memory.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest

from agents.cells import Cell


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that this process computes from now on."""
    cells: list[Cell] = []
    compute = Cell.compute

    def counted(cell: Cell, device: str) -> Any:
        cells.append(cell)
        return compute(cell, device)

    monkeypatch.setattr(Cell, "compute", counted)
    return cells
