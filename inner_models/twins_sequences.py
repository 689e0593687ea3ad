"""Twins of the layers of sequence models. Sequences are `[replicas, batch, length, width]`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from inner_models.models import GRU, Attention, Last, Mean, Position
from inner_models.programs import Tape
from inner_models.twins import Backward, Site, affine, twin

_aten = torch.ops.aten


@twin.register
def _last(module: Last, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    def backward(g: Tensor) -> Tensor:
        gx = tape.workspace.named(f"{site.name}gx", tuple(x.shape))  # stays zero elsewhere
        tape.call(gx.select(-2, -1).copy_, g)
        return gx

    return x.select(-2, -1), backward


@twin.register
def _mean(module: Mean, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    replicas, batch, length, width = x.shape
    out = tape.take(replicas, batch, width)
    tape.call(torch.mean, x, -2, out=out)

    def backward(g: Tensor) -> Tensor:
        gx = tape.take(*x.shape)
        tape.call(torch.div, g.unsqueeze(2).expand(x.shape), length, out=gx)
        return gx

    return out, backward


@twin.register
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
        if not tape.cpu:  # sums of `index_add_` come in any order on a GPU, a product's do not
            flat = tape.view(g, replicas, -1, width)
            hot = tape.take(replicas, flat.shape[1], vocabulary)
            tape.call(hot.zero_)
            tape.call(hot.scatter_, 2, tokens.view(replicas, -1, 1), 1.0)
            tape.add_product(weight.gradient, hot.transpose(1, 2), flat)
            tape.release(hot, rows)
            return g
        gt = tape.take(*table.shape)
        tape.call(gt.zero_)
        tape.call(gt.flatten(0, 1).index_add_, 0, rows.flatten(), tape.view(g, -1, width))
        tape.add_gradient(weight.gradient, gt)
        tape.release(gt, rows)
        return g

    return out, backward


@twin.register
def _position(module: Position, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    weight = site["weight"]
    out = tape.take(*x.shape)
    tape.call(torch.add, x, weight.value.unsqueeze(1), out=out)

    def backward(g: Tensor) -> Tensor:
        tape.add_sum(weight.gradient, g, 1)
        return g

    return out, backward


@twin.register
def _attention(module: Attention, site: Site, tape: Tape, x: Tensor) -> tuple[Tensor, Backward]:
    replicas, batch, length, width = x.shape
    heads = module.heads
    size = width // heads
    qkv, qkv_backward = affine(tape, site["qkv.weight"], site["qkv.bias"], x, site.first)

    def split(packed: Tensor) -> tuple[Tensor, ...]:
        """`[replicas, batch, length, 3 * width]` to three views `[replicas, batch, heads, length, size]`."""
        return packed.view(replicas, batch, length, 3, heads, size).permute(3, 0, 1, 4, 2, 5).unbind(0)

    def by_head(whole: Tensor) -> Tensor:
        """`[replicas, batch, length, width]` as `[replicas, batch, heads, length, size]`."""
        return whole.view(replicas, batch, length, heads, size).transpose(2, 3)

    q, k, v = split(qkv)
    scores, weights = (tape.take(replicas, batch, heads, length, length) for _ in range(2))
    keys = tape.transposed(k, size**-0.5)
    tape.matmul(q, keys, scores)
    tape.release(keys)
    if module.causal:
        future = torch.full((length, length), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        tape.call(scores.add_, future)
    tape.call(torch.softmax, scores, -1, out=weights)
    mixed = tape.take(replicas, batch, length, width)
    tape.matmul(weights, v, by_head(mixed))
    tape.release(scores)
    tape.until_backward(qkv, weights)
    out, out_backward = affine(tape, site["out.weight"], site["out.bias"], mixed)
    tape.until_backward(mixed)

    def backward(g: Tensor) -> Tensor:
        gm = out_backward(g)
        packed, gs = tape.take(*qkv.shape), tape.take(*weights.shape)
        gq, gk, gv = split(packed)
        values = tape.transposed(v, size**-0.5)  # the factor of the scores, which this carries into their gradient
        tape.matmul(weights.transpose(-1, -2), by_head(gm), gv)
        tape.matmul(by_head(gm), values, gs)
        tape.release(values)
        tape.call(_aten._softmax_backward_data.out, gs, weights, -1, weights.dtype, grad_input=gs)
        tape.matmul(gs, k, gq)
        tape.matmul(gs.transpose(-1, -2), q, gk)
        tape.release(gm, gs, weights, mixed, qkv)
        gx = qkv_backward(packed)
        tape.release(packed)
        return gx

    return out, backward


@twin.register
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
    a, a_backward = affine(tape, site["weight_ih_l0"], site["bias_ih_l0"], ordered, site.first)
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
