"""Replicated twins of the layers in `inner_models.models`: the same mathematics with a leading replica dimension.

`replicate` turns a module into a function of inputs `[replicas, batch, ...]` and of parameters
`[replicas, *parameter shape]`. A layer type is supported when it has a registered twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import singledispatch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from inner_models.models import GRU, Attention, Dropout, Last, Mean, Position, Residual, attend

Forward = Callable[[Tensor], Tensor]
Parameters = Mapping[str, Tensor]

_REFILL_BYTES = 1 << 24


def replicate(model: nn.Module, parameters: Parameters, masks: list[MaskSource]) -> Forward:
    """The replicated forward pass of `model`.

    Args:
        parameters: name in `model.named_parameters()` -> `[replicas, *shape]`.
        masks: one source a `Dropout` module, in the order of `model.modules()`.

    Raises:
        NotImplementedError: the model holds a layer type without a replicated twin.
    """
    dropouts = {id(m): source for m, source in zip(_dropouts(model), masks, strict=True)}

    def build(module: nn.Module, prefix: str) -> Forward:
        _check_options(module)
        if isinstance(module, Dropout):
            return dropouts[id(module)].apply
        if isinstance(module, nn.Sequential):
            return _chain([build(child, f"{prefix}{name}.") for name, child in module.named_children()])
        if isinstance(module, Residual):
            body = build(module.body, f"{prefix}body.")
            return lambda x: x + body(x)
        own = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
        return _twin(module, own)

    return build(model, "")


def _dropouts(model: nn.Module) -> list[Dropout]:
    return [module for module in model.modules() if isinstance(module, Dropout)]


def _chain(steps: list[Forward]) -> Forward:
    def forward(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return forward


class MaskSource:
    """Dropout masks of one module for all replicas, drawn from one stream of bytes a replica.

    The bytes are those that `models.Dropout` draws, so a replica sees the masks of its reference run.

    Attributes:
        threshold: `[replicas]` uint8; a unit is kept when its byte is at or above it.
    """

    def __init__(self, streams: list[np.random.Generator], device: torch.device) -> None:
        self._streams = streams
        self._device = device
        self._buffer: NDArray[np.uint8] | None = None
        self._at = 0
        self.active = False

    def set_rates(self, rates: Tensor) -> None:
        """Set the dropout rate of each replica, `[replicas]`, rounded to multiples of 1/256."""
        threshold = (rates * 256).round()
        self.threshold = threshold.to(torch.uint8)
        self.scale = 256 / (256 - threshold)

    def restart(self, replica: int, stream: np.random.Generator) -> None:
        """Give one replica a new stream."""
        self._streams[replica] = stream
        if self._buffer is not None and self._at < self._buffer.shape[1]:  # bytes(0) would move the stream
            self._draw(self._buffer, replica, self._at)

    def apply(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        drawn = torch.from_numpy(self._take(x[0].numel())).to(self._device, non_blocking=True).view(x.shape)
        return x * (drawn >= self.threshold.view(shape)) * self.scale.view(shape)

    def _take(self, size: int) -> NDArray[np.uint8]:
        if self._buffer is None or self._at == self._buffer.shape[1]:
            replicas = len(self._streams)
            self._buffer = np.empty((replicas, size * max(1, _REFILL_BYTES // (size * replicas))), np.uint8)
            for replica in range(replicas):
                self._draw(self._buffer, replica, 0)
            self._at = 0
        self._at += size
        return self._buffer[:, self._at - size : self._at]

    def _draw(self, buffer: NDArray[np.uint8], replica: int, start: int) -> None:
        count = buffer.shape[1] - start
        buffer[replica, start:] = np.frombuffer(self._streams[replica].bytes(count), np.uint8)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.baddbmm(bias.unsqueeze(1), flat, weight.transpose(1, 2))
    return out.view(*x.shape[:-1], weight.shape[1])


_ONLY: dict[type[nn.Module], dict[str, object]] = {
    nn.Flatten: {"start_dim": 1, "end_dim": -1},
    nn.Conv2d: {"padding_mode": "zeros", "stride": (1, 1), "dilation": (1, 1), "groups": 1},
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


@singledispatch
def _twin(module: nn.Module, p: Parameters) -> Forward:
    raise NotImplementedError(f"{type(module).__name__} has no replicated twin")


@_twin.register(nn.ReLU)
@_twin.register(nn.GELU)
@_twin.register(nn.Tanh)
@_twin.register(nn.SiLU)
@_twin.register(Mean)
@_twin.register(Last)
def _unchanged(module: nn.Module, p: Parameters) -> Forward:
    """Layers that act on trailing dimensions alone."""
    return module.forward


@_twin.register
def _flatten(module: nn.Flatten, p: Parameters) -> Forward:
    return lambda x: x.flatten(2)


@_twin.register
def _linear_twin(module: nn.Linear, p: Parameters) -> Forward:
    return lambda x: _linear(x, p["weight"], p["bias"])


@_twin.register
def _conv2d(module: nn.Conv2d, p: Parameters) -> Forward:
    """One batched matrix product over unfolded patches: many small kernels defeat grouped convolution."""
    kernel, padding = module.kernel_size, module.padding
    if isinstance(padding, str):
        raise NotImplementedError(f"{module} has no replicated twin: padding must be given in numbers")

    def forward(x: Tensor) -> Tensor:
        replicas, batch, channels, height, width = x.shape
        patches = functional.unfold(x.reshape(replicas * batch, channels, height, width), kernel, padding=padding)
        patches = patches.view(replicas, batch, patches.shape[1], -1).transpose(1, 2).flatten(2)
        out = torch.baddbmm(p["bias"].unsqueeze(2), p["weight"].flatten(2), patches)
        return out.view(replicas, -1, batch, height, width).transpose(1, 2)

    return forward


@_twin.register
def _avg_pool2d(module: nn.AvgPool2d, p: Parameters) -> Forward:
    return lambda x: module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@_twin.register
def _layer_norm(module: nn.LayerNorm, p: Parameters) -> Forward:
    def forward(x: Tensor) -> Tensor:
        shape = (x.shape[0],) + (1,) * (x.dim() - 2) + module.normalized_shape
        normalized = functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        return torch.addcmul(p["bias"].view(shape), normalized, p["weight"].view(shape))

    return forward


@_twin.register
def _group_norm(module: nn.GroupNorm, p: Parameters) -> Forward:
    def forward(x: Tensor) -> Tensor:
        shape = (x.shape[0], 1, module.num_channels) + (1,) * (x.dim() - 3)
        normalized = functional.group_norm(x.flatten(0, 1), module.num_groups, eps=module.eps).view(x.shape)
        return torch.addcmul(p["bias"].view(shape), normalized, p["weight"].view(shape))

    return forward


@_twin.register
def _embedding(module: nn.Embedding, p: Parameters) -> Forward:
    def forward(tokens: Tensor) -> Tensor:
        weight = p["weight"]
        first = torch.arange(weight.shape[0], device=tokens.device) * weight.shape[1]
        return functional.embedding(tokens + first.view(-1, *[1] * (tokens.dim() - 1)), weight.flatten(0, 1))

    return forward


@_twin.register
def _position(module: Position, p: Parameters) -> Forward:
    return lambda x: x + p["weight"].unsqueeze(1)


@_twin.register
def _attention(module: Attention, p: Parameters) -> Forward:
    def forward(x: Tensor) -> Tensor:
        qkv = _linear(x, p["qkv.weight"], p["qkv.bias"])
        mixed = attend(qkv.flatten(0, 1), module.heads, module.causal)
        return _linear(mixed.reshape(x.shape), p["out.weight"], p["out.bias"])

    return forward


@_twin.register
def _gru(module: GRU, p: Parameters) -> Forward:
    """Equations of `torch.nn.GRU`, one layer, one direction."""
    width = module.hidden_size

    def forward(x: Tensor) -> Tensor:
        inputs = _linear(x, p["weight_ih_l0"], p["bias_ih_l0"]).unbind(2)
        weight, bias = p["weight_hh_l0"].transpose(1, 2), p["bias_hh_l0"].unsqueeze(1)
        state = x.new_zeros(*x.shape[:2], width)
        states = []
        for step in inputs:
            hidden = torch.baddbmm(bias, state, weight)
            reset, update = torch.sigmoid(step[..., : 2 * width] + hidden[..., : 2 * width]).chunk(2, -1)
            candidate = torch.tanh(step[..., 2 * width :] + reset * hidden[..., 2 * width :])
            state = torch.lerp(candidate, state, update)
            states.append(state)
        return torch.stack(states, 2)

    return forward


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
