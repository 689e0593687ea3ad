"""Denormal numbers: zero inside of the engine, as they were outside of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inner_models.batched_training import BatchedTraining
from inner_models.denormals import denormals_as_zero
from inner_models.tasks import Task

TINY = torch.full((64,), 1e-40)

needs_the_mode = pytest.mark.skipif(
    not torch.set_flush_denormal(False), reason="this processor cannot count denormal numbers as zero"
)


def shown() -> tuple[bool, bool]:
    """Whether torch and numpy see denormal numbers here."""
    return bool((TINY * 1 != 0).any()), bool((TINY.numpy() * np.float32(1) != 0).any())


@needs_the_mode
def test_they_are_zero_inside_and_as_before_afterwards() -> None:
    assert shown() == (True, True)
    with denormals_as_zero():
        assert shown() == (False, False)
        with denormals_as_zero():
            assert shown() == (False, False)
        assert shown() == (False, False)
    assert shown() == (True, True)
    with pytest.raises(LookupError), denormals_as_zero():
        raise LookupError
    assert shown() == (True, True)


@needs_the_mode
def test_whoever_had_switched_them_off_finds_them_off() -> None:
    torch.set_flush_denormal(True)
    try:
        with denormals_as_zero():
            pass
        assert shown() == (False, False)
    finally:
        torch.set_flush_denormal(False)


@needs_the_mode
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_engine_leaves_none_behind(optimizer: str) -> None:
    """Nor switches them off for its user. Where all weights are zero, only the last bias has a gradient."""
    engine = BatchedTraining(Task.named("diabetes/mlp", optimizer=optimizer, interval_examples=1024), [0, 1])
    changed = {"values": torch.zeros(engine.parameters), "momentum": torch.full((engine.parameters,), 1e-37)}
    engine.restore(0, engine.snapshot(0) | changed)
    values = {"lr": 0.0, "batch_size": 16.0, "weight_decay": 0.0, "dropout": 0.0}
    engine.advance({name: np.full(2, value) for name, value in values.items()})
    assert shown() == (True, True)
    kept = engine.snapshot(0)
    for name in ("values", "momentum"):
        tiny = (kept[name] != 0) & (kept[name].abs() < torch.finfo(torch.float32).tiny)
        assert not tiny.any(), name
