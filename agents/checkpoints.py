"""Checkpoints of a run: one safetensors file each, sealed by a checksum, read without running code."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from .files import remove_partial, write_atomically

FOLDER = "checkpoints"
FORMAT = "hyperpilot-checkpoint"
FORMAT_VERSION = 1
_MAX_BYTES = 1 << 30
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
_UNSEALED = "0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
"""Inside of the state, which is a string in the header, quotes are escaped: it cannot hold another."""

_FLOAT, _TENSOR = "$float", "$tensor"

_DAMAGES = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError)
"""What reading may raise, files included that are nonsense under a right checksum."""

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

        Args:
            state: of tensors, None, bool, int, float, str, list and dict with str keys: what comes back equal.

        Raises:
            TypeError: something else in `state`.
            ValueError: a negative step, or more than 1 GiB.
            OSError: not saved; those that were there still are.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        tensors: list[torch.Tensor] = []
        payload = {"version": FORMAT_VERSION, "step": step, "state": _plain(dict(state), tensors)}
        metadata = {FORMAT: json.dumps(payload, allow_nan=False), "sha256": _UNSEALED}
        # Copies, as safetensors refuses tensors that share memory.
        plain = (tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for tensor in tensors)
        copies = {str(index): tensor for index, tensor in enumerate(plain)}
        data = serialize(copies, metadata)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"a checkpoint of {len(data)} bytes; it could not be read again (at most {_MAX_BYTES})")
        start, end = _seal(data)
        path = self.folder / f"checkpoint-{step:012d}.safetensors"
        remove_partial(self.folder)  # first, as the disk may be full of them
        write_atomically(path, b"".join([data[:start], _digest(data, start, end).encode(), data[end:]]))
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
                return _load(path, step)
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


def _load(path: Path, step: int) -> Checkpoint:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        start, end = _seal(data)
        if data[start:end].decode() != _digest(data, start, end):
            raise ValueError("its contents do not match its checksum")
        header, tensors = json.loads(data[8 : 8 + _header_size(data)]), deserialize(data)
        payload = json.loads(header["__metadata__"][FORMAT], object_hook=partial(_restored, tensors=tensors))
        if (payload["version"], payload["step"]) != (FORMAT_VERSION, step):
            raise ValueError(f"it is of step {payload['step']} and format {payload['version']}, not {FORMAT_VERSION}")
        return Checkpoint(path, step, dict(payload["state"]))
    except _DAMAGES as error:
        raise ValueError(f"the checkpoint {path} is damaged: {error}") from error


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _seal(data: bytes) -> tuple[int, int]:
    """From where to where the checksum stands in the header of a safetensors file."""
    match = _SEAL.search(data, 8, 8 + min(_header_size(data), len(data)))
    if match is None:
        raise ValueError("it has no checksum")
    return match.span(1)


def _digest(data: bytes, start: int, end: int) -> str:
    """SHA-256 of a file as it was before its checksum was put in."""
    view = memoryview(data)
    digest = hashlib.sha256(view[:start])
    digest.update(_UNSEALED.encode())
    digest.update(view[end:])
    return digest.hexdigest()


def _plain(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` for JSON, which knows neither infinity nor NaN; its tensors go to the end of `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {_TENSOR: str(len(tensors) - 1)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list):
        return [_plain(entry, tensors) for entry in value]
    if isinstance(value, dict) and all(isinstance(key, str) and key not in (_FLOAT, _TENSOR) for key in value):
        return {key: _plain(entry, tensors) for key, entry in value.items()}
    raise TypeError(f"a checkpoint's state cannot hold {value!r} of type {type(value).__name__}")


def _restored(entry: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    if entry.keys() == {_FLOAT}:
        return float(entry[_FLOAT])
    return tensors[entry[_TENSOR]] if entry.keys() == {_TENSOR} else entry
