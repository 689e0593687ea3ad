"""Training that can be differentiated: replicas of a problem, step by step, as functions of the hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from inner_models.datasets import Split
from inner_models.models import build_model
from inner_models.sampling import MICRO_BATCH, draw_order
from inner_models.tasks import Loss, OptimizerName, Task, elementwise_loss, prepare
from inner_models.updates import BETA2, EPS

KINDS = ("linear", "mlp", "autoencoder", "cnn")
"""Models whose gradients can be differentiated once more, many replicas at once."""

COPIES = {"adamw": 16, "sgd": 6}
"""Numbers that a step keeps for the way back, for each parameter (measured)."""


def hats(progress: Tensor, knots: int) -> Tensor:
    """Weight of each knot at `progress` `[steps]`, `[knots, steps]`: piecewise linear, 1 at the knot itself."""
    return (1 - (progress * (knots - 1) - torch.arange(knots)[:, None]).abs()).clamp(min=0)


@dataclass(frozen=True)
class Problem:
    """What the inner loop trains.

    Attributes:
        build: the model, its initial weights drawn from a generator.
        train, val: what is trained on, and what is differentiated.
        steps: optimizer steps of a whole run.
        dropout: rate of the model's dropout layers.
    """

    build: Callable[[torch.Generator], nn.Module]
    train: Split
    val: Split
    loss: Loss
    steps: int
    optimizer: OptimizerName = "adamw"
    batch_size: int = MICRO_BATCH
    dropout: float = 0.0

    @classmethod
    def of(cls, task: Task, batch_size: int = MICRO_BATCH, dropout: float = 0.0) -> Problem:
        """A task without its test split.

        Raises:
            ValueError: a model that cannot be differentiated twice, an unknown data set.
        """
        if task.model.kind not in KINDS:
            raise ValueError(f"{task.name} cannot be unrolled: its model must be one of {', '.join(KINDS)}")
        data = prepare(task)
        steps = task.horizon * -(-data.interval_examples // batch_size)

        def build(generator: torch.Generator) -> nn.Module:
            return build_model(task.model, data.dataset, generator)

        train, val = data.dataset.train, data.dataset.val
        return cls(build, train, val, data.loss, steps, task.optimizer, batch_size, dropout)


class State(NamedTuple):
    """Weights of all replicas and what the optimizer remembers of their gradients, `[replicas, parameters]` each."""

    weights: Tensor
    first: Tensor
    second: Tensor


class Unrolled:
    """Replicas of a problem, trained step by step such that the hyperparameters can be differentiated.

    Args:
        generator: initial weights, row order and `mask_seed`; equal ones give equal runs.

    Attributes:
        start: the state before training.
        rows: numbers of the rows of each batch, `[replicas, steps, batch_size]`.
        mask_seed: of the global generator, which the dropout masks come from.
    """

    def __init__(self, problem: Problem, replicas: int, generator: torch.Generator) -> None:
        self.problem = problem
        models = [problem.build(generator) for _ in range(replicas)]
        self._model = models[0]
        for module in self._model.modules():
            if isinstance(module, nn.Dropout):
                module.p = problem.dropout
        self._parameters = dict(self._model.named_parameters())
        weights = torch.stack([nn.utils.parameters_to_vector(model.parameters()).detach() for model in models])
        self.start = State(weights, torch.zeros_like(weights), torch.zeros_like(weights))
        self._sizes = [p.numel() for p in self._parameters.values()]
        self._decays = torch.cat([torch.full((p.numel(),), float(p.ndim >= 2)) for p in self._parameters.values()])
        self.mask_seed = int(torch.randint(2**62, (), generator=generator))
        rng = np.random.default_rng(self.mask_seed)
        examples = problem.steps * problem.batch_size
        orders = [draw_order(len(problem.train), examples, rng) for _ in range(replicas)]
        self.rows = torch.from_numpy(np.stack(orders)).view(replicas, problem.steps, problem.batch_size)

    def run(self, scaled: Tensor, state: State, first: int, steps: int) -> State:
        """Steps `first` .. `first + steps` of the run.

        Args:
            scaled: log lr, log weight decay and logit momentum of each replica at equally spaced points of the run,
                `[replicas, 3, knots]`.
        """
        middle = (torch.arange(first, first + steps) + 0.5) / self.problem.steps
        values = (scaled @ hats(middle, scaled.shape[-1]).to(scaled)).unbind(1)
        rates, decays, momenta = values[0].exp(), values[1].exp(), values[2].sigmoid()
        gradient = vmap(grad(self._loss), randomness="different")
        self._model.train()
        for step in range(steps):
            rows = self.rows[:, first + step]
            slopes = gradient(state.weights, self.problem.train.inputs[rows], self.problem.train.targets[rows])
            rate, decay, momentum = (value[:, step, None] for value in (rates, decays, momenta))
            update = adamw if self.problem.optimizer == "adamw" else sgd
            state = update(state, slopes, rate, decay * self._decays, momentum, first + step + 1)
        return state

    def val_loss(self, state: State) -> Tensor:
        """`[replicas]`, dropout off."""
        self._model.eval()
        losses: Tensor = vmap(self._loss, in_dims=(0, None, None))(
            state.weights, self.problem.val.inputs, self.problem.val.targets
        )
        return losses

    def gibibytes(self, steps: int) -> float:
        """What so many steps keep for the way back, without the activations."""
        return 4 * COPIES[self.problem.optimizer] * steps * self.start.weights.numel() / 2**30

    def _loss(self, weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        parts = zip(self._parameters.items(), torch.split(weights, self._sizes), strict=True)
        named = {name: part.view(parameter.shape) for (name, parameter), part in parts}
        return elementwise_loss(functional_call(self._model, named, (inputs,)), targets, self.problem.loss).mean()


def adamw(state: State, slopes: Tensor, lr: Tensor, decay: Tensor, momentum: Tensor, step: int) -> State:
    """A step as `torch.optim.AdamW` takes it.

    Args:
        slopes: gradients, `[replicas, parameters]`.
        lr, momentum: `[replicas, 1]`.
        decay: `[replicas, parameters]`, 0 where weight decay does not act.
        step: 1 for the first.
    """
    first = state.first + (slopes - state.first) * (1 - momentum)
    second = state.second + (slopes.square() - state.second) * (1 - BETA2)
    # A weight that never had a gradient has a root of 0, whose slope is infinite.
    root = (second / (1 - BETA2**step) + 1e-30).sqrt() + EPS
    return State(state.weights * (1 - lr * decay) - lr * first / (1 - momentum**step) / root, first, second)


def sgd(state: State, slopes: Tensor, lr: Tensor, decay: Tensor, momentum: Tensor, step: int) -> State:
    """A step as `torch.optim.SGD` takes it; arguments as for `adamw`."""
    first = state.first * momentum + slopes + decay * state.weights
    return State(state.weights - lr * first, first, state.second)
