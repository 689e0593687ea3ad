from __future__ import annotations

from typing import Any

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
