"""Batch sizes as the model and the optimizer see them, not as they are reported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from agents import ControlPolicy, Tuner
from tests.recipes.page import Moving, Recipe, batches

ROWS = 1257
ONE = TensorDataset(torch.zeros(1))


@pytest.fixture(autouse=True)
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlPolicy, "act", Moving("batch_size"))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers(context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches that reach the model have the size that was decided on, from the first pass on."""
    recipe = Recipe("workers").watch()
    recipe["EPOCHS"] = 8 if context == "fork" else 3
    monkeypatch.setattr(DataLoader, "multiprocessing_context", context)
    recipe.run()
    assert recipe.rows == [size for epoch in recipe.sizes for size in batches(ROWS, epoch)]
    assert len(set(recipe.sizes)) > 1
    assert recipe["loader"].num_workers == 2


def test_gradient_accumulation() -> None:
    """Examples of every optimizer step, the gradient that it uses, and the incomplete last one."""
    recipe = Recipe("accumulation").watch()
    steps: list[list[int]] = []

    def seen(optimizer: Optimizer, *_: Any) -> None:
        steps.append(list(recipe.rows))
        recipe.rows.clear()

    hook = register_optimizer_step_pre_hook(seen)
    try:
        recipe.run()
    finally:
        hook.remove()
    assert len(set(recipe.sizes)) > 1
    expected = []
    for size in recipe.sizes:
        parts = batches(ROWS, size // 4)
        expected += [parts[start : start + 4] for start in range(0, len(parts), 4)]
        assert [sum(step) for step in expected][-len(batches(ROWS, size)) :] == batches(ROWS, size)
    assert steps == expected


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(100))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream(workers: int) -> None:
    """Workers are asked for as many examples as make a batch."""
    loader = DataLoader(Stream(), batch_size=8, num_workers=workers)
    tuner = Tuner.pretrained(torch.optim.AdamW([torch.ones(2)]), loader=loader, total_epochs=8)
    seen = []
    for _ in range(3):
        size = int(tuner.hyperparameters["batch_size"])
        assert [len(batch) for batch in loader] == batches(100, size)
        seen.append(size)
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert len(set(seen)) > 1


class Own:
    """A user's batch sampler that does not say how large its batches are."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2]])


@pytest.mark.parametrize(
    "loader",
    [DataLoader(ONE, batch_size=None), DataLoader(ONE, batch_sampler=Own())],
    ids=["unbatched", "own"],
)
def test_a_batch_size_that_cannot_be_set(loader: DataLoader[Any], caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    tuner = Tuner.pretrained(optimizer, loader=loader, total_epochs=8)
    for _ in range(3):
        tuner.step(train_loss=1.0, val_loss=1.0)
    assert "batch_size" not in tuner.hyperparameters
    first, second = caplog.messages
    assert "batch size" in first
    assert "has taken no step" in second
