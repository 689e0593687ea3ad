"""Augmentation: random changes of training inputs, of one strength whatever they are."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from inner_models.datasets import Modality

START = 0.1
"""Strength that a run begins with, until it is set."""


class Augment(nn.Module):
    """Changes its inputs at random while the model trains, not in evaluation. It stands first in a model.

    What a strength of s does:

    - `table`, `[batch, features]`: adds Gaussian noise of standard deviation s to every number; meant for standardized
      ones (Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization").
    - `image`, `[batch, channels, height, width]`: shifts an image in both directions by whole pixels, each uniformly up
      to s times half its side; what comes in repeats the edge (padding and cropping, as in He et al. 2016,
      arXiv:1512.03385).
    - `sequence`, `[batch, length, channels]`: zeroes every step with probability s (as in Park et al. 2019,
      arXiv:1904.08779).
    - `text`, `[batch, length]` token ids: puts a random token in every token's place with probability s (Xie et al.
      2017, arXiv:1703.02573).

    A subclass with a `changed` of its own can be anything else that has a strength.

    Args:
        modality: what the inputs are.
        strength: see above, 0..1; it may be set at any time.
        vocabulary: number of tokens; for text only.

    Attributes:
        stream: where random numbers come from; torch's own generator when None. Rows draw theirs in order whatever the
            batch size, so a batch of 64 sees the changes that four batches of 16 would.
    """

    stream: np.random.Generator | None = None

    def __init__(self, modality: Modality, strength: float = START, *, vocabulary: int | None = None) -> None:
        super().__init__()
        if modality not in get_args(Modality):
            raise ValueError(f"modality {modality!r} is not one of {', '.join(get_args(Modality))}")
        if not 0 <= strength <= 1:
            raise ValueError(f"the strength of an augmentation must lie in 0..1, not {strength}")
        if (modality == "text") != (vocabulary is not None):
            raise ValueError(f"give the vocabulary of a text, and only of a text, not {vocabulary} of a {modality}")
        self.modality, self.strength, self.vocabulary = modality, strength, vocabulary or 0

    def extra_repr(self) -> str:
        return f"{self.modality}, strength={self.strength:g}"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or (self.stream is None and not self.strength):
            return input
        dtype = input.dtype if input.is_floating_point() else torch.float32
        count = self.numbers(tuple(input.shape[1:]))
        if self.stream is None:
            draw = torch.randn if self.modality == "table" else torch.rand
            drawn = draw(len(input), count, device=input.device, dtype=dtype)
        else:
            drawn = torch.from_numpy(self.draw(self.stream, len(input) * count)).view(len(input), count)
        drawn = drawn.to(input.device, dtype)
        return self.changed(input, drawn, torch.full((1,), self.strength, device=input.device, dtype=dtype))

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Random numbers that an example of this shape takes."""
        return {"table": math.prod(shape), "image": 2, "sequence": shape[0], "text": 2 * shape[0]}[self.modality]

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Random numbers, the same ones however many calls they are drawn in: normal ones for a table, else uniform."""
        normal = self.modality == "table"
        return stream.standard_normal(count, np.float32) if normal else stream.random(count, np.float32)

    def changed(self, x: Tensor, numbers: Tensor, strength: Tensor) -> Tensor:
        """The inputs, changed.

        Args:
            x: `[*batch, *example]`.
            numbers: `[*batch, numbers]`, as `draw` gives them.
            strength: of each example, in a shape that broadcasts to `[*batch]`.
        """
        strength = strength.unsqueeze(-1)
        if self.modality == "table":
            return x + (numbers * strength).view(x.shape)
        if self.modality == "sequence":
            return x * (numbers >= strength).unsqueeze(-1)
        if self.modality == "text":
            replaced, token = numbers.chunk(2, -1)
            return torch.where(replaced < strength, (token * self.vocabulary).to(x.dtype), x)
        height, width = x.shape[-2:]
        down, right = (2 * numbers - 1).unsqueeze(-2).unbind(-1)
        rows, columns = (
            # With half a pixel more, -m..m are equally likely for a whole m, and small strengths shift some images.
            (torch.arange(side, device=x.device) + (share * (strength * side / 2 + 0.5)).round()).clamp(0, side - 1)
            for share, side in ((down, height), (right, width))
        )  # [*batch, side], where each row and column comes from
        rows, columns = rows.long(), columns.long()
        pixels = (rows.unsqueeze(-1) * width + columns.unsqueeze(-2)).flatten(-2).unsqueeze(-2)
        flat = x.flatten(-2)
        return flat.gather(-1, pixels.expand(flat.shape)).view(x.shape)
