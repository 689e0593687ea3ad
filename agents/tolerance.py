"""A tuner is a guest in somebody's run: what goes wrong there is logged once, and does not end the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from inner_models.signals import NOTHING, GradientMeter

_MEASURING = "measuring gradients"

_log = logging.getLogger("hyperpilot")


class Notices:
    """Logs each kind of trouble once as a warning; from then on at the level DEBUG."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, kind: str, message: str, *arguments: object, traceback: bool = False) -> None:
        level = logging.DEBUG if kind in self._told else logging.WARNING
        self._told.add(kind)
        _log.log(level, message, *arguments, exc_info=traceback)

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """A block whose failure is logged with its traceback, and goes no further."""
        try:
            yield
        except Exception:
            self.tell(what, "%s failed; the run goes on without it", what, traceback=True)


class TolerantMeter(GradientMeter):
    """A gradient meter in which a failure costs its signals and not the optimizer's step.

    Args:
        before_training: called once, before the optimizer's first step; never after `resume`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, notices: Notices, before_training: Callable[[], None] | None = None
    ) -> None:
        self._notices, self._trained, self._before_training = notices, False, before_training
        super().__init__(optimizer)

    def begin(self) -> None:
        """As in `GradientMeter`; without a copy of the parameters where that fails."""
        with self._notices.surviving(_MEASURING):
            return super().begin()
        self._began = NOTHING

    def finish(self) -> dict[str, float]:
        """As in `GradientMeter`; nothing where that fails."""
        measured, idle = bool(self._measured), not self.steps
        if idle and self._trained:
            self._notices.tell(
                "idle",
                "no optimizer step since the last epoch: is step called more often, or another optimizer trained with?",
            )
        elif idle:
            self._notices.tell(
                "never", "the optimizer that this was made with has taken no step: is it the one that is trained with?"
            )
        self._trained = self._trained or not idle
        with self._notices.surviving(_MEASURING):
            signals = super().finish()
            if measured and not math.isfinite(signals["grad_norm"]):
                self._notices.tell("gradients", "an epoch's gradients were not finite")
            return signals
        self.begin()
        return {}

    def resume(self) -> None:
        """Training has begun elsewhere, and goes on here."""
        self._before_training = None
        self.begin()

    def _before_step(self, *arguments: Any) -> Any:
        if self._before_training is not None:
            self._before_training()
            self._before_training = None
        return super()._before_step(*arguments)

    def _measure(self, optimizer: torch.optim.Optimizer) -> None:
        with self._notices.surviving(_MEASURING):
            super()._measure(optimizer)
