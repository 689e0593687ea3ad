"""The policy file's format, read as if from a stranger: every part is bounded and checked, and nothing is ever run.

A safetensors file whose tensors are all F32. Its metadata has one entry, `hyperpilot-policy`: the fields of
`PolicyHeader` as JSON, with `format_version`, and with `sha256` over all that and the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from reprlib import repr as short
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from hpo_env.actions import RANGES
from hpo_env.base_schedules import REGULARIZERS, BaseRule
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES, features_of
from inner_models.signals import SIGNALS
from inner_models.tasks import OptimizerName

from .untrusted import Check, anything, integer, items, number, one_of, read_json, table, text

CONSTANT = 1e-3
"""A feature whose range in meta-training is no wider than this never varied there."""

FORMAT = "hyperpilot-policy"
FORMAT_VERSION = 2
MAX_BYTES = 64 << 20
_MAX_HEADER = 1 << 20
_MAX_TENSORS = 64
_COPY = "copy or download it again"


class PolicyError(ValueError):
    """A policy file that cannot be used; the message says why and what to do."""


def _ranges(controls: Iterable[str]) -> dict[str, dict[str, float]]:
    return {name: asdict(RANGES[name]) for name in controls}


def of_controls(controls: Collection[str]) -> dict[str, Any]:
    """The entries of a `PolicyHeader` that follow from what the policy moves."""
    return {"controls": tuple(controls), "features": features_of(controls), "ranges": _ranges(controls)}


@dataclass(frozen=True)
class PolicyHeader:
    """What a policy file says of itself.

    Attributes:
        hidden: widths of the network's hidden layers (tanh).
        base_rules: optimizer kind -> the rule whose schedule its actions deviate from.
        required_signals: signals that a run must give at every step.
        controls: what the network moves: all of this package's, but for `REGULARIZERS`, of which it may lack some.
        features, ranges: this package's own for these controls.
        strength: share of the network's actions that is taken, 0..1, from the second decision on.
        trained_ranges: feature -> the least and the largest value that meta-training saw; `horizons` -> intervals in a
            run.
        training: provenance (preset, seed, timesteps, seconds, device, versions, data sets).
        scores: meta-validation figures, with how they were taken.
    """

    hidden: tuple[int, ...]
    base_rules: dict[str, dict[str, Any]]
    required_signals: tuple[str, ...] = ("train_loss", "val_loss")
    features: tuple[str, ...] = features_of(CONTROLS)
    controls: tuple[str, ...] = tuple(CONTROLS)
    ranges: dict[str, dict[str, float]] = field(default_factory=lambda: _ranges(CONTROLS))
    strength: float = 1.0
    trained_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)

    def base_rule(self, optimizer_kind: str) -> BaseRule:
        return BaseRule.from_dict(self.base_rules[optimizer_kind])

    @cached_property
    def limits(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Of the features that varied in meta-training: their places in an observation, and how low and how high a
        value may be before the policy is out of its depth."""
        varied = {name: pair for name, pair in self.trained_ranges.items() if pair[1] - pair[0] > CONSTANT}
        known = [index for index, feature in enumerate(FEATURES) if feature.name in varied]
        low, high = np.array([varied[FEATURES[index].name] for index in known]).reshape(-1, 2).T
        return np.array(known, np.int64), 2 * low - high, 2 * high - low


def _warmup(where: str, value: Any) -> None:
    number(0, 1)(where, value)
    if 0 < value < 1e-6:  # progress divided by it would overflow
        raise ValueError(f"{where} must be 0 or at least 1e-6, not {value}")


def _some(entries: Mapping[str, Check], others: Check | None = None) -> Check:
    return table(entries, optional=entries, others=others)


_OWN = PolicyHeader(hidden=(), base_rules={})
_SCORE = number(-1e9, 1e9)
_ROWS = table(dict.fromkeys(CONTROLS, items(number(-1000, 1000), 3, 3)), optional=REGULARIZERS)
_RULE = table({"coefficients": _ROWS, "warmup": _warmup})
_check_header = table(
    {
        "format_version": anything(0),
        "hidden": items(integer(1, 4096), 0, 16),
        "base_rules": table(dict.fromkeys(get_args(OptimizerName), _RULE)),
        "required_signals": items(one_of(*SIGNALS), 0, len(SIGNALS)),
        "features": anything(1),
        "controls": anything(1),
        "ranges": table({}, others=table({}, others=_SCORE)),
        "trained_ranges": _some(dict.fromkeys((*_OWN.features, "horizons"), items(_SCORE, 2, 2))),
        "strength": number(0, 1),
        "training": _some({"preset": text, "seconds": number(0, 1e12)}, others=anything(3)),
        "scores": _some(
            {"timesteps": integer(0, 10**15), "log_ratio_iqm": _SCORE, "mean_return": _SCORE}, others=anything(3)
        ),
    },
    optional=("strength",),
)
_SIZE = integer(0, MAX_BYTES)
_check_tensor = table({"dtype": one_of("F32"), "shape": items(_SIZE, 0, 2), "data_offsets": items(_SIZE, 2, 2)})


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a header (as canonical JSON) and of every tensor's name, type, shape and bytes."""
    sum_ = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sum_.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        sum_.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sum_.hexdigest()


def to_bytes(header: PolicyHeader, tensors: Mapping[str, Tensor]) -> bytes:
    """The file of a policy."""
    payload = {"format_version": FORMAT_VERSION, **asdict(header)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return serialize(contiguous, {FORMAT: json.dumps({**payload, "sha256": digest(payload, contiguous)})})


def from_bytes(data: bytes) -> tuple[PolicyHeader, dict[str, Tensor]]:
    """The inverse of `to_bytes`. Whether the tensors are those of the header's network is not looked at.

    Raises:
        PolicyError: not such a file. Its message goes on from the file's name.
    """
    try:
        entries, start = _container(data)
        payload, checksum = _payload(entries.pop("__metadata__", None))
        _check_tensors(entries, len(data) - start)
        tensors = deserialize(data)
        if digest(payload, tensors) != checksum:
            raise PolicyError(f"is damaged: its contents do not match its checksum; {_COPY}")
        return _header(payload), tensors
    except SafetensorError as error:
        raise PolicyError(f"is not a whole safetensors file ({error}); {_COPY}") from None
    except RecursionError:
        raise PolicyError("is not a policy file: its header is nested too deeply") from None


def _container(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where the tensors' bytes begin."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        if not 8 < start <= len(data):
            raise ValueError(f"its {len(data)} bytes do not hold its header")
        if start > _MAX_HEADER:
            raise ValueError(f"its header has {start} bytes, more than {_MAX_HEADER}")
        return read_json(data[8:start].decode()), start
    except ValueError as error:
        raise PolicyError(f"is not a whole safetensors file ({error}); {_COPY}") from None


def _payload(metadata: Any) -> tuple[dict[str, Any], Any]:
    """What the policy's header says, and the checksum over it and the tensors."""
    if not isinstance(metadata, dict) or not isinstance(metadata.get(FORMAT), str):
        raise PolicyError(
            f"is a safetensors file, but not a hyperpilot policy (it has no {FORMAT} header); give a file that "
            "scripts/train_agent.py or ControlPolicy.save wrote"
        )
    try:
        payload = read_json(metadata[FORMAT])
        for name in ("format_version", "sha256"):
            if name not in payload:
                raise ValueError(f"no {name}")
    except ValueError as error:
        raise PolicyError(f"is damaged: its header cannot be read ({error}); {_COPY}") from None
    version = payload["format_version"]
    if type(version) is int and version > FORMAT_VERSION:
        raise PolicyError(
            f"has format version {short(version)}; this hyperpilot reads up to {FORMAT_VERSION}: upgrade hyperpilot"
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise PolicyError(
            f"has format version {short(version)}; this hyperpilot reads {FORMAT_VERSION}: train the policy anew"
        )
    if len(metadata) > 1:
        raise PolicyError(f"has {len(metadata) - 1} metadata entries besides {FORMAT}; remove them")
    return payload, payload.pop("sha256")


def _check_tensors(entries: dict[str, Any], size: int) -> None:
    """Each F32, one after the other, and together all the `size` bytes after the header."""
    try:
        if len(entries) > _MAX_TENSORS:
            raise ValueError(f"there are {len(entries)}, more than {_MAX_TENSORS}")
        for name, entry in entries.items():
            _check_tensor(short(name), entry)
    except ValueError as error:
        raise PolicyError(f"holds tensors that do not fit its header: {error}; {_COPY}") from None
    end = 0
    for (begin, stop), shape, name in sorted((e["data_offsets"], e["shape"], name) for name, e in entries.items()):
        if begin != end or stop - begin != 4 * math.prod(shape):
            raise PolicyError(
                f"is not a whole safetensors file (tensor {short(name)} of shape {shape} lies at {begin}..{stop}, the "
                f"one before it ends at {end}); {_COPY}"
            )
        end = stop
    if end != size:
        raise PolicyError(f"is not a whole safetensors file (it has {size} bytes of tensors instead of {end}); {_COPY}")


def _header(payload: dict[str, Any]) -> PolicyHeader:
    moved = found if isinstance(found := payload.get("controls"), list) else CONTROLS
    controls = tuple(name for name in CONTROLS if name in moved or name not in REGULARIZERS)
    for name, value in read_json(json.dumps(of_controls(controls))).items():
        if payload.get(name, value) != value:
            raise PolicyError(
                f"was made for other {name} than this version of hyperpilot has; use the version that it was trained "
                "with, or train anew"
            )
    try:
        _check_header("header", payload)
        for name, (low, high) in payload["trained_ranges"].items():
            if low > high:
                raise ValueError(f"header.trained_ranges.{name} must not fall, as {low}..{high} does")
    except ValueError as error:
        raise PolicyError(f"has a header that does not fit format version {FORMAT_VERSION}: {error}; {_COPY}") from None
    entries = {name: value for name, value in payload.items() if name != "format_version"}
    tuples = {name: tuple(entries[name]) for name in ("hidden", "required_signals", "features", "controls")}
    ranges = {name: (float(low), float(high)) for name, (low, high) in entries["trained_ranges"].items()}
    return PolicyHeader(**{**entries, **tuples, "trained_ranges": ranges})
