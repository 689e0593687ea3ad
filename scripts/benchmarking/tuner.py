"""What a tuner costs a user's training loop."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from agents.policy import ControlPolicy
from agents.tuner import Tuner, pretrained_path
from scripts.benchmarking.processes import synchronize

BATCHES, BATCH_SIZE, INPUTS, CLASSES = 50, 128, 512, 10


class _Loop:
    """A user's loop: an MLP of 1 M parameters, AdamW, epochs of 50 batches of 128."""

    def __init__(self, device: str, policy: ControlPolicy | None, epochs: int) -> None:
        self._device = device
        self._model = nn.Sequential(
            nn.Linear(INPUTS, 1024), nn.ReLU(), nn.Linear(1024, 450), nn.ReLU(), nn.Linear(450, CLASSES)
        ).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._tuner = Tuner(policy, self._optimizer, model=self._model, total_epochs=epochs) if policy else None

    def epoch(self, inputs: torch.Tensor, targets: torch.Tensor, val_loss: float) -> tuple[float, float]:
        """Seconds of an epoch, the tuner's decision included, and of that decision."""
        synchronize(self._device)
        started = time.perf_counter()
        for x, y in zip(inputs, targets, strict=True):
            self._optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self._model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        train_loss = loss.item()  # waits for the device
        decided = time.perf_counter()
        if self._tuner:
            self._tuner.step(train_loss=train_loss, val_loss=val_loss)
            synchronize(self._device)
        ended = time.perf_counter()
        return ended - started, ended - decided


def overhead(pairs: int, device: str) -> dict[str, Any]:
    """Medians over `pairs` epochs in turn: without a tuner, with one, and with one whose guard takes a snapshot.

    The guard takes a snapshot when the validation loss has improved, so it is told so in every epoch, or never.
    """
    policy = ControlPolicy.load(pretrained_path())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCHES, BATCH_SIZE, INPUTS, generator=generator).to(device)
    targets = torch.randint(CLASSES, (BATCHES, BATCH_SIZE), generator=generator).to(device)
    epochs = max(8, pairs + 1)  # the policy knows no shorter runs
    plain, level, improving = (_Loop(device, used, epochs) for used in (None, policy, policy))
    rounds = [
        (
            plain.epoch(inputs, targets, 1.0),
            level.epoch(inputs, targets, 1.0),
            improving.epoch(inputs, targets, 0.99**epoch),
        )
        for epoch in range(pairs + 1)
    ][1:]  # the first warms up

    def share(side: int) -> float:
        return statistics.median(times[side][0] / times[0][0] - 1 for times in rounds)

    return {
        "share_of_loop": share(1),
        "share_of_loop_with_snapshot": share(2),
        "seconds_per_decision": statistics.median(times[1][1] for times in rounds),
        "seconds_per_decision_with_snapshot": statistics.median(times[2][1] for times in rounds),
        "seconds_per_epoch": statistics.median(times[0][0] for times in rounds),
        "pairs": pairs,
        "threads": torch.get_num_threads(),
    }
