"""How near the engine comes to what the machine allows.

An inner step needs the matrix products of a forward and a backward pass over 16 examples, its share of those of the
interval's evaluation, and the optimizer's pass over the parameters. With F flops (2 m k n a product) at T flops a
second, and B bytes at W bytes a second,

    limit = sum over processes of 1 / (F / T + B / W)        inner steps per second

T is measured on products of these very shapes, batched over replicas and small enough for the cache: the best of
numpy's and torch's, in three layouts. W is that of a stream, x = y + a z, over as much memory as the replicas'
parameters, gradients and moments take. Both are measured in all processes at once, best of repetitions. B is 32 bytes a
parameter: AdamW reads the parameter, its gradient and two moments, and writes the parameter, the moments and the
gradient's zero, 4 bytes each. Activations, losses, dropout, normalization and biases are left out, and so is the host:
the limit is optimistic.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from inner_models.models import build_model
from inner_models.replicated_layers import parameter_count
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import Task, elementwise_loss, prepare
from scripts.benchmarking.processes import synchronize
from scripts.benchmarking.speed import Setting

Product = tuple[int, int, int, int]
"""(b, m, k, n): b products of `[m, k]` and `[k, n]`."""

OPTIMIZER_BYTES = 32  # a parameter, in single precision

_EVALUATION_ROWS = 256
_BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 30}
_REPETITIONS = {"cpu": 4, "cuda": 200}  # on a GPU so many that waiting for the first and the last is none of the time


class _ProductCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the matrix products that run under it; a convolution is one over its unfolded input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = args[-2:]
            self.counts[(math.prod(a.shape[:-2]), *a.shape[-2:], b.shape[-1])] += 1
        elif name == "convolution":
            self.counts.update(_convolution(result, args[1])[:1])
        elif name == "convolution_backward":
            gradients = _convolution(args[0], args[2])[1:]
            self.counts.update(product for product, wanted in zip(gradients, args[-1], strict=False) if wanted)
        return result


def _convolution(output: Tensor, weight: Tensor) -> tuple[Product, Product, Product]:
    """Products of a convolution's output, of the gradient of its input and of that of its weight."""
    channels, fan_in, places = weight.shape[0], weight[0].numel(), output.numel() // output.shape[1]
    return (1, channels, fan_in, places), (1, fan_in, channels, places), (1, channels, places, fan_in)


@dataclass(frozen=True)
class Work:
    """Matrix products of one replica: of a training step, and of a share `evaluation_share` of it (an inner step's part
    of the interval's evaluation) in `evaluation`."""

    training: Mapping[Product, int]
    evaluation: Mapping[Product, int]
    evaluation_share: float
    parameters: int

    @property
    def flops(self) -> float:
        """Of an inner step."""
        return _flops(self.training) + self.evaluation_share * _flops(self.evaluation)


def _flops(products: Mapping[Product, int]) -> int:
    return sum(2 * count * math.prod(product) for product, count in products.items())


def work(task: Task) -> Work:
    """Record what the reference model does, attention by plain products."""
    data = prepare(task)
    model = build_model(task.model, data.dataset)
    train, val = data.dataset.train, data.dataset.val
    with sdpa_kernel(SDPBackend.MATH):
        with _ProductCounter() as training:
            losses = elementwise_loss(model(train.inputs[:MICRO_BATCH]), train.targets[:MICRO_BATCH], data.loss)
            losses.mean().backward()  # type: ignore[no-untyped-call]
        with _ProductCounter() as evaluation, torch.no_grad():
            rows = len(model(val.inputs[:_EVALUATION_ROWS]))
    share = len(val.inputs) / rows / (data.interval_examples // MICRO_BATCH)
    return Work(training.counts, evaluation.counts, share, parameter_count(model))


def limit_steps_per_second(flops: float, throughput: float, moved: float, bandwidth: float) -> float:
    """Of one process, by the formula above."""
    return 1 / (flops / throughput + moved / bandwidth)


def share_of_limit(task: Task, replicas: int, steps_per_second: float, setting: Setting) -> dict[str, float]:
    """Measure the limit in all processes of the crew.

    Args:
        replicas: of a process, for the size of the working set.
        steps_per_second: what the engine reached, all processes together.
    """
    needed, crew = work(task), setting.crew
    moved = OPTIMIZER_BYTES * needed.parameters
    crew.build("machine", Machine, setting.device, setting.seconds / 40)
    throughputs = crew.call("machine", "throughput", needed, replicas)
    bandwidths = crew.call("machine", "bandwidth", 16 * needed.parameters * replicas)
    crew.drop("machine")
    limit = sum(
        limit_steps_per_second(needed.flops, throughput, moved, bandwidth)
        for throughput, bandwidth in zip(throughputs, bandwidths, strict=True)
    )
    return {
        "parameters": needed.parameters,
        "flops_per_step": needed.flops,
        "optimizer_bytes_per_step": moved,
        "flops_per_second": sum(throughputs),
        "bytes_per_second": sum(bandwidths),
        "limit_steps_per_second": limit,
        "share_of_limit": steps_per_second / limit,
    }


class Machine:
    """Measures the process that it is built in."""

    def __init__(self, device: str, seconds: float) -> None:
        self._device, self._seconds = device, seconds

    def throughput(self, needed: Work, replicas: int) -> float:
        """Flops per second over the products of `needed`, in their proportions."""
        once = {product: self._product(product, replicas) for product in {*needed.training, *needed.evaluation}}
        training, evaluation = (
            sum(count * once[product] for product, count in products.items())
            for products in (needed.training, needed.evaluation)
        )
        return needed.flops / (training + needed.evaluation_share * evaluation)

    def bandwidth(self, size: int) -> float:
        """Bytes per second of x = y + a z over `size` bytes in all."""
        x, y, z = (torch.ones(max(1, size // 12), device=self._device) for _ in range(3))
        return 12 * len(x) / self._best(partial(torch.add, y, z, alpha=2, out=x))

    def _product(self, product: Product, replicas: int) -> float:
        """Seconds of one replica's product."""
        b, m, k, n = product
        block = max(1, min(replicas, _BLOCK_BYTES[self._device.split(":")[0]] // (4 * b * (m * k + k * n + m * n))))
        out = torch.empty(block * b, m, n, device=self._device)
        left, right = (torch.randn(block * b, *shape, device=self._device) for shape in ((m, k), (k, n)))
        best = math.inf
        for a, c in _layouts(left, right):
            best = min(best, self._best(partial(torch.bmm, a, c, out=out)))
            if self._device == "cpu":
                best = min(best, self._best(partial(np.matmul, a.numpy(), c.numpy(), out=out.numpy())))
        return best / block

    def _best(self, call: Callable[[], object]) -> float:
        """Seconds of a call, the best of many measurements of some."""
        repetitions = _REPETITIONS[self._device.split(":")[0]]
        best, until = math.inf, time.perf_counter() + self._seconds
        while not math.isfinite(best) or time.perf_counter() < until:
            synchronize(self._device)
            started = time.perf_counter()
            for _ in range(repetitions):
                call()
            synchronize(self._device)
            best = min(best, (time.perf_counter() - started) / repetitions)
        return best


def _layouts(left: Tensor, right: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """The factors as they are, and with the one or the other stored transposed."""

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    return (left, right), (left, transposed(right)), (transposed(left), right)
