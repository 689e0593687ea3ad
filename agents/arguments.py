"""What a user passes to a tuner: checked, with errors that name the value, or warned of."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from reprlib import repr as short
from typing import Any, Literal, Required, SupportsFloat, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from hpo_env.hyperparameters import CONTROLS
from inner_models.names import unknown
from inner_models.updates import SGD_MOMENTUM

from .batch_size import Loader
from .files import ScalarWriter
from .policy import ControlPolicy, PolicyError

_log = logging.getLogger("hyperpilot")

_NEEDS = {
    "batch_size": "loader=..., an ordinary DataLoader",
    "weight_decay": "an optimizer that decays weights apart from the gradient (AdamW), or SGD, at a rate above 0",
    "dropout": "model=... with dropout layers at a rate above 0",
    "augmentation": "model=... with an Augment layer",
    "label_smoothing": "criterion=... with label_smoothing above 0",
}
"""What a run must have for a control to be there, beside a policy that knows it."""


class OptionalArguments(TypedDict, total=False):
    """The arguments of `Tuner` that say how it tunes a run, and may be left out. A test holds them to its signature."""

    criterion: nn.Module | None
    start: Literal["policy", "given"]
    max_factor: float | None
    controls: Sequence[str] | None
    initial_loss: float | Tensor | None
    signals: Sequence[str]
    guard: bool
    writer: ScalarWriter | None


class TunerArguments(OptionalArguments, total=False):
    """The keyword arguments of `Tuner`."""

    total_epochs: Required[int]
    loader: Loader | None
    model: nn.Module | None
    batches_per_step: int
    examples_per_epoch: int | None
    batch_size: int | None


def check_names(given: Iterable[str]) -> None:
    """Raise a TypeError for a name that is none of `OptionalArguments`: where they are handed on only later."""
    for name in given:
        if name not in OptionalArguments.__annotations__:
            raise TypeError(unknown("argument", name, OptionalArguments.__annotations__))


def real(name: str, value: Any) -> float:
    """`value` as a float; a tensor or an array must have one element.

    Raises:
        ValueError: it is no real number. One that is not finite is.
    """
    if type(value) is float:
        return value
    try:
        found = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) else value
        if isinstance(found, SupportsFloat):  # a str is none
            return float(found)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several elements
        pass
    raise ValueError(f"{name} must be a number, not {short(value)}")


def count(name: str, value: Any) -> int:
    """`value` as an int of at least 1; a float must be whole.

    Raises:
        ValueError: it is none.
    """
    known = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not known or not 1 <= value < 2**63 or value % 1:
        raise ValueError(f"{name} must be at least 1 and whole, not {short(value)}")
    return int(value)


def chosen(controls: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    """The controls that the policy may move, all when None.

    Raises:
        ValueError: one of them is not available.
    """
    if controls is None:
        return tuple(available)
    for name in controls:
        if name in CONTROLS and name not in available:
            raise ValueError(
                f"unknown control {name!r} in this run, which has {', '.join(available)}: it needs {_NEEDS[name]}, and "
                "a policy that moves it"
            )
        if name not in available:
            raise ValueError(unknown("control", name, CONTROLS, shown=available))
    return tuple(name for name in available if name in controls)


def check_kinds(
    optimizer: torch.optim.Optimizer,
    loader: Loader | None,
    model: nn.Module | None,
    criterion: nn.Module | None,
    writer: ScalarWriter | None,
) -> None:
    """Whether they are what they are to be, or like it.

    Raises:
        ValueError: one of them is not.
    """
    kinds = (
        ("optimizer", optimizer, ("param_groups", "register_step_pre_hook"), "a torch.optim.Optimizer"),
        ("loader", loader, ("batch_sampler", "dataset"), "the DataLoader itself"),
        ("model", model, ("modules", "state_dict"), "an nn.Module"),
        ("criterion", criterion, ("modules",), "an nn.Module"),
        ("writer", writer, ("add_scalar",), "a SummaryWriter"),
    )
    for name, given, has, kind in kinds:
        if (name == "optimizer" or given is not None) and not all(hasattr(given, attribute) for attribute in has):
            raise ValueError(f"{name} must be {kind}, not {short(given)}")


def check_run(policy: ControlPolicy, optimizer: torch.optim.Optimizer, signals: Sequence[str]) -> None:
    """Whether the policy can control a run that has this optimizer and gives these signals.

    Raises:
        ValueError: a parameter group's settings are not finite.
        PolicyError: the policy needs other signals.
    """
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise ValueError(f"a parameter group of {type(optimizer).__name__} has no lr, which is what the tuner sets")
        for name in ("lr", "weight_decay"):
            value = group.get(name, 0.0)
            if value is None or not 0 <= float(value) < math.inf:
                raise ValueError(f"{name} of a parameter group must be a finite number, not {value}")
    missing = [name for name in policy.header.required_signals if name not in signals]
    if missing:
        raise PolicyError(
            f"this policy needs {' and '.join(missing)} at every step, which this run does not give "
            f"(signals={tuple(signals)}); use a policy trained without"
        )


def warn_of_misfits(
    policy: ControlPolicy, optimizer: torch.optim.Optimizer, total_epochs: int, start: str, controls: Sequence[str]
) -> None:
    """Log what is allowed but unlikely to work well, with these controls in the policy's hands."""
    if "lr" in controls and any("initial_lr" in group for group in optimizer.param_groups):
        _log.warning("a learning rate scheduler is attached to this optimizer; remove it: the tuner sets lr")
    if start == "policy" and not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):
        _log.warning(
            "the policy knows AdamW and SGD; with %s its learning rates may not fit: consider start='given'",
            type(optimizer).__name__,
        )
    sgd = isinstance(optimizer, torch.optim.SGD)
    momenta = {float(group["momentum"]) for group in optimizer.param_groups} if sgd else set()
    if start == "policy" and "lr" in controls and any(abs(momentum - SGD_MOMENTUM) > 0.05 for momentum in momenta):
        _log.warning(
            "the policy knows SGD with momentum %g; with %s its learning rates may not fit: consider start='given'",
            SGD_MOMENTUM,
            " and ".join(f"{momentum:g}" for momentum in sorted(momenta)),
        )
    shortest, _ = policy.header.trained_ranges.get("horizons", (1, math.inf))
    if total_epochs < shortest:
        _log.warning("this policy was trained on runs of %g epochs or more, not %d", shortest, total_epochs)
