"""Replicated models: `inner_models.models` recorded for many replicas at once, with their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inner_models import twins_images, twins_sequences  # noqa: F401  (they register their twins)
from inner_models.augmentation import Augment
from inner_models.masks import Source
from inner_models.models import GRU, Dropout, Residual, random_layers
from inner_models.programs import Tape, same_memory
from inner_models.tasks import Loss
from inner_models.twins import Backward, Parameter, Site, twin


def takes_images(model: nn.Sequential) -> bool:
    """Whether the model's twin wants its input channels-last, `[..., height, width, channels]`."""
    return isinstance(next(layer for layer in model if not isinstance(layer, Augment)), nn.Conv2d)


def record(
    model: nn.Sequential, parameters: Mapping[str, Parameter], sources: Sequence[Source], tape: Tape, x: Tensor
) -> tuple[Tensor, Backward]:
    """Record the replicated forward pass of `model`.

    Args:
        parameters: by their names in `model.named_parameters()`.
        sources: of `random_layers(model)`.
        x: the buffer that will hold the inputs, `[replicas, batch, ...]`.

    Returns:
        The buffer that will hold the outputs, and what records the backward pass.

    Raises:
        NotImplementedError: the model holds a layer type without a replicated twin.
    """
    by_layer = {id(layer): source for layer, source in zip(random_layers(model), sources, strict=True)}
    chain = _chain(model, "", parameters, by_layer, tape, x, outermost=True)
    return chain.out, chain.backward


@dataclass(frozen=True)
class _Chain:
    """A recorded chain of layers.

    Attributes:
        out: its output.
        backward: records its backward pass, and releases the outputs of its layers as it goes.
        spent: nothing but what follows needs `out`, so it may be overwritten.
    """

    out: Tensor
    backward: Backward
    spent: bool


_KEEP_OUTPUT = (nn.ReLU, nn.Tanh)
"""Layers whose backward pass reads their output."""


def _chain(
    model: nn.Sequential,
    prefix: str,
    parameters: Mapping[str, Parameter],
    sources: Mapping[int, Source],
    tape: Tape,
    x: Tensor,
    outermost: bool = False,
) -> _Chain:
    """Layers one after the other. `x` and the gradient of the output are the caller's to release."""
    steps: list[tuple[Backward, Tensor | None]] = []
    given, first, images, spent = x, outermost, outermost and takes_images(model), False
    for key, module in model.named_children():
        name = f"{prefix}{key}."
        owned = True
        if isinstance(module, Residual):
            body = _chain(module.body, f"{name}body.", parameters, sources, tape, x)
            out, backward = _residual(tape, x, body)
            owned = not same_memory(out, body.out)  # else its body releases it
        else:
            _check_options(module)
            own = {path.removeprefix(name): value for path, value in parameters.items() if path.startswith(name)}
            site = Site(name, own, sources.get(id(module)), first, images, spent)
            out, backward = twin(module, site, tape, x)
        fresh = not same_memory(x, out)
        if not tape.training and fresh and not same_memory(x, given):
            tape.release(x)
        if not first or any(True for _ in module.parameters()):  # nothing before the first parameters has a gradient
            first = False
            steps.append((backward, out if owned and fresh else None))
        images |= isinstance(module, nn.Conv2d)
        spent = not isinstance(module, _KEEP_OUTPUT) and (fresh or (spent and isinstance(module, Dropout)))
        x = out

    def all_backward(gradient: Tensor) -> Tensor:
        g = gradient
        for backward, out in reversed(steps):
            gx = backward(g)
            if not same_memory(g, gradient) and not same_memory(g, gx):
                tape.release(g)
            if out is not None:
                tape.release(out)
            g = gx
        return g

    return _Chain(x, all_backward, spent)


def _residual(tape: Tape, x: Tensor, body: _Chain) -> tuple[Tensor, Backward]:
    out = body.out if body.spent else tape.take(*x.shape)
    tape.call(torch.add, x, body.out, out=out)
    if not body.spent:
        tape.until_backward(body.out)

    def backward(g: Tensor) -> Tensor:
        through = body.backward(g)
        if same_memory(through, g):
            gx = tape.take(*x.shape)
            tape.call(torch.add, g, through, out=gx)
            return gx
        tape.call(through.add_, g)
        return through

    return out, backward


_ONLY: dict[type[nn.Module], dict[str, object]] = {
    nn.Flatten: {"start_dim": 1, "end_dim": -1},
    nn.Conv2d: {"padding_mode": "zeros", "stride": (1, 1), "dilation": (1, 1), "groups": 1},
    nn.AvgPool2d: {"stride": 2, "kernel_size": 2, "padding": 0, "ceil_mode": False},
    nn.GroupNorm: {"num_groups": 1},
    nn.GELU: {"approximate": "none"},
    GRU: {"num_layers": 1, "bidirectional": False, "batch_first": True, "dropout": 0.0},
}
"""Options of layers that their twins know, where they know only one."""


def _check_options(module: nn.Module) -> None:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm) and own != {"weight", "bias"}:
        raise NotImplementedError(f"{module} has no replicated twin: it needs a weight and a bias")
    for name, value in _ONLY.get(type(module), {}).items():
        if getattr(module, name) != value:
            raise NotImplementedError(f"{module} has no replicated twin: {name} must be {value}")


def record_loss(
    tape: Tape, outputs: Tensor, targets: Tensor, loss: Loss, smoothing: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Record the mean loss of each replica and its gradient.

    Args:
        outputs: `[replicas, batch, ...]`; for cross-entropy the logits are in the last dimension.
        targets: `[replicas, batch, ...]`.
        smoothing: the label smoothing of each replica, `[replicas]`; cross-entropy only.

    Returns:
        Buffers `[replicas]` and of the shape of `outputs`.
    """
    replicas, scale = outputs.shape[0], targets[0].numel()
    losses = tape.take(replicas)
    gradient = tape.take(*outputs.shape)
    if loss == "mse":
        squares = tape.take(*outputs.shape)
        tape.call(torch.sub, outputs, targets, out=gradient)
        tape.call(torch.mul, gradient, gradient, out=squares)
        tape.call(torch.mean, squares.view(replicas, -1), 1, out=losses)
        tape.call(gradient.mul_, 2 / scale)
        tape.release(squares)
        return losses, gradient
    classes = outputs.shape[-1]
    # Classes before rows: torch's softmax over a short last dimension is ten times as slow.
    logits, logs = (tape.take(replicas, classes, scale) for _ in range(2))
    picked = tape.take(replicas, 1, scale)
    index = targets.view(replicas, 1, scale)
    tape.call(logits.copy_, tape.view(outputs, replicas, scale, classes).transpose(1, 2))
    tape.call(torch.log_softmax, logits, 1, out=logs)
    tape.call(torch.gather, logs, 1, index, out=picked)
    tape.call(torch.sum, picked.view(replicas, scale), 1, out=losses)
    if smoothing is not None:
        even = tape.take(replicas)
        tape.call(torch.sum, logs.view(replicas, -1), 1, out=even)
        tape.call(even.div_, classes)
        tape.call(losses.lerp_, even, smoothing)
        tape.release(even)
    tape.call(losses.mul_, -1 / scale)
    if tape.training:
        certain = torch.full_like(picked, -1.0)
        tape.call(torch.exp, logs, out=logits)
        if smoothing is not None:
            share = smoothing.view(replicas, 1, 1)
            tape.call(torch.sub, share.expand_as(certain), 1, out=certain)
            tape.call(logits.sub_, share, alpha=1 / classes)
        tape.call(logits.scatter_add_, 1, index, certain)
        tape.call(torch.div, logits.transpose(1, 2), scale, out=gradient.view(replicas, scale, classes))
    tape.release(logits, logs, picked)
    return losses, gradient


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
