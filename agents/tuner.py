"""`Tuner`: a policy attached to a user's own PyTorch training run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any, ClassVar, Literal, Self, SupportsIndex, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from hpo_env.base_schedules import BaseSchedule
from hpo_env.control import ControlLoop, Intervals, epochs_per_decision
from hpo_env.hyperparameters import CONTROLS, Array, Binding, HasBatchSize
from inner_models.sampling import BatchSampler

from .arguments import TunerArguments, check_kinds, check_run, chosen, count, real, warn_of_misfits
from .batch_size import Loader, batch_in, examples_in, rows_of
from .board import group_values, write_decision, write_epoch
from .files import ScalarWriter
from .guard import Guard
from .policy import ControlPolicy
from .ranks import averaged, world_size
from .reasons import reason
from .tolerance import Notices, TolerantMeter
from .trajectory import Trajectory
from .tuner_state import VERSION
from .tuner_state import check as check_state
from .user_run import batch_sampler, batch_size_of, losses_of, own_optimizer
from .watch import LOWERED

PRETRAINED = "pretrained.safetensors"

ASSUMED_BATCH = 32
"""Examples that an optimizer step is taken to use where neither epochs nor batches are known in examples."""

MAX_FACTOR = 1000.0
"""How far values may go from those that are given, where nobody says."""

_log = logging.getLogger("hyperpilot")


class Tuner:
    """Sets a run's learning rate, weight decay, dropout and batch size, epoch by epoch; and, with a policy that knows
    them, the strength of its augmentation and its label smoothing.

    The first decision is taken here, before training starts; each `step` takes the next.

    Args:
        policy: the policy that decides; `Tuner.load` and `Tuner.pretrained` read one.
        optimizer: the run's optimizer. Its parameter groups keep their ratios to one another, and groups without
            weight decay stay so.
        total_epochs: how many times `step` will be called. In runs of more than 64 the policy decides every second,
            third, ... time.
        loader: the run's training `DataLoader`. From then on its batch size is what the tuner says, if the loader has
            one that can be set (an ordinary loader has), from its next pass on; `loader.batch_size` does not show it.
        model: the model; needed to move dropout and augmentation (`Augment`), and for the guard. If it is or holds a
            `DistributedDataParallel`, `step` takes the mean of the losses over its processes: all of them must make and
            step a tuner.
        criterion: the training loss as a module, such as `nn.CrossEntropyLoss(label_smoothing=0.1)`; needed to move
            label smoothing. The validation losses given to `step` are to be another's, without smoothing: else they
            move with it.
        batches_per_step: batches of the loader that make one optimizer step (gradient accumulation).
        examples_per_epoch: training examples in an epoch, usually `len(train_set)`: the best start depends on the
            length of the run. Without it the length is known from `loader` or `batch_sampler`, or guessed after the
            first epoch, from the steps that it took (with a warning). A batch size that stays, and is not known either,
            follows from it after that epoch.
        batch_size: in place of `loader`: the run's batch size, if the tuner may change it; batches must then come from
            `batch_sampler`, whose row order is part of the tuner's state.
        start: `policy` chooses absolute values; `given` takes the run's own values (with warm-up and cosine decay) as
            the base and stays within `max_factor` of that.
        max_factor: see `start`, without which it is an error. 1,000, where it is left out, is enough to mend a bad
            start; to fine-tune near your own values, give 3.
        controls: names of the controls that the policy may move; all that the run has and the policy knows when None.
        initial_loss: validation loss before training, if known: a signal like any other.
        signals: names of the losses that the run will give to `step`.
        guard: when the run diverges (a loss that is not finite, or far above the run's best), restore the best
            snapshot and lower the learning rate to a quarter; after three times in a row, which did not help, it is
            taken back, and the losses are believed. Keeps one copy of the model's and optimizer's state. The first
            time is logged as a warning, later ones at the level DEBUG.
        writer: a TensorBoard `SummaryWriter` (or anything with `add_scalar`) for losses, controls and reasons
            (`agents.board.RUN_TAGS`).

    Attributes:
        history: one entry a decision: the epoch it is for, the signals and observation it saw, the action, the values
            set, what the guard did since the last one, whether the policy was out of its depth, and the reason in plain
            words.

    Raises:
        ValueError: bad arguments; the message names the value.
        PolicyError: the policy needs a signal that the run does not give.

    Examples:
        >>> tuner = Tuner.pretrained(optimizer, model=model, total_epochs=30)  # doctest: +SKIP
        >>> for epoch in range(30):  # doctest: +SKIP
        ...     train_loss, val_loss = train_one_epoch(), validate()
        ...     tuner.step(train_loss=train_loss, val_loss=val_loss)
    """

    _losses_are_shared: ClassVar[bool] = False
    """Whether all processes are given the same ones, whatever the model is."""

    _batch_size_stays: ClassVar[bool] = False
    """Whether the batch size is known and nothing else: not even where it would be a control."""

    def __init__(
        self,
        policy: ControlPolicy,
        optimizer: torch.optim.Optimizer,
        *,
        total_epochs: int,
        loader: Loader | None = None,
        model: nn.Module | None = None,
        criterion: nn.Module | None = None,
        batches_per_step: int = 1,
        examples_per_epoch: int | None = None,
        batch_size: int | None = None,
        start: Literal["policy", "given"] = "policy",
        max_factor: float | None = None,
        controls: Sequence[str] | None = None,
        initial_loss: float | Tensor | None = None,
        signals: Sequence[str] = ("train_loss", "val_loss"),
        guard: bool = True,
        writer: ScalarWriter | None = None,
    ) -> None:
        optimizer = own_optimizer(optimizer)
        check_kinds(optimizer, loader, model, criterion, writer)
        total_epochs = count("total_epochs", total_epochs)
        if start not in ("policy", "given"):
            raise ValueError(f"start must be 'policy' or 'given', not {start!r}")
        if max_factor is not None and start == "policy":
            raise ValueError(f"max_factor={short(max_factor)} is for start='given', to stay near your own values")
        max_factor = real("max_factor", MAX_FACTOR if max_factor is None else max_factor)
        if not max_factor > 1:
            raise ValueError(f"max_factor must be above 1, not {max_factor}")
        examples = None if examples_per_epoch is None else count("examples_per_epoch", examples_per_epoch)
        self._notices = Notices()
        ranks = world_size(model, None if self._losses_are_shared else self._notices)
        self._batches = batches = count("batches_per_step", batches_per_step) * ranks
        if examples is None and loader is not None and (rows := examples_in(loader)):
            examples = rows * ranks
        check_run(policy, optimizer, signals)
        self._batch_size = batch_size_of(batch_size, loader, model, batches, self._notices)
        known = {} if initial_loss is None else {"val_loss": real("initial_loss", initial_loss)}
        known = averaged(known, model)
        if not all(map(math.isfinite, known.values())):
            self._notices.tell("initial", "initial_loss=%g is taken as not known", known.pop("val_loss"))
        self.policy, self._total_epochs = policy, total_epochs
        self._optimizer, self._model, self._writer = optimizer, model, writer
        self._binding = Binding(optimizer, model, None if self._batch_size_stays else self._batch_size, criterion)
        sgd = isinstance(optimizer, torch.optim.SGD)
        given = {"batch_size": 1.0, "weight_decay": 0.0, "dropout": 0.0, **self._binding.read()}
        self._intervals = Intervals(total_epochs)
        self._loop = ControlLoop(
            1,
            horizon=self._intervals.horizon,
            rule=policy.header.base_rule("sgd" if sgd else "adamw"),
            given=BaseSchedule(**given) if start == "given" else None,
            parameters=sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad),
            momentum_sgd=sgd,
            max_factor=max_factor if start == "given" else math.inf,
        )
        known_controls = [name for name in self._binding.available if name in policy.header.controls]
        self._controls = moved = chosen(controls, known_controls)
        warn_of_misfits(policy, optimizer, total_epochs, start, moved)
        lacking = {name: 0.0 for name in CONTROLS if name not in moved}
        if "batch_size" in lacking and (rows := self._rows_of_a_step(loader)):
            lacking["batch_size"] = float(min(rows, examples or rows))
        self._loop.restart([0], {name: np.array([value]) for name, value in known.items()}, fixed=[lacking])
        self._settings: dict[str, Any] = {"total_epochs": total_epochs, "start": start, "max_factor": max_factor}
        self._settings["controls"] = ", ".join(moved)
        self._guard = self._made_guard() if guard and model is not None else None
        if self._guard and known:
            self._guard.check(0, known)
        self._meter = TolerantMeter(optimizer, self._notices, self._guard.begin if self._guard else None)
        self._policy_state: Any = None
        self._verdict: str | None = None
        self._history: list[dict[str, Any]] = []
        self._unexplained: list[tuple[dict[str, Any], Callable[[], str]]] = []
        self._epochs: list[dict[str, Any]] = []
        self._examples, self._told = examples, None if examples_per_epoch is None else examples
        self._whole = True  # the epoch so far
        self._written: dict[str, float] = {}
        if examples is not None:
            self._loop.tell_examples(float(examples * total_epochs))
        self._decide(known, None)

    @classmethod
    def load(cls, path: Path | str, optimizer: torch.optim.Optimizer, **arguments: Unpack[TunerArguments]) -> Self:
        """A tuner with the policy in the file at `path`; the other arguments are the class's own.

        Raises:
            FileNotFoundError, PolicyError: no such file; a file that is not a whole policy for this version.
        """
        return cls(ControlPolicy.load(path), optimizer, **arguments)

    @classmethod
    def pretrained(cls, optimizer: torch.optim.Optimizer, **arguments: Unpack[TunerArguments]) -> Self:
        """A tuner with the policy that ships with the package."""
        return cls.load(pretrained_path(), optimizer, **arguments)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """The values in use, of the controls that this run has."""
        return self._binding.read()

    @property
    def history(self) -> list[dict[str, Any]]:
        """See the class. A decision is put into words only when somebody reads this."""
        for entry, explain in self._unexplained:
            with self._notices.surviving("explaining a decision"):
                entry["reason"] = explain()
        self._unexplained.clear()
        return self._history

    @property
    def total_epochs(self) -> int:
        """The run's length. It stays: another one is another schedule, and another tuner."""
        return self._total_epochs

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._intervals.epoch

    @property
    def trajectory(self) -> Trajectory:
        """What was done so far: to be saved, looked at, and applied to another run (`agents.replay`)."""
        return Trajectory.of_epochs(
            self._epochs,
            self.history,
            total_epochs=self.total_epochs,
            optimizer=type(self._optimizer).__name__,
            examples_per_epoch=self._examples,
            policy=self.policy.digest,
        )

    def step(self, *, train_loss: float | Tensor | None, val_loss: float | Tensor | None = None) -> dict[str, float]:
        """Call at the end of every epoch. Sets the hyperparameters for the next one and returns them.

        Losses may be numbers or one-element tensors, and negative: the same function of the model on training and on
        validation rows, and the same all the time. What a run can bring about ends no run, and each kind of it is
        logged once: a loss that is not finite is a divergence; one that is None (validation comes late, or not in every
        epoch) counts as not measured.

        Raises:
            ValueError: a loss is neither a number nor None; nothing has changed then.
        """
        told = losses = losses_of(self._model, train_loss, val_loss)
        if self._guard and self._guard.validation_is_broken and math.isinf(told.get("val_loss", 0.0)):
            losses = {name: value for name, value in told.items() if name != "val_loss"}
        missing = [name for name in self.policy.header.required_signals if name not in losses]
        if missing:
            self._notices.tell("missing", "epoch %d: %s not measured", self.epoch + 1, " and ".join(missing))
        used = self._moved(self.hyperparameters)
        self._warn_if_overwritten(used)
        self._warn_of_new_groups()
        steps, self._whole = self._meter.steps if self._whole else 0, True
        if steps:
            self._learn_from(steps)
        measured = {**averaged(self._meter.finish(), self._model), **losses}
        interval = self._intervals.finish_epoch({name: np.array([value]) for name, value in measured.items()})
        self._write({name: value for name, value in measured.items() if not math.isnan(value)}, used)
        if interval is not None:
            self._loop.record(interval)
        verdict, factor = self._guarded(told)
        if steps and self._told:
            self._loop.tell_batch_size(self._told / steps, may_raise_lr=not verdict)
        self._epochs.append({"values": used, "losses": losses, "guard": verdict})
        if self.epoch < self.total_epochs:
            self._verdict = verdict or self._verdict
            if interval is not None:
                self._decide(losses, self._verdict)
                self._verdict = None
            else:
                self._apply(self._loop.values_at(self._intervals.progress))
        elif factor != 1 and "lr" in self._controls:
            self._set({"lr": self.hyperparameters["lr"] * factor})
        if self.epoch > self.total_epochs:
            self._notices.tell("over", "more epochs than total_epochs=%d: values stay as they are", self.total_epochs)
        return self.hyperparameters

    def batch_sampler(
        self, data: Sized | SupportsIndex, *, seed: int | np.random.Generator = 0, drop_last: bool = False
    ) -> BatchSampler:
        """A batch sampler for `DataLoader(data, batch_sampler=...)` whose batches have the size in use.

        Args:
            data: the data set, or its number of rows.
            seed: seed or generator of the row order.
            drop_last: leave out a last batch that is not full.

        Raises:
            ValueError: the tuner was made without `batch_size`.
        """
        sampler = batch_sampler(self._batch_size, data, seed, drop_last)
        self._written = self.hyperparameters  # the sampler may not have room for the batch size
        self._know(sampler.rows)
        return sampler

    def follow(self, sampler: HasBatchSize) -> None:
        """Have a sampler of the user's own, with a settable `batch_size`, take the batch size in use from now on. If it
        has a length in batches as well, the length of the run is known by it.

        Raises:
            ValueError: the tuner was made without `batch_size`.
        """
        if self._batch_size is None:
            raise ValueError("the tuner was made without batch_size=..., so it does not control the batch size")
        rows = rows_of(sampler)
        self._batch_size.follow(sampler)
        self._written = self.hyperparameters
        if rows:
            self._know(rows)

    def state_dict(self) -> dict[str, Any]:
        """State to put in the run's own checkpoint (tensors and plain values, the guard's snapshot included)."""
        return {**self._outline(), "guard": self._guard.state_dict() if self._guard else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, exactly if it was taken between epochs. Load the model's and the optimizer's state,
        and make the batch samplers, first.

        Raises:
            ValueError: the state is damaged, of another version, or of a tuner made with other arguments; the tuner is
                then as it was.
        """
        try:
            self._load(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the tuner's state cannot be used: {str(error) or type(error).__name__}") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        """All that can fail comes before anything is changed."""
        check_state(state, self._outline())
        guard = None
        if self._guard:
            guard = self._made_guard()  # of the weights just loaded
            if state["guard"]:
                guard.load_state_dict(state["guard"])
        intervals = Intervals(self.total_epochs)
        intervals.load_state_dict(state["intervals"])
        if self._batch_size:
            self._batch_size.check(state["samplers"])
        self._loop.load_state_dict(state["loop"])  # all of it or nothing; what follows cannot fail
        if self._batch_size:
            self._batch_size.load_state_dict(state["samplers"])
        self._intervals, self._guard = intervals, guard
        self._verdict = state["verdict"]
        self._binding.shares = copy.deepcopy(state["shares"])
        self._set(state["hyperparameters"])
        self._unexplained.clear()
        self._history, self._epochs = copy.deepcopy(state["history"]), copy.deepcopy(state["epochs"])
        self._meter.resume()
        self._whole = not state["steps"]
        if state["policy"] != self.policy.digest:
            self._notices.tell("policy", "the state is of a run with another policy; from now on this one decides")

    def _outline(self) -> dict[str, Any]:
        """The state without the guard's, which is as large as the model's."""
        return {
            "version": VERSION,
            "settings": dict(self._settings),
            "policy": self.policy.digest,
            "steps": self._meter.steps,
            "intervals": self._intervals.state_dict(),
            "loop": self._loop.state_dict(),
            "verdict": self._verdict,
            "hyperparameters": self.hyperparameters,
            "shares": copy.deepcopy(self._binding.shares),
            "history": copy.deepcopy(self.history),
            "epochs": copy.deepcopy(self._epochs),
            "samplers": self._batch_size.state_dict() if self._batch_size else [],
        }

    def close(self) -> None:
        """Take the measuring hook off the optimizer, and give the loader its own batch size back."""
        self._meter.close()
        if self._batch_size:
            self._batch_size.give_back()

    def _made_guard(self) -> Guard:
        assert self._model is not None
        return Guard(self._model, self._optimizer, self._notices, lowers_lr="lr" in self._controls)

    def _guarded(self, losses: Mapping[str, float]) -> tuple[str | None, float]:
        """Have the guard look at an epoch's losses. Returns what is wrong with the run, if anything, and the factor on
        its learning rate."""
        broken = [name for name, value in losses.items() if not math.isfinite(value)]
        if self._guard is None and broken:
            self._notices.tell("losses", "epoch %d: %s not finite", self.epoch, " and ".join(broken))
        if not self._guard or not losses:
            return None, 1.0
        found = self._guard.check(self.epoch, losses)
        factor = LOWERED ** (bool(found.verdict) - found.taken_back)
        self._loop.scale_lr(0, factor)
        if found.verdict:
            self._meter.begin()
        return found.verdict, factor

    def _rows_of_a_step(self, loader: Loader | None) -> int | None:
        """Rows of an optimizer step, where they are known before training."""
        if self._batch_size:
            return self._batch_size.batch_size
        rows = batch_in(loader) if loader is not None else None
        return rows and rows * self._batches

    def _know(self, rows: int) -> None:
        """The rows of an epoch, where they were not known: before training the first decision is taken again."""
        if self._examples is None:
            self._examples = rows
        if not self.epoch and self._loop.tell_examples(float(rows * self.total_epochs)):
            self._loop.take_back()
            self._policy_state = None
            self._decide(self.history.pop()["signals"], None)

    def _learn_from(self, steps: int) -> None:
        """What an epoch's optimizer steps say of the length of the run and of its batches."""
        batch = self._batch_size.batch_size if self._batch_size else ASSUMED_BATCH * self._batches
        if not self._loop.knows_examples:
            self._loop.tell_examples(float(steps * batch * self.total_epochs))
            if self._settings["start"] == "policy":
                self._notices.tell(
                    "length",
                    "epoch %d: the run's length was not known until now, and its first values are not made for it: "
                    "give loader or examples_per_epoch",
                    self.epoch + 1,
                )
        elif (
            self._batch_size
            and self._examples
            and self._examples / steps > 1.5 * batch
            and self.epoch + 1 < self.total_epochs  # a last epoch may be cut short
        ):
            self._notices.tell(
                "batches",
                "epoch %d: %d examples made %d optimizer steps, with batches of %d: give batches_per_step (gradient "
                "accumulation) or examples_per_epoch (not a whole pass)",
                self.epoch + 1,
                self._examples,
                steps,
                batch,
            )

    def _decide(self, signals: dict[str, float], guard: str | None) -> None:
        observation = self._loop.observe()
        action, self._policy_state = self.policy.act(observation, self._policy_state)
        lost = self.policy.out_of_depth(observation)
        if lost[0]:
            self._notices.tell(
                "depth",
                "epoch %d: this run looks unlike any that the policy was trained on; the base schedule takes over "
                "where it does",
                self.epoch,
            )
        before = self._moved(self.hyperparameters)
        chosen = self._apply(self._loop.decide(action, lost, self._intervals.progress))
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "signals": signals,
            "observation": observation[0].tolist(),
            "action": action[0].tolist(),
            "hyperparameters": chosen,
            "guard": guard,
            "out_of_depth": bool(lost[0]),
            "reason": "",
        }
        explain = partial(
            reason,
            self.policy,
            observation,
            action,
            before,
            self._moved(_only(self._loop.without_action)),
            chosen,
            first=not self.epoch,
            out_of_depth=entry["out_of_depth"],
            guard=guard,
            epochs=epochs_per_decision(self.total_epochs),
        )
        self._unexplained.append((entry, explain))
        self._history.append(entry)

    def _moved(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of these values, those of the controls that the policy may move."""
        return {name: float(values[name]) for name in self._controls}

    def _apply(self, values: Mapping[str, Array]) -> dict[str, float]:
        chosen = self._moved(_only(values))
        self._set(chosen)
        return chosen

    def _set(self, values: Mapping[str, float]) -> None:
        self._binding.write(values)
        self._written = self.hyperparameters

    def _warn_if_overwritten(self, used: Mapping[str, float]) -> None:
        # A rate may be a tensor of float32.
        others = [name for name, value in used.items() if not math.isclose(value, self._written[name], rel_tol=1e-6)]
        if others:
            self._notices.tell(
                "overwritten",
                "epoch %d was trained with %s, not with what the tuner had set: something else, a scheduler perhaps, "
                "sets it too; remove that, or leave it out of controls",
                self.epoch + 1,
                " and ".join(f"{name} {used[name]:g}" for name in others),
            )

    def _warn_of_new_groups(self) -> None:
        added = self._optimizer.param_groups[len(self._binding.shares["lr"]) :]
        for rate in (float(group["lr"]) for group in added):
            if "lr" in self._controls and not math.isclose(rate, self._written["lr"], rel_tol=1e-6):
                self._notices.tell(
                    "groups",
                    "epoch %d: a parameter group was added with lr %g, and has the largest of all groups from now on: "
                    "for a share of what the tuner sets, add the group before the tuner is made",
                    self.epoch + 1,
                    rate,
                )

    def _write(self, signals: Mapping[str, float], used: Mapping[str, float]) -> None:
        """Write an epoch that is over, and the decision that it began with, if it began with one."""
        if self._writer is not None:
            with self._notices.surviving("writing to TensorBoard"):
                write_epoch(self._writer, self.epoch, signals, used, group_values(self._optimizer))
                if self.history[-1]["epoch"] == self.epoch - 1:
                    write_decision(self._writer, self.epoch, self.history[-1]["reason"])


def _only(values: Mapping[str, Array]) -> dict[str, float]:
    """Those of the one run that there is."""
    return {name: value.item() for name, value in values.items()}


def pretrained_path() -> Path:
    """Where the policy that ships with the package lies."""
    return Path(__file__).with_name(PRETRAINED)
