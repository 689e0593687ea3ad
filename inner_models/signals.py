"""The signals of one interval of training, and the meter that takes them from a torch optimizer.

The reference training, the batched engine and the user's tuner report these same numbers, computed by one rule:
gradient statistics are taken at every `MEASURE_EVERY`-th optimizer step of an interval, its first step included, just
before the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEASURE_EVERY = 8

SAMPLED = 1 << 16
"""Parameters, about, that the meter looks at: of larger models it takes rows at equal distances, and scales up."""

SIGNALS: dict[str, str] = {
    "train_loss": "mean loss of the interval's training batches, as trained on (dropout active)",
    "val_loss": "mean loss on the validation split at the interval's end",
    "grad_norm": "mean Euclidean norm of the batch gradient over the measured steps",
    "grad_norm_std": "standard deviation of that norm over the measured steps",
    "grad_cosine": "mean cosine between the batch gradient and the optimizer's momentum before the step",
    "update_ratio": "distance that the parameters moved over the interval, divided by their norm at its end",
}
"""Name -> meaning. Missing or unmeasurable values are NaN."""

_LEFT_OUT = -1.0
"""In place of the products of a step that did not take place: what it was is not known without synchronization."""

_MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """The first-moment buffer that `optimizer` keeps for `parameter`, if it keeps one."""
    state = optimizer.state.get(parameter, {})
    for key in _MOMENTUM_KEYS:
        if isinstance(momentum := state.get(key), Tensor):
            return momentum
    return None


class GradientMeter:
    """Measures gradient statistics through an optimizer's step hook.

    Sums stay on the parameters' device; nothing is synchronized until `finish`. Keeps a copy of the parameters that it
    looks at, all of them in a model of up to `SAMPLED`: a larger one costs no more. Where a step is given a closure
    (Lightning does that), the gradients are measured after its first call. Those that cannot be measured (sparse ones)
    are left out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Forget what was measured and start an interval here."""
        self._steps = 0
        self._products: list[Tensor] = []  # of each measured step: gradient^2, momentum^2, gradient * momentum
        self._with_cosine: list[bool] = []
        parameters = self._parameters()
        total = sum(p.numel() for p in parameters)
        stride = max(1, -(-total // SAMPLED))
        self._rows = {p: _rows(p.shape, stride) for p in parameters} if stride > 1 else {}
        samples = [self._sample(p, p) for p in parameters]
        sizes = [sample.numel() for sample in samples]
        self._scale = total / max(1, sum(sizes))
        self._start = _Snapshot([_Known(p, p.device, p.dtype, p.shape) for p in parameters], sizes, _flat(samples))

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """Return the interval's `grad_norm`, `grad_norm_std`, `grad_cosine` and `update_ratio`, and start the next."""
        products = torch.stack(self._products).tolist() if self._products else []
        taken = [pair for pair in zip(products, self._with_cosine, strict=True) if pair[0][0] != _LEFT_OUT]
        norms = [math.sqrt(self._scale * gg) for (gg, _, _), _ in taken]
        cosines = [gm / max(math.sqrt(gg) * math.sqrt(mm), 1e-12) for (gg, mm, gm), measured in taken if measured]
        mean = _mean(norms)
        before = self._start
        self.begin()
        return {
            "grad_norm": mean,
            "grad_norm_std": math.sqrt(_mean([(norm - mean) * (norm - mean) for norm in norms])),
            "grad_cosine": _mean(cosines),
            "update_ratio": _moved(before, self._start),
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of the interval so far."""
        return self._steps

    def close(self) -> None:
        """Detach from the optimizer."""
        self._handle.remove()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _sample(self, parameter: Tensor, values: Tensor) -> Tensor:
        """Of `values`, shaped like `parameter`, those that are looked at."""
        return values[self._rows[parameter]] if parameter in self._rows else values

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        measured = self._steps % MEASURE_EVERY == 0
        self._steps += 1
        closures = [argument for argument in (*args, *kwargs.values()) if callable(argument)]
        if measured and not closures:
            self._measure(optimizer)
        if not measured or not closures:
            return None
        closure, pending = closures[0], True

        def then_measured() -> Any:
            nonlocal pending
            loss = closure()
            if pending:
                pending = False
                self._measure(optimizer)
            return loss

        swap = {id(closure): then_measured}
        return tuple(swap.get(id(a), a) for a in args), {name: swap.get(id(a), a) for name, a in kwargs.items()}

    @torch.no_grad()
    def _measure(self, optimizer: torch.optim.Optimizer) -> None:
        known = {p: p.grad for p in self._parameters() if p.grad is not None}
        if not known or any(gradient.is_sparse for gradient in known.values()):
            return
        gradient = _flat([self._sample(p, gradient) for p, gradient in known.items()])
        momenta = [self._sample(p, momentum) for p in known if (momentum := momentum_of(optimizer, p)) is not None]
        complete = len(momenta) == len(known)
        momentum = _flat(momenta).to(gradient) if complete else torch.zeros_like(gradient)
        # A fused optimizer under a GradScaler undoes the scale, or leaves out the step, itself, inside its step.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            gradient /= scale.to(gradient)
        pairs = ((gradient, gradient), (momentum, momentum), (gradient, momentum))
        self._products.append(torch.stack([torch.vdot(*pair).real for pair in pairs]))
        if overflow is not None:
            self._products[-1].masked_fill_(overflow.to(gradient.device) > 0, _LEFT_OUT)
        # In the run's first step there is no momentum yet: the cosine is 0.
        self._with_cosine.append(complete or not optimizer.state)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _rows(shape: torch.Size, stride: int) -> tuple[slice, ...]:
    """Every `stride`-th entry along the first dimension that has as many, or else along the longest."""
    if not shape:
        return ()
    dim = next((dim for dim, size in enumerate(shape) if size >= stride), shape.index(max(shape)))
    return (slice(None),) * dim + (slice(None, None, stride),)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one copy, on the first tensor's device; in single precision at least."""
    if not tensors:
        return torch.empty(0)
    device, dtype = tensors[0].device, torch.promote_types(tensors[0].dtype, torch.float32)
    flat = [tensor.flatten() for tensor in tensors]
    return torch.cat(
        [part if (part.device, part.dtype) == (device, dtype) else part.to(device, dtype) for part in flat]
    )


class _Known(NamedTuple):
    """A parameter, and what it was when it was looked at. Equal to itself alone."""

    parameter: Tensor
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.parameter is other.parameter and self[1:] == other[1:]

    def __hash__(self) -> int:
        return id(self.parameter)


class _Snapshot(NamedTuple):
    """What was looked at of the parameters, `sizes` of each, one after the other in `values`."""

    known: list[_Known]
    sizes: list[int]
    values: Tensor


NOTHING = _Snapshot([], [], torch.empty(0))
"""A snapshot that nothing can be compared with."""


def _moved(before: _Snapshot, after: _Snapshot) -> float:
    """Distance over norm at the end, of the parameters that were there all the time, neither moved nor converted."""
    start, end = before.values, after.values
    if before[:2] != after[:2]:
        parts = dict(zip(zip(before.known, before.sizes, strict=True), torch.split(start, before.sizes), strict=True))
        there = zip(zip(after.known, after.sizes, strict=True), torch.split(end, after.sizes), strict=True)
        pairs = [(parts[key], part) for key, part in there if key in parts]
        start, end = _flat([pair[0] for pair in pairs]), _flat([pair[1] for pair in pairs])
    if not len(end):
        return math.nan
    distance, size = (float(torch.linalg.vector_norm(x)) for x in (end - start, end))
    return distance / max(size, 1e-12)
