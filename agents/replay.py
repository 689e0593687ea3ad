"""`Replay`: what a tuner did in one run, done again in another, without a policy."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from hpo_env.hyperparameters import Binding
from inner_models.sampling import BatchSampler

from .arguments import chosen, count
from .batch_size import Loader
from .board import group_values, write_epoch
from .files import ScalarWriter
from .guard import Guard
from .ranks import world_size
from .tolerance import Notices
from .trajectory import Trajectory
from .tuner_state import shares_of
from .untrusted import integer, table
from .user_run import batch_sampler, batch_size_of, losses_of, own_optimizer
from .watch import LOWERED

VERSION = 4

_log = logging.getLogger("hyperpilot")


class Replay:
    """Sets a run's hyperparameters, epoch by epoch, to those of a recorded run.

    In a run of the recorded length they are the recorded ones, to the last bit; in another, those at the same share of
    the run. The first epoch's are set here; each `step` sets the next's.

    Args:
        trajectory: the recorded run; `Replay.load` reads one from a file.
        optimizer: the run's optimizer. Its parameter groups keep their ratios to one another, and groups without
            weight decay stay so.
        total_epochs: how many times `step` will be called.
        loader, model, criterion, batches_per_step, batch_size, writer: as in `Tuner`.
        controls: names of the controls to set; None for all that the trajectory has. Those that this run lacks are
            left out, and this is logged; those that the trajectory lacks stay as they are.
        guard: as in `Tuner`. What the recorded run's guard did to the learning rate is in the trajectory: it is
            lowered further only when this run diverges more often.

    Raises:
        ValueError: bad arguments, or a trajectory without a finished epoch; the message names the value.

    Examples:
        >>> tuner.trajectory.save("trajectory.json")  # doctest: +SKIP
        >>> replay = Replay.load("trajectory.json", optimizer, model=model, total_epochs=30)  # doctest: +SKIP
        >>> for epoch in range(30):  # doctest: +SKIP
        ...     train_one_epoch()
        ...     replay.step()
    """

    def __init__(
        self,
        trajectory: Trajectory,
        optimizer: torch.optim.Optimizer,
        *,
        total_epochs: int,
        loader: Loader | None = None,
        model: nn.Module | None = None,
        criterion: nn.Module | None = None,
        batches_per_step: int = 1,
        batch_size: int | None = None,
        controls: Sequence[str] | None = None,
        guard: bool = True,
        writer: ScalarWriter | None = None,
    ) -> None:
        optimizer = own_optimizer(optimizer)
        self.total_epochs, self.epoch = count("total_epochs", total_epochs), 0
        wanted = chosen(controls, trajectory.controls)
        if not trajectory.epochs:
            raise ValueError("the trajectory has no finished epoch: there is nothing to replay")
        self._notices = Notices()
        batches = count("batches_per_step", batches_per_step) * world_size(model, self._notices)
        self._batch_size = batch_size_of(batch_size, loader, model, batches, self._notices)
        self._optimizer, self._model, self._writer = optimizer, model, writer
        self._binding = Binding(optimizer, model, self._batch_size, criterion)
        values = trajectory.values_for(self.total_epochs)
        self._values = {name: values[name] for name in wanted if name in self._binding.available}
        _warn_of_misfits(trajectory, optimizer, [name for name in wanted if name not in self._values])
        # What was undone after the last epoch is in no value.
        undone = [(epoch + 1) / trajectory.total_epochs for epoch, what in enumerate(trajectory.guard[:-1]) if what]
        self._recorded, self._undone = undone, 0
        self._settings = {"total_epochs": self.total_epochs, "trajectory": self._digest()}
        self._guard = self._made_guard() if guard and model is not None else None
        self._apply()

    @classmethod
    def load(cls, path: Path | str, optimizer: torch.optim.Optimizer, **arguments: Any) -> Self:
        """A replay of the trajectory in the file at `path`; the other arguments are the class's own.

        Raises:
            FileNotFoundError, ValueError: no such file; a file that is not a whole trajectory for this version.
        """
        return cls(Trajectory.load(path), optimizer, **arguments)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """The values in use, of the controls that this run has."""
        return self._binding.read()

    def step(
        self, *, train_loss: float | Tensor | None = None, val_loss: float | Tensor | None = None
    ) -> dict[str, float]:
        """Call at the end of every epoch. Sets the hyperparameters for the next one and returns them.

        The losses are for the guard and the writer; without them the guard sees nothing.

        Raises:
            ValueError: a loss is neither a number nor None; nothing has changed then.
        """
        losses = losses_of(self._model, train_loss, val_loss)
        self.epoch += 1
        if self._writer is not None:
            used = {name: self.hyperparameters[name] for name in self._values}
            with self._notices.surviving("writing to TensorBoard"):
                write_epoch(self._writer, self.epoch, losses, used, group_values(self._optimizer))
        if self._guard and losses:
            found = self._guard.check(self.epoch, losses)
            self._undone += bool(found.verdict) - found.taken_back
        if self.epoch > self.total_epochs:
            self._notices.tell("over", "more epochs than total_epochs=%d: values stay as they are", self.total_epochs)
        self._apply()
        return self.hyperparameters

    def batch_sampler(
        self, data: Sized | SupportsIndex, *, seed: int | np.random.Generator = 0, drop_last: bool = False
    ) -> BatchSampler:
        """As `Tuner.batch_sampler`."""
        return batch_sampler(self._batch_size, data, seed, drop_last)

    def state_dict(self) -> dict[str, Any]:
        """State to put in the run's own checkpoint (tensors and plain values, the guard's snapshot included)."""
        return {
            "version": VERSION,
            "settings": dict(self._settings),
            "epoch": self.epoch,
            "undone": self._undone,
            "shares": copy.deepcopy(self._binding.shares),
            "samplers": self._batch_size.state_dict() if self._batch_size else [],
            "guard": self._guard.state_dict() if self._guard else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Load the model's and the optimizer's state, and make the batch samplers, first.

        Raises:
            ValueError: the state is damaged, or of another replay; this one is then as it was.
        """
        try:
            self._load(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the replay's state cannot be used: {str(error) or type(error).__name__}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        """All that can fail comes before anything is changed."""
        integer(VERSION, VERSION)("its version", state["version"])
        if state["settings"] != self._settings:
            raise ValueError("it is of a replay of another trajectory, or with other arguments")
        integer(0, sys.maxsize)("its epoch", state["epoch"])
        integer(0, state["epoch"])("its undone", state["undone"])
        own = self._binding.shares
        table({name: shares_of(name, len(shares)) for name, shares in own.items()})("its shares", state["shares"])
        guard = None
        if self._guard:
            guard = self._made_guard()  # of the weights just loaded
            if state["guard"]:
                guard.load_state_dict(state["guard"])
        if self._batch_size:
            self._batch_size.check(state["samplers"])
            self._batch_size.load_state_dict(state["samplers"])
        self._guard, self.epoch, self._undone = guard, state["epoch"], state["undone"]
        self._binding.shares = copy.deepcopy(state["shares"])
        self._apply()

    def _made_guard(self) -> Guard:
        assert self._model is not None
        return Guard(self._model, self._optimizer, self._notices, lowers_lr="lr" in self._values)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps([self._values, self._recorded]).encode()).hexdigest()

    def _apply(self) -> None:
        """Set what the coming epoch is to be trained with."""
        values = {name: recorded[min(self.epoch, self.total_epochs - 1)] for name, recorded in self._values.items()}
        known = sum(share <= self.epoch / self.total_epochs for share in self._recorded)
        if "lr" in values and self._undone > known:
            values["lr"] *= LOWERED ** (self._undone - known)
        self._binding.write(values)


def _warn_of_misfits(trajectory: Trajectory, optimizer: torch.optim.Optimizer, lacking: list[str]) -> None:
    """Log what is allowed but unlikely to be meant."""
    if lacking:
        _log.warning("this run has no %s: the trajectory's is ignored", " and no ".join(lacking))
    if type(optimizer).__name__ != trajectory.optimizer:
        _log.warning(
            "the trajectory was recorded with %s: its learning rates may not fit %s",
            trajectory.optimizer,
            type(optimizer).__name__,
        )
    if trajectory.epochs < trajectory.total_epochs:
        _log.warning(
            "only %d of the recorded run's %d epochs were finished: the last values stay from there on",
            trajectory.epochs,
            trajectory.total_epochs,
        )
