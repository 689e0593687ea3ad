"""Files of a run, and writing them so that nothing that existed is lost."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CONFIG_FILE = "config.json"
"""The effective settings, in every run's folder."""


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
