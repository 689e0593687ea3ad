"""A learned distance between tasks: how much each feature counts, by how well near tasks recommend.

Soft neighbours as in neighbourhood components analysis (Goldberger et al. 2004, "Neighbourhood Components Analysis"),
with the score of what they recommend in place of a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpo_env.hyperparameters import Array


@dataclass(frozen=True)
class Learning:
    """How the weights are learned.

    Attributes:
        steps: of Adam on the logarithms of the weights, all tasks at once.
        scale: sum of the weights at the start, all equal.
        pull: on the mean squared distance of these logarithms from the start.
        temperature: in score; how sharply the best trial is told from the others.
    """

    steps: int = 100
    lr: float = 0.05
    scale: float = 16.0
    pull: float = 0.03
    temperature: float = 0.05


def learn_weights(places: Array, scores: Array, datasets: Sequence[str], learning: Learning | None = None) -> Array:
    """Weights w, all above 0, of the squared distance d_ij^2 = sum_f w_f (x_if - x_jf)^2, `[features]`.

    Args:
        places: x, `[tasks, features]`, standardized.
        scores: of the trials, `[tasks, trials]`, the same trials on all tasks; low is good.
        datasets: of the tasks: none listens to others on its own.

    Raises:
        ValueError: all tasks are on one data set.
    """
    learning = learning or Learning()
    if len(set(datasets)) < 2:
        raise ValueError(f"a distance is learned from tasks on two data sets or more, not on {datasets[0]} alone")
    given = torch.from_numpy(places), torch.from_numpy(scores), same_dataset(datasets)
    features = places.shape[1]
    start = torch.full((features,), math.log(learning.scale / features), dtype=torch.float64)
    logs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logs], learning.lr)
    for _ in range(learning.steps):
        expected = expected_scores(*given, logs.exp(), learning.temperature)
        loss = expected.mean() + learning.pull * (logs - start).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return np.asarray(logs.detach().exp().numpy())


def same_dataset(names: Sequence[str]) -> Tensor:
    """Which pairs of tasks share a data set, `[tasks, tasks]`."""
    labels = np.array(names)
    return torch.from_numpy(labels[:, None] == labels)


def expected_scores(places: Tensor, scores: Tensor, deaf: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Of what soft neighbours recommend to each task i, `[tasks]`: sum_c q_ic s_ic.

    Task i listens to task j with the share p_ij, the softmax over j of -d_ij^2. Trial c is recommended to it with the
    probability q_ic, the softmax over c of -sum_j p_ij s_jc / temperature.

    Args:
        places, scores: see `learn_weights`.
        deaf: `[tasks, tasks]`, to whom a task does not listen.
    """
    distances = (places[:, None] - places).square() @ weights
    shares = torch.softmax(-distances.masked_fill(deaf, math.inf), dim=1)
    recommended = torch.softmax(-shares @ scores / temperature, dim=1)
    return (recommended * scores).sum(dim=1)
