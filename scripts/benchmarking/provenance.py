"""Where figures come from: machine, code and libraries, without names of hosts or folders."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import threadpoolctl
import torch

from agents.provenance import provenance as of_device
from scripts.benchmarking.processes import Crew, cores


class Libraries:
    """What the process that it is built in computes with."""

    def figures(self) -> dict[str, Any]:
        """Threads, and each BLAS loaded: library, version, kernels in use."""
        return {
            "torch_threads": torch.get_num_threads(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "blas": [
                {key: pool.get(key) for key in ("internal_api", "version", "architecture", "num_threads")}
                for pool in threadpoolctl.threadpool_info()
                if pool["user_api"] == "blas"
            ],
        }


def provenance(crew: Crew, device: str) -> dict[str, Any]:
    """Of figures that `crew` measured on `device`."""
    crew.build("libraries", Libraries)
    return {
        "commit": _commit(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": cores(),
        **of_device(device),
        "worker": crew.call("libraries", "figures")[0],
    }


def _commit() -> str | None:
    """The checkout's commit, with a mark if files have changed since; None where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None
