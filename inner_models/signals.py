"""The signals of one interval of training, and the meter that takes them from a torch optimizer.

The reference training, the batched engine and the user's tuner report these same numbers, computed by one rule:
gradient statistics are taken at every `MEASURE_EVERY`-th optimizer step of an interval, its first step included, just
before the update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MEASURE_EVERY = 4

SIGNALS: dict[str, str] = {
    "train_loss": "mean loss of the interval's training batches, as trained on (dropout active)",
    "val_loss": "mean loss on the validation split at the interval's end",
    "grad_norm": "mean Euclidean norm of the batch gradient over the measured steps",
    "grad_norm_std": "standard deviation of that norm over the measured steps",
    "grad_cosine": "mean cosine between the batch gradient and the optimizer's momentum before the step",
    "update_ratio": "distance that the parameters moved over the interval, divided by their norm at its end",
}
"""Name -> meaning. Missing or unmeasurable values are NaN."""

_MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    """The first-moment buffer that `optimizer` keeps for `parameter`, if it keeps one."""
    state = optimizer.state.get(parameter, {})
    return next((state[key] for key in _MOMENTUM_KEYS if isinstance(state.get(key), Tensor)), None)


class GradientMeter:
    """Measures gradient statistics through an optimizer's step hook.

    Sums stay on the parameters' device; nothing is synchronized until `finish`. Keeps one copy of the parameters. What
    cannot be measured (sparse gradients; steps with a closure, whose gradients do not exist yet) is left out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self.begin()

    def begin(self) -> None:
        """Forget what was measured and start an interval here."""
        self._steps = 0
        self._norms: list[Tensor] = []
        self._cosines: list[Tensor] = []
        self._start = {parameter: parameter.detach().clone() for parameter in self._parameters()}

    def finish(self) -> dict[str, float]:
        """Return the interval's `grad_norm`, `grad_norm_std`, `grad_cosine` and `update_ratio`, and start the next."""
        kept = [
            parameter for parameter in self._parameters() if parameter in self._start
        ]  # neither new nor frozen since
        moved = _norm([parameter.detach() - self._start[parameter] for parameter in kept])
        ratio = moved / _norm([parameter.detach() for parameter in kept]).clamp_min(1e-12)
        nan = torch.full_like(ratio, torch.nan)
        norms = torch.stack(self._norms) if self._norms else nan[None]
        cosine = torch.stack(self._cosines).mean() if self._cosines else nan
        values = torch.stack([norms.mean(), norms.std(correction=0), cosine, ratio]).tolist()
        self.begin()
        return dict(zip(("grad_norm", "grad_norm_std", "grad_cosine", "update_ratio"), values, strict=True))

    def close(self) -> None:
        """Detach from the optimizer."""
        self._handle.remove()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._steps += 1
        if (self._steps - 1) % MEASURE_EVERY or any(callable(argument) for argument in (*args, *kwargs.values())):
            return
        pairs = [(p.grad, momentum_of(optimizer, p)) for p in self._parameters() if p.grad is not None]
        if not pairs or any(gradient.is_sparse for gradient, _ in pairs):
            return
        gradients = [gradient for gradient, _ in pairs]
        # A fused optimizer under a GradScaler undoes the scale itself, inside its step.
        scale = getattr(optimizer, "grad_scale", None)
        norm = _norm(gradients)
        self._norms.append(norm if scale is None else norm / scale.to(norm))
        momenta = [momentum for _, momentum in pairs if momentum is not None]
        if len(momenta) == len(pairs):
            dot = _together([(g * m).sum(dtype=norm.dtype) for g, m in zip(gradients, momenta, strict=True)]).sum()
            self._cosines.append(dot / (norm * _norm(momenta)).clamp_min(1e-12))
        elif not optimizer.state:
            self._cosines.append(torch.zeros_like(norm))  # the run's first step: no momentum yet


def _norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all elements; in single precision at least, on the first tensor's device."""
    if not tensors:
        return torch.tensor(torch.nan)
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = _together([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors])
    return norms.square().sum().sqrt()


def _together(scalars: list[Tensor]) -> Tensor:
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])
