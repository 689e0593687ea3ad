"""Twins of the layers of image models. Images are channels-last, `[replicas, batch, height, width, channels]`."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from inner_models.programs import Tape
from inner_models.twins import Backward, Site, twin


@twin.register
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


@twin.register
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


@twin.register
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
