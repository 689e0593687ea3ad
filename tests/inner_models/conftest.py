"""Fixtures for the engine's tests."""

from __future__ import annotations

from typing import Any

import pytest

from inner_models import batched_training, masks
from inner_models.programs import Tape, Workspace


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are recorded for a GPU, on tensors of the CPU."""
    make_tape, make_source = Tape.__init__, masks._Source.__init__

    def tape(self: Tape, workspace: Workspace, **arguments: Any) -> None:
        make_tape(self, workspace, **arguments)
        self.cpu = False

    def source(self: Any, *arguments: Any) -> None:
        make_source(self, *arguments)
        self._cpu = False

    monkeypatch.setattr(Tape, "__init__", tape)
    monkeypatch.setattr(masks._Source, "__init__", source)
    monkeypatch.setattr(batched_training, "_ACTIVATION_BYTES", 1 << 40)  # one stride
