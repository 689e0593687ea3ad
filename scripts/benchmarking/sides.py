"""What is compared: the same inner trainings, by the engine, by stable-baselines3's processes and by `torch.func.vmap`.

All sides train the same task under the calibrated schedule with batches of 16 (64 where said), and end every interval
with the validation loss. The environments' sides also observe; their observations travel to this process.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpo_env.actions import RANGES
from hpo_env.base_schedules import BaseSchedule, calibrated
from hpo_env.env import HPOEnv
from hpo_env.hyperparameters import CONTROLS
from hpo_env.vector_env import HPOVectorEnv
from inner_models import updates
from inner_models.models import GRU, Dropout, build_model
from inner_models.sampling import MICRO_BATCH, draw_order
from inner_models.tasks import Task, elementwise_loss, prepare
from inner_models.training import Training
from scripts.benchmarking.processes import START_METHOD, Crew, starting_workers, synchronize

_EVALUATION_ROWS = 8192  # replicas x rows that vmap evaluates at once


def base_schedule(task: Task) -> BaseSchedule:
    """The calibrated schedule with batches of 16."""
    return replace(calibrated(task.optimizer), batch_size=float(MICRO_BATCH))


def first_action(batch_size: int) -> NDArray[np.float32]:
    """The first decision that takes the batch size from 16 to `batch_size` (16..64) and leaves all else alone."""
    action = np.zeros(len(CONTROLS), np.float32)
    action[list(CONTROLS).index("batch_size")] = math.log(batch_size / MICRO_BATCH) / RANGES["batch_size"].first
    return action


class Side(Protocol):
    """One of the things compared. `examples`: training examples in an interval, of all replicas and processes."""

    examples: int

    def interval(self) -> None:
        """Train all replicas for one interval."""


def rate(side: Side, seconds: float) -> float:
    """Examples per second over whole intervals, for at least `seconds`."""
    started, intervals = time.perf_counter(), 0
    while intervals == 0 or time.perf_counter() - started < seconds:
        side.interval()
        intervals += 1
    return intervals * side.examples / (time.perf_counter() - started)


class Engine:
    """`HPOVectorEnv` over the batched engine. The first interval, which warms up, is over once it is made."""

    def __init__(self, task: Task, replicas: int, device: str, batch_size: int) -> None:
        updates.COMPILE_AFTER = 0.0  # as in a long run; the warm-up compiles
        self._env, self._device = HPOVectorEnv(replicas, task=task, base=base_schedule(task), device=device), device
        self._env.reset(seed=0)
        _, _, _, _, infos = self._env.step(np.tile(first_action(batch_size), (replicas, 1)))
        self._first = {name: float(infos[name][0]) for name in CONTROLS}
        self._stay = np.zeros((replicas, len(CONTROLS)), np.float32)

    def interval(self) -> NDArray[np.float32]:
        observations = self._env.step(self._stay)[0]
        synchronize(self._device)
        return observations

    def hyperparameters(self) -> dict[str, float]:
        """Those of the first interval."""
        return self._first


class Vmap:
    """Replicas by `torch.func`: gradients by vmap over stacked modules, torch's fused AdamW over the stacks.

    In its favour: all replicas share their hyperparameters, and nothing is measured or observed but losses. Two layers
    have no batching rule: an evaluated GRU is written out, attention uses torch's own plain products.
    """

    def __init__(self, task: Task, replicas: int, device: str, batch_size: int) -> None:
        self._data, self._replicas, self._batch_size = prepare(task), replicas, batch_size
        self._device = torch.device(device)
        dataset = self._data.dataset
        models = [build_model(task.model, dataset, seed) for seed in range(replicas)]
        stacked, _ = stack_module_state(models)
        self._parameters: dict[str, Tensor] = {name: value.detach().to(self._device) for name, value in stacked.items()}
        self._model = models[0].to("meta")
        values = {name: float(value) for name, value in base_schedule(task).values(np.array(0.5)).items()}
        for module in self._model.modules():
            if isinstance(module, Dropout):
                module.p = values["dropout"]
            elif isinstance(module, GRU):
                module.forward = partial(_gru, module)  # type: ignore[method-assign]
        decayed = [value for value in self._parameters.values() if value.ndim > 2]
        others = [value for value in self._parameters.values() if value.ndim <= 2]
        groups = [{"params": decayed, "weight_decay": values["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=values["lr"], fused=True)
        self._train, self._val = (
            [tensor.to(self._device) for tensor in (split.inputs, split.targets)]
            for split in (dataset.train, dataset.val)
        )
        self._gradients = vmap(grad_and_value(self._loss), randomness="different")
        self._losses = vmap(self._loss, in_dims=(0, None, None))
        self._rng = np.random.default_rng(0)
        self.interval()

    def interval(self) -> NDArray[np.float32]:
        """Returns the replicas' mean losses over the validation split."""
        examples = self._data.interval_examples
        orders = [draw_order(len(self._train[0]), examples, self._rng) for _ in range(self._replicas)]
        batches = torch.split(torch.from_numpy(np.stack(orders)).to(self._device), self._batch_size, dim=1)
        total = torch.zeros(self._replicas, device=self._device)
        with sdpa_kernel(SDPBackend.MATH):
            self._model.train()
            for chosen in batches:
                gradients, losses = self._gradients(self._parameters, *(tensor[chosen] for tensor in self._train))
                for name, parameter in self._parameters.items():
                    parameter.grad = gradients[name]
                self._optimizer.step()
                total += losses
            with torch.no_grad():
                self._model.eval()
                val = torch.zeros(self._replicas, device=self._device)
                rows = max(1, _EVALUATION_ROWS // self._replicas)
                for x, y in zip(*(torch.split(tensor, rows) for tensor in self._val), strict=True):
                    val += self._losses(self._parameters, x, y) * len(x)
        return torch.stack([total / len(batches), val / len(self._val[0])]).cpu().numpy()

    def _loss(self, parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self._model, parameters, (inputs,))
        return elementwise_loss(outputs, targets, self._data.loss).mean()


def _gru(module: GRU, inputs: Tensor) -> Tensor:
    """The module's forward pass; in evaluation written out, since vmap knows `aten::gru` under a gradient alone."""
    if module.training:
        return GRU.forward(module, inputs)
    weights = (getattr(module, f"{kind}_{of}_l0") for of in ("ih", "hh") for kind in ("weight", "bias"))
    weight, bias, weight_hidden, bias_hidden = weights
    steps = functional.linear(inputs, weight, bias).unbind(1)
    state, states = torch.zeros_like(steps[0][:, : module.hidden_size]), []
    for step in steps:
        (r, z, n), (hr, hz, hn) = (
            part.chunk(3, 1) for part in (step, functional.linear(state, weight_hidden, bias_hidden))
        )
        state = torch.lerp(torch.tanh(n + torch.sigmoid(r + hr) * hn), state, torch.sigmoid(z + hz))
        states.append(state)
    return torch.stack(states, 1)


class Reference:
    """The plain PyTorch loop: one inner training."""

    def __init__(self, task: Task, replicas: int, device: str, batch_size: int) -> None:
        assert replicas == 1
        self._training, self._device = Training(task, 0, device=device), device
        self._training.batch_sampler.batch_size = batch_size
        self.interval()

    def interval(self) -> None:
        self._training.advance()
        synchronize(self._device)


class OfCrew:
    """A side that every worker of a crew runs: `factory(task, replicas, device, batch_size)`."""

    def __init__(
        self, crew: Crew, factory: type, task: Task, replicas: int, device: str, batch_size: int = MICRO_BATCH
    ) -> None:
        self._crew, self._name = crew, factory.__name__
        self.examples = crew.size * replicas * prepare(task).interval_examples
        crew.build(self._name, factory, task, replicas, device, batch_size)

    def interval(self) -> None:
        self._crew.call(self._name, "interval")

    def hyperparameters(self) -> dict[str, float]:
        """Those of the first interval, of the sides that have them."""
        values: dict[str, float] = self._crew.call(self._name, "hyperparameters")[0]
        return values

    def close(self) -> None:
        """Free what the workers keep for it."""
        self._crew.drop(self._name)


class Subproc:
    """stable-baselines3's `SubprocVecEnv` over `HPOEnv`s, the reference training inside: one a process, on the CPU."""

    def __init__(self, task: Task, processes: int) -> None:
        self.examples = processes * prepare(task).interval_examples
        with starting_workers():
            self._envs = SubprocVecEnv([partial(_single_env, task)] * processes, start_method=START_METHOD)
        self._stay = np.zeros((processes, len(CONTROLS)), np.float32)

    def begin(self, batch_size: int) -> dict[str, float]:
        """Begin an episode with a first interval, which warms up. Returns the hyperparameters of that."""
        self._envs.reset()
        _, _, _, infos = self._envs.step(np.tile(first_action(batch_size), (len(self._stay), 1)))
        return {name: float(infos[0][name]) for name in CONTROLS}

    def interval(self) -> None:
        self._envs.step(self._stay)

    def close(self) -> None:
        """End the processes."""
        self._envs.close()


def _single_env(task: Task) -> Any:
    torch.set_num_threads(1)
    return HPOEnv(task=task, base=base_schedule(task))
