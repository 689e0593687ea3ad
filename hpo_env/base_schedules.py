"""What an untouched run follows: one schedule for all runs, or a rule that fits one to the run's length and size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import CONTROLS, Array, finite_positive

REGULARIZERS = {"augmentation": 0.005, "label_smoothing": 0.02}
"""The controls that few runs have, and their values in a base that was made without them (docs/regularization.md)."""


@dataclass(frozen=True)
class BaseSchedule:
    """Warm-up and cosine decay of the learning rate, the other controls constant.

    Attributes:
        lr: peak learning rate.
        warmup: share of the run over which the learning rate rises linearly from zero.
    """

    lr: float
    batch_size: float
    weight_decay: float
    dropout: float
    warmup: float = 0.05
    augmentation: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        finite_positive("lr", self.lr)
        finite_positive("batch_size", self.batch_size)
        if not (0 <= self.weight_decay < math.inf and 0 <= self.dropout < 1 and 0 <= self.warmup <= 1):
            raise ValueError(
                f"weight_decay must not be negative, dropout lie in 0..1 and warmup in 0..1, not {self.weight_decay}, "
                f"{self.dropout} and {self.warmup}"
            )
        if not (0 <= self.augmentation < 1 and 0 <= self.label_smoothing < 1):
            raise ValueError(
                f"augmentation and label_smoothing must lie in 0..1, not {self.augmentation} and {self.label_smoothing}"
            )

    def values(self, progress: Array) -> dict[str, Array]:
        """Values over an interval whose middle lies at `progress` (0..1 of the run), in the shape of `progress`."""
        constant = {name: np.full_like(progress, getattr(self, name)) for name in CONTROLS if name != "lr"}
        return {"lr": self.lr * shape(progress, self.warmup), **constant}

    def at_batch_size(self, batch_size: float | None, momentum_sgd: bool) -> BaseSchedule:
        """The schedule for a run whose batch size stays there, its learning rate by `lr_factor`; as it is when None."""
        if batch_size is None:
            return self
        factor = lr_factor(np.array(batch_size), np.array(self.batch_size), np.array(momentum_sgd))
        return replace(self, lr=self.lr * float(factor), batch_size=batch_size)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def shape(progress: Array, warmup: float) -> Array:
    """Linear warm-up times cosine decay, 0..1, at `progress` (0..1 of the run)."""
    decay = 0.5 * (1 + np.cos(math.pi * np.clip(progress, 0, 1)))
    rise = np.minimum(1.0, progress / warmup) if warmup else np.ones_like(progress)
    return np.asarray(decay * rise)


TYPICAL = {"examples": 10_000.0, "parameters": 3_000.0}
"""Where a rule's slopes do not matter, and what it takes a run for whose length is not known."""


REACH = math.log(300)
"""How far from there a rule is believed, in the logarithm: somewhat farther than meta-training goes."""


@dataclass(frozen=True)
class BaseRule:
    """A base schedule for each length and size of a run.

    On each control's scale (natural log, logit), its value is
    `intercept + slope_examples ln(examples / TYPICAL) + slope_parameters ln(parameters / TYPICAL)`.

    Attributes:
        coefficients: control -> (intercept, slope_examples, slope_parameters).
        warmup: as in `BaseSchedule`.
    """

    coefficients: Mapping[str, tuple[float, float, float]]
    warmup: float = 0.05

    def __post_init__(self) -> None:
        numbers = [number for row in self.coefficients.values() for number in row]
        if set(self.coefficients) != set(CONTROLS) or any(len(row) != 3 for row in self.coefficients.values()):
            raise ValueError(f"a base rule needs three coefficients for each of {', '.join(CONTROLS)}")
        if not all(math.isfinite(number) for number in numbers) or not 0 <= self.warmup <= 1:
            raise ValueError(f"a base rule's coefficients must be finite and its warmup lie in 0..1, not {self}")

    def peaks(self, examples: Array, parameters: Array) -> dict[str, Array]:
        """The controls' values, the learning rate at its peak.

        Args:
            examples: training examples of the whole run, `[runs]`; NaN where not known.
            parameters: trainable parameters, `[runs]`.
        """
        known = np.where(np.isfinite(examples) & (examples > 0), examples, TYPICAL["examples"])
        x = np.clip(np.log(known / TYPICAL["examples"]), -REACH, REACH)
        y = np.clip(np.log(np.maximum(parameters, 1) / TYPICAL["parameters"]), -REACH, REACH)
        return {
            name: control.from_scale(row[0] + row[1] * x + row[2] * y)
            for (name, control), row in zip(CONTROLS.items(), (self.coefficients[n] for n in CONTROLS), strict=True)
        }

    def schedule(self, examples: float, parameters: float) -> BaseSchedule:
        """The schedule of one run."""
        peaks = self.peaks(np.array([examples]), np.array([parameters]))
        return BaseSchedule(**{name: float(value[0]) for name, value in peaks.items()}, warmup=self.warmup)

    def to_dict(self) -> dict[str, object]:
        return {"coefficients": {name: list(row) for name, row in self.coefficients.items()}, "warmup": self.warmup}

    @classmethod
    def from_dict(cls, entries: Mapping[str, object]) -> BaseRule:
        """The inverse of `to_dict`. A rule that was made without `REGULARIZERS` gets them, as constants.

        Raises:
            ValueError, TypeError, KeyError: not a rule.
        """
        coefficients, warmup = entries["coefficients"], entries["warmup"]
        if not isinstance(coefficients, Mapping) or not isinstance(warmup, int | float):
            raise TypeError("a base rule has coefficients and a warmup")
        usual = {name: float(CONTROLS[name].to_scale(np.array(value))) for name, value in REGULARIZERS.items()}
        rows = {name: (value, 0.0, 0.0) for name, value in usual.items()}
        for name, row in coefficients.items():
            intercept, examples, parameters = (float(number) for number in row)
            rows[str(name)] = (intercept, examples, parameters)
        return cls(rows, float(warmup))


def lr_factor(batch_size: Array, usual: Array, momentum_sgd: NDArray[np.bool_]) -> Array:
    """By how much the learning rate follows a batch size that stays at another value than the base's: the ratio's root
    with an adaptive optimizer (Malladi et al. 2022, arXiv:2205.10287), the ratio with SGD (Goyal et al. 2017,
    arXiv:1706.02677); no further than batch sizes are moved.

    Args:
        batch_size: rows of an optimizer step, `[runs]`; NaN where it does not stay, or is not known.
        usual: the base's, `[runs]`.
        momentum_sgd: `[runs]`.
    """
    low, high = CONTROLS["batch_size"].low, CONTROLS["batch_size"].high
    ratio = np.clip(np.where(np.isnan(batch_size), usual, batch_size), low, high) / np.clip(usual, low, high)
    return np.asarray(np.where(momentum_sgd, ratio, np.sqrt(ratio)))


CALIBRATION_FILE = "base_schedule.json"
RULE_FILE = "base_rule.json"


def calibrated(optimizer: str) -> BaseSchedule:
    """The one schedule that `scripts/calibrate.py` found best on average over meta-train, for `adamw` or `sgd`."""
    return BaseSchedule(**{**REGULARIZERS, **_table(CALIBRATION_FILE, "schedules", optimizer)})


def calibrated_rule(optimizer: str) -> BaseRule:
    """The rule that `scripts/calibrate.py` fitted on meta-train, for `adamw` or `sgd`."""
    return BaseRule.from_dict(_table(RULE_FILE, "rules", optimizer))


def _table(file: str, key: str, optimizer: str) -> dict[str, float]:
    table: dict[str, dict[str, float]] = json.loads(resources.files("hpo_env").joinpath(file).read_text())[key]
    if optimizer not in table:
        raise ValueError(f"no calibrated schedule for optimizer {optimizer!r}; known: {', '.join(table)}")
    return table[optimizer]
