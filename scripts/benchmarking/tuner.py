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
    """A user's loop with a tuner: an MLP of 1 M parameters, AdamW, epochs of 50 batches of 128.

    What the tuner does at an optimizer step lies between two more hooks, which take the time.
    """

    def __init__(self, device: str, epochs: int) -> None:
        self._device, self._began, self._hooked = device, 0.0, 0.0
        self._model = nn.Sequential(
            nn.Linear(INPUTS, 1024), nn.ReLU(), nn.Linear(1024, 450), nn.ReLU(), nn.Linear(450, CLASSES)
        ).to(device)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._optimizer.register_step_pre_hook(self._begin)
        policy = ControlPolicy.load(pretrained_path())
        self._tuner = Tuner(policy, self._optimizer, model=self._model, total_epochs=epochs)
        self._optimizer.register_step_pre_hook(self._end)

    def _begin(self, *_: Any) -> None:
        synchronize(self._device)
        self._began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        synchronize(self._device)
        self._hooked += time.perf_counter() - self._began

    def epoch(self, inputs: torch.Tensor, targets: torch.Tensor, val_loss: float) -> tuple[float, float, float]:
        """Seconds of an epoch without the tuner's, of the tuner at its steps, and of the decision at its end."""
        synchronize(self._device)
        self._hooked, started = 0.0, time.perf_counter()
        for x, y in zip(inputs, targets, strict=True):
            self._optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self._model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        train_loss = loss.item()  # waits for the device
        decided = time.perf_counter()
        self._tuner.step(train_loss=train_loss, val_loss=val_loss)
        synchronize(self._device)
        return decided - started - self._hooked, self._hooked, time.perf_counter() - decided


def overhead(epochs: int, device: str) -> dict[str, Any]:
    """Medians over the epochs of two loops in turn: the guard takes a snapshot in every epoch of one, and of the other
    in none. It takes one when the validation loss has improved, so it is told so."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCHES, BATCH_SIZE, INPUTS, generator=generator).to(device)
    targets = torch.randint(CLASSES, (BATCHES, BATCH_SIZE), generator=generator).to(device)
    total = max(8, epochs + 1)  # the policy knows no shorter runs
    loops = (_Loop(device, total), _Loop(device, total))
    rounds = [
        (loops[0].epoch(inputs, targets, 1.0), loops[1].epoch(inputs, targets, 0.99**epoch))
        for epoch in range(epochs + 1)
    ][1:]  # the first warms up

    def share(loop: int) -> float:
        return statistics.median((hooks + decision) / own for own, hooks, decision in (times[loop] for times in rounds))

    return {
        "share_of_loop": share(0),
        "share_of_loop_with_snapshot": share(1),
        "seconds_per_decision": statistics.median(times[0][2] for times in rounds),
        "seconds_per_decision_with_snapshot": statistics.median(times[1][2] for times in rounds),
        "seconds_at_steps_per_epoch": statistics.median(times[0][1] for times in rounds),
        "seconds_per_epoch": statistics.median(times[0][0] for times in rounds),
        "epochs": epochs,
        "threads": torch.get_num_threads(),
    }
