"""Environment variables under which numpy's matrix products are fast. OpenBLAS reads them when numpy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import threadpoolctl
import torch


def kernel_environment() -> dict[str, str]:
    """What to set so that OpenBLAS uses AVX-512 where the processor has it; nothing where it does so by itself.

    OpenBLAS 0.3.31 takes processors that it does not know yet, such as AMD's Zen 5, for older ones without. What the
    user has set is left as it is.
    """
    if "OPENBLAS_CORETYPE" in os.environ or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return {}
    found = {library.get("architecture") for library in threadpoolctl.threadpool_info()}
    return {"OPENBLAS_CORETYPE": "SkylakeX"} if found & {"Haswell", "Zen"} else {}


def worker_environment() -> dict[str, str]:
    """What to set for a worker process that trains beside others: one thread, and the fastest kernels."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return threads | kernel_environment()


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, for processes started inside."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
