"""A user's own training run, for a tuner to be attached to."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from agents import ControlPolicy, Tuner
from hpo_env.base_schedules import BaseSchedule
from hpo_env.hyperparameters import CONTROLS, HasBatchSize
from inner_models.datasets import load_dataset
from tests.rules import flat
from tests.tiny import random_policy

ROWS = 192
LR, DECAY, DROPOUT = 0.002, 0.03, 0.2
BASE = {"adamw": BaseSchedule(0.006, 48, 0.2, 0.1), "sgd": BaseSchedule(0.03, 32, 0.01, 0.15, warmup=0.1)}


def constant_policy(**actions: float) -> ControlPolicy:
    """A policy that always takes these actions from `BASE`, in runs of any length; without any it stays."""
    policy = random_policy()
    policy.header = replace(policy.header, base_rules={kind: flat(base).to_dict() for kind, base in BASE.items()})
    last = policy.network[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data.zero_()
    last.bias.data = torch.tensor([actions.get(name, 0.0) for name in CONTROLS])
    return policy


class Loop:
    """A user's run: an MLP on 192 digits, three parameter groups, nothing of this project's in it."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(24, 24), nn.ReLU(),
            nn.Dropout(DROPOUT / 2), nn.Linear(24, 10),
        )  # fmt: skip
        biases = [p for p in self.model.parameters() if p.ndim == 1]
        first, *others = [p for p in self.model.parameters() if p.ndim == 2]
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": [first], "lr": LR / 4, "weight_decay": DECAY / 3},
            {"params": biases, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)
        digits = load_dataset("digits")
        self.train, self.val = digits.train, digits.val

    def epoch(self, number: int, batch_size: int = 32) -> tuple[float, float]:
        """Train one epoch. Row order and dropout depend on `number` alone. Returns train and validation loss."""
        torch.manual_seed(number)
        self.model.train()
        total = 0.0
        for rows in torch.split(torch.randperm(ROWS), batch_size):
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(self.train.inputs[rows]), self.train.targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item() * len(rows)
        return total / ROWS, self.validate()

    @torch.no_grad()
    def validate(self) -> float:
        self.model.eval()
        return cross_entropy(self.model(self.val.inputs), self.val.targets).item()

    def weights(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.model.state_dict().values()]

    def settings(self) -> list[tuple[float, float]]:
        return [(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups]

    def rates(self) -> list[float]:
        return [module.p for module in self.model if isinstance(module, nn.Dropout)]


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def warmup_cosine(epoch: int, total: int, warmup: float = 0.05) -> float:
    progress = (epoch + 0.5) / total
    return min(1.0, progress / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    loaded: dict[str, Any] = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    return loaded


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged, but for a line on the run's length, which most of these tests leave untold."""
    return [message for message in caplog.messages if "the run's length was not known" not in message]


class Unsized:
    """A batch sampler's size, without its length."""

    def __init__(self, sampler: HasBatchSize) -> None:
        self._sampler = sampler

    @property
    def batch_size(self) -> int:
        return self._sampler.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._sampler.batch_size = value


def guarded(policy: ControlPolicy | None = None, **arguments: Any) -> tuple[Loop, Tuner]:
    """A run of 12 epochs and its tuner, with a model to guard; without a policy, one that stays."""
    run = Loop()
    tuner = Tuner(policy or constant_policy(), run.optimizer, model=run.model, total_epochs=12, **arguments)
    return run, tuner
