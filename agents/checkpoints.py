"""Checkpoints of a run: one state file each."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import remove_partial
from .state_file import load_state, save_state

FOLDER = "checkpoints"
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")

_log = logging.getLogger("hyperpilot")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was saved; its tensors are on the CPU."""

    path: Path
    step: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder, in `folder / "checkpoints"`.

    Args:
        keep: how many of the newest are kept, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder, self.keep = folder / FOLDER, keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Save a checkpoint, then remove old ones. Only for the run folder's only writer (`files.only_writer`).

        Raises:
            TypeError, ValueError, OSError: as `save_state`; those that were there still are.
        """
        path = self.folder / f"checkpoint-{step:012d}.safetensors"
        remove_partial(self.folder)  # first, as the disk may be full of them
        save_state(path, state, step=step)
        older = [old for number, old in self._saved() if number < step]
        for old in older[self.keep - 1 :]:
            with suppress(OSError):  # the next save tries again
                os.unlink(old)
        return path

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None if there is none at all. A damaged one is logged and passed over.

        Raises:
            ValueError: there are some, but all are damaged.
        """
        damaged = 0
        for step, path in self._saved():
            try:
                return Checkpoint(path, step, load_state(path, step=step))
            except ValueError as error:
                _log.warning("%s; trying the one before", error)
                damaged += 1
        if damaged:
            raise ValueError(f"all {damaged} checkpoints in {self.folder} are damaged; train anew in another folder")
        return None

    def _saved(self) -> list[tuple[int, Path]]:
        """Step and path of all that are there, the newest first."""
        names = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("checkpoint-*"))
        return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)
