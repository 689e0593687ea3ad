"""`TunerCallback`: the tuner in the Hugging Face Trainer."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Unpack

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from inner_models.names import unknown

from ..arguments import OptionalArguments, check_names
from ..optional import require
from ..policy import ControlPolicy
from ..state_file import load_state, save_state
from ..tuner import Tuner, pretrained_path

try:
    from transformers import SchedulerType, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError:
    require("transformers", extra="transformers")  # says how to install it
    raise

FILE = "tuner.safetensors"
"""The tuner's state, in every checkpoint of the Trainer."""

_KNOWN_TO_THE_TRAINER = ("optimizer", "model", "loader", "total_epochs", "examples_per_epoch", "batches_per_step")

_log = logging.getLogger("hyperpilot")


class _Tuner(Tuner):
    _losses_are_shared = True  # the Trainer gathers them, and its callbacks see the model without its wrapper
    _batch_size_stays = True


class TunerCallback(TrainerCallback):
    """Sets the learning rate, weight decay and dropout of a Trainer's run, anew after every evaluation.

    An interval is what lies between two evaluations, an epoch or `eval_steps` steps. The train loss of one is the mean
    of the losses that the Trainer logs, and the Trainer is made to log at its end. The learning rate schedule of the
    Trainer, warm-up included, is set aside. The batch size is left alone: the Trainer counts its steps once, before
    training, and would leave out examples if batches became smaller.

    What the run does not use is not switched on (`TrainingArguments` has `weight_decay=0`), nor are dropout rates moved
    that a model holds as numbers and not in `nn.Dropout` layers.

    The values in use are added to the logged losses as `control/<name>`: in `state.log_history`, and for the callbacks
    behind this one. The Trainer puts those of `report_to` in front, so give them yourself to see the values there:
    `report_to="none"` and `callbacks=[TunerCallback(), TensorBoardCallback()]`.

    Checkpoints contain the tuner's state, as `tuner.safetensors`. A run that is resumed from one that was written after
    an evaluation is the uninterrupted one.

    Args:
        policy: file of the policy that decides; the one that ships with the package when None.
        monitor: the metric that is the validation loss, lower is better.
        resume_from: the checkpoint that `Trainer.train` resumes from, if it does not lie in `output_dir` any more.
        arguments: further arguments of `Tuner`, such as `start`, `controls`, `guard` and `writer`: those of
            `agents.arguments.OptionalArguments`.

    Attributes:
        tuner: the `Tuner` of the present or last run, None before the first.

    Raises:
        TypeError: an argument that `Tuner` does not have.
        ValueError: an argument that is not for the user to give; in `Trainer.train`, if nothing is evaluated, `monitor`
            is not among the metrics, the schedule cannot be set aside, or a resumed run has no state of a tuner.

    Examples:
        >>> trainer = Trainer(model, args, callbacks=[TunerCallback()], ...)  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Path | str | None = None,
        *,
        monitor: str = "eval_loss",
        resume_from: Path | str | None = None,
        **arguments: Unpack[OptionalArguments],
    ) -> None:
        if "batch_size" in arguments:
            raise ValueError("the batch size of a Trainer's run cannot be moved: leave out batch_size")
        for name in _KNOWN_TO_THE_TRAINER:
            if name in arguments:
                raise ValueError(f"leave out {name}: the Trainer tells it")
        check_names(arguments)
        self.tuner: Tuner | None = None
        self._policy, self._monitor, self._resume_from = policy or pretrained_path(), monitor, resume_from
        self._arguments = arguments
        self._schedule: LambdaLR | None = None
        self._over = False  # the interval is, and its evaluation due
        self._metrics: set[str] = set()  # of that evaluation
        self._logged = 0  # the step
        self._losses, self._steps = 0.0, 0  # of the interval: the sum over as many steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.deepspeed or args.fsdp:
            raise ValueError("TunerCallback does not support DeepSpeed and FSDP")
        self._close()
        intervals = _intervals(args, state)
        batch_size = (state.train_batch_size or 1) * args.gradient_accumulation_steps * args.world_size
        controls, schedule = self._arguments.get("controls"), kwargs["lr_scheduler"]
        moved = controls is None or "lr" in controls
        self._schedule = _set_aside(schedule, args.lr_scheduler_type) if moved else None
        self.tuner = _Tuner(
            ControlPolicy.load(self._policy),
            kwargs["optimizer"],
            model=kwargs["model"],
            total_epochs=intervals,
            examples_per_epoch=math.ceil(state.max_steps * batch_size / intervals),
            batch_size=batch_size,
            **self._arguments,
        )
        _log.info("the batch size stays as it is: the Trainer counts its steps by it")
        self._begin_interval()
        self._logged = state.global_step
        if state.global_step:
            saved = load_state(self._checkpoint(args, state) / FILE)
            self.tuner.load_state_dict(saved["tuner"])
            self._losses, self._steps = saved["losses"], saved["steps"]
        self._follow()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._settle()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.eval_strategy == "steps" and (
            state.global_step % state.eval_steps == 0 or state.global_step >= state.max_steps
        ):
            self._over = control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_strategy == "epoch":
            self._over = control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self.tuner and "loss" in logs:
            steps, self._logged = state.global_step - self._logged, state.global_step
            self._losses, self._steps = self._losses + logs["loss"] * steps, self._steps + steps
            values = {f"control/{name}": value for name, value in self.tuner.hyperparameters.items()}
            logs.update(values)
            state.log_history[-1].update(values)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called for every evaluation set, after `on_log`."""
        metrics = kwargs["metrics"]
        if self._over and self._monitor in metrics:
            self._step(metrics[self._monitor])
        elif self._over:
            self._metrics.update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._settle()
        path = _folder(args, state) / FILE
        if self.tuner and args.should_save and path.parent.is_dir():
            save_state(path, {"tuner": self.tuner.state_dict(), "losses": self._losses, "steps": self._steps})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._settle()
        self._close()

    def _settle(self) -> None:
        """Finish an interval in which nothing was evaluated (`eval_delay`)."""
        if self._over and self._metrics:
            raise ValueError(unknown("metric", self._monitor, sorted(self._metrics)))
        if self._over:
            self._step(None)

    def _step(self, val_loss: float | None) -> None:
        assert self.tuner is not None
        self.tuner.step(train_loss=self._losses / self._steps if self._steps else None, val_loss=val_loss)
        self._begin_interval()
        self._follow()

    def _begin_interval(self) -> None:
        self._over, self._losses, self._steps = False, 0.0, 0
        self._metrics.clear()

    def _follow(self) -> None:
        """Have the schedule that was set aside stay at the tuner's rates."""
        if self._schedule is not None:
            self._schedule.base_lrs = [group["lr"] for group in self._schedule.optimizer.param_groups]
            self._schedule._last_lr = list(self._schedule.base_lrs)  # which the Trainer logs

    def _close(self) -> None:
        if self.tuner:
            self.tuner.close()

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The folder of the checkpoint that the run goes on from: the Trainer does not tell."""
        for folder in (self._resume_from, args.resume_from_checkpoint, _folder(args, state)):
            told = Path(folder or "", "trainer_state.json")
            if told.is_file() and told.with_name(FILE).is_file():
                own = TrainerState.load_from_json(str(told))
                if repr(own.log_history) == repr(state.log_history):  # as text, nan is nan
                    return told.parent
        raise ValueError(
            f"the run is resumed at step {state.global_step}, from a checkpoint without {FILE} or one that has been "
            "moved: train from the beginning, or say TunerCallback(resume_from=...)"
        )


def _intervals(args: TrainingArguments, state: TrainerState) -> int:
    """How many times a run is evaluated; those that `eval_delay` leaves out are counted."""
    if args.eval_strategy == "no":
        raise ValueError("TunerCallback needs evaluations: give TrainingArguments(eval_strategy='epoch')")
    if args.eval_strategy == "steps":
        return math.ceil(state.max_steps / state.eval_steps)
    if state.num_train_epochs > state.max_steps:
        raise ValueError(
            "the length of the training data is not known, so neither is the number of epochs: give "
            "TrainingArguments(eval_strategy='steps', eval_steps=...)"
        )
    return state.num_train_epochs


def _set_aside(schedule: LRScheduler, kind: str) -> LambdaLR:
    """Have a schedule, which the Trainer steps after every optimizer step, keep the rates that its optimizer has.

    Raises:
        ValueError: it is of a kind that has a mind of its own.
    """
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"{type(schedule).__name__} would overwrite the tuner's learning rates: give "
            "TrainingArguments(lr_scheduler_type='constant') and the Trainer no scheduler"
        )
    for group in schedule.optimizer.param_groups:
        group["lr"] = group.pop("initial_lr", group["lr"])  # 0 during a warm-up; and there is no scheduler any more
    schedule.lr_lambdas = [_constant] * len(schedule.lr_lambdas)
    if kind != "constant":
        _log.warning(
            "the Trainer's %s schedule is set aside: the tuner sets the learning rate", SchedulerType(kind).value
        )
    return schedule


def _constant(step: int) -> float:
    return 1.0


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts the checkpoint of the present step."""
    return Path(args.output_dir or "", f"checkpoint-{state.global_step}")
