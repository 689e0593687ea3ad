"""`Tuner`: a policy attached to a user's own PyTorch training run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from hpo_env.base_schedules import BaseSchedule
from hpo_env.control import ControlLoop, epochs_per_decision
from hpo_env.hyperparameters import CONTROLS, Array, Binding, HasBatchSize
from hpo_env.telemetry import combined
from inner_models.names import unknown
from inner_models.sampling import BatchSampler
from inner_models.signals import GradientMeter

from .files import ScalarWriter
from .policy import ControlPolicy, PolicyError
from .watch import LOWERED, Watch

PRETRAINED = "pretrained.safetensors"

ASSUMED_BATCH = 32
"""Examples that an optimizer step is taken to use where neither epochs nor batches are known in examples."""

_log = logging.getLogger("hyperpilot")


class _BatchSize:
    """The batch size in use; the run's samplers follow it."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.samplers: list[HasBatchSize] = []

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = value
        for sampler in self.samplers:
            sampler.batch_size = value


class Tuner:
    """Sets a run's learning rate, weight decay, dropout and batch size, epoch by epoch.

    The first decision is taken here, before training starts; each `step` takes the next.

    Args:
        policy: the policy that decides; `Tuner.load` and `Tuner.pretrained` read one.
        optimizer: the run's optimizer. Its parameter groups keep their ratios to one another, and groups without
            weight decay stay so.
        total_epochs: how many times `step` will be called. In runs of more than 64 the policy decides every second,
            third, ... time.
        examples_per_epoch: training examples in an epoch, usually `len(train_set)`: the best start depends on the
            length of the run. Without it the length is known from `batch_sampler`, or after the first epoch, from the
            steps that it took.
        model: the model; needed to move dropout and for the guard.
        batch_size: the run's batch size, if the tuner may change it; batches must then come from `batch_sampler`.
        start: `policy` chooses absolute values; `given` takes the run's own values (with warm-up and cosine decay) as
            the base and stays within `max_factor` of that.
        max_factor: see `start`. 100 is enough to mend a bad start; to fine-tune near your own values, give 3.
        controls: names of the controls that the policy may move, all that the run has when None.
        initial_loss: validation loss before training, if known: a signal like any other.
        signals: names of the losses that the run will give to `step`.
        guard: when the run diverges (a loss that is not finite, or far above the run's best), restore the best
            snapshot and lower the learning rate to a quarter. Keeps one copy of the model's and optimizer's state.
        writer: a TensorBoard `SummaryWriter` (or anything with `add_scalar`) for losses and controls.

    Attributes:
        history: one entry a decision: the epoch it is for, the signals and observation it saw, the action, the values
            set, what the guard did since the last one, and whether the policy was out of its depth.

    Raises:
        ValueError: bad arguments; the message names the value.
        PolicyError: the policy needs a signal that the run does not give.

    Example:
        >>> tuner = Tuner.pretrained(optimizer, model=model, total_epochs=30)  # doctest: +SKIP
        >>> for epoch in range(30):  # doctest: +SKIP
        ...     train_loss, val_loss = train_one_epoch(), validate()
        ...     tuner.step(train_loss=train_loss, val_loss=val_loss)
    """

    def __init__(
        self,
        policy: ControlPolicy,
        optimizer: torch.optim.Optimizer,
        *,
        total_epochs: int,
        examples_per_epoch: int | None = None,
        model: nn.Module | None = None,
        batch_size: int | None = None,
        start: Literal["policy", "given"] = "policy",
        max_factor: float = 100.0,
        controls: Sequence[str] | None = None,
        initial_loss: float | Tensor | None = None,
        signals: Sequence[str] = ("train_loss", "val_loss"),
        guard: bool = True,
        writer: ScalarWriter | None = None,
    ) -> None:
        if total_epochs < 1:
            raise ValueError(f"total_epochs must be at least 1, not {total_epochs}")
        if start not in ("policy", "given"):
            raise ValueError(f"start must be 'policy' or 'given', not {start!r}")
        if not max_factor > 1:
            raise ValueError(f"max_factor must be above 1, not {max_factor}")
        if examples_per_epoch is not None and examples_per_epoch < 1:
            raise ValueError(f"examples_per_epoch must be at least 1, not {examples_per_epoch}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if any("initial_lr" in group for group in optimizer.param_groups):
            _log.warning("a learning rate scheduler is attached to this optimizer; remove it: the tuner sets lr")
        if start == "policy" and not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
            _log.warning(
                "the policy knows AdamW and SGD; with %s its learning rates may not fit: consider start='given'",
                type(optimizer).__name__,
            )
        missing = [name for name in policy.header.required_signals if name not in signals]
        if missing:
            raise PolicyError(
                f"this policy needs {' and '.join(missing)} at every step, which this run does not give "
                f"(signals={tuple(signals)}); use a policy trained without"
            )
        shortest, _ = policy.header.trained_ranges.get("horizons", (1, math.inf))
        if total_epochs < shortest:
            _log.warning("this policy was trained on runs of %g epochs or more, not %d", shortest, total_epochs)
        self.policy, self.total_epochs = policy, total_epochs
        self._required = policy.header.required_signals
        self._optimizer, self._model, self._writer = optimizer, model, writer
        self._batch_size = None if batch_size is None else _BatchSize(batch_size)
        self._binding = Binding(optimizer, model, self._batch_size)
        sgd = isinstance(optimizer, torch.optim.SGD)
        given = {"batch_size": 1.0, "weight_decay": 0.0, "dropout": 0.0, **self._binding.read()}
        self._per_decision = epochs_per_decision(total_epochs)
        self._loop = ControlLoop(
            1,
            horizon=-(-total_epochs // self._per_decision),
            rule=policy.header.base_rule("sgd" if sgd else "adamw"),
            given=BaseSchedule(**given) if start == "given" else None,
            parameters=sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad),
            momentum_sgd=sgd,
            max_factor=max_factor if start == "given" else math.inf,
        )
        self._controls = _chosen(controls, self._binding.available)
        lacking = {name: 0.0 for name in CONTROLS if name not in self._controls}
        known = {} if initial_loss is None else {"val_loss": np.array([_number("initial_loss", initial_loss)])}
        self._loop.restart([0], known, fixed=[lacking])
        self._meter = GradientMeter(optimizer)
        self._settings: dict[str, Any] = {
            "total_epochs": total_epochs,
            "start": start,
            "max_factor": max_factor,
            "controls": list(self._controls),
        }
        self._guard = _Guard(model, optimizer) if guard and model is not None else None
        if self._guard and known:
            self._guard.check({"val_loss": float(known["val_loss"][0])})
        self._policy_state: Any = None
        self._epoch = 0
        self._since_decision: list[dict[str, Array]] = []
        self._warned = False
        self._verdict: str | None = None
        self.history: list[dict[str, Any]] = []
        if examples_per_epoch is not None:
            self._loop.tell_examples(float(examples_per_epoch * total_epochs))
        self._decide({name: float(value[0]) for name, value in known.items()}, None)

    @classmethod
    def load(cls, path: Path | str, optimizer: torch.optim.Optimizer, **arguments: Any) -> Self:
        """A tuner with the policy in the file at `path`; the other arguments are the class's own.

        Raises:
            FileNotFoundError, PolicyError: no such file; a file that is not a whole policy for this version.
        """
        return cls(ControlPolicy.load(path), optimizer, **arguments)

    @classmethod
    def pretrained(cls, optimizer: torch.optim.Optimizer, **arguments: Any) -> Self:
        """A tuner with the policy that ships with the package."""
        return cls.load(pretrained_path(), optimizer, **arguments)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """The values in use, of the controls that this run has."""
        return self._binding.read()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._epoch

    def step(self, *, train_loss: float | Tensor, val_loss: float | Tensor | None = None) -> dict[str, float]:
        """Call at the end of every epoch. Sets the hyperparameters for the next one and returns them.

        Losses may be numbers or one-element tensors. One that is not finite is a divergence, not an error.

        Raises:
            ValueError: a loss that the policy needs is missing or not a number.
        """
        losses = {"train_loss": train_loss, "val_loss": val_loss}
        missing = [name for name in self._required if losses.get(name) is None]
        if missing:
            raise ValueError(f"this policy needs {' and '.join(missing)} at every step: pass {missing[0]}=...")
        signals = {name: _number(name, value) for name, value in losses.items() if value is not None}
        signals = {name: value if math.isfinite(value) else math.inf for name, value in signals.items()}
        self._write("inner", signals, self.epoch + 1)
        self._write("control", {name: self.hyperparameters[name] for name in self._controls}, self.epoch + 1)
        batch = self._batch_size.batch_size if self._batch_size else ASSUMED_BATCH
        if self._meter.steps:
            self._loop.tell_examples(float(self._meter.steps * batch * self.total_epochs))
        self._since_decision.append({k: np.array([v]) for k, v in {**self._meter.finish(), **signals}.items()})
        self._epoch += 1
        due = self._epoch % self._per_decision == 0 or self._epoch >= self.total_epochs
        if due:
            self._loop.record(combined(self._since_decision))
            self._since_decision = []
        verdict = self._guard.check(signals) if self._guard else None
        if verdict and self._guard:
            self._guard.restore()
            self._loop.scale_lr(0, LOWERED)
            self._meter.begin()
            _log.warning("epoch %d: %s; restored the best snapshot and lowered lr to a quarter", self.epoch, verdict)
        if self.epoch < self.total_epochs:
            self._verdict = verdict or self._verdict
            if due:
                self._decide(signals, self._verdict)
                self._verdict = None
            else:
                self._apply(self._loop.values_at(self._progress))
        elif verdict:
            self._binding.write({"lr": self.hyperparameters["lr"] * LOWERED})
        if self.epoch == self.total_epochs + 1:
            _log.warning("more epochs than total_epochs=%d: values stay as they are", self.total_epochs)
        return self.hyperparameters

    def batch_sampler(
        self, data: Sized | int, *, seed: int | np.random.Generator = 0, drop_last: bool = False
    ) -> BatchSampler:
        """A batch sampler for `DataLoader(data, batch_sampler=...)` whose batches have the size in use.

        Args:
            data: the data set, or its number of rows.
            seed: seed or generator of the row order.
            drop_last: leave out a last batch that is not full.

        Raises:
            ValueError: the tuner was made without `batch_size`.
        """
        rows = data if isinstance(data, int) else len(data)
        sampler = BatchSampler(rows, 1, np.random.default_rng(seed), drop_last=drop_last)
        self.follow(sampler)
        if not self._epoch and self._loop.tell_examples(float(rows * self.total_epochs)):
            self._loop.take_back()
            self._policy_state = None
            self._decide(self.history.pop()["signals"], None)  # the first decision, with the length known
        return sampler

    def follow(self, sampler: HasBatchSize) -> None:
        """Have a sampler of the user's own, with a settable `batch_size`, take the batch size in use from now on.

        Raises:
            ValueError: the tuner was made without `batch_size`.
        """
        if self._batch_size is None:
            raise ValueError("the tuner was made without batch_size=..., so it does not control the batch size")
        sampler.batch_size = self._batch_size.batch_size
        self._batch_size.samplers.append(sampler)

    def state_dict(self) -> dict[str, Any]:
        """State to put in the run's own checkpoint (tensors and plain values, the guard's snapshot included)."""
        return {
            "loop": self._loop.state_dict(),
            "given": self._loop.given.to_dict() if self._loop.given else None,
            "epoch": self._epoch,
            "verdict": self._verdict,
            "since_decision": [{n: float(v[0]) for n, v in part.items()} for part in self._since_decision],
            "hyperparameters": self.hyperparameters,
            "history": copy.deepcopy(self.history),
            "settings": dict(self._settings),
            "samplers": [s.generator.bit_generator.state for s in self._samplers()],
            "guard": self._guard.state_dict() if self._guard else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Load the model's and the optimizer's state, and make the batch samplers, first.

        Raises:
            ValueError: the state is that of a tuner made with other arguments.
        """
        for name, value in self._settings.items():
            if state["settings"][name] != value:
                raise ValueError(f"the state is of a run with {name}={state['settings'][name]!r}, not {value!r}")
        for sampler, generator in zip(self._samplers(), state["samplers"], strict=False):
            sampler.generator.bit_generator.state = generator
        self._loop.given = BaseSchedule(**state["given"]) if state["given"] else None
        self._loop.load_state_dict(state["loop"])
        self._epoch, self._verdict = int(state["epoch"]), state["verdict"]
        self._since_decision = [{n: np.array([v]) for n, v in part.items()} for part in state["since_decision"]]
        self._binding.write(state["hyperparameters"])
        self.history = copy.deepcopy(list(state["history"]))
        if self._guard and self._model is not None:
            self._guard = _Guard(self._model, self._optimizer)  # of the weights just loaded
            if state["guard"]:
                self._guard.load_state_dict(state["guard"])
        self._meter.begin()

    def _samplers(self) -> list[BatchSampler]:
        followers = self._batch_size.samplers if self._batch_size else []
        return [sampler for sampler in followers if isinstance(sampler, BatchSampler)]

    def close(self) -> None:
        """Take the measuring hook off the optimizer."""
        self._meter.close()

    @property
    def _progress(self) -> float:
        """Where the middle of the coming epoch lies, 0..1 of the run."""
        return (self._epoch + 0.5) / self.total_epochs

    def _decide(self, signals: dict[str, float], guard: str | None) -> None:
        observation = self._loop.observe()
        action, self._policy_state = self.policy.act(observation, self._policy_state)
        lost = self.policy.out_of_depth(observation)
        if lost[0] and not self._warned:
            self._warned = True
            _log.warning(
                "epoch %d: this run looks unlike any that the policy was trained on; the base schedule takes over "
                "where it does",
                self.epoch,
            )
        chosen = self._apply(self._loop.decide(action, lost, self._progress))
        self.history.append(
            {
                "epoch": self.epoch,
                "signals": signals,
                "observation": observation[0].tolist(),
                "action": action[0].tolist(),
                "hyperparameters": chosen,
                "guard": guard,
                "out_of_depth": bool(lost[0]),
            }
        )

    def _apply(self, values: Mapping[str, Array]) -> dict[str, float]:
        chosen = {name: float(values[name][0]) for name in self._controls}
        self._binding.write(chosen)
        return chosen

    def _write(self, group: str, values: Mapping[str, float], epoch: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, epoch)


def pretrained_path() -> Path:
    """Where the policy that ships with the package lies."""
    return Path(__file__).with_name(PRETRAINED)


class _Guard:
    """Notices divergence and keeps the best snapshot, in main memory."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._watch = Watch()
        self._snapshot: dict[str, Any] = {}
        self._take()

    def check(self, signals: Mapping[str, float]) -> str | None:
        """What is wrong with the run, if anything; otherwise a new best loss is remembered with its state."""
        verdict, improved = self._watch.check(signals)
        if improved:
            self._take()
        return verdict

    def restore(self) -> None:
        self._model.load_state_dict(self._snapshot["model"])
        kept = [
            {key: value for key, value in group.items() if key != "params"} for group in self._optimizer.param_groups
        ]
        if len(kept) == len(self._snapshot["optimizer"]["param_groups"]):  # else groups came since: no state fits them
            self._optimizer.load_state_dict(copy.deepcopy(self._snapshot["optimizer"]))
            for group, values in zip(self._optimizer.param_groups, kept, strict=True):
                group.update(values)

    def state_dict(self) -> dict[str, Any]:
        return {**self._watch.state_dict(), "snapshot": _copied(self._snapshot)}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._watch.load_state_dict(state)
        self._snapshot = _copied(state["snapshot"])  # not the caller's own: the next best overwrites it

    @torch.inference_mode(False)  # a tensor made in that mode could not be overwritten outside of it
    def _take(self) -> None:
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        self._snapshot = _copied(state, self._snapshot)


def _copied(state: Any, into: Any = None) -> Any:
    """A copy of a state dict, its tensors in main memory: in those of `into`, an earlier copy, wherever they fit."""
    if isinstance(state, Tensor):
        fits = isinstance(into, Tensor) and (into.shape, into.dtype) == (state.shape, state.dtype)
        return into.copy_(state.detach()) if fits else state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        known = into if isinstance(into, dict) else {}
        return {key: _copied(value, known.get(key)) for key, value in state.items()}
    if isinstance(state, list):
        known = dict(enumerate(into)) if isinstance(into, list) else {}
        return [_copied(value, known.get(index)) for index, value in enumerate(state)]
    return copy.deepcopy(state)


def _chosen(controls: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    """The controls that the policy may move."""
    if controls is None:
        return tuple(available)
    for name in controls:
        if name not in available:
            raise ValueError(unknown("control", name, available))
    return tuple(name for name in available if name in controls)


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several elements
        raise ValueError(f"{name} must be a number, not {value!r}") from None
