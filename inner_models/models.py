"""Inner models: plain `torch.nn` modules, each built from a short list of layers.

Every layer type used here has a replicated twin (`inner_models.twins`), so that one definition of a model
serves the readable reference training and the batched engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from inner_models.augmentation import Augment
from inner_models.datasets import Dataset
from inner_models.sampling import draw_bytes

ModelKind = Literal["linear", "mlp", "cnn", "gru", "transformer", "autoencoder"]
Activation = Literal["relu", "gelu", "tanh", "silu"]
Normalization = Literal["none", "layer"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}


@dataclass(frozen=True)
class ModelSpec:
    """Architecture of an inner model, apart from the input and output sizes, which its data set fixes.

    Attributes:
        kind: one of `ModelKind`.
        width: hidden units (MLP, GRU, autoencoder), channels (CNN) or embedding size (transformer).
        depth: hidden layers or blocks; ignored by `linear`.
        activation: the nonlinearity; the GRU has its own.
        normalization: `layer` puts layer normalization before each activation (group normalization with one group in
            a CNN); the transformer always has it.
    """

    kind: ModelKind
    width: int = 64
    depth: int = 2
    activation: Activation = "relu"
    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("kind", self.kind, get_args(ModelKind)),
            ("activation", self.activation, get_args(Activation)),
            ("normalization", self.normalization, get_args(Normalization)),
        ):
            if value not in known:
                raise ValueError(f"model {field} {value!r} is not one of {', '.join(known)}")
        if self.width < 1 or self.depth < 1:
            raise ValueError(f"model width and depth must be at least 1, not {self.width} and {self.depth}")


class Dropout(nn.Dropout):
    """`nn.Dropout` that can draw its mask from a numpy generator, so that a run depends on its own seed alone.

    With `stream` set, one byte is drawn per unit and the rate is rounded to a multiple of 1/256. Rows are drawn in
    order whatever the batch size, so a batch of 64 sees the masks that four batches of 16 would.
    """

    stream: np.random.Generator | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.stream is None:
            return super().forward(input)
        drawn = draw_bytes(self.stream, input.numel()).reshape(input.shape)
        threshold = round(self.p * 256)
        keep = torch.from_numpy(drawn >= threshold).to(input.device)
        return input * keep * (256 / (256 - threshold))


class GRU(nn.GRU):
    """`nn.GRU` that returns only its outputs `[batch, length, width]`."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        output, _ = super().forward(input)
        return output


class Position(nn.Module):
    """Adds a learned embedding of each position. `[batch, length, width]` in and out."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017). `[batch, length, width]` in and out."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(attend(self.qkv(x), self.heads, self.causal))
        return result


def attend(qkv: Tensor, heads: int, causal: bool) -> Tensor:
    """Scaled dot-product attention. `[batch, length, 3 * width]` to `[batch, length, width]`."""
    batch, length, triple = qkv.shape
    q, k, v = qkv.view(batch, length, 3, heads, triple // (3 * heads)).permute(2, 0, 3, 1, 4)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).reshape(batch, length, triple // 3)


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class Last(nn.Module):
    """The last position. `[batch, length, width]` to `[batch, width]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.select(-2, -1)


class Mean(nn.Module):
    """Mean over positions. `[batch, length, width]` to `[batch, width]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)


def build_model(
    spec: ModelSpec, dataset: Dataset, seed: int | torch.Generator = 0, *, augmented: bool = False
) -> nn.Sequential:
    """Build and initialize the model of `spec` for `dataset`.

    Args:
        seed: seed or generator of the initial weights; the global generator is neither read nor moved.
        augmented: put an `Augment` before it.

    Raises:
        ValueError: the kind does not take this modality (a CNN on a table, say).
    """
    with torch.device("meta"):
        layers = _LAYERS[spec.kind](spec, dataset)
        if augmented:
            vocabulary = dataset.outputs if dataset.modality == "text" else None
            layers = [Augment(dataset.modality, vocabulary=vocabulary), *layers]
        model = nn.Sequential(*layers)
    model = model.to_empty(device="cpu")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    initialize(model, generator)
    return model


def random_layers(model: nn.Module) -> list[Dropout | Augment]:
    """The layers that draw at random, in the order of their streams (`inner_models.training.Streams`): augmentation
    comes last, so that dropout is the same with it and without."""
    dropouts = [layer for layer in model.modules() if isinstance(layer, Dropout)]
    return [*dropouts, *(layer for layer in model.modules() if isinstance(layer, Augment))]


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Torch's default initialization, drawn from `generator`: uniform in +-1/sqrt(fan in); norms at one and zero."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
            continue
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding | Position):
            for parameter in own:
                parameter.data.normal_(0.0, 0.1, generator=generator)
        elif isinstance(module, nn.GRU):
            bound = 1 / math.sqrt(module.hidden_size)
            for parameter in own:
                parameter.data.uniform_(-bound, bound, generator=generator)
        elif own:
            bound = 1 / math.sqrt(own[0][0].numel())
            for parameter in own:
                parameter.data.uniform_(-bound, bound, generator=generator)


def _require(spec: ModelSpec, dataset: Dataset, *modalities: str) -> None:
    if dataset.modality not in modalities:
        raise ValueError(
            f"model {spec.kind!r} takes {' or '.join(modalities)} data, but {dataset.name!r} is {dataset.modality} data"
        )


def _norm(spec: ModelSpec, width: int) -> list[nn.Module]:
    return [nn.LayerNorm(width)] if spec.normalization == "layer" else []


def _hidden(spec: ModelSpec, fan_in: int, width: int) -> list[nn.Module]:
    return [nn.Linear(fan_in, width), *_norm(spec, width), ACTIVATIONS[spec.activation](), Dropout()]


def _linear(spec: ModelSpec, dataset: Dataset) -> list[nn.Module]:
    _require(spec, dataset, "table", "image", "sequence")
    return [nn.Flatten(), nn.Linear(math.prod(dataset.input_shape), dataset.outputs)]


def _mlp(spec: ModelSpec, dataset: Dataset) -> list[nn.Module]:
    _require(spec, dataset, "table", "image", "sequence")
    layers: list[nn.Module] = [nn.Flatten()]
    fan_in = math.prod(dataset.input_shape)
    for _ in range(spec.depth):
        layers += _hidden(spec, fan_in, spec.width)
        fan_in = spec.width
    return [*layers, nn.Linear(fan_in, dataset.outputs)]


def _cnn(spec: ModelSpec, dataset: Dataset) -> list[nn.Module]:
    _require(spec, dataset, "image")
    channels, height, width = dataset.input_shape
    layers: list[nn.Module] = []
    for _ in range(spec.depth):
        layers.append(nn.Conv2d(channels, spec.width, kernel_size=3, padding=1))
        if spec.normalization == "layer":
            layers.append(nn.GroupNorm(1, spec.width))
        layers.append(ACTIVATIONS[spec.activation]())
        channels = spec.width
        if min(height, width) >= 4:
            layers.append(nn.AvgPool2d(2))
            height, width = height // 2, width // 2
    return [*layers, nn.Flatten(), Dropout(), nn.Linear(channels * height * width, dataset.outputs)]


def _gru(spec: ModelSpec, dataset: Dataset) -> list[nn.Module]:
    _require(spec, dataset, "sequence", "text")
    text = dataset.modality == "text"
    layers: list[nn.Module] = [nn.Embedding(dataset.outputs, spec.width)] if text else []
    fan_in = spec.width if text else dataset.input_shape[1]
    for _ in range(spec.depth):
        layers += [GRU(fan_in, spec.width, batch_first=True), Dropout()]
        fan_in = spec.width
    return [*layers, *([] if text else [Last()]), nn.Linear(fan_in, dataset.outputs)]


def _transformer(spec: ModelSpec, dataset: Dataset) -> list[nn.Module]:
    _require(spec, dataset, "sequence", "text")
    text, width = dataset.modality == "text", spec.width
    heads = max(1, width // 16)
    if width % heads:
        raise ValueError(f"a transformer's width must be below 32 or a multiple of its {heads} heads, not {width}")
    layers: list[nn.Module] = [
        nn.Embedding(dataset.outputs, width) if text else nn.Linear(dataset.input_shape[1], width),
        Position(dataset.input_shape[0], width),
    ]
    for _ in range(spec.depth):
        layers.append(Residual(nn.LayerNorm(width), Attention(width, heads, causal=text), Dropout()))
        layers.append(
            Residual(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                ACTIVATIONS[spec.activation](),
                Dropout(),
                nn.Linear(2 * width, width),
            )
        )
    return [*layers, nn.LayerNorm(width), *([] if text else [Mean()]), nn.Linear(width, dataset.outputs)]


def _autoencoder(spec: ModelSpec, dataset: Dataset) -> list[nn.Module]:
    _require(spec, dataset, "table", "image", "sequence")
    size = math.prod(dataset.input_shape)
    code = max(2, spec.width // 8)
    layers: list[nn.Module] = [nn.Flatten()]
    fan_in = size
    for width in [spec.width] * spec.depth + [code] + [spec.width] * spec.depth:
        layers += _hidden(spec, fan_in, width)
        fan_in = width
    return [*layers, nn.Linear(fan_in, size)]


def encoder(autoencoder: nn.Sequential) -> nn.Sequential:
    """The first half of a model of kind `autoencoder`, sharing its weights: from inputs to codes, `[rows, code]`."""
    linears = [at for at, module in enumerate(autoencoder) if isinstance(module, nn.Linear)]
    return nn.Sequential(*list(autoencoder)[: linears[len(linears) // 2]])


_LAYERS: dict[str, Callable[[ModelSpec, Dataset], list[nn.Module]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "cnn": _cnn,
    "gru": _gru,
    "transformer": _transformer,
    "autoencoder": _autoencoder,
}
