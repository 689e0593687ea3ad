"""`ControlPolicy`: the network that decides, saved as one file that holds all it needs and runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES, counted

from . import policy_file
from .files import write_atomically
from .policy_file import CONSTANT, PolicyError, PolicyHeader
from .untrusted import read_regular, shown

__all__ = ["CONSTANT", "OBSERVATION_CLIP", "ControlPolicy", "PolicyError", "PolicyHeader"]

OBSERVATION_CLIP = 5.0
_FIRST = "first_decision"
_FEATURES, _CONTROLS = [feature.name for feature in FEATURES], list(CONTROLS)
_LARGEST_WEIGHT = 1e6
"""Far above what training gives, and small enough that no activation overflows."""

T = TypeVar("T", Tensor, NDArray[np.float32])


class ControlPolicy(nn.Module):
    """A multilayer perceptron from observations to actions, input normalization included.

    A policy that knows fewer controls than this package reads the features that it knows, and stays on the others.

    Args:
        header: see `PolicyHeader`.

    Attributes:
        mean, std: of the features in the header.
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
        """The policy by itself: `[..., features in the header]` to `[..., controls in the header]`, in -1..1."""
        first = observation[..., self.header.features.index(_FIRST)]
        return self._unclipped(observation).clamp(-1, 1) * self._share(first)[..., None]

    def _share(self, first: T) -> T:
        strength = self.header.strength
        return strength + (1 - strength) * first.clip(0, 1)  # type: ignore[return-value]

    def share(self, observation: T) -> T:
        """Of the network's actions at whole observations `[..., features]`, the share that is taken, `[...]`."""
        return self._share(observation[..., _FEATURES.index(_FIRST)])

    def _unclipped(self, observation: Tensor) -> Tensor:
        normalized = ((observation - self.mean) / self.std).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        result: Tensor = self.network(normalized)
        return result

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """Those of the network, from input to output."""
        return [layer for layer in self.network if isinstance(layer, nn.Linear)]

    @cached_property
    def _read(self) -> NDArray[np.int64]:
        return np.array([_FEATURES.index(name) for name in self.header.features], np.int64)

    @cached_property
    def _moved(self) -> NDArray[np.int64]:
        return np.array([_CONTROLS.index(name) for name in self.header.controls], np.int64)

    def means(self, observation: Tensor) -> Tensor:
        """Whole observations `[..., features]` to `[..., controls in the header]`, not yet clipped to -1..1, of which a
        `share` is taken."""
        return self._unclipped(observation[..., self._read])

    def on_all_controls(self, actions: Tensor) -> Tensor:
        """`[..., controls in the header]` to `[..., controls]`: the policy stays on those that it does not know."""
        result = actions.new_zeros(*actions.shape[:-1], len(_CONTROLS))
        result[..., self._moved] = actions
        return result

    @property
    def typical(self) -> NDArray[np.float32]:
        """The mean of every feature in meta-training, `[features]`; 0 for those that the policy does not know."""
        means = np.zeros(len(_FEATURES), np.float32)
        means[self._read] = self.mean.numpy()
        return means

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
        # `means` in fewer of torch's calls, as time goes into their number; the same to the last bit.
        mean, std = self.mean.numpy(), self.std.numpy()
        with np.errstate(over="ignore"):  # a stranger's std may be tiny
            normalized = ((observation[:, self._read] - mean) / std).clip(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        means = self.network(torch.from_numpy(normalized)).numpy()
        actions = np.zeros((len(observation), len(_CONTROLS)))
        actions[:, self._moved] = means.clip(-1, 1) * self.share(observation)[:, None]
        return actions, state

    def out_of_depth(self, observation: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which runs look unlike any of the meta-training, `[runs]`: a feature lies farther outside of the range that
        was seen there than that range is wide. What never varied there does not count: policies are blind to it. Nor
        does a number of examples that is not known.

        Args:
            observation: `[runs, features]`.
        """
        known, lowest, highest = self.header.limits
        seen = observation[:, known]
        outside = (seen < lowest) | (seen > highest)
        return np.asarray((outside & counted(observation)[:, known]).any(axis=1))

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides: equal for policies that differ in provenance and scores alone."""
        header = asdict(self.header)
        for name in ("training", "scores"):
            del header[name]
        if header["strength"] == 1:  # as in files from before there was one
            del header["strength"]
        return policy_file.digest(header, self.state_dict())

    def to_bytes(self) -> bytes:
        """The policy as one safetensors file.

        Raises:
            PolicyError: it could not be loaded again, as with weights that are not finite.
        """
        data = policy_file.to_bytes(self.header, self.state_dict())
        self.from_bytes(data)
        return data

    def save(self, path: Path | str) -> None:
        """Write the policy as one safetensors file, whole or not at all.

        Raises:
            PolicyError: as `to_bytes`; an old file stays.
        """
        write_atomically(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: Path | str) -> ControlPolicy:
        """Read a policy file, from anybody: its code is never run, and what it holds is checked before it is used.

        Raises:
            FileNotFoundError: no such file.
            PolicyError: not a policy file, damaged, from a newer version, or made for other features or controls.
        """
        try:
            data = read_regular(path, policy_file.MAX_BYTES)
        except FileNotFoundError:
            raise FileNotFoundError(f"no policy file at {shown(path)}") from None
        except ValueError as error:
            raise PolicyError(f"{shown(path)} {error}; give a policy file") from None
        return cls.from_bytes(data, shown(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the policy") -> ControlPolicy:
        """The policy whose file holds `data`; as `load`, with `name` for error messages.

        Raises:
            PolicyError: see `load`.
        """
        try:
            header, tensors = policy_file.from_bytes(data)
            with torch.device("meta"):  # a small file must not make a large network
                policy = cls(header)
            _check(tensors, policy.state_dict())
        except PolicyError as error:
            raise PolicyError(f"{name} {error}") from None
        policy.to_empty(device="cpu").load_state_dict(tensors)
        return policy.eval()


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    found, needed = ({k: list(t.shape) for k, t in part.items()} for part in (tensors, expected))
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            raise PolicyError(
                f"holds tensors that do not fit its header: {short(name)} has shape {found.get(name)} instead of "
                f"{needed.get(name)}"
            )
    for name, tensor in tensors.items():
        low, high = tensor.aminmax()
        if not -_LARGEST_WEIGHT <= low <= high <= _LARGEST_WEIGHT:  # NaN neither
            raise PolicyError(f"holds weights in {name} that are not finite, or beyond {_LARGEST_WEIGHT:g}; train anew")
    if not bool((tensors["std"] > 0).all()):
        raise PolicyError("holds an input normalization whose std is not positive; train anew")
