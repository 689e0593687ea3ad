"""What a tuner costs a user's training loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from agents.policy import ControlPolicy
from agents.tuner import Tuner, pretrained_path
from scripts.benchmarking.processes import synchronize

BATCHES, BATCH_SIZE, INPUTS, CLASSES = 50, 128, 512, 10


class _Loop:
    """A user's loop: an MLP of 1 M parameters, AdamW, epochs of 50 batches of 128.

    Attributes:
        seconds: of the present epoch so far.
    """

    def __init__(self, device: str, policy: ControlPolicy | None, epochs: int) -> None:
        self._device = device
        self._model = nn.Sequential(
            nn.Linear(INPUTS, 1024), nn.ReLU(), nn.Linear(1024, 450), nn.ReLU(), nn.Linear(450, CLASSES)
        ).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._tuner = Tuner(policy, self._optimizer, model=self._model, total_epochs=epochs) if policy else None
        self.seconds, self._loss = 0.0, torch.zeros(())

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        started = time.perf_counter()
        self._optimizer.zero_grad()
        self._loss = nn.functional.cross_entropy(self._model(x), y)
        self._loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        synchronize(self._device)  # lest the next loop's time have some of this one's
        self.seconds += time.perf_counter() - started

    def decide(self, val_loss: float) -> tuple[float, float]:
        """End the epoch. Returns its seconds, the decision included, and those of the decision."""
        train_loss = self._loss.item()
        started = time.perf_counter()
        if self._tuner:
            self._tuner.step(train_loss=train_loss, val_loss=val_loss)
            synchronize(self._device)
        decision = time.perf_counter() - started
        epoch, self.seconds = self.seconds + decision, 0.0
        return epoch, decision


def overhead(epochs: int, device: str) -> dict[str, Any]:
    """Medians over epochs of three loops: without a tuner, with one, and with one whose guard takes a snapshot.

    The loops take turns batch by batch, in changing order, so that all see the same machine. The guard takes a snapshot
    when the validation loss has improved, so it is told so in every epoch, or never.
    """
    policy = ControlPolicy.load(pretrained_path())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCHES, BATCH_SIZE, INPUTS, generator=generator).to(device)
    targets = torch.randint(CLASSES, (BATCHES, BATCH_SIZE), generator=generator).to(device)
    total = max(8, epochs + 1)  # the policy knows no shorter runs
    loops = [_Loop(device, used, total) for used in (None, policy, policy)]
    rounds = [_epoch(loops, inputs, targets, (1.0, 1.0, 0.99**epoch)) for epoch in range(epochs + 1)]
    rounds = rounds[1:]  # the first warms up

    def share(loop: int) -> float:
        return statistics.median(times[loop][0] / times[0][0] - 1 for times in rounds)

    return {
        "share_of_loop": share(1),
        "share_of_loop_with_snapshot": share(2),
        "seconds_per_decision": statistics.median(times[1][1] for times in rounds),
        "seconds_per_decision_with_snapshot": statistics.median(times[2][1] for times in rounds),
        "seconds_per_epoch": statistics.median(times[0][0] for times in rounds),
        "epochs": epochs,
        "threads": torch.get_num_threads(),
    }


def _epoch(
    loops: Sequence[_Loop], inputs: torch.Tensor, targets: torch.Tensor, val_losses: Sequence[float]
) -> list[tuple[float, float]]:
    for turn, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        for offset in range(len(loops)):
            loops[(turn + offset) % len(loops)].batch(x, y)
    return [loop.decide(val_loss) for loop, val_loss in zip(loops, val_losses, strict=True)]
