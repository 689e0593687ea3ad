"""Telling two classes of a data set apart, from few examples: the textbook family of tasks for MAML, with what it must
beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from inner_models.datasets import Split, load_dataset

from .maml import Config, Examples, Initialization, Task, accuracy, adapt, meta_train

Pair = tuple[int, int]

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Inner learning rates that methods without a learned one choose from, by their accuracy on the meta-train pairs."""


class ClassPairs:
    """Tasks made of the pairs of classes of a data set: support rows from its training split, query rows from its test
    split. The lower class is 0, the higher one 1.

    Args:
        dataset: name of a set with classes.
        generator: draws the rows.

    Raises:
        ValueError: its targets are not classes.
    """

    def __init__(self, dataset: str, generator: np.random.Generator) -> None:
        data = load_dataset(dataset)
        if data.target != "classification" or data.test is None:
            raise ValueError(f"{dataset} has no classes to tell apart; take digits or mnist-5k, for example")
        self.name, self._generator = dataset, generator
        self._rows = tuple(_by_class(split) for split in (data.train, data.test))
        self.inputs = int(self._rows[0][0].shape[1])
        self.pairs: list[Pair] = list(combinations(range(len(self._rows[0])), 2))

    def draw(self, pairs: Sequence[Pair], shots: int, queries: int) -> Task:
        """One task a pair.

        Args:
            shots, queries: rows of each class, in the support and in the query set.

        Raises:
            ValueError: none, or more rows than a class has.
        """
        return Task(self._examples(0, pairs, shots), self._examples(1, pairs, queries))

    def _examples(self, split: int, pairs: Sequence[Pair], count: int) -> Examples:
        if count < 1:
            raise ValueError(f"each class needs 1 row or more, not {count}")
        inputs = [[self._of_class(split, name, count) for name in pair] for pair in pairs]
        targets = torch.tensor([0, 1]).repeat_interleave(count).expand(len(pairs), -1)
        return Examples(torch.stack([torch.cat(both) for both in inputs]), targets)

    def _of_class(self, split: int, name: int, count: int) -> Tensor:
        rows = self._rows[split][name]
        if len(rows) < count:
            raise ValueError(
                f"class {name} of {self.name} has {len(rows)} rows to draw from, not {count}; ask for fewer"
            )
        return rows[torch.from_numpy(self._generator.choice(len(rows), count, replace=False))]


def _by_class(split: Split) -> list[Tensor]:
    inputs = split.inputs.flatten(1)
    return [inputs[split.targets == name] for name in range(int(split.targets.max()) + 1)]


def network(kind: str, inputs: int) -> nn.Module:
    """`linear` (logistic regression) or `mlp` (64 hidden units).

    Raises:
        ValueError: another kind.
    """
    if kind not in ("linear", "mlp"):
        raise ValueError(f"model must be linear or mlp, not {kind!r}")
    return (
        nn.Linear(inputs, 2) if kind == "linear" else nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 2))
    )


Starts = Callable[[Task], Sequence[Initialization]]
"""A way of starting on new tasks: the weights and inner learning rates for each of them."""


def starts(
    tasks: ClassPairs,
    model: nn.Module,
    pairs: Sequence[Pair],
    config: Config,
    generator: torch.Generator,
    *,
    shots: int = 10,
    queries: int = 15,
) -> dict[str, Starts]:
    """Method -> its way of starting on a new task, learned on `pairs`: MAML of both orders, and what it must beat.

    Args:
        shots, queries: rows of each class, in meta-training.
    """

    def draw() -> Task:
        return tasks.draw(pairs, shots, queries)

    def same(start: Initialization) -> Starts:
        return lambda task: [start] * len(task.support.targets)

    def best_rate(make: Callable[[float], Starts]) -> Starts:
        trial = draw()
        scores = [scored(model, make(rate), trial, max(config.steps, 1)).mean().item() for rate in RATES]
        return make(RATES[int(np.argmax(scores))])

    joint = meta_train(model, draw, replace(config, steps=0), generator)
    whole = tasks.draw(pairs, shots * 4, 1).support
    each = adapt(model, Initialization.of(model, 0.1), whole, 200)
    return {
        "MAML": same(meta_train(model, draw, config, generator)),
        "MAML, first order": same(meta_train(model, draw, replace(config, second_order=False), generator)),
        "joint pretraining": best_rate(lambda rate: same(Initialization(joint.weights, _all(joint, rate)))),
        "nearest pair": best_rate(lambda rate: _nearest(whole, each, rate)),
        "random weights": best_rate(lambda rate: same(Initialization.of(model, rate))),
    }


def scored(model: nn.Module, start: Starts, task: Task, steps: int) -> Tensor:
    """Accuracy on the query sets after `steps` gradient steps on the support sets, `[tasks]`."""
    found = []
    for index, own in enumerate(start(task)):
        support, query = (Examples(part.inputs[[index]], part.targets[[index]]) for part in (task.support, task.query))
        found.append(accuracy(model, adapt(model, own, support, steps), query))
    return torch.cat(found)


def _all(start: Initialization, rate: float) -> dict[str, Tensor]:
    return {name: torch.tensor(rate) for name in start.weights}


def _nearest(known: Examples, weights: Mapping[str, Tensor], rate: float) -> Starts:
    """For each new task the weights of the known task whose class means lie nearest to its own."""

    def start(task: Task) -> list[Initialization]:
        nearest = torch.cdist(_means(task.support), _means(known)).argmin(1).tolist()
        own = [{name: tensor[index] for name, tensor in weights.items()} for index in nearest]
        return [Initialization(one, {name: torch.tensor(rate) for name in one}) for one in own]

    return start


def _means(examples: Examples) -> Tensor:
    """The mean input of class 0 beside that of class 1, `[tasks, 2 * inputs]`; rows come in order of their class."""
    return torch.cat([half.mean(1) for half in examples.inputs.chunk(2, dim=1)], dim=1)
