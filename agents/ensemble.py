"""A regression of numbers on numbers that knows what it does not know: an ensemble of small networks.

Deep ensembles (Lakshminarayanan et al. 2017, arXiv:1612.01474), each member without one part of the groups that rows
come in (tasks, say): how members differ shows how far a prediction carries over to other groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hpo_env.hyperparameters import Array

_INPUT_CLIP = 4.0
"""In standard deviations: what lies farther outside is as far as anything was."""

_BATCH = 512


@dataclass(frozen=True)
class Fit:
    """How an ensemble is fitted.

    Attributes:
        members: networks, at least 2.
        hidden: widths of their two hidden layers.
        steps: of AdamW, batches of 512 rows; the learning rate falls to 0 as a cosine.
        noise: standard deviation of the noise on standardized inputs, which keeps members from knowing tasks by heart.
    """

    members: int = 5
    hidden: int = 128
    steps: int = 3000
    lr: float = 2e-3
    weight_decay: float = 0.1
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.members < 2 or self.hidden < 1 or self.steps < 1:
            raise ValueError(
                f"members must be at least 2, hidden and steps at least 1, not {self.members}, {self.hidden} and "
                f"{self.steps}"
            )


class Ensemble:
    """Multilayer perceptrons (SiLU) on standardized inputs, all members in one batch.

    Args:
        mean, std: of the inputs, `[inputs]`; a constant has a `std` of 1.
        layers: weights `[members, fan in, fan out]` and biases `[members, 1, fan out]` in turn; the last fan out is 1.
    """

    def __init__(self, mean: Tensor, std: Tensor, layers: list[Tensor]) -> None:
        self._mean, self._std, self._layers = mean, std, layers

    @classmethod
    def fit(cls, inputs: ArrayLike, targets: ArrayLike, groups: ArrayLike, config: Fit | None = None) -> Ensemble:
        """Minimize the mean squared error.

        Args:
            inputs: `[rows, inputs]`, finite.
            targets: `[rows]`, finite.
            groups: `[rows]`, any labels. They are dealt to the members; each leaves out those that it is dealt.

        Raises:
            ValueError: other shapes, what is not finite, fewer groups than members.
        """
        config = config or Fit()
        x, y = np.asarray(inputs, np.float32), np.asarray(targets, np.float32)
        labels = np.unique(np.asarray(groups), return_inverse=True)[1]
        if x.ndim != 2 or y.shape != labels.shape or y.shape != x.shape[:1] or not len(y):
            raise ValueError(f"inputs, targets and groups have the shapes {x.shape}, {y.shape} and {labels.shape}")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError("inputs and targets must be finite")
        if labels.max() + 1 < config.members:
            raise ValueError(f"{config.members} members need as many groups at least, not {labels.max() + 1}")
        rng = np.random.default_rng(config.seed)
        dealt = rng.permutation(np.resize(np.arange(config.members), labels.max() + 1))[labels]
        own = [np.flatnonzero(dealt != member) for member in range(config.members)]
        std = x.std(axis=0)
        mean, std = torch.from_numpy(x.mean(axis=0)), torch.from_numpy(np.where(std > 1e-6, std, 1).astype(np.float32))
        generator = torch.Generator().manual_seed(config.seed)
        ensemble = cls(mean, std, _initial(x.shape[1], config, generator))
        ensemble._train(torch.from_numpy(x), torch.from_numpy(y), own, config, rng, generator)
        return ensemble

    @torch.no_grad()
    def predict(self, inputs: ArrayLike) -> tuple[Array, Array]:
        """`[rows, inputs]` to the mean of the members' predictions and their standard deviation, `[rows]` each."""
        x = torch.from_numpy(np.atleast_2d(np.asarray(inputs, np.float32)))
        outputs = self._forward(self._standardized(x).expand(len(self._layers[0]), -1, -1)).double().numpy()
        return outputs.mean(axis=0), outputs.std(axis=0, ddof=1)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "std": self._std, "layers": list(self._layers)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Ensemble:
        return cls(state["mean"], state["std"], list(state["layers"]))

    def _standardized(self, x: Tensor) -> Tensor:
        return ((x - self._mean) / self._std).clamp(-_INPUT_CLIP, _INPUT_CLIP)

    def _forward(self, x: Tensor) -> Tensor:
        """`[members, rows, inputs]` to `[members, rows]`."""
        for index in range(0, len(self._layers), 2):
            x = torch.baddbmm(self._layers[index + 1], x, self._layers[index])
            if index + 2 < len(self._layers):
                x = torch.nn.functional.silu(x)
        return x[..., 0]

    def _train(
        self,
        x: Tensor,
        y: Tensor,
        own: list[NDArray[np.intp]],
        config: Fit,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> None:
        x = self._standardized(x)
        parameters = [layer.requires_grad_() for layer in self._layers]
        optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
        decline = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        for _ in range(config.steps):
            rows = torch.from_numpy(np.stack([rng.choice(mine, _BATCH) for mine in own]))
            batch = x[rows]
            batch = batch + config.noise * torch.randn(batch.shape, generator=generator)
            loss = (self._forward(batch) - y[rows]).square().mean(dim=1).sum()  # members do not mix
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decline.step()
        self._layers = [layer.detach() for layer in parameters]


def _initial(inputs: int, config: Fit, generator: torch.Generator) -> list[Tensor]:
    """Uniform in +-1/sqrt(fan in), as torch's own layers."""
    layers = []
    for fan_in, fan_out in ((inputs, config.hidden), (config.hidden, config.hidden), (config.hidden, 1)):
        bound = fan_in**-0.5
        for shape in ((config.members, fan_in, fan_out), (config.members, 1, fan_out)):
            layers.append((2 * torch.rand(shape, generator=generator) - 1) * bound)
    return layers
