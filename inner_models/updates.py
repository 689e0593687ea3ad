"""Optimizer steps of many replicas at once, each with its own hyperparameters, on flat buffers.

One definition runs in three ways: as it stands, compiled to one vectorized loop on a CPU, or to one Triton kernel on a
GPU. On a CPU a test holds both equal bit for bit, so that it does not matter to a run when the change is made. On a
GPU, where a kernel rounds less often than the operations one by one, it is made before the first step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""`torch.optim.AdamW`'s defaults."""

SGD_MOMENTUM = 0.9

COMPILE_AFTER = 5.0
"""Seconds that a function costs in a process before compiling it, which takes about as long, is tried."""

_log = logging.getLogger("hyperpilot")


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, decays: Tensor, columns: Tensor, clear: bool) -> None:
    """AdamW (Loshchilov & Hutter 2019) as in `torch.optim.AdamW`; replicas whose batch is not full stay as they are.

    Args:
        p, g, m, v: `[replicas, parameters]` parameters, summed gradients of micro-batches, first and second moments.
        decays: `[parameters]`, 1 where weight decay acts and 0 elsewhere.
        columns: `[replicas, 6]`, zero where a replica does not step: factor on the gradient,
            1 - beta1, 1 - beta2, lr * weight decay, lr / first bias correction, 1 / root of the second correction.
        clear: whether to zero the gradients of those that stepped.
    """
    scale, rise1, rise2, shrink, rate, unbias = torch.split(columns, 1, dim=1)
    scaled = g * scale
    m.add_((scaled - m) * rise1)
    v.add_((scaled * scaled - v) * rise2)
    p.sub_(p * decays * shrink)
    p.sub_(m / (_sqrt(v) * unbias + EPS) * rate)
    if clear:
        g.mul_(scale == 0)


def sgd(p: Tensor, g: Tensor, m: Tensor, decays: Tensor, columns: Tensor, clear: bool) -> None:
    """SGD with momentum as in `torch.optim.SGD`; replicas whose batch is not full stay as they are.

    Args:
        p, g, m, decays, clear: as for `adamw`, m being the momentum buffer.
        columns: `[replicas, 4]`, zero where a replica does not step: factor on the gradient, weight decay,
            1 - momentum, lr.
    """
    scale, decay, loss, lr = torch.split(columns, 1, dim=1)
    m.add_(g * scale + p * decays * decay - m * loss)
    p.sub_(m * lr)
    if clear:
        g.mul_(scale == 0)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded, as compiled code has it; torch's own on a CPU is not."""
    if x.is_cpu and not torch.compiler.is_compiling():
        return torch.from_numpy(np.sqrt(x.numpy()))
    return torch.sqrt(x)


class Fused:
    """A function of tensors that is compiled; on a CPU once it has been used for long.

    Compiled, it takes a fifth of the time on most sizes, and at most 10 microseconds more on the smallest.

    Args:
        function: works in place, on its tensor arguments alone; the last argument is a flag.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._chosen: dict[str, Callable[..., None]] = {}
        self._seconds = 0.0

    def __call__(self, first: Tensor, *others: Tensor | bool) -> None:
        args, device = (first, *others), first.device.type
        if device not in self._chosen:
            if device == "cpu" and self._seconds < COMPILE_AFTER:
                started = time.perf_counter()
                self._function(*args)
                self._seconds += time.perf_counter() - started
                return
            self._chosen[device] = self._compiled(args)
        self._chosen[device](*args)

    def _compiled(self, args: tuple[Tensor | bool, ...]) -> Callable[..., None]:
        """The function, compiled for arguments like these; or as it is, where that fails."""
        compiled = torch.compile(self._function, dynamic=True)
        try:
            for flag in (True, False):
                compiled(*(arg.clone() for arg in args if isinstance(arg, Tensor)), flag)
        except Exception as error:  # whatever a compiler or its absence raises: the function itself always works
            reason = str(error).strip().splitlines()
            _log.warning(
                "%s could not be compiled, so inner training is slower: %s",
                self._function.__name__,
                reason[0] if reason else type(error).__name__,
            )
            return self._function
        return compiled


STEPS = {"adamw": Fused(adamw), "sgd": Fused(sgd)}
"""Optimizer name -> its step."""

COLUMNS = {"adamw": 6, "sgd": 4}
"""Optimizer name -> scalars of a replica's step."""
