"""The tuner as a callback of Lightning's `Trainer`. Needs the extra `lightning`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from inner_models.names import unknown

from ..arguments import OptionalArguments, check_names
from ..batch_size import Loader, examples_in, length_of, settable
from ..optional import require
from ..policy import ControlPolicy
from ..tuner import Tuner

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    pl = require("lightning.pytorch", extra="lightning")

_log = logging.getLogger("hyperpilot")


class TunerCallback(pl.Callback):
    """Has a `Tuner` set a run's learning rate, weight decay, dropout and batch size, epoch by epoch.

    The tuner is made when training starts, after a checkpoint has been restored, and stepped at the end of every
    training epoch. Its state is part of Lightning's own checkpoints. What was used in an epoch is logged under
    `control/<name>`.

    Args:
        monitor: name of the validation loss, as logged in `validation_step`. An epoch without validation counts as not
            measured; of several validations in an epoch the last one counts, and the sanity check does not.
        policy: the policy, or the path of its file; the one that ships with the package when None.
        train_loss: name of a logged training loss; the mean of what `training_step` returned when None.
        total_epochs: epochs of the run, if that is not the trainer's `max_epochs`, or what its `max_steps` make.
        examples_per_epoch: training examples in an epoch of all processes, where neither a loader nor its data says.
        arguments: other arguments of `Tuner`, such as `start`, `controls` or `guard`: those of
            `agents.arguments.OptionalArguments`.

    Attributes:
        tuner: the tuner of the current or last `fit`; None before the first.

    Raises:
        TypeError: an argument that is none of these.
        ValueError: when `fit` starts: the length of the run is not known, or in steps, of which the tuner would change
            how many an epoch has; it has several optimizers, or a learning rate scheduler besides the tuner. At the end
            of an epoch: there is no metric of the given name.

    Examples:
        >>> tuned = TunerCallback(monitor="val_loss")  # doctest: +SKIP
        >>> pl.Trainer(max_epochs=30, callbacks=[tuned]).fit(module, train_loader, val_loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        policy: ControlPolicy | Path | str | None = None,
        train_loss: str | None = None,
        total_epochs: int | None = None,
        examples_per_epoch: int | None = None,
        **arguments: Unpack[OptionalArguments],
    ) -> None:
        check_names(arguments)
        self.tuner: Tuner | None = None
        self._monitor, self._train_loss, self._total_epochs = monitor, train_loss, total_epochs
        self._policy, self._arguments, self._examples = policy, arguments, examples_per_epoch
        self._restored: dict[str, Any] = {}
        self._losses: Tensor | float = 0.0  # of the epoch: the sum over as many batches
        self._batches = 0
        self._val_loss: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restored = {}  # a state that was loaded for `test` is none for the next `fit`

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work before anything has been trained."""
        if len(trainer.optimizers) != 1:
            raise ValueError(f"TunerCallback tunes runs with one optimizer, not {len(trainer.optimizers)}")
        if self._total_epochs is None and (trainer.max_epochs or -1) < 0:
            raise ValueError(
                f"the tuner must know the length of the run, and max_epochs is {trainer.max_epochs}: give "
                "Trainer(max_epochs=...) or TunerCallback(total_epochs=...)"
            )
        controls = self._arguments.get("controls")
        if trainer.lr_scheduler_configs and (controls is None or "lr" in controls):
            scheduler = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise ValueError(
                f"{scheduler} and the tuner would both set the learning rate: return the optimizer alone from "
                "configure_optimizers, or leave 'lr' out of TunerCallback(controls=[...])"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the tuner: everything has been restored by now."""
        if self.tuner is not None:
            self.tuner.close()
        state, self._restored = self._restored, {}
        self._first_epoch = state.get("first_epoch", trainer.current_epoch)
        self._loader = _only_loader(trainer)
        if self._loader is None:
            _log.warning("TunerCallback: training data that is not one DataLoader keeps its batch size")
        sampler = settable(self._loader) if self._loader is not None else None
        given = sampler.batch_size if sampler is not None else None
        batches = length_of(self._loader)
        self._share = trainer.num_training_batches / batches if batches else 1.0
        self.tuner = self._make(trainer)
        if _ends_by_steps(trainer) and "batch_size" in self.tuner.history[0]["hyperparameters"]:
            self.tuner.close()
            raise ValueError(
                f"max_steps={trainer.max_steps} counts optimizer steps, and the tuner changes how many an epoch has: "
                "give max_epochs alone, or leave 'batch_size' out of TunerCallback(controls=[...])"
            )
        self._begin_epoch()
        if state:
            self.tuner.load_state_dict(state["tuner"])
            self._losses, self._batches, self._val_loss = state["losses"], state["batches"], state["val_loss"]
        self._sampler = sampler if "batch_size" in self.tuner.hyperparameters else None
        self._begun_late = trainer.current_epoch > 0
        if self._sampler is not None and self._sampler.batch_size != given:
            self._recount(trainer)
            _start_pass(trainer)  # workers have been handed batches of the old size

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the trainer take the batch size of this epoch, also where it has just loaded its data anew."""
        self._loader = _only_loader(trainer)
        if self._sampler is not None and self._loader is not None and (sampler := settable(self._loader)) is not None:
            sampler.batch_size = self._sampler.batch_size
            self._recount(trainer)
        if self._begun_late:
            _start_pass(trainer)  # the trainer has done so before it told the sampler the epoch
            self._begun_late = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1  # it has been divided
            self._losses = self._losses + loss.detach() * scale
            self._batches += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._val_loss = _metric(trainer, self._monitor, "validation_step")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.tuner is not None
        if self._train_loss is not None:
            train_loss = _metric(trainer, self._train_loss, "training_step, with on_epoch=True")
        elif self._batches:
            train_loss = float(self._losses) / self._batches
        else:
            raise ValueError("training_step returned no loss: log one, and give TunerCallback(train_loss=...) its name")
        pl_module.log_dict({f"control/{name}": value for name, value in self.tuner.hyperparameters.items()})
        self.tuner.step(train_loss=train_loss, val_loss=self._val_loss)
        self._begin_epoch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.tuner is not None:
            self.tuner.close()

    def state_dict(self) -> dict[str, Any]:
        if self.tuner is None:
            return self._restored
        return {
            "tuner": self.tuner.state_dict(),
            "first_epoch": self._first_epoch,
            "losses": float(self._losses),
            "batches": self._batches,
            "val_loss": self._val_loss,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # the optimizer's state is not there yet

    def _make(self, trainer: pl.Trainer) -> Tuner:
        arguments: dict[str, Any] = {
            "total_epochs": self._total_epochs or _epochs(trainer) - self._first_epoch,
            "loader": self._loader,
            "model": trainer.model,
            "batches_per_step": trainer.accumulate_grad_batches,
        }
        if self._loader is not None and self._share != 1 and (rows := examples_in(self._loader)):
            arguments["examples_per_epoch"] = max(1, round(rows * self._share)) * trainer.world_size
        if self._examples is not None:
            arguments["examples_per_epoch"] = self._examples
        arguments |= self._arguments
        (optimizer,) = trainer.optimizers
        if isinstance(self._policy, ControlPolicy):
            return Tuner(self._policy, optimizer, **arguments)
        if self._policy is not None:
            return Tuner.load(self._policy, optimizer, **arguments)
        return Tuner.pretrained(optimizer, **arguments)

    def _begin_epoch(self) -> None:
        self._losses, self._batches, self._val_loss = 0.0, 0, None

    def _recount(self, trainer: pl.Trainer) -> None:
        """The trainer counts the batches of an epoch when it sets its loader up; batches of another size are more or
        fewer. Where their number is not known, an epoch ends with the data, or after as many batches as it did."""
        loop, loader = trainer.fit_loop, self._loader
        assert loop._combined_loader is not None
        assert loader is not None
        assert self._sampler is not None
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            vars(loader)["batch_size"] = self._sampler.batch_size  # of which its length is; torch refuses setattr
        if (batches := length_of(loader)) is None:
            return
        loop.max_batches = max(1, round(self._share * batches))
        loop._combined_loader.limits = [loop.max_batches]
        interval = getattr(trainer, "val_check_interval", None)  # there is none where it is a time
        if isinstance(interval, float):
            trainer.val_check_batch = max(1, int(loop.max_batches * interval))
        elif interval is not None and trainer.check_val_every_n_epoch is not None:
            trainer.val_check_batch = min(interval, loop.max_batches)


def _ends_by_steps(trainer: pl.Trainer) -> bool:
    return trainer.max_steps > 0 and not trainer.fast_dev_run  # type: ignore[attr-defined]  # which sets it


def _epochs(trainer: pl.Trainer) -> int:
    """Epochs of a run whose `max_epochs` are set, from its beginning on."""
    epochs = trainer.fit_loop.max_epochs
    assert epochs is not None
    if _ends_by_steps(trainer) and math.isfinite(batches := trainer.num_training_batches):
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        epochs = min(epochs, math.ceil(trainer.max_steps / steps))
    return epochs


def _only_loader(trainer: pl.Trainer) -> Loader | None:
    """The loader that the trainer iterates; None where there are several."""
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    if len(loaders) == 1 and isinstance(loaders[0], torch.utils.data.DataLoader):
        return loaders[0]
    return None


def _start_pass(trainer: pl.Trainer) -> None:
    """Start the pass over the training data anew. The trainer starts the first one before there is a tuner."""
    assert trainer.fit_loop._data_fetcher is not None
    iter(trainer.fit_loop._data_fetcher)


def _metric(trainer: pl.Trainer, name: str, where: str) -> float:
    """What was logged under `name`.

    Raises:
        ValueError: nothing was.
    """
    if name not in trainer.callback_metrics:
        found = unknown("metric", name, sorted(trainer.callback_metrics))
        raise ValueError(f"{found} (log it with self.log in {where})")
    return float(trainer.callback_metrics[name])
