"""Twins: layers of `inner_models.models` for many replicas at once, recorded on a tape.

A twin records the calls of its forward pass and returns what records those of its backward pass. Inputs are
`[replicas, batch, ...]` (images channels-last), parameters `[replicas, *parameter shape]`. No call writes into the
gradient of its layer's output, nor, unless `Site.spent` allows it, into the layer's input: layers combine freely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from inner_models.augmentation import Augment
from inner_models.masks import MaskSource, NoiseSource, Source
from inner_models.models import Dropout
from inner_models.programs import Tape

Backward = Callable[[Tensor], Tensor]
"""Records a backward pass: gradient of the layer's output to gradient of its input."""

_aten = torch.ops.aten


@dataclass(frozen=True)
class Parameter:
    """A parameter of all replicas, `[replicas, *shape]`: views into the engine's flat buffers."""

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Site:
    """Where a layer stands in the model.

    Attributes:
        name: its path; names its buffers.
        parameters: its own, by name.
        source: where it draws from, if it draws.
        first: no layer before it has parameters, so nothing needs its input's gradient.
        channels_last: its input is an image whose channels come last.
        spent: its input may be overwritten.
    """

    name: str
    parameters: Mapping[str, Parameter]
    source: Source | None = None
    first: bool = False
    channels_last: bool = False
    spent: bool = False

    def __getitem__(self, name: str) -> Parameter:
        return self.parameters[name]


@singledispatch
def twin(module: nn.Module, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    """Record `module`: the buffer of its output, and what records its backward pass.

    Raises:
        NotImplementedError: this type of layer has no twin.
    """
    raise NotImplementedError(f"{type(module).__name__} has no replicated twin")


@twin.register
def _dropout(module: Dropout, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    if not tape.training:
        return x, _no_backward
    assert isinstance(site.source, MaskSource)
    shape = x.shape
    mask = _mask(site.name, site.source, tape, shape)
    out = x if site.spent else tape.take(*shape)
    tape.call(torch.mul, x, mask, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*shape)
        tape.call(torch.mul, g, mask, out=gx)
        tape.release(mask)
        return gx

    return out, backward


def _mask(name: str, source: MaskSource, tape: Tape, shape: tuple[int, ...]) -> Tensor:
    """A buffer of `shape` for the masks of the replicas that are being recorded.

    On a CPU it is filled when it is needed, so that it is in the cache; a CUDA graph needs all that is drawn before it.
    """
    units = math.prod(shape[1:])
    if tape.rows.start == 0:
        tape.program.add_before(source.draw, units)
    if tape.cpu:
        mask, keep = tape.take(*shape), tape.take(shape[0], units, dtype=torch.bool)
        tape.call(source.fill, tape.rows, keep, mask.view(keep.shape))
        tape.release(keep)
        return mask
    size = (source.replicas, units)
    masks = tape.workspace.named(f"{name}mask", size)
    if tape.rows.start == 0:
        tape.program.add_before(source.fill, slice(None), tape.workspace.named("keep", size, torch.bool), masks)
    return masks[tape.rows].view(shape)


def _no_backward(gradient: Tensor) -> Tensor:
    raise AssertionError("an evaluation has no backward pass")


@twin.register
def _augment(module: Augment, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    """It stands first, so that no gradient passes through."""
    if not tape.training:
        return x, _no_backward
    assert isinstance(site.source, NoiseSource)
    out = tape.workspace.named(f"{site.name}out", tuple(x.shape), x.dtype)
    given, changed = (t.movedim(-1, -3) if site.channels_last else t for t in (x, out))  # as the module takes them
    replicas, batch, *example = given.shape
    count = module.numbers(tuple(example))
    drawn = tape.workspace.named(f"{site.name}numbers", (site.source.replicas, batch * count))
    if tape.rows.start == 0:
        tape.program.add_before(site.source.fill, drawn)
    numbers, strengths = drawn[tape.rows].view(replicas, batch, count), site.source.strengths[tape.rows].unsqueeze(1)
    tape.call(lambda: changed.copy_(module.changed(given, numbers, strengths)))
    return out, _no_backward


@twin.register
def _relu(module: nn.ReLU, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    out = tape.take(*x.shape)
    tape.call(torch.clamp_min, x, 0, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(_aten.threshold_backward.grad_input, g, out, 0, grad_input=gx)
        return gx

    return out, backward


_OF_INPUT = {
    nn.GELU: (_aten.gelu.out, _aten.gelu_backward.grad_input),
    nn.SiLU: (_aten.silu.out, _aten.silu_backward.grad_input),
}
"""Activations whose derivative is one of their input: forward, backward."""


@twin.register(nn.GELU)
@twin.register(nn.SiLU)
def _of_input(module: nn.Module, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    activation, derivative = _OF_INPUT[type(module)]
    out = tape.take(*x.shape)
    tape.call(activation, x, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(derivative, g, x, grad_input=gx)
        return gx

    return out, backward


@twin.register
def _tanh(module: nn.Tanh, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    out = tape.take(*x.shape)
    tape.tanh(x, out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(_aten.tanh_backward.grad_input, g, out, grad_input=gx)
        return gx

    return out, backward


@twin.register
def _linear(module: nn.Linear, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    return affine(tape, site["weight"], site["bias"], x, site.first)


def affine(tape: Tape, weight: Parameter, bias: Parameter, x: Tensor, first: bool = False) -> tuple[Tensor, Backward]:
    """x @ weight.T + bias."""
    replicas, outputs, inputs = weight.value.shape
    rows = tape.view(x, replicas, -1, inputs)
    out = tape.take(*x.shape[:-1], outputs)
    flat = out.view(replicas, -1, outputs)
    tape.matmul(rows, weight.value.transpose(1, 2), flat)
    tape.call(flat.add_, bias.value.unsqueeze(1))

    def backward(g: Tensor) -> Tensor:
        flat = tape.view(g, replicas, -1, outputs)
        tape.add_product(weight.gradient, flat.transpose(1, 2), rows)
        tape.add_sum(bias.gradient, flat, 1)
        if first:
            return g
        gx = tape.take(*x.shape)
        tape.matmul(flat, weight.value, gx.view(replicas, -1, inputs))
        return gx

    return out, backward


@twin.register
def _layer_norm(module: nn.LayerNorm, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    width = x.shape[-1]
    return _normalization(tape, site, x, tape.view(x, x.shape[0], -1, 1, width), module.eps)


@twin.register
def _group_norm(module: nn.GroupNorm, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    replicas, batch, *_, channels = x.shape
    return _normalization(tape, site, x, tape.view(x, replicas, batch, -1, channels), module.eps)


def _normalization(tape: Tape, site: Site, x: Tensor, groups: Tensor, eps: float) -> tuple[Tensor, Backward]:
    """Normalize over the last two dimensions of `groups`, then scale and shift by its last.

    Args:
        groups: `x` as `[replicas, groups, positions, channels]`.
    """
    replicas, count, positions, channels = groups.shape
    size = positions * channels
    weight, bias = (site[name].value.view(replicas, 1, 1, channels) for name in ("weight", "bias"))
    flat = groups.view(replicas, count, size)
    mean, inverse = (tape.take(replicas, count, 1) for _ in range(2))
    normal, scratch = (tape.take(replicas, count, size) for _ in range(2))
    out = tape.take(*groups.shape)
    # A product with a constant vector is the fastest mean over a short dimension.
    average = torch.full((size, 1), 1 / size, device=x.device, dtype=x.dtype)
    tape.matmul(flat, average, mean)
    tape.call(torch.sub, flat, mean, out=normal)
    tape.call(torch.mul, normal, normal, out=scratch)
    tape.matmul(scratch, average, inverse)
    tape.call(inverse.add_, eps)
    tape.call(inverse.rsqrt_)
    tape.call(normal.mul_, inverse)
    tape.call(torch.addcmul, bias, normal.view(groups.shape), weight, out=out)
    tape.release(mean, scratch)
    tape.until_backward(inverse, normal)

    def backward(g: Tensor) -> Tensor:
        gg = tape.view(g, *groups.shape)
        scratch, gx = (tape.take(replicas, count, size) for _ in range(2))
        shaped = scratch.view(groups.shape)
        tape.call(torch.mul, gg, normal.view(groups.shape), out=shaped)
        tape.add_sum(site["weight"].gradient, shaped, (1, 2))
        tape.add_sum(site["bias"].gradient, gg, (1, 2))
        # With y = weight * normal, both sums of the gradient of `normal` are products with the weight.
        slope, level = (tape.take(replicas, count, 1) for _ in range(2))
        spread = tape.view(weight.expand(replicas, 1, positions, channels), replicas, size, 1)
        tape.matmul(scratch, spread, slope)
        tape.matmul(gg.view(replicas, count, size), spread, level)
        tape.call(torch.mul, gg, weight, out=gx.view(groups.shape))
        tape.call(gx.sub_, level, alpha=1 / size)
        tape.call(gx.addcmul_, normal, slope, value=-1 / size)
        tape.call(gx.mul_, inverse)
        tape.release(scratch, slope, level, spread, inverse, normal)
        return gx.view(x.shape)

    return out.view(x.shape), backward
