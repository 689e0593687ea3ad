"""Nested state as one safetensors file, sealed by a checksum, read without running code."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from .files import write_atomically

FORMAT = "hyperpilot-checkpoint"
FORMAT_VERSION = 2
_UNSEALED = "0" * 64
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
"""Inside of the state, which is a string in the header, quotes are escaped: it cannot hold another."""

_FLOAT, _TENSOR, _TUPLE, _PAIRS = "$float", "$tensor", "$tuple", "$pairs"
_MARKS = (_FLOAT, _TENSOR, _TUPLE, _PAIRS)

_DAMAGES = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError)
"""What reading may raise, files included that are nonsense under a right checksum."""


def save_state(path: Path, state: Mapping[str, Any], *, step: int = 0) -> None:
    """Write `state` so that an earlier file at `path` stays whole until this one is.

    Args:
        state: of tensors, None, bool, int, float, str, list, tuple and dict with keys of str or int, such as state
            dicts are: what comes back equal.
        step: how far the run was, 0 or more.

    Raises:
        TypeError: something else in `state`.
        ValueError: a negative step.
        OSError: not saved; an earlier file still is there.
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
    start, end = _seal(data)
    write_atomically(path, b"".join([data[:start], _digest(data, start, end).encode(), data[end:]]))


def load_state(path: Path, *, step: int = 0) -> dict[str, Any]:
    """Read what `save_state` wrote for this step; tensors come back on the CPU.

    Raises:
        ValueError: it cannot be read, is damaged, or is of another version or step.
    """
    try:
        data = path.read_bytes()
        start, end = _seal(data)
        if data[start:end].decode() != _digest(data, start, end):
            raise ValueError("its contents do not match its checksum")
        header, tensors = json.loads(data[8 : 8 + _header_size(data)]), deserialize(data)
        payload = json.loads(header["__metadata__"][FORMAT], object_hook=partial(_restored, tensors=tensors))
        if (payload["version"], payload["step"]) != (FORMAT_VERSION, step):
            raise ValueError(f"it is of step {payload['step']} and format {payload['version']}, not {FORMAT_VERSION}")
        return dict(payload["state"])
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
    if isinstance(value, tuple):
        return {_TUPLE: [_plain(entry, tensors) for entry in value]}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        if any(key in _MARKS or isinstance(key, int) for key in value):
            return {_PAIRS: [[key, _plain(entry, tensors)] for key, entry in value.items()]}
        return {key: _plain(entry, tensors) for key, entry in value.items()}
    raise TypeError(f"a checkpoint's state cannot hold {value!r} of type {type(value).__name__}")


def _restored(entry: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `_plain` made `entry` of; its own entries are restored already."""
    if len(entry) != 1:
        return entry
    ((mark, value),) = entry.items()
    if mark == _FLOAT:
        return float(value)
    if mark == _TENSOR:
        return tensors[value]
    if mark == _TUPLE:
        return tuple(value)
    return dict(value) if mark == _PAIRS else entry
