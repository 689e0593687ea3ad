"""Replicated twins of the layers in `inner_models.models`: the same mathematics for many replicas at once.

A twin records the calls of its forward pass on a tape and returns what records those of its backward pass. Inputs are
`[replicas, batch, ...]` (images channels-last), parameters `[replicas, *parameter shape]`. No call writes into the
gradient of its layer's output, nor, unless `Site.spent` allows it, into the layer's input: layers combine freely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from itertools import product

import torch
from torch import Tensor, nn

from inner_models.masks import MaskSource
from inner_models.models import GRU, Attention, Dropout, Last, Mean, Position, Residual
from inner_models.programs import Tape, same_memory
from inner_models.tasks import Loss

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
        masks: its mask source, if it is a dropout layer.
        first: no layer before it has parameters, so nothing needs its input's gradient.
        channels_last: its input is an image that a convolution has seen.
        spent: its input may be overwritten.
    """

    name: str
    parameters: Mapping[str, Parameter]
    masks: MaskSource | None = None
    first: bool = False
    channels_last: bool = False
    spent: bool = False

    def __getitem__(self, name: str) -> Parameter:
        return self.parameters[name]


def takes_images(model: nn.Sequential) -> bool:
    """Whether the model's twin wants its input channels-last, `[..., height, width, channels]`."""
    return isinstance(model[0], nn.Conv2d)


def record(
    model: nn.Sequential, parameters: Mapping[str, Parameter], masks: list[MaskSource], tape: Tape, x: Tensor
) -> tuple[Tensor, Backward]:
    """Record the replicated forward pass of `model`.

    Args:
        parameters: by their names in `model.named_parameters()`.
        masks: one source a `Dropout` module, in the order of `model.modules()`.
        x: the buffer that will hold the inputs, `[replicas, batch, ...]`.

    Returns:
        The buffer that will hold the outputs, and what records the backward pass.

    Raises:
        NotImplementedError: the model holds a layer type without a replicated twin.
    """
    dropouts = [module for module in model.modules() if isinstance(module, Dropout)]
    sources = {id(module): source for module, source in zip(dropouts, masks, strict=True)}
    chain = _chain(model, "", parameters, sources, tape, x, outermost=True)
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
    sources: Mapping[int, MaskSource],
    tape: Tape,
    x: Tensor,
    outermost: bool = False,
) -> _Chain:
    """Layers one after the other. `x` and the gradient of the output are the caller's to release."""
    steps: list[tuple[Backward, Tensor | None]] = []
    given, first, images, spent = x, outermost, False, False
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
            out, backward = _twin(module, site, tape, x)
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


@singledispatch
def _twin(module: nn.Module, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    raise NotImplementedError(f"{type(module).__name__} has no replicated twin")


@_twin.register
def _dropout(module: Dropout, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    if not tape.training:
        return x, _no_backward
    assert site.masks is not None
    shape = x.shape
    size = (site.masks.replicas, math.prod(shape[1:]))
    masks = tape.workspace.named(f"{site.name}mask", size)
    if tape.rows.start == 0:
        tape.program.add_before(site.masks.fill, tape.workspace.named("keep", size, torch.bool), masks)
    mask = masks[tape.rows]
    out = x if site.spent else tape.take(*shape)
    tape.call(torch.mul, x, mask.view(shape), out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*shape)
        tape.call(torch.mul, g, mask.view(shape), out=gx)
        return gx

    return out, backward


def _no_backward(gradient: Tensor) -> Tensor:
    raise AssertionError("an evaluation has no backward pass")


@_twin.register
def _relu(module: nn.ReLU, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    out = tape.take(*x.shape)
    tape.call(torch.clamp_min, x, 0, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(_aten.threshold_backward.grad_input, g, out, 0, grad_input=gx)
        return gx

    return out, backward


@_twin.register
def _gelu(module: nn.GELU, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    out = tape.take(*x.shape)
    tape.call(_aten.gelu.out, x, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(_aten.gelu_backward.grad_input, g, x, grad_input=gx)
        return gx

    return out, backward


@_twin.register
def _silu(module: nn.SiLU, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    out = tape.take(*x.shape)
    tape.call(_aten.silu.out, x, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(_aten.silu_backward.grad_input, g, x, grad_input=gx)
        return gx

    return out, backward


@_twin.register
def _tanh(module: nn.Tanh, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    out = tape.take(*x.shape)
    tape.tanh(x, out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(_aten.tanh_backward.grad_input, g, out, grad_input=gx)
        return gx

    return out, backward


@_twin.register
def _flatten(module: nn.Flatten, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    """`nn.Flatten` of a channels-last image puts the channels first, as the reference has them."""
    if not site.channels_last:
        return tape.view(x, *x.shape[:2], -1), lambda g: g.view(x.shape)
    replicas, batch, height, width, channels = x.shape
    out = tape.take(replicas, batch, channels, height, width)
    tape.call(out.copy_, x.movedim(-1, 2))

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(gx.copy_, g.view(out.shape).movedim(2, -1))
        return gx

    return out.flatten(2), backward


@_twin.register
def _last(module: Last, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    def backward(g: Tensor) -> Tensor:
        gx = tape.workspace.named(f"{site.name}gx", tuple(x.shape))  # stays zero elsewhere
        tape.call(gx.select(-2, -1).copy_, g)
        return gx

    return x.select(-2, -1), backward


@_twin.register
def _mean(module: Mean, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    replicas, batch, length, width = x.shape
    out = tape.take(replicas, batch, width)
    tape.call(torch.mean, x, -2, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(torch.div, g.unsqueeze(2).expand(x.shape), length, out=gx)
        return gx

    return out, backward


@_twin.register
def _linear(module: nn.Linear, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    return _affine(tape, site["weight"], site["bias"], x, site.first)


def _affine(tape: Tape, weight: Parameter, bias: Parameter, x: Tensor, first: bool = False) -> tuple[Tensor, Backward]:
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


@_twin.register
def _conv2d(module: nn.Conv2d, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    """One batched matrix product over patches; columns are ordered (kernel row, kernel column, channel)."""
    if isinstance(module.padding, str):
        raise NotImplementedError(f"{module} has no replicated twin: padding must be given in numbers")
    replicas, batch, height, width, channels = x.shape
    (rows, columns), (above, left) = module.kernel_size, module.padding
    out_height, out_width = height + 2 * above - rows + 1, width + 2 * left - columns + 1
    weight, bias, outputs = site["weight"], site["bias"], module.out_channels
    pixels, taps = batch * out_height * out_width, rows * columns * channels
    inside = (..., slice(above, above + height), slice(left, left + width), slice(None))

    frame = (replicas, batch, height + 2 * above, width + 2 * left, channels)
    padded = tape.workspace.named(f"{site.name}padded", frame)  # its border stays zero
    tape.call(padded[inside].copy_, x)
    patches = tape.take(replicas, pixels, taps)
    windows = padded.unfold(2, rows, 1).unfold(3, columns, 1).movedim(4, -1)  # [R, B, h, w, rows, columns, channels]
    if columns * channels >= 16:
        tape.call(patches.view(windows.shape).copy_, windows)
    else:  # runs too short for a strided copy to be fast
        index = torch.arange(padded[0, 0].numel(), device=x.device).view(frame[2:])
        index = index.unfold(0, rows, 1).unfold(1, columns, 1).movedim(2, -1).flatten()
        images = replicas * batch
        tape.call(torch.index_select, padded.view(images, -1), 1, index, out=patches.view(images, -1))
    matrix = tape.take(replicas, taps, outputs)
    by_tap = matrix.view(replicas, rows, columns, channels, outputs)
    tape.call(by_tap.copy_, weight.value.permute(0, 3, 4, 2, 1))
    out = tape.take(replicas, batch, out_height, out_width, outputs)
    flat_out = out.view(replicas, pixels, outputs)
    tape.matmul(patches, matrix, flat_out)
    tape.call(flat_out.add_, bias.value.unsqueeze(1))
    tape.until_backward(patches, matrix)

    def backward(g: Tensor) -> Tensor:
        flat = tape.view(g, replicas, pixels, outputs)
        gm = tape.take(*matrix.shape)
        tape.matmul(patches.transpose(1, 2), flat, gm)
        tape.add_gradient(weight.gradient, gm.view(by_tap.shape).permute(0, 4, 3, 1, 2))
        tape.add_sum(bias.gradient, flat, 1)
        if site.first:
            tape.release(gm, patches, matrix)
            return g
        gp = patches  # no longer needed
        tape.matmul(flat, matrix.transpose(1, 2), gp)
        gx = tape.take(*frame)
        tape.call(gx.zero_)
        for row, column in product(range(rows), range(columns)):
            part = gx[:, :, row : row + out_height, column : column + out_width]
            tape.call(part.add_, gp.view(windows.shape)[..., row, column, :])
        tape.release(gm, patches, matrix)
        return gx[inside]

    return out, backward


@_twin.register
def _avg_pool2d(module: nn.AvgPool2d, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    replicas, batch, height, width, channels = x.shape
    corners = [
        (..., slice(row, height // 2 * 2, 2), slice(column, width // 2 * 2, 2), slice(None))
        for row, column in product((0, 1), (0, 1))
    ]
    out = tape.take(replicas, batch, height // 2, width // 2, channels)
    parts = [x[corner] for corner in corners]
    tape.call(torch.add, parts[0], parts[1], out=out)
    tape.call(out.add_, parts[2])
    tape.call(out.add_, parts[3])
    tape.call(out.mul_, 0.25)

    def backward(g: Tensor) -> Tensor:
        gx = tape.workspace.named(f"{site.name}gx", tuple(x.shape))  # an odd last row or column stays zero
        for corner in corners:
            tape.call(torch.mul, g, 0.25, out=gx[corner])
        return gx

    return out, backward


@_twin.register
def _layer_norm(module: nn.LayerNorm, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    width = x.shape[-1]
    return _normalization(tape, site, x, tape.view(x, x.shape[0], -1, 1, width), module.eps)


@_twin.register
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
        # With y = weight * normal, both means of the gradient of `normal` are products with the weight.
        slope, level = (tape.take(replicas, count, 1) for _ in range(2))
        spread = tape.take(replicas, size, 1)
        wide = (replicas, 1, positions, channels)
        tape.call(torch.div, weight.expand(wide), size, out=spread.view(wide))
        tape.matmul(scratch, spread, slope)
        tape.matmul(gg.view(replicas, count, size), spread, level)
        tape.call(torch.mul, gg, weight, out=gx.view(groups.shape))
        tape.call(gx.sub_, level)
        tape.call(gx.addcmul_, normal, slope, value=-1)
        tape.call(gx.mul_, inverse)
        tape.release(scratch, slope, level, spread, inverse, normal)
        return gx.view(x.shape)

    return out.view(x.shape), backward


@_twin.register
def _embedding(module: nn.Embedding, site: Site, tape: Tape, tokens: Tensor) -> tuple[Tensor, Backward]:
    weight = site["weight"]
    replicas, vocabulary, width = weight.value.shape
    table = tape.take(replicas, vocabulary, width)
    rows = tape.take(*tokens.shape, dtype=torch.int64)
    out = tape.take(*tokens.shape, width)
    first = torch.arange(replicas, device=tokens.device).view(-1, *[1] * (tokens.dim() - 1)) * vocabulary
    tape.call(table.copy_, weight.value)
    tape.call(torch.add, tokens, first, out=rows)
    tape.call(torch.index_select, table.flatten(0, 1), 0, rows.flatten(), out=out.view(-1, width))
    tape.until_backward(rows)
    tape.release(table)

    def backward(g: Tensor) -> Tensor:
        gt = tape.take(*table.shape)
        tape.call(gt.zero_)
        tape.call(gt.flatten(0, 1).index_add_, 0, rows.flatten(), tape.view(g, -1, width))
        tape.add_gradient(weight.gradient, gt)
        tape.release(gt, rows)
        return g

    return out, backward


@_twin.register
def _position(module: Position, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    weight = site["weight"]
    out = tape.take(*x.shape)
    tape.call(torch.add, x, weight.value.unsqueeze(1), out=out)

    def backward(g: Tensor) -> Tensor:
        tape.add_sum(weight.gradient, g, 1)
        return g

    return out, backward


@_twin.register
def _attention(module: Attention, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    replicas, batch, length, width = x.shape
    heads = module.heads
    size = width // heads
    qkv, qkv_backward = _affine(tape, site["qkv.weight"], site["qkv.bias"], x, site.first)

    def split(packed: Tensor) -> tuple[Tensor, ...]:
        """`[replicas, batch, length, 3 * width]` to three views `[replicas, batch, heads, length, size]`."""
        return packed.view(replicas, batch, length, 3, heads, size).permute(3, 0, 1, 4, 2, 5).unbind(0)

    def by_head(whole: Tensor) -> Tensor:
        """`[replicas, batch, length, width]` as `[replicas, batch, heads, length, size]`."""
        return whole.view(replicas, batch, length, heads, size).transpose(2, 3)

    q, k, v = split(qkv)
    scores, weights = (tape.take(replicas, batch, heads, length, length) for _ in range(2))
    tape.call(q.mul_, size**-0.5)
    tape.matmul(q, k.transpose(-1, -2), scores)
    if module.causal:
        future = torch.full((length, length), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        tape.call(scores.add_, future)
    tape.call(torch.softmax, scores, -1, out=weights)
    mixed = tape.take(replicas, batch, length, width)
    tape.matmul(weights, v, by_head(mixed))
    tape.release(scores)
    tape.until_backward(qkv, weights)
    out, out_backward = _affine(tape, site["out.weight"], site["out.bias"], mixed)
    tape.until_backward(mixed)

    def backward(g: Tensor) -> Tensor:
        gm = out_backward(g)
        packed, gw, gs = tape.take(*qkv.shape), tape.take(*weights.shape), tape.take(*weights.shape)
        gq, gk, gv = split(packed)
        tape.matmul(weights.transpose(-1, -2), by_head(gm), gv)
        tape.matmul(by_head(gm), v.transpose(-1, -2), gw)
        tape.call(_aten._softmax_backward_data.out, gw, weights, -1, weights.dtype, grad_input=gs)
        tape.matmul(gs, k, gq)
        tape.call(gq.mul_, size**-0.5)
        tape.matmul(gs.transpose(-1, -2), q, gk)
        tape.release(gm, gw, gs, weights, mixed, qkv)
        gx = qkv_backward(packed)
        tape.release(packed)
        return gx

    return out, backward


@_twin.register
def _gru(module: GRU, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    """Equations of `torch.nn.GRU`, one layer, one direction. Buffers are `[replicas, length, batch, ...]`.

    Gates r (reset), z (update) and candidate n: h' = n + z * (h - n), n = tanh(a_n + r * c) with a = W_i x + b_i and
    c the candidate's part of W_h h + b_h.
    """
    replicas, batch, length, inputs = x.shape
    width = module.hidden_size
    gates = slice(0, 2 * width)
    rest = slice(2 * width, None)

    weight, bias = site["weight_hh_l0"], site["bias_hh_l0"]
    matrix = tape.take(replicas, width, 3 * width)  # a product with it is three times as fast as one with its transpose
    ordered = tape.take(replicas, length, batch, inputs)
    tape.call(matrix.copy_, weight.value.transpose(1, 2))
    tape.call(ordered.copy_, x.transpose(1, 2))
    a, a_backward = _affine(tape, site["weight_ih_l0"], site["bias_ih_l0"], ordered, site.first)
    state = tape.workspace.named(f"{site.name}state", (replicas, length + 1, batch, width))  # the first stays zero
    gate = tape.take(replicas, length, batch, 2 * width)
    c, n = (tape.take(replicas, length, batch, width) for _ in range(2))
    hidden = tape.take(replicas, batch, 3 * width)
    for t in range(length):
        h, next_h = state[:, t], state[:, t + 1]
        tape.matmul(h, matrix, hidden)
        tape.call(hidden.add_, bias.value.unsqueeze(1))
        tape.call(torch.add, a[:, t, :, gates], hidden[..., gates], out=gate[:, t])
        tape.call(gate[:, t].sigmoid_)
        tape.call(c[:, t].copy_, hidden[..., rest])
        tape.call(torch.addcmul, a[:, t, :, rest], gate[:, t, :, :width], c[:, t], out=n[:, t])
        tape.tanh(n[:, t], n[:, t])
        tape.call(torch.lerp, n[:, t], h, gate[:, t, :, width:], out=next_h)
    out = tape.take(replicas, batch, length, width)
    tape.call(out.copy_, state[:, 1:].transpose(1, 2))
    tape.release(a, hidden, matrix)
    tape.until_backward(ordered, gate, c, n)

    def backward(g: Tensor) -> Tensor:
        ga, gh = (tape.take(replicas, length, batch, 3 * width) for _ in range(2))
        carried, product, onward = (tape.take(replicas, batch, width) for _ in range(3))
        gg = tape.take(replicas, batch, 2 * width)
        by_time = g.transpose(1, 2)
        tape.call(carried.copy_, by_time[:, -1])
        for t in reversed(range(length)):
            r, z = gate[:, t, :, :width], gate[:, t, :, width:]
            tape.call(torch.sub, state[:, t], n[:, t], out=onward)
            tape.call(torch.mul, carried, onward, out=gg[..., width:])
            tape.call(torch.mul, carried, z, out=onward)
            tape.call(carried.sub_, onward)  # of what arrives, the part that goes into n
            tape.call(_aten.tanh_backward.grad_input, carried, n[:, t], grad_input=ga[:, t, :, rest])
            tape.call(torch.mul, ga[:, t, :, rest], r, out=gh[:, t, :, rest])
            tape.call(torch.mul, ga[:, t, :, rest], c[:, t], out=gg[..., :width])
            tape.call(_aten.sigmoid_backward.grad_input, gg, gate[:, t], grad_input=ga[:, t, :, gates])
            tape.call(gh[:, t, :, gates].copy_, ga[:, t, :, gates])
            if t:
                tape.matmul(gh[:, t], weight.value, product)
                tape.call(torch.add, product, onward, out=carried)
                tape.call(carried.add_, by_time[:, t - 1])
        flat = gh.view(replicas, length * batch, 3 * width)
        tape.add_product(weight.gradient, flat.transpose(1, 2), state[:, :-1].flatten(1, 2))
        tape.add_sum(bias.gradient, flat, 1)
        tape.release(gh, carried, product, onward, gg, gate, c, n)
        gx = a_backward(ga)
        tape.release(ordered, ga)
        return gx.transpose(1, 2)

    return out, backward


def record_loss(tape: Tape, outputs: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Record the mean loss of each replica and its gradient.

    Args:
        outputs: `[replicas, batch, ...]`; for cross-entropy the logits are in the last dimension.
        targets: `[replicas, batch, ...]`.

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
    tape.call(losses.mul_, -1 / scale)
    if tape.training:
        tape.call(torch.exp, logs, out=logits)
        tape.call(logits.scatter_add_, 1, index, torch.full_like(picked, -1.0))
        tape.call(torch.div, logits.transpose(1, 2), scale, out=gradient.view(replicas, scale, classes))
    tape.release(logits, logs, picked)
    return losses, gradient


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
