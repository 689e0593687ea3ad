"""What a user would do without a policy: schedules, through the tuner's own interface (`step`, `hyperparameters`)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from hpo_env.actions import BaseSchedule
from hpo_env.hyperparameters import Binding


class Controller(Protocol):
    """Sets a run's hyperparameters epoch by epoch. `Tuner` is one."""

    @property
    def hyperparameters(self) -> dict[str, float]: ...

    def step(self, *, train_loss: float, val_loss: float | None = None) -> dict[str, float]: ...


DEFAULTS = BaseSchedule(lr=1e-3, batch_size=32, weight_decay=0.01, dropout=0.1)
"""AdamW as most people start it: torch's defaults, batches of 32, a tenth dropped."""

SGD_DEFAULTS = BaseSchedule(lr=0.1, batch_size=32, weight_decay=1e-4, dropout=0.1)


def defaults(optimizer: torch.optim.Optimizer) -> BaseSchedule:
    """The usual starting point for this optimizer."""
    return SGD_DEFAULTS if isinstance(optimizer, torch.optim.SGD) else DEFAULTS


class Cosine:
    """Warm-up and cosine decay of the learning rate; the rest constant.

    Args:
        binding: the run's controls.
        schedule: the values; those that the run lacks are left out.
    """

    def __init__(self, binding: Binding, schedule: BaseSchedule, total_epochs: int) -> None:
        self._binding, self._schedule, self._total = binding, schedule, total_epochs
        self._epoch = 0
        self._apply()

    @property
    def hyperparameters(self) -> dict[str, float]:
        return self._binding.read()

    def step(self, *, train_loss: float, val_loss: float | None = None) -> dict[str, float]:
        self._epoch = min(self._epoch + 1, self._total - 1)
        self._apply()
        return self.hyperparameters

    def _apply(self) -> None:
        values = self._schedule.values(np.asarray((self._epoch + 0.5) / self._total))
        self._binding.write({name: float(values[name]) for name in self._binding.available})


class Constant:
    """Nothing ever changes."""

    def __init__(self, binding: Binding, schedule: BaseSchedule) -> None:
        self._binding = binding
        binding.write({name: getattr(schedule, name) for name in binding.available})

    @property
    def hyperparameters(self) -> dict[str, float]:
        return self._binding.read()

    def step(self, *, train_loss: float, val_loss: float | None = None) -> dict[str, float]:
        return self.hyperparameters


class Plateau(Constant):
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` on the validation loss: halved after a tenth of the run without
    improvement (at least 2 epochs)."""

    def __init__(
        self, binding: Binding, schedule: BaseSchedule, optimizer: torch.optim.Optimizer, total_epochs: int
    ) -> None:
        super().__init__(binding, schedule)
        patience = max(2, total_epochs // 10)
        self._scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)

    def step(self, *, train_loss: float, val_loss: float | None = None) -> dict[str, float]:
        self._scheduler.step(train_loss if val_loss is None else val_loss)
        return self.hyperparameters
