"""Programs: lists of calls on fixed buffers, recorded once and run once a micro-step.

Recording takes shapes, views and devices out of the inner loop: what is left is one bound call an operation. On a CUDA
device the calls of a program become one CUDA graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

_WARM_UP = 2  # runs before a CUDA graph is captured
# OpenBLAS multiplies small matrices without copying them first, and a third faster or more, unless the right one is
# transposed.
_SMALL = 1_000_000  # multiplications in a small product, at most
_ROWS = 32  # of the left matrix, from which on a copy of a transposed right one pays

_log = logging.getLogger("hyperpilot")


class Workspace:
    """Memory of programs that run one after the other and so can share it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.pool: list[Tensor] = []
        self._named: dict[Hashable, Tensor] = {}

    def named(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A buffer of its own, the same one for equal arguments; zero when it is made."""
        key = (name, shape)
        if key not in self._named:
            self._named[key] = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        return self._named[key]

    def allocate(self, size: int) -> Tensor:
        """Add `size` bytes to the pool."""
        self.pool.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        return self.pool[-1]


class Program:
    """Calls in two lists: those that take in new data from the host, and those on the device that follow."""

    _can_capture: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: list[Callable[[], object]] = []
        self._calls: list[Callable[[], object]] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0

    @property
    def captured(self) -> bool:
        """Whether it runs as a CUDA graph by now."""
        return self._graph is not None

    def run(self) -> None:
        """Run all calls in the order in which they were recorded."""
        for call in self._before:
            call()
        if self._graph is not None:
            self._graph.replay()
            return
        if self._runs == _WARM_UP and self._device.type == "cuda" and Program._can_capture:
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
        """Capturing does not run the calls. Where it cannot be done, they go on being made one by one, and so do those
        of the other programs: a failed capture can leave the allocator unable to make another."""
        try:
            self._graph = _capture(self._calls, self._device)
        except RuntimeError as error:
            Program._can_capture = False
            _log.warning("no CUDA graph could be captured, so inner training is slower: %s", error)


def _capture(calls: Sequence[Callable[[], object]], device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of `calls`. `torch.cuda.graph` would wait for the device and empty the caches every time, and a
    meta-training captures thousands."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # So that the graph gets a workspace of its own: one shared with an earlier graph would be gone with that
        # (https://github.com/pytorch/pytorch/issues/193402).
        torch._C._cuda_clearCublasWorkspaces()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph


class Tape:
    """What layers record on.

    Attributes:
        training: whether dropout is on and a backward pass follows.
        fresh: whether parameter gradients are written instead of added to.
        cpu: whether it is for a CPU.
        rows: the replicas, of those that the program is for, whose calls are being recorded.
    """

    rows = slice(0, None)

    def __init__(self, workspace: Workspace, *, training: bool, fresh: bool) -> None:
        self.training, self.fresh = training, fresh
        self.program = Program(workspace.device)
        self.workspace = workspace
        self.cpu = workspace.device.type == "cpu"
        self._free = list(workspace.pool)
        self._taken: dict[int, Tensor] = {}

    def call(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Record one call."""
        self.program.add(function, *args, **kwargs)

    def take(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer for the calls to come, until it is released: the smallest free one that is large enough."""
        dtype = dtype or self.workspace.dtype
        count = math.prod(shape)
        size = max(1, count) * dtype.itemsize
        fitting = [memory for memory in self._free if memory.numel() >= size]
        if fitting:
            memory = min(reversed(fitting), key=Tensor.numel)  # of equal ones, the one that is likeliest in the cache
            self._free = [other for other in self._free if other is not memory]
        else:
            memory = self.workspace.allocate(size)
        self._taken[_storage(memory)] = memory
        return memory[:size].view(dtype)[:count].view(shape)

    def release(self, *buffers: Tensor) -> None:
        """Give back the memory of `buffers`, or of views of them; what was not taken here is left alone."""
        for buffer in buffers:
            memory = self._taken.pop(_storage(buffer), None)
            if memory is not None:
                self._free.append(memory)

    def until_backward(self, *buffers: Tensor) -> None:
        """Release buffers that only a backward pass needs, if there is none to come."""
        if not self.training:
            self.release(*buffers)

    def view(self, x: Tensor, *shape: int) -> Tensor:
        """`x` in another shape: a view where its strides allow one, else a buffer that a recorded call copies it to."""
        try:
            return x.view(shape)
        except RuntimeError:
            copy = self.take(*x.shape, dtype=x.dtype)
            self.call(copy.copy_, x)
            return copy.view(shape)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Record out = a @ b. On a CPU by numpy, whose BLAS is the faster one for small matrices."""
        if a.shape[-1] == 1:  # numpy has no fast path for it
            self.call(torch.mul, a, b, out=out)
        elif not self.cpu:
            self.call(torch.matmul, a, b, out=out)
        elif b.stride(-1) != 1 and a.shape[-2] >= _ROWS:
            copy = self.transposed(b.transpose(-1, -2))
            self.matmul(a, copy, out)
            self.release(copy)
        else:
            parts = _parts(a.shape[-2], a.shape[-1] * b.shape[-1])
            if parts > 1:
                a, out = (x.view(*x.shape[:-2], parts, -1, x.shape[-1]) for x in (a, out))
                b = b.unsqueeze(-3)
            self.call(np.matmul, a.numpy(), b.numpy(), out=out.numpy())

    def transposed(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """A buffer that a recorded call fills with `factor` times `x`, its last two dimensions swapped."""
        swapped = x.transpose(-1, -2)
        out = self.take(*swapped.shape)
        if self.cpu:  # numpy is the faster one at this
            self.call(np.multiply, swapped.numpy(), factor, out=out.numpy())
        else:
            self.call(torch.mul, swapped, factor, out=out)
        return out

    def tanh(self, x: Tensor, out: Tensor) -> None:
        """Record out = tanh(x). numpy's is ten times as fast as torch's on a CPU."""
        if self.cpu:
            self.call(np.tanh, x.numpy(), out=out.numpy())
        else:
            self.call(torch.tanh, x, out=out)

    def add_product(self, gradient: Tensor, a: Tensor, b: Tensor) -> None:
        """Record the gradient of a parameter that is a matrix product, `[replicas, m, k] @ [replicas, k, n]`."""
        if self.fresh:
            self.matmul(a, b, gradient)
        elif self.cpu:
            product = self.take(*gradient.shape)
            self.matmul(a, b, product)
            self.call(gradient.add_, product)
            self.release(product)
        else:
            self.call(gradient.baddbmm_, a, b)

    def add_sum(self, gradient: Tensor, terms: Tensor, dim: int | tuple[int, ...]) -> None:
        """Record the gradient of a parameter that is a sum over `dim`."""
        if self.fresh:
            self.call(torch.sum, terms, dim, out=gradient)
            return
        total = self.take(*gradient.shape)
        self.call(torch.sum, terms, dim, out=total)
        self.call(gradient.add_, total)
        self.release(total)

    def add_gradient(self, gradient: Tensor, value: Tensor) -> None:
        """Record the gradient of a parameter."""
        self.call(gradient.copy_ if self.fresh else gradient.add_, value)


def _parts(rows: int, products: int) -> int:
    """Into how many small products one divides by its rows, of `products` multiplications each; 1 where none fits."""
    fitting = (n for n in range(1, rows // 16 + 1) if rows % n == 0 and rows // n * products <= _SMALL)
    return next(fitting, 1)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same buffer."""
    return _storage(a) == _storage(b)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
