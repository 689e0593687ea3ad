"""Files of a run, its TensorBoard writer, and writing them so that nothing that existed is lost."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

CONFIG_FILE = "config.json"
"""The effective settings, in every run's folder."""


class ScalarWriter(Protocol):
    """What a TensorBoard `SummaryWriter` offers here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the old file stays whole until the new one is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
