"""Hyperparameters: their ranges and scales, and reading and writing them on a torch run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from inner_models.augmentation import Augment
from inner_models.sampling import MICRO_BATCH

Array = NDArray[np.float64]
Scale = Literal["log", "logit"]


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter, its range, and the scale on which equal steps matter equally.

    Attributes:
        low, high: range of values, both attainable.
        scale: `log` (positive values) or `logit` (values in 0..1, both ends excluded).
        multiple: values are rounded to a multiple of this; 0 for none.
    """

    name: str
    low: float
    high: float
    scale: Scale
    multiple: int = 0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"{self.name}: low must be below high, not {self.low} and {self.high}")
        if (self.scale == "log" and self.low <= 0) or (self.scale == "logit" and not 0 < self.low < self.high < 1):
            raise ValueError(f"{self.name}: range {self.low}..{self.high} does not fit the {self.scale} scale")

    @cached_property
    def _scales(self) -> Scales:
        return Scales([self])

    def to_scale(self, value: Array) -> Array:
        """Value -> its scale's units (log value or logit value); values outside the range are clipped to it."""
        return self._scales.to_scale(np.asarray(value)[..., None])[..., 0]

    def from_scale(self, scaled: Array) -> Array:
        """The inverse of `to_scale`, clipped to the range and rounded to `multiple`."""
        return self._scales.from_scale(np.asarray(scaled)[..., None])[..., 0]

    def normalize(self, value: Array) -> Array:
        """Value -> 0..1 on its scale."""
        return self._scales.normalize(np.asarray(value)[..., None])[..., 0]

    def denormalize(self, unit: Array) -> Array:
        """The inverse of `normalize`."""
        low, high = self._scales.bounds
        return self.from_scale(low[0] + np.asarray(unit) * (high[0] - low[0]))


class Scales:
    """The ranges and scales of several hyperparameters. Arrays have one column for each, `[..., hyperparameters]`.

    Attributes:
        low, high: ranges of values.
        bounds: the same on the scales.
        multiple: values are rounded to multiples of this; 0 for none.
        logit: whether the scale is the logit, not the logarithm.
        rate: whether a value may lie below the range: what has a logarithm and is no multiple.
    """

    def __init__(self, parts: Iterable[Hyperparameter]) -> None:
        parts = list(parts)
        self.low, self.high = (np.array([getattr(part, end) for part in parts]) for end in ("low", "high"))
        self.multiple = np.array([part.multiple for part in parts])
        self.logit = np.array([part.scale == "logit" for part in parts])
        self.rate = ~self.logit & (self.multiple == 0)
        self._rounded = np.flatnonzero(self.multiple)
        self.bounds = self.to_scale(self.low), self.to_scale(self.high)

    def to_scale(self, values: Array) -> Array:
        """Values -> their scales' units (log value or logit value); values outside the ranges are clipped to them."""
        values = np.clip(values, self.low, self.high)
        return np.asarray(np.log(values) - np.log1p(np.where(self.logit, -values, 0)))

    def from_scale(self, scaled: Array) -> Array:
        """The inverse of `to_scale`, clipped to the ranges and rounded to `multiple`."""
        scaled = np.clip(scaled, *self.bounds)
        powers = np.exp(np.where(self.logit, -scaled, scaled))
        values = np.clip(np.where(self.logit, 1 / (1 + powers), powers), self.low, self.high)
        for column in self._rounded:
            values[..., column] = np.rint(values[..., column] / self.multiple[column]) * self.multiple[column]
        return values

    def room(self, values: Array) -> tuple[Array, Array]:
        """How far values can move down (0 or below) and up (0 or above), in scale units: within the range, but for a
        rate that already lies below it, which may fall further."""
        low, high = self.bounds
        at = self.to_scale(values)
        below = self.rate & (values > 0) & (values < self.low)
        return np.where(below, -np.inf, low - at), high - at

    def normalize(self, values: Array) -> Array:
        """Values -> 0..1 on their scales."""
        low, high = self.bounds
        return np.asarray((self.to_scale(values) - low) / (high - low))


CONTROLS: dict[str, Hyperparameter] = {
    control.name: control
    for control in (
        Hyperparameter("lr", 1e-6, 1.0, "log"),
        Hyperparameter("batch_size", MICRO_BATCH, 256, "log", multiple=MICRO_BATCH),
        Hyperparameter("weight_decay", 1e-6, 3.0, "log"),
        Hyperparameter("dropout", 0.005, 0.5, "logit"),
        Hyperparameter("augmentation", 0.005, 0.5, "logit"),
        Hyperparameter("label_smoothing", 0.005, 0.5, "logit"),
    )
}
"""The hyperparameters that a policy moves, in the order of its actions."""

SCALES = Scales(CONTROLS.values())
"""Theirs."""


def in_columns(values: Mapping[str, Array]) -> Array:
    """Values of all controls by name, `[runs]` each, as `[runs, controls]`."""
    return np.stack([values[name] for name in CONTROLS], axis=1)


def by_name(columns: Array) -> dict[str, Array]:
    """The inverse of `in_columns`."""
    return {name: columns[:, index].copy() for index, name in enumerate(CONTROLS)}


_ATTRIBUTES = {"dropout": "p", "augmentation": "strength", "label_smoothing": "label_smoothing"}
"""Controls that modules hold, and where."""


class HasBatchSize(Protocol):
    """Anything with a settable `batch_size`."""

    batch_size: int


class Binding:
    """Reads and writes controls on a torch optimizer, on modules and on a batch sampler.

    Parameter groups keep their ratios: a group's learning rate stays at its share of the largest one, its weight decay
    likewise, and groups without decay stay so. Dropout layers keep their ratios to the largest rate, and so do the
    other modules. What the run does not use (no decay anywhere, all rates zero) is not switched on.

    Args:
        optimizer: any `torch.optim.Optimizer` whose groups have `lr`. `weight_decay` is available where it is decoupled
            (AdamW and its like) or the optimizer is SGD; elsewhere the same number means another thing.
        model: where to look for `nn.Dropout` layers and their like, and for `Augment`; `dropout` and `augmentation` are
            not available without one. Rates that other modules hold as numbers (`nn.MultiheadAttention`, `nn.LSTM`) are
            left alone.
        batch_sampler: what to set `batch_size` on; `batch_size` is not available without it.
        criterion: where to look for losses with a `label_smoothing`, such as `nn.CrossEntropyLoss`; `label_smoothing`
            is not available without one.

    Attributes:
        available: names of the controls that this run has.
        shares: for each control, every group's (or module's) share of the largest value.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        batch_sampler: HasBatchSize | None = None,
        criterion: nn.Module | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._batch_sampler = batch_sampler
        layers, losses = (list(part.modules()) if part is not None else [] for part in (model, criterion))
        self._modules: dict[str, list[nn.Module]] = {
            "dropout": [layer for layer in layers if isinstance(layer, nn.modules.dropout._DropoutNd)],
            "augmentation": [layer for layer in layers if isinstance(layer, Augment)],
            "label_smoothing": [loss for loss in losses if isinstance(getattr(loss, "label_smoothing", None), float)],
        }
        rates = [float(group["lr"]) for group in self._groups]
        if not any(rates):  # a scheduler that warms up from 0 is attached
            rates = [float(group.get("initial_lr", 0.0)) for group in self._groups]
        self._firsts = [group["params"][0] if group["params"] else None for group in self._groups]
        self.shares = {
            "lr": _shares(rates),
            "weight_decay": _shares([float(group.get("weight_decay", 0.0)) for group in self._groups]),
            **{name: _shares(self._held(name)) for name in self._modules},
        }
        has = {
            "lr": True,
            "batch_size": batch_sampler is not None,
            "weight_decay": any(_decays(optimizer, group) for group in self._groups),
            **{name: any(value > 0 for value in self._held(name)) for name in self._modules},
        }
        self.available = tuple(name for name in CONTROLS if has[name])

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups  # looked up anew: load_state_dict replaces the list

    def _held(self, name: str) -> list[float]:
        """A control's value in each of its modules."""
        return [float(getattr(module, _ATTRIBUTES[name])) for module in self._modules[name]]

    def read(self) -> dict[str, float]:
        """The run's present values of its available controls."""
        values = {"lr": max(float(group["lr"]) for group in self._groups)}
        if self._batch_sampler is not None:
            values["batch_size"] = float(self._batch_sampler.batch_size)
        if "weight_decay" in self.available:
            values["weight_decay"] = max(float(group.get("weight_decay", 0.0)) for group in self._groups)
        return values | {name: max(self._held(name)) for name in self._modules if name in self.available}

    def write(self, values: Mapping[str, float]) -> None:
        """Set controls; names that the run does not have are an error."""
        unknown = [name for name in values if name not in self.available]
        if unknown:
            raise ValueError(f"this run has no {', '.join(unknown)}; it has {', '.join(self.available)}")
        for name, value in values.items():
            if name == "batch_size":
                assert self._batch_sampler is not None
                self._batch_sampler.batch_size = int(value)
            elif name in self._modules:
                for module, share in zip(self._modules[name], self.shares[name], strict=True):
                    setattr(module, _ATTRIBUTES[name], value * share)
            else:
                for group, share in zip(self._groups, self._shares_of_groups(name), strict=True):
                    _set(group, name, value * share)

    def _shares_of_groups(self, name: str) -> list[float]:
        """A control's shares, of the groups that there are now. One that was added later has the largest rate, and the
        largest decay if it has any."""
        shares, groups = self.shares[name], self._groups
        if len(groups) < len(shares):
            left = [group["params"][0] for group in groups if group["params"]]
            kept = [any(first is other for other in left) for first in self._firsts]
            shares = [share for share, stays in zip(shares, kept, strict=True) if stays]
        return shares + [1.0 if name == "lr" or group.get(name) else 0.0 for group in groups[len(shares) :]]


_DECOUPLED = (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon)
"""Optimizers whose weight decay is scaled by the learning rate alone."""


def _decays(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    decoupled = isinstance(optimizer, _DECOUPLED) or group.get("decoupled_weight_decay", False)
    return bool(decoupled) and float(group.get("weight_decay", 0.0)) > 0


def _shares(values: list[float]) -> list[float]:
    """Each value's share of the largest; all ones where every value is zero."""
    largest = max(values, default=0.0)
    return [value / largest for value in values] if largest > 0 else [1.0] * len(values)


def _set(group: dict[str, Any], name: str, value: float) -> None:
    if name == "weight_decay" and name not in group:
        return
    if isinstance(group[name], torch.Tensor):  # a capturable optimizer keeps its lr on the device
        group[name].fill_(value)
    else:
        group[name] = value


def finite_positive(name: str, value: float) -> float:
    """Return `value`, or raise a ValueError that names it."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, not {value}")
    return value
