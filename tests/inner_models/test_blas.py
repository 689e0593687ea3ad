"""Which environment variables are set, and that they are set for child processes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest
import threadpoolctl
import torch

from inner_models.blas import environment, kernel_environment, worker_environment


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An AVX-512 processor that OpenBLAS takes for an older one."""
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: [{"architecture": "Haswell"}, {}])
    return monkeypatch


def test_an_unknown_processor_is_named(machine: pytest.MonkeyPatch) -> None:
    assert kernel_environment() == {"OPENBLAS_CORETYPE": "SkylakeX"}
    assert worker_environment() == {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_CORETYPE": "SkylakeX",
    }


def test_nothing_is_said_where_it_is_known_or_lacking_or_chosen(machine: pytest.MonkeyPatch) -> None:
    with machine.context() as patch:
        patch.setattr(threadpoolctl, "threadpool_info", lambda: [{"architecture": "SkylakeX"}])
        assert kernel_environment() == {}
    with machine.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert kernel_environment() == {}
    machine.setenv("OPENBLAS_CORETYPE", "Zen")
    assert kernel_environment() == {}


def in_child(variables: Mapping[str, str]) -> list[str]:
    """The BLAS kernels of a Python process with `variables`."""
    code = "import numpy, threadpoolctl; print(*[i.get('architecture') for i in threadpoolctl.threadpool_info()])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_openblas_follows_the_variable() -> None:
    if not {"Haswell", "Zen", "SkylakeX"} & set(in_child({})):
        pytest.skip("numpy's BLAS is not an x86 OpenBLAS with kernels to choose from")
    assert "Haswell" in in_child({"OPENBLAS_CORETYPE": "Haswell"})


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with environment({"OMP_NUM_THREADS": "1", "HYPERPILOT_TEST": "x"}):
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.environ["HYPERPILOT_TEST"] == "x"
    assert dict(os.environ) == before
