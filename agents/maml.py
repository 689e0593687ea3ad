"""Model-agnostic meta-learning: initial weights from which a few gradient steps suffice on a new task.

Finn, Abbeel and Levine 2017 (arXiv:1703.03400), algorithm 1; with learned inner learning rates, one a parameter tensor,
as in Antoniou, Edwards and Storkey 2019 (arXiv:1810.09502). The four phases: `meta_train` draws tasks; its inner loop
(`adapt`) trains on each task's support set; its outer loop moves the initial weights by the loss on the query sets;
meta-testing is `adapt` and `accuracy` on tasks never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

Weights = Mapping[str, Tensor]
"""Parameter name -> tensor; with a leading dimension of `tasks` where several tasks are adapted to at once."""


@dataclass(frozen=True)
class Examples:
    """Labelled rows of several tasks, equally many of each.

    Attributes:
        inputs: `[tasks, rows, *input_shape]`.
        targets: `[tasks, rows]` int64 classes.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.targets.ndim != 2 or not self.targets.numel():
            raise ValueError(f"targets must be [tasks, rows], at least one of each, not {list(self.targets.shape)}")
        if self.inputs.shape[:2] != self.targets.shape:
            raise ValueError(f"inputs are of {list(self.inputs.shape[:2])} tasks and rows, targets not")


@dataclass(frozen=True)
class Task:
    """What is adapted on, and what the adapted weights are judged by."""

    support: Examples
    query: Examples


@dataclass(frozen=True)
class Config:
    """A meta-training.

    Attributes:
        iterations: updates of the initial weights.
        lr: Adam's learning rate for them, and for the logarithms of the inner learning rates.
        inner_lr: inner learning rate to begin with.
        steps: gradient steps of the inner loop, at most: each iteration draws their number from 1 on, so that every
            number counts, as in that paper's multi-step loss. 0 is joint pretraining on all tasks.
        second_order: differentiate through the inner loop; without, its gradients count as constants (section 5.2).
        learn_rates: whether the inner learning rates are learned.
    """

    iterations: int = 600
    lr: float = 3e-3
    inner_lr: float = 0.1
    steps: int = 5
    second_order: bool = True
    learn_rates: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.steps < 0:
            raise ValueError(f"iterations must be 1 or more and steps 0 or more, not {self.iterations}, {self.steps}")
        if min(self.lr, self.inner_lr) <= 0:
            raise ValueError(f"lr and inner_lr must be positive, not {self.lr} and {self.inner_lr}")


@dataclass(frozen=True)
class Initialization:
    """What meta-training finds: `weights` to start from, and an inner learning rate for each of them."""

    weights: Weights
    rates: Weights

    @classmethod
    def of(cls, model: nn.Module, lr: float) -> Initialization:
        """The model's own weights, with one learning rate for all."""
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        return cls(weights, {name: torch.tensor(lr) for name in weights})


def loss_of(model: nn.Module, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `model` with these weights, on the rows of one task."""
    return cross_entropy(functional_call(model, dict(weights), (inputs,)), targets)


def adapt(
    model: nn.Module, start: Initialization, support: Examples, steps: int, *, second_order: bool = False
) -> dict[str, Tensor]:
    """The inner loop: `steps` steps of gradient descent on each task's support set, from the same start.

    Args:
        second_order: whether the result can be differentiated through the steps.

    Returns:
        Weights, `[tasks, ...]` each.
    """
    gradient = grad(loss_of, argnums=1)

    def descend(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        weights = dict(start.weights)
        for _ in range(steps):
            slopes = gradient(model, weights, inputs, targets)
            if not second_order:
                slopes = {name: slope.detach() for name, slope in slopes.items()}
            weights = {name: weight - start.rates[name] * slopes[name] for name, weight in weights.items()}
        return weights

    adapted: dict[str, Tensor] = vmap(descend)(support.inputs, support.targets)
    return adapted


def query_loss(model: nn.Module, start: Initialization, task: Task, steps: int, *, second_order: bool = True) -> Tensor:
    """The outer loop's loss: of the adapted weights on the query sets, mean over tasks."""
    weights = adapt(model, start, task.support, steps, second_order=second_order)
    losses: Tensor = vmap(loss_of, in_dims=(None, 0, 0, 0))(model, weights, task.query.inputs, task.query.targets)
    return losses.mean()


@torch.no_grad()
def accuracy(model: nn.Module, weights: Weights, query: Examples) -> Tensor:
    """Share of the query rows that adapted weights get right, `[tasks]`."""

    def outputs(weights: Weights, inputs: Tensor) -> Tensor:
        result: Tensor = functional_call(model, dict(weights), (inputs,))
        return result

    predicted: Tensor = vmap(outputs)(weights, query.inputs).argmax(-1)
    return (predicted == query.targets).float().mean(1)


def meta_train(
    model: nn.Module,
    draw: Callable[[], Task],
    config: Config,
    generator: torch.Generator | None = None,
    report: Callable[[int, float], None] = lambda iteration, loss: None,
) -> Initialization:
    """Meta-train initial weights, from those of `model`, which itself stays as it is.

    Args:
        draw: gives the tasks of the next iteration.
        generator: draws the numbers of inner steps.
        report: called after each with its number and the query loss.

    Raises:
        ValueError: the query loss is not finite any more; lower the learning rates.
        MemoryError: the unrolled inner loop does not fit; take fewer steps, rows or tasks, or the first order.
    """
    weights = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in model.named_parameters()}
    log_rates = {name: nn.Parameter(torch.tensor(config.inner_lr).log()) for name in weights}
    learned = [*weights.values(), *(log_rates.values() if config.learn_rates else ())]
    optimizer = torch.optim.Adam(learned, config.lr)
    for iteration in range(config.iterations):
        start = Initialization(weights, {name: rate.exp() for name, rate in log_rates.items()})
        steps = int(torch.randint(1, config.steps + 1, (), generator=generator)) if config.steps else 0
        try:
            loss = query_loss(model, start, draw(), steps, second_order=config.second_order)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "memory" not in str(error):  # torch has a type of its own for a GPU's memory alone
                raise
            raise MemoryError(f"{steps} inner steps do not fit into memory; take fewer or first order") from None
        if not torch.isfinite(loss):
            raise ValueError(f"the query loss is {loss.item()} in iteration {iteration}; lower lr or inner_lr")
        optimizer.step()
        report(iteration + 1, loss.item())
    return Initialization(
        {name: weight.detach() for name, weight in weights.items()},
        {name: rate.detach().exp() for name, rate in log_rates.items()},
    )
