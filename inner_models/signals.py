"""The signals of one interval of training, and the meter that takes them from a torch optimizer.

The reference training, the batched engine and the user's tuner report these same numbers, computed by one rule:
gradient statistics are taken at every `MEASURE_EVERY`-th optimizer step of an interval, its first step included, just
before the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MEASURE_EVERY = 8

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

    Sums stay on the parameters' device; nothing is synchronized until `finish`. Keeps one copy of the parameters. Where
    a step is given a closure (Lightning does that), the gradients are measured after its first call. Those that cannot
    be measured (sparse ones) are left out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self._start: dict[Tensor, Tensor] = {}
        self.begin()

    @torch.inference_mode(False)  # a copy made in that mode could not be overwritten outside of it
    @torch.no_grad()
    def begin(self) -> None:
        """Forget what was measured and start an interval here."""
        self._steps = 0
        self._products: list[Tensor] = []  # of each measured step: gradient^2, momentum^2, gradient * momentum
        self._with_cosine: list[bool] = []
        known = self._known()
        self._start = {p: known[p] if p in known else torch.empty_like(p) for p in self._parameters()}
        if self._start:
            torch._foreach_copy_(list(self._start.values()), list(self._start))

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """Return the interval's `grad_norm`, `grad_norm_std`, `grad_cosine` and `update_ratio`, and start the next."""
        known = self._known()
        parameters, moved = list(known), list(known.values())
        if known:
            torch._foreach_sub_(moved, parameters)  # `begin` fills them anew
        distance, size = torch.stack([_norm(moved), _norm(parameters)]).tolist()
        products = _together(self._products).tolist() if self._products else []
        taken = [pair for pair in zip(products, self._with_cosine, strict=True) if pair[0][0] != _LEFT_OUT]
        norms = [math.sqrt(gg) for (gg, _, _), _ in taken]
        cosines = [gm / max(math.sqrt(gg) * math.sqrt(mm), 1e-12) for (gg, mm, gm), measured in taken if measured]
        mean = _mean(norms)
        signals = {
            "grad_norm": mean,
            "grad_norm_std": math.sqrt(_mean([(norm - mean) * (norm - mean) for norm in norms])),
            "grad_cosine": _mean(cosines),
            "update_ratio": distance / max(size, 1e-12),
        }
        self.begin()
        return signals

    @property
    def steps(self) -> int:
        """Optimizer steps of the interval so far."""
        return self._steps

    def close(self) -> None:
        """Detach from the optimizer."""
        self._handle.remove()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _known(self) -> dict[Tensor, Tensor]:
        """Parameter -> its copy, of those that were there at the start, neither frozen, moved nor converted since."""
        pairs = {p: self._start[p] for p in self._parameters() if p in self._start}
        return {p: s for p, s in pairs.items() if (p.device, p.dtype, p.shape) == (s.device, s.dtype, s.shape)}

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
        pairs = [(p.grad, momentum_of(optimizer, p)) for p in self._parameters() if p.grad is not None]
        if not pairs or any(gradient.is_sparse for gradient, _ in pairs):
            return
        gradients = [gradient for gradient, _ in pairs]
        momenta = [momentum for _, momentum in pairs if momentum is not None]
        if len(momenta) == len(pairs):
            dots = [_dot(*pair) for pair in zip(gradients, momenta, strict=True)]
            parts = _together([*_norms([*gradients, *momenta]), *dots]).view(3, -1)
        else:
            parts = functional.pad(_together(_norms(gradients))[None], (0, 0, 0, 2))
        # A fused optimizer under a GradScaler undoes the scale, or leaves out the step, itself, inside its step.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            parts[::2] /= scale.to(parts)
        parts[:2].square_()
        self._products.append(parts.sum(1))
        if overflow is not None:
            self._products[-1].masked_fill_(overflow.to(parts.device) > 0, _LEFT_OUT)
        # In the run's first step there is no momentum yet: the cosine is 0.
        self._with_cosine.append(len(momenta) == len(pairs) or not optimizer.state)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all elements; in single precision at least, on the first tensor's device."""
    if not tensors:
        return torch.tensor(torch.nan)
    norm: Tensor = torch.linalg.vector_norm(_together(_norms(tensors)))
    return norm


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(tensors, dtype=_precise(tensors[0]))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of all elements; in single precision at least, for which less precise ones are copied."""
    dtype = _precise(a)
    if not a.dtype == b.dtype == dtype:
        a, b = a.to(dtype), b.to(dtype)
    product: Tensor = torch.vdot(a.flatten(), b.flatten()).real
    return product


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _together(tensors: Sequence[Tensor]) -> Tensor:
    device = tensors[0].device
    return torch.stack([tensor if tensor.device == device else tensor.to(device) for tensor in tensors])
