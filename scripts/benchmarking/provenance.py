"""Where figures come from: machine, code and libraries, without names of hosts or folders."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
import torch

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
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "cores": cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
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


def _cpu_model() -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
