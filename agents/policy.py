"""`ControlPolicy`: the network that decides, saved as one safetensors file that holds all it needs and runs no code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from hpo_env.actions import RANGES
from hpo_env.base_schedules import BaseRule
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from inner_models.signals import SIGNALS
from inner_models.tasks import OptimizerName

from .files import write_atomically

FORMAT = "hyperpilot-policy"
FORMAT_VERSION = 2
OBSERVATION_CLIP = 5.0
_METADATA_KEY = FORMAT
_CONSTANT = 1e-3
_MAX_BYTES = 64 << 20


class PolicyError(ValueError):
    """A policy file that cannot be used; the message says why and what to do."""


def _ranges() -> dict[str, dict[str, float]]:
    return {name: asdict(range_) for name, range_ in RANGES.items()}


@dataclass(frozen=True)
class PolicyHeader:
    """What a policy file says of itself.

    Attributes:
        hidden: widths of the network's hidden layers (tanh).
        base_rules: optimizer kind -> the rule whose schedule its actions deviate from.
        required_signals: signals that a run must give at every step.
        features, controls, ranges: what the network reads and moves; they must be this package's own.
        trained_ranges: feature -> the least and the largest value that meta-training saw; `horizons` -> intervals in a
            run.
        training: provenance (preset, seed, timesteps, seconds, device, versions, data sets).
        scores: meta-validation figures, with how they were taken.
    """

    hidden: tuple[int, ...]
    base_rules: dict[str, dict[str, Any]]
    required_signals: tuple[str, ...] = ("train_loss", "val_loss")
    features: tuple[str, ...] = tuple(feature.name for feature in FEATURES)
    controls: tuple[str, ...] = tuple(CONTROLS)
    ranges: dict[str, dict[str, float]] = field(default_factory=_ranges)
    trained_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)

    def base_rule(self, optimizer_kind: str) -> BaseRule:
        return BaseRule.from_dict(self.base_rules[optimizer_kind])


class ControlPolicy(nn.Module):
    """A multilayer perceptron from observations to actions, input normalization included.

    Args:
        header: see `PolicyHeader`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, header: PolicyHeader) -> None:
        super().__init__()
        self.header = header
        self.register_buffer("mean", torch.zeros(len(header.features)))
        self.register_buffer("std", torch.ones(len(header.features)))
        layers: list[nn.Module] = []
        fan_in = len(header.features)
        for width in header.hidden:
            layers += [nn.Linear(fan_in, width), nn.Tanh()]
            fan_in = width
        self.network = nn.Sequential(*layers, nn.Linear(fan_in, len(header.controls)))

    def forward(self, observation: Tensor) -> Tensor:
        """`[batch, features]` to mean actions `[batch, controls]`, in -1..1."""
        normalized = ((observation - self.mean) / self.std).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        result: Tensor = self.network(normalized)
        return result.clamp(-1, 1)

    @torch.inference_mode()
    def act(
        self, observation: NDArray[np.float32], state: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32] | None]:
        """Decide for a batch of runs.

        Args:
            observation: `[runs, features]`.
            state: what the previous call returned; this network keeps none.

        Returns:
            Actions `[runs, controls]` in -1..1, and the state for the next call.
        """
        return self(torch.from_numpy(observation)).double().numpy(), state

    def out_of_depth(self, observation: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which runs look unlike any of the meta-training, `[runs]`: a feature lies farther outside of the range that
        was seen there than that range is wide. What never varied there does not count: policies are blind to it.

        Args:
            observation: `[runs, features]`.
        """
        ranges = self.header.trained_ranges
        varied = {name: pair for name, pair in ranges.items() if pair[1] - pair[0] > _CONSTANT}
        known = [index for index, name in enumerate(self.header.features) if name in varied]
        low, high = np.array([varied[self.header.features[index]] for index in known]).reshape(-1, 2).T
        seen, width = observation[:, known], high - low
        return np.asarray(((seen < low - width) | (seen > high + width)).any(axis=1))

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides: equal for policies that differ in provenance and scores alone."""
        header = asdict(self.header)
        for name in ("training", "scores"):
            del header[name]
        return _digest(header, self.state_dict())

    def save(self, path: Path | str) -> None:
        """Write the policy as one safetensors file: to a temporary file beside it first, then renamed."""
        path = Path(path)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        header = {"format_version": FORMAT_VERSION, **asdict(self.header)}
        payload = {**header, "sha256": _digest(header, tensors)}
        data = serialize(tensors, {_METADATA_KEY: json.dumps(payload)})
        write_atomically(path, data)

    @classmethod
    def load(cls, path: Path | str) -> ControlPolicy:
        """Read a policy file. Executes no code from it.

        Raises:
            FileNotFoundError: no such file.
            PolicyError: not a policy file, damaged, from a newer version, or made for other features or controls.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no policy file at {path}")
        if path.stat().st_size > _MAX_BYTES:
            raise PolicyError(f"{path} has {path.stat().st_size} bytes, more than any policy file ({_MAX_BYTES})")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
            raise PolicyError(f"{path} is not a whole safetensors file: {error}") from error
        header = _header(path, metadata, tensors)
        with torch.device("meta"):  # a small file must not make a large network
            expected = _layout(cls(header).state_dict())
        if (found := _layout(tensors)) != expected:
            raise PolicyError(f"{path} holds tensors that do not fit its header: {found} instead of {expected}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise PolicyError(f"{path} holds weights that are not finite")
        policy = cls(header)
        policy.load_state_dict(tensors)
        if not bool((policy.std > 0).all()):
            raise PolicyError(f"{path} holds an input normalization whose std is not positive")
        return policy.eval()


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the header (as canonical JSON) and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _header(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> PolicyHeader:
    if _METADATA_KEY not in metadata:
        raise PolicyError(f"{path} is a safetensors file, but not a hyperpilot policy (it has no {FORMAT} header)")
    try:
        payload = json.loads(metadata[_METADATA_KEY])
        version = payload.pop("format_version")
        checksum = payload.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PolicyError(f"{path} is damaged: its header cannot be read ({error})") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PolicyError(
            f"{path} has format version {version}; this hyperpilot reads up to {FORMAT_VERSION}: upgrade hyperpilot"
        )
    if version != FORMAT_VERSION:
        raise PolicyError(f"{path} has format version {version!r}; this hyperpilot reads {FORMAT_VERSION}")
    if _digest({"format_version": version, **payload}, tensors) != checksum:
        raise PolicyError(f"{path} is damaged: its contents do not match its checksum")
    try:
        header = PolicyHeader(
            **{
                **payload,
                "hidden": tuple(int(width) for width in payload["hidden"]),
                **{name: tuple(payload[name]) for name in ("required_signals", "features", "controls")},
                "trained_ranges": {
                    name: (float(low), float(high)) for name, (low, high) in payload["trained_ranges"].items()
                },
            }
        )
        for kind in get_args(OptimizerName):
            header.base_rule(kind)
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        raise PolicyError(f"{path} has a header that does not fit format version {FORMAT_VERSION}: {error}") from error
    own = PolicyHeader(hidden=(), base_rules={})
    for name in ("features", "controls", "ranges"):
        if getattr(header, name) != getattr(own, name):
            raise PolicyError(f"{path} was made for other {name} than this version of hyperpilot has")
    unknown = [signal for signal in header.required_signals if signal not in SIGNALS]
    if unknown or not all(1 <= width <= 4096 for width in header.hidden) or len(header.hidden) > 16:
        raise PolicyError(f"{path} has a header that does not fit format version {FORMAT_VERSION}")
    return header
