"""A tuner in other people's runs: bad signals, runs that are killed and resumed, damaged states, fuzzed inputs."""

from __future__ import annotations

import copy
import logging
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from agents import ControlPolicy, Tuner
from agents.guard import _layout
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import HIGH, LOW
from inner_models.sampling import BatchSampler
from tests.faults import Fault, Outcome
from tests.tiny import random_policy
from tests.user_runs import through_a_file

ROWS = 40

Case = TypeVar("Case")

Mend = Callable[[], None]

# -- a user's run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What the tuner is attached to.

    Attributes:
        told: whether the tuner is given the model.
        batches: whether batches come from the tuner's sampler.
    """

    optimizer: str = "adamw"
    epochs: int = 8
    told: bool = True
    guard: bool = True
    batches: bool = False
    start: Literal["policy", "given"] = "policy"


SETTINGS = (
    Setting(batches=True),
    Setting("sgd", guard=False),
    Setting(epochs=130, start="given"),
    Setting("sgd", told=False, batches=True),
)


class UserRun:
    """Regression on 40 rows, with dropout, in batches of the tuner's or of 4: ten optimizer steps an epoch."""

    def __init__(self, setting: Setting, policy: ControlPolicy, seed: int = 0, **arguments: Any) -> None:
        torch.manual_seed(seed)
        self.layers = nn.Linear(3, 4), nn.Linear(4, 1)
        self.model = nn.Sequential(self.layers[0], nn.Tanh(), nn.Dropout(0.2), self.layers[1])
        groups: list[dict[str, Any]] = [
            {"params": layer.parameters(), "lr": lr} for layer, lr in zip(self.layers, (0.003, 0.001), strict=True)
        ]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(groups, weight_decay=0.01)
            if setting.optimizer == "adamw"
            else torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)
        )
        self.inputs = torch.linspace(-1, 1, 3 * ROWS).reshape(ROWS, 3).requires_grad_()
        self.targets = self.inputs.detach().prod(1, keepdim=True)
        self._setting, self._policy, self._arguments = setting, policy, arguments
        self.attach()
        self._mend: Mend | None = None
        self.optimizer.register_step_pre_hook(lambda *_: self._mend() if self._mend else None)  # after the tuner's

    def attach(self) -> None:
        """Make the tuner."""
        self.tuner = Tuner(
            self._policy,
            self.optimizer,
            model=self.model if self._setting.told else None,
            total_epochs=self._setting.epochs,
            batch_size=16 if self._setting.batches else None,
            guard=self._setting.guard,
            start=self._setting.start,
            **self._arguments,
        )
        self.sampler: BatchSampler | None = self.tuner.batch_sampler(ROWS) if self._setting.batches else None

    def epoch(self, spoil: Callable[[UserRun], Mend | None] | None = None) -> float:
        """Train; what `spoil` does before every optimizer step, its result undoes before the optimizer sees it. Returns
        the mean loss."""
        losses: list[float] = []
        for rows in self.sampler or torch.split(torch.arange(ROWS), 4):
            self.optimizer.zero_grad()
            loss = (self.model(self.inputs[rows]) - self.targets[rows]).square().mean()
            torch.autograd.backward(loss)
            losses.append(loss.item())
            self._mend = spoil(self) if spoil else None
            self.optimizer.step()
        return sum(losses) / len(losses)

    def broken(self) -> bool:
        """Whether a weight is not finite; if so, the user begins with new ones."""
        found = not all(parameter.isfinite().all() for parameter in self.model.parameters())
        if found:
            for layer in self.layers:
                layer.reset_parameters()
            self.optimizer.state.clear()
        return found

    def state(self) -> dict[str, Any]:
        """The checkpoint that the user takes at the end of an epoch."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tuner": self.tuner.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any], tuner_first: bool) -> None:
        """Go on from a checkpoint; the tuner is made before, or once model and optimizer have their states."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on with these very tensors
        if not tuner_first:
            self.tuner.close()
            self.attach()
        self.tuner.load_state_dict(state["tuner"])
        torch.set_rng_state(state["rng"])


class Warnings(logging.Handler):
    """Keeps what the tuner warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def warnings_of_the_tuner() -> Iterator[list[logging.LogRecord]]:
    """The warnings that are logged within."""
    handler, logger = Warnings(), logging.getLogger("hyperpilot")
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)


def out_of_bounds(tuner: Tuner) -> list[str]:
    """What is wrong with the last decision and the values in use."""
    seen, values = np.array(tuner.history[-1]["observation"]), tuner.hyperparameters
    wrong = [] if (np.isfinite(seen) & (seen >= LOW) & (seen <= HIGH)).all() else [f"observation {seen}"]
    for name in tuner.history[-1]["hyperparameters"]:
        low = 0.0 if name == "lr" else CONTROLS[name].low  # at the end of its cosine, or lowered by the guard
        if not (low <= values[name] <= CONTROLS[name].high):
            wrong.append(f"{name}={values[name]}")
    return wrong


def misreported(records: list[logging.LogRecord], due: Mapping[str, bool]) -> list[str]:
    """Which kinds of trouble were logged more than once; which parts of messages were logged or not where the contrary
    was due."""
    counts = Counter(str(record.msg) for record in records)
    logged = "\n".join(record.getMessage() for record in records)
    twice = [f"logged {count} times: {message}" for message, count in counts.items() if count > 1]
    return twice + [f"{'not ' * is_due}logged: {text!r}" for text, is_due in due.items() if (text in logged) != is_due]


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)  # NaN equals itself here


# -- bad signals -------------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1e308": 1e308,
    "-1e308": -1e308,
    "denormal": 1e-320,
    "zero": 0.0,
    "negative": -3.0,
    "none": None,
    "bool": True,
    "tensor of nan": torch.tensor(math.nan),
    "tensor with gradient": torch.tensor([0.5], requires_grad=True),
    "float16 overflow": torch.tensor(7e4).half(),
    "numpy nan": np.float32(math.nan),
    "numpy array": np.array([[0.25]]),
}
"""What a run can bring forth."""

WRONG: dict[str, Any] = {
    "string": "0.5",
    "complex": 1j,
    "numpy complex": np.complex128(1),
    "list": [0.5],
    "two elements": torch.ones(2),
    "no elements": torch.ones(0),
    "too large": 10**400,
}
"""What only a mistake in a program can."""

SIGNALS = ("train_loss", "val_loss", "both", "initial_loss")

TIMES: dict[str, Callable[[int], bool]] = {
    "once": lambda epoch: epoch == 3,
    "often": lambda epoch: epoch % 2 == 1,
    "always": lambda epoch: True,
    "repeated": lambda epoch: epoch == 3,
}
"""In which epochs, counted from 0, a loss is bad; when repeated, `step` is called twice for that epoch."""


def bad_signal(setting: Setting, signal: str, kind: str, when: str, policy: ControlPolicy) -> list[str]:
    """Ten epochs (in a short run, two too many) with bad losses. Where they are not finite, neither are the weights.
    Returns what did not hold."""
    value, failures, lost = VALUES[kind], list[str](), False
    finite = value is None or math.isfinite(getattr(value, "item", lambda: value)())
    first, later = signal in ("both", "initial_loss"), signal != "initial_loss"
    with warnings_of_the_tuner() as records:
        run = UserRun(setting, policy, initial_loss=value if first else None)
        for epoch in range(10):
            good, bad = run.epoch(), later and TIMES[when](epoch)
            losses = {name: value if bad and signal in (name, "both") else good for name in ("train_loss", "val_loss")}
            if bad and not finite:
                lost = True
                run.layers[0].weight.data.fill_(math.nan)
            for _ in range(2 if bad and when == "repeated" else 1):
                run.tuner.step(**losses)
                failures += out_of_bounds(run.tuner)
            if run.broken() and setting.told and setting.guard:
                failures.append(f"epoch {epoch}: weights not restored")
    due = {
        "not measured": value is None and later,
        "loss not finite": lost,
        "is taken as not known": first and not finite,
        "more epochs than total_epochs": setting.epochs < 10,
        "is step called more often": when == "repeated" and later,
        "failed": False,
    }
    return failures + misreported(records, due)


def wrong_signal(setting: Setting, signal: str, kind: str, policy: ControlPolicy) -> list[str]:
    """A loss that is no number is refused, and nothing has changed. Returns what did not hold."""
    run = UserRun(setting, policy)
    losses: dict[str, Any] = dict.fromkeys(("train_loss", "val_loss"), 0.5)
    losses |= {name: WRONG[kind] for name in losses if signal in (name, "both")}
    run.epoch()
    before = copy.deepcopy(run.state())
    try:
        if signal == "initial_loss":
            Tuner(policy, run.optimizer, total_epochs=3, initial_loss=WRONG[kind])
        else:
            run.tuner.step(**losses)
    except ValueError as error:
        changed = [] if same(before, run.state()) else ["something has changed"]
        return changed + ([] if re.fullmatch(r"\w+ must be a number, not .{1,99}", str(error)) else [str(error)])
    return ["no ValueError"]


# -- bad gradients, parameters and optimizers --------------------------------------------------------------------------


def _filled(value: float) -> Callable[[UserRun], None]:
    def spoil(run: UserRun) -> None:
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(value)

    return spoil


def _sparse(run: UserRun) -> Mend | None:
    """A gradient that AdamW cannot take; the tuner sees it."""
    weight = run.layers[0].weight
    if (gradient := weight.grad) is None:
        return None
    weight.grad = gradient.to_sparse()
    return lambda: setattr(weight, "grad", gradient)


def _strange_momentum(run: UserRun) -> Mend:
    """As of an optimizer that keeps its moments in another shape."""
    state = run.optimizer.state[run.layers[0].weight]
    kept = {name: state[name] for name in ("exp_avg", "momentum_buffer") if name in state}
    state.update(dict.fromkeys(kept, torch.ones(5)))
    return lambda: state.update(kept)


def _empty_parameters(run: UserRun) -> None:
    if len(run.optimizer.param_groups) == 2:
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(2, 0))]})


def _another_model(run: UserRun) -> None:
    """Its state has an entry more by now than the best snapshot has."""
    if not hasattr(run.model, "late"):
        run.model.register_buffer("late", torch.zeros(1))


GRADIENTS: dict[str, tuple[Callable[[UserRun], Mend | None], str]] = {
    "nan": (_filled(math.nan), "gradients were not finite"),
    "inf": (_filled(math.inf), "gradients were not finite"),
    "1e38": (_filled(1e38), "gradients were not finite"),
    "denormal": (_filled(1e-45), ""),
    "zero": (_filled(0.0), ""),
    "none": (lambda run: run.optimizer.zero_grad(), ""),
    "one none": (lambda run: setattr(run.layers[0].weight, "grad", None), ""),
    "sparse": (_sparse, ""),
    "strange momentum": (_strange_momentum, "measuring gradients failed"),
    "no optimizer state": (lambda run: run.optimizer.state.clear(), ""),
    "one frozen": (lambda run: setattr(run.layers[0].weight, "requires_grad", False), ""),
    "all frozen": (lambda run: run.model.requires_grad_(False) and None, ""),
    "empty parameters": (_empty_parameters, ""),
    "another model": (_another_model, "restoring the best snapshot failed"),
}
"""What is done before each optimizer step, and what is logged of it."""


def bad_gradient(setting: Setting, kind: str, policy: ControlPolicy) -> list[str]:
    """Nine epochs, bad from the fourth to the sixth, after which the run diverges. Returns what did not hold."""
    spoil, message = GRADIENTS[kind]
    failures: list[str] = []
    with warnings_of_the_tuner() as records:
        run = UserRun(setting, policy)
        for epoch in range(9):
            run.epoch(spoil if 3 <= epoch < 6 else None)
            run.tuner.step(train_loss=1 / (epoch + 1), val_loss=math.nan if epoch == 5 else 1.0)
            failures += out_of_bounds(run.tuner)
            if run.broken() and epoch == 5 and setting.told and setting.guard:
                failures.append("weights not restored")
    guarded = setting.told and setting.guard
    logged = bool(message) and (guarded or kind != "another model")
    due = {
        message or "failed": logged,
        "failed": logged and "failed" in message,
        "loss not finite": not (guarded and kind == "another model"),
        "more epochs than total_epochs": setting.epochs < 9,
    }
    return failures + misreported(records, due)


def bad_signals(count: int, folder: Path) -> Outcome:
    """All combinations, or `count` of them in even steps."""
    policy = random_policy(seed=1, scale=2.0)
    cases: list[tuple[Callable[..., list[str]], tuple[Any, ...]]] = [
        *((bad_signal, case) for case in product(SETTINGS, SIGNALS, VALUES, TIMES)),
        *((wrong_signal, case) for case in product(SETTINGS, SIGNALS, WRONG)),
        *((bad_gradient, case) for case in product(SETTINGS, GRADIENTS)),
    ]
    chosen = _evenly(cases, count)
    failures = [
        f"{check.__name__} {' '.join(map(str, case))}: {failure}"
        for check, case in chosen
        for failure in _tried(check, *case, policy)
    ]
    return Outcome(len(chosen), tuple(failures))


def _evenly(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` cases in even steps, or all there are."""
    return [cases[index * len(cases) // count] for index in range(count)] if count < len(cases) else list(cases)


def _tried(check: Callable[..., list[str]], *case: Any) -> list[str]:
    try:
        return check(*case)
    except Exception as error:  # what would have ended the user's run
        return [f"{type(error).__name__}: {error}"]


# -- resuming ----------------------------------------------------------------------------------------------------------

RESUMABLE = (
    *(Setting(optimizer, batches=batches) for optimizer in ("adamw", "sgd") for batches in (True, False)),
    *(Setting(optimizer, 130, batches=True, start="given") for optimizer in ("adamw", "sgd")),
    Setting("sgd", epochs=5, told=False, batches=True, start="given"),
    Setting("adamw", guard=False),
)
EPOCHS = 9


def _train(run: UserRun, epoch: int) -> None:
    """The second and the seventh epoch diverge (in long runs, within an interval); the fifth has no validation loss."""
    loss = run.epoch()
    val_loss = {1: math.nan, 6: math.inf, 4: None}.get(epoch, loss + 0.1 * math.sin(epoch))
    run.tuner.step(train_loss=loss, val_loss=val_loss)


def resumed(count: int, folder: Path) -> Outcome:
    """`count` resumptions: of runs of all settings, at every epoch, with the tuner made before and after the optimizer
    has its state; in the long runs within and between stretches, with a verdict of the guard's pending or not."""
    failures: list[str] = []
    seeds = range(-(-count // (2 * EPOCHS * len(RESUMABLE))))
    cases = list(product(seeds, RESUMABLE, range(EPOCHS), (True, False)))
    with warnings_of_the_tuner():
        for seed, setting, start, tuner_first in _evenly(cases, count):
            states = _states(setting, seed)
            run = UserRun(setting, random_policy(seed, 0.7), seed=99)
            run.load(states[start], tuner_first)
            for epoch in range(start, EPOCHS):
                _train(run, epoch)
                if not same(run.state(), states[epoch + 1]):
                    failures.append(f"{setting}, resumed at {start}, tuner first: {tuner_first}: other after {epoch}")
                    break
    return Outcome(count, tuple(failures))


@lru_cache(1)
def _states(setting: Setting, seed: int) -> list[dict[str, Any]]:
    """The checkpoints of an uninterrupted run, from before its first epoch to after its last."""
    run = UserRun(setting, random_policy(seed, 0.7), seed)
    states = [through_a_file(run.state())]
    for epoch in range(EPOCHS):
        _train(run, epoch)
        states.append(through_a_file(run.state()))
    return states


# -- damaged states ----------------------------------------------------------------------------------------------------

GONE = object()


def _paths(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for name, value in entries:
        yield (*path, name)
        yield from _paths(value, (*path, name))


def _replacements(value: Any) -> Iterator[Any]:
    yield from (GONE, None, math.nan, -math.inf, 1e300, -1, 10**30, "x", [], {}, [math.nan], torch.ones(3, 7))
    if isinstance(value, Tensor):
        yield from (value[None], value.to(torch.complex64), torch.full_like(value, -5))
        yield from (torch.full_like(value, number) for number in (math.nan, 1e30) if value.is_floating_point())


def _damaged(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(state)
    *parents, last = path
    entry: Any = found
    for name in parents:
        entry = entry[name]
    if value is GONE:
        del entry[last]
    else:
        entry[last] = value
    return found


def damaged_state(good: dict[str, Any], bad: Any, setting: Setting, policy: ControlPolicy) -> tuple[bool, list[str]]:
    """Load a state that is not as it was. Returns whether it was refused, and what did not hold: that it is refused in
    one line and changes nothing, or that the run goes on within bounds, through a divergence too."""
    run = UserRun(setting, policy, seed=99)
    run.load(good, tuner_first=True)
    before = copy.deepcopy(run.state())
    try:
        run.tuner.load_state_dict(bad)
    except ValueError as error:
        changed = [] if same(before, run.state()) else ["refused, but something has changed"]
        return True, changed + ([] if "\n" not in str(error) and 20 < len(str(error)) < 500 else [f"says {error}"])
    for epoch in range(3):
        run.epoch()
        run.tuner.step(train_loss=0.5, val_loss=math.nan if epoch == 1 else 0.5)
    return False, out_of_bounds(run.tuner)


def damaged_states(count: int, folder: Path) -> Outcome:
    """Every entry of a state replaced by what does not belong there, or `count` of these in even steps."""
    policy, failures, refused = random_policy(seed=1), list[str](), 0
    cases = []
    for setting in (RESUMABLE[0], RESUMABLE[5]):
        run = UserRun(setting, policy)
        for epoch in range(4):
            _train(run, epoch)
        good = run.state()
        for path in _paths(good["tuner"]):
            entry = good["tuner"]
            for name in path:
                entry = entry[name]
            cases += [
                (setting, good, path, value)
                for value in _replacements(entry)
                # The numbers in the best snapshot are the user's: nobody else can tell which are right.
                if not (path[:2] == ("guard", "snapshot") and _layout(value) == _layout(entry))
            ]
    chosen = _evenly(cases, count)
    for setting, good, path, value in chosen:
        bad = _damaged(good["tuner"], path, value)
        try:
            with warnings_of_the_tuner():
                was_refused, found = damaged_state(good, bad, setting, policy)
        except Exception as error:
            was_refused, found = False, [f"{type(error).__name__}: {error}"]
        refused += was_refused
        shown = "gone" if value is GONE else " ".join(repr(value).split())[:40]
        failures += [f"{'.'.join(map(str, path))} = {shown}: {failure}" for failure in found]
    return Outcome(len(chosen), tuple(failures), f"{refused:,} refused, the others harmless")


# -- fuzzing -----------------------------------------------------------------------------------------------------------


def fuzzed(count: int, folder: Path) -> Outcome:
    """Coverage-guided, in a process of its own."""
    command = [sys.executable, "-m", "tests.faults.fuzz_tuner", f"-runs={count}", "-seed=1", "-max_len=32"]
    command.append("-rss_limit_mb=0")  # the fuzzer's own memory grows with the runs
    done = subprocess.run(
        [*command, f"-artifact_prefix={folder}/", str(folder)],
        capture_output=True, text=True, errors="replace", cwd=Path(__file__).parents[2],
    )  # fmt: skip
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    remark = "{} edges, {} features, {} inputs kept".format(*covered[-1]) if covered else ""
    if done.returncode == 0 and f"Done {count} runs" in done.stderr:
        return Outcome(count, (), remark)
    return Outcome(count, (f"exit {done.returncode}: {done.stdout[-2000:]}",), remark)


_CASES = len(SETTINGS) * (len(SIGNALS) * (len(VALUES) * len(TIMES) + len(WRONG)) + len(GRADIENTS))

FAULTS = (
    Fault("bad signals", "the run goes on within bounds; one logged line per kind", bad_signals, _CASES),
    Fault("tuner resumed at every epoch", "bit for bit the uninterrupted run", resumed, 720),
    Fault("damaged tuner states", "one clear error and nothing changed, or no harm", damaged_states, 3_000),
    Fault("fuzzed tuner inputs", "no untyped exception; finite, within bounds", fuzzed, 300_000),
)
