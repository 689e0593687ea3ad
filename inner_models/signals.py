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
        self._sample = self._began = NOTHING
        self.begin()

    @torch.inference_mode(False)  # tensors made in that mode could not be written to outside of it
    @torch.no_grad()
    def begin(self) -> None:
        """Forget what was measured and start an interval here."""
        self._steps = 0
        self._measured: list[_Measured] = []
        parameters = self._parameters()
        if not self._sample.is_of(parameters):
            self._sample = _Sample(parameters)
        self._began = self._sample
        self._began.start()

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """Return the interval's `grad_norm`, `grad_norm_std`, `grad_cosine` and `update_ratio`, and start the next."""
        taken = []
        if self._measured:
            products = torch.stack([step.products for step in self._measured]).flatten(1).tolist()
            taken = [pair for pair in zip(products, self._measured, strict=True) if pair[0][0] != _LEFT_OUT]
        norms = [math.sqrt(step.scale * gg) for (gg, *_), step in taken]
        cosines = [
            gm / max(math.sqrt(gg) * math.sqrt(mm), 1e-12) for (gg, gm, _, mm), step in taken if step.with_cosine
        ]
        mean = _mean(norms)
        moved = self._began.moved(self._parameters())
        self._steps, self._measured = 0, []
        if not self._began.go_on():
            self.begin()
        return {
            "grad_norm": mean,
            "grad_norm_std": math.sqrt(_mean([(norm - mean) * (norm - mean) for norm in norms])),
            "grad_cosine": _mean(cosines),
            "update_ratio": moved,
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of the interval so far."""
        return self._steps

    def close(self) -> None:
        """Detach from the optimizer."""
        self._handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._handle = self._optimizer.register_step_pre_hook(self._before_step)  # copies of optimizers have no hooks

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        measured = self._steps % MEASURE_EVERY == 0
        self._steps += 1
        if not measured:
            return None
        closures = [argument for argument in (*args, *kwargs.values()) if callable(argument)]
        if not closures:
            self._measure(optimizer)
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
        parameters = self._parameters()
        gradients = [p.grad for p in parameters]
        if all(g is None for g in gradients) or any(g is not None and g.is_sparse for g in gradients):
            return
        if not self._sample.is_of(parameters):
            self._sample = _Sample(parameters)
        momenta = [None if p.grad is None else momentum_of(optimizer, p) for p in parameters]
        complete = all(g is None or m is not None for g, m in zip(gradients, momenta, strict=True))
        gradient = self._sample.fill(_GRADIENT, gradients)
        self._sample.fill(_GRADIENT + 1, momenta if complete else [None] * len(momenta))
        # A fused optimizer under a GradScaler undoes the scale, or leaves out the step, itself, inside its step.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            gradient /= scale.to(gradient)
        products = self._sample.products(_GRADIENT)
        if overflow is not None:
            products.masked_fill_(overflow.to(gradient.device) > 0, _LEFT_OUT)
        # In the run's first step there is no momentum yet: the cosine is 0.
        self._measured.append(_Measured(products, self._sample.scale, complete or not optimizer.state))


class _Measured(NamedTuple):
    """A step's products of the sampled gradient and momentum, `[2, 2]`; parameters for each entry of the sample; and
    whether the momentum counts."""

    products: Tensor
    scale: float
    with_cosine: bool


_GRADIENT, _START = 0, 2
"""Rows of a sample: a gradient's, with its momentum's after it, and the first of the parameters' own two."""


class _Sample:
    """The entries that are looked at of some parameters, as rows of one tensor: a gradient's, its momentum's, and the
    parameters' own at the interval's start and at its end. All entries of a model of up to `SAMPLED` parameters.

    Attributes:
        scale: parameters for each entry.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._known = [_Known(p, p.device, p.dtype, p.shape) for p in parameters]
        total = sum(p.numel() for p in parameters)
        stride = max(1, -(-total // SAMPLED))
        self._slices = [_rows(p.shape, stride) if stride > 1 else None for p in parameters]
        parts = [_entries(p, at) for p, at in zip(parameters, self._slices, strict=True)]
        self.size = sum(part.numel() for part in parts)
        self.scale = sum(_entries(p, None).numel() for p in parameters) / max(1, self.size)
        dtype = torch.promote_types(parts[0].dtype, torch.float32) if parts else torch.float32
        self._rows = torch.zeros(4, self.size, dtype=dtype, device=parts[0].device if parts else "cpu")
        self._places = self._views()
        self._start, self._end, self._whole = _START, _START + 1, False

    def _views(self) -> list[list[Tensor]]:
        """Of each row, the part of each parameter, in the shape of its entries."""
        shapes = [_entries(known.parameter, at).shape for known, at in zip(self._known, self._slices, strict=True)]
        sizes = [shape.numel() for shape in shapes]
        split = [row.split(sizes) for row in self._rows] if shapes else [[]] * 4
        return [[x.view(shape) for x, shape in zip(row, shapes, strict=True)] for row in split]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_places"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._places = self._views()

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it is of these parameters, neither moved nor converted since."""
        return len(parameters) == len(self._known) and all(map(_Known.is_still, self._known, parameters))

    def fill(self, row: int, tensors: Sequence[Tensor | None]) -> Tensor:
        """Copy the entries of tensors shaped like the parameters into a row, zeros in place of what is None.

        Returns:
            The row.
        """
        for place, at, tensor in zip(self._places[row], self._slices, tensors, strict=True):
            if tensor is None:
                place.zero_()
            else:
                place.copy_(_entries(tensor, at))
        return self._rows[row]

    def products(self, row: int) -> Tensor:
        """Of a row and the next one with one another, `[2, 2]`."""
        pair = self._rows[row : row + 2]
        device = pair.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # squares would overflow half precision
                return pair @ pair.T
        return pair @ pair.T

    def start(self) -> None:
        """Remember the parameters as they are."""
        self.fill(self._start, [known.parameter for known in self._known])

    def moved(self, parameters: Sequence[Tensor]) -> float:
        """Distance from the start over the norm now, of the parameters that are still among `parameters`, neither moved
        nor converted; NaN where there are none."""
        self._whole = self.is_of(parameters)
        given = set(map(id, parameters))
        there = [
            self._whole or (id(known.parameter) in given and known.is_still(known.parameter)) for known in self._known
        ]
        if not any(there) or not self.size:
            return math.nan
        seen = [known.parameter if still else None for known, still in zip(self._known, there, strict=True)]
        now = self.fill(self._end, seen)
        for place, still in zip(self._places[self._start], there, strict=True):
            if not still:
                place.zero_()
        self._rows[self._start].sub_(now)  # in place: the next interval starts elsewhere
        squares = self.products(_START).tolist()
        distance, size = (math.sqrt(squares[row - _START][row - _START]) for row in (self._start, self._end))
        return distance / max(size, 1e-12)

    def go_on(self) -> bool:
        """Let the next interval start where `moved` has just looked. Returns whether it saw all there is."""
        if self._whole:
            self._start, self._end = self._end, self._start
        return self._whole


NOTHING = _Sample([])
"""A sample of no parameters, with which nothing can be compared."""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _rows(shape: torch.Size, stride: int) -> tuple[slice, ...]:
    """Every `stride`-th entry along the first dimension that has as many, or else along the longest."""
    if not shape:
        return ()
    dim = next((dim for dim, size in enumerate(shape) if size >= stride), shape.index(max(shape)))
    return (slice(None),) * dim + (slice(None, None, stride),)


def _entries(tensor: Tensor, at: tuple[slice, ...] | None) -> Tensor:
    """Those of a tensor that are looked at, all where None; of a complex one, the real and the imaginary parts."""
    seen = tensor if at is None else tensor[at]
    return torch.view_as_real(seen) if seen.is_complex() else seen


class _Known(NamedTuple):
    """A parameter, and what it was when it was looked at."""

    parameter: Tensor
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size

    def is_still(self, other: Tensor) -> bool:
        """Whether `other` is the parameter, and as it was."""
        return other is self.parameter and (other.device, other.dtype, other.shape) == self[1:]
