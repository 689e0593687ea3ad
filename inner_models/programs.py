"""Programs: lists of calls on fixed buffers, recorded once and run once a micro-step.

Recording takes shapes, views and devices out of the inner loop: what is left is one bound call an operation. On a CUDA
device the calls of a program become one CUDA graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WARM_UP = 2  # runs before a CUDA graph is captured

_log = logging.getLogger("hyperpilot")


class Workspace:
    """Buffers by name and shape. Equal names share memory, so the programs of several blocks need only one set."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._memory: dict[Hashable, Tensor] = {}

    def buffer(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A buffer whose content does not outlive the program's run."""
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            memory = self._memory[name] = torch.zeros(size, dtype=dtype or self.dtype, device=self.device)
        return memory[:size].view(shape)

    def zeros(self, name: Hashable, shape: tuple[int, ...]) -> Tensor:
        """A buffer that was zero when it was made and that no other shape shares."""
        return self.buffer((name, shape), shape)


class Program:
    """Calls in two lists: those that take in new data from the host, and those on the device that follow."""

    def __init__(self, device: torch.device) -> None:
        self._before: list[Callable[[], object]] = []
        self._calls: list[Callable[[], object]] = []
        self._capture = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0

    def run(self) -> None:
        """Run all calls in the order in which they were recorded."""
        for call in self._before:
            call()
        if self._graph is not None:
            self._graph.replay()
            return
        if self._capture and self._runs == _WARM_UP:
            self._try_capture()
            if self._graph is not None:
                self._graph.replay()
                return
        self._runs += 1
        with np.errstate(all="ignore"):  # a replica may diverge
            for call in self._calls:
                call()

    def add(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        self._calls.append(partial(function, *args, **kwargs))

    def add_before(self, function: Callable[..., object], *args: Any) -> None:
        self._before.append(partial(function, *args))

    def _try_capture(self) -> None:
        """Capturing does not run the calls. Where it cannot be done, the calls go on being made one by one."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in self._calls:
                    call()
            self._graph = graph
        except RuntimeError as error:
            self._capture = False
            _log.warning("no CUDA graph could be captured, so inner training is slower: %s", error)


class Tape:
    """What layers record on.

    Attributes:
        training: whether dropout is on and a backward pass follows.
        fresh: whether parameter gradients are written instead of added to.
    """

    def __init__(self, workspace: Workspace, *, training: bool, fresh: bool) -> None:
        self.training, self.fresh = training, fresh
        self.program = Program(workspace.device)
        self.workspace = workspace
        self._cpu = workspace.device.type == "cpu"

    def call(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Record one call."""
        self.program.add(function, *args, **kwargs)

    def view(self, name: Hashable, x: Tensor, *shape: int) -> Tensor:
        """`x` in another shape: a view where its strides allow one, else a buffer that a recorded call copies it to."""
        try:
            return x.view(shape)
        except RuntimeError:
            copy = self.workspace.buffer((name, "copy"), tuple(x.shape))
            self.call(copy.copy_, x)
            return copy.view(shape)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Record out = a @ b. On a CPU by numpy, whose BLAS is the faster one for small matrices."""
        if a.shape[-1] == 1:  # numpy has no fast path for it
            self.call(torch.mul, a, b, out=out)
        elif self._cpu:
            self.call(np.matmul, a.numpy(), b.numpy(), out=out.numpy())
        else:
            self.call(torch.matmul, a, b, out=out)

    def tanh(self, x: Tensor, out: Tensor) -> None:
        """Record out = tanh(x). numpy's is ten times as fast as torch's on a CPU."""
        if self._cpu:
            self.call(np.tanh, x.numpy(), out=out.numpy())
        else:
            self.call(torch.tanh, x, out=out)

    def add_product(self, gradient: Tensor, a: Tensor, b: Tensor) -> None:
        """Record the gradient of a parameter that is a matrix product, `[replicas, m, k] @ [replicas, k, n]`."""
        if self.fresh:
            self.matmul(a, b, gradient)
        elif self._cpu:
            product = self.workspace.buffer("product", tuple(gradient.shape))
            self.matmul(a, b, product)
            self.call(gradient.add_, product)
        else:
            self.call(gradient.baddbmm_, a, b)

    def add_sum(self, gradient: Tensor, terms: Tensor, dim: int | tuple[int, ...]) -> None:
        """Record the gradient of a parameter that is a sum over `dim`."""
        out = gradient if self.fresh else self.workspace.buffer("sum", tuple(gradient.shape))
        self.call(torch.sum, terms, dim, out=out)
        if not self.fresh:
            self.call(gradient.add_, out)

    def add_gradient(self, gradient: Tensor, value: Tensor) -> None:
        """Record the gradient of a parameter."""
        self.call(gradient.copy_ if self.fresh else gradient.add_, value)
