"""Observations: the table of features that a policy sees. The table is the documentation and the code.

Every feature is unitless or relative, finite, and clipped to its range; what is not (yet) measured is 0. Losses enter
only as relative differences, r(a, b) = 2 (a - b) / (|a| + |b|) = 2 tanh(log(a / b) / 2) for positive a and b: the log
ratio for nearby values, bounded by 2 for distant ones, and defined at zero and below.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpo_env.actions import RANGES
from hpo_env.hyperparameters import CONTROLS, SCALES, Array
from hpo_env.telemetry import Telemetry

Pair = tuple[Array, Array]


@dataclass
class RunState:
    """All that an observation is computed from, for several runs at once.

    Attributes:
        telemetry: signal histories.
        offsets: `[runs, controls]`, distance from the base schedule in scale units.
        distances: `[runs, controls]`, the same from the rule's schedule, where the base is another one.
        actions: `[runs, controls]`, the last action.
        values: `[runs, controls]`, the values in use.
        available: `[runs, controls]`, whether the run has the control.
        parameters: `[runs]`, trainable parameters of the inner model.
        examples: `[runs]`, training examples of the whole run; NaN where not known.
        momentum_sgd: `[runs]`, whether the optimizer is SGD.
    """

    telemetry: Telemetry
    offsets: Array
    distances: Array
    actions: Array
    values: Array
    available: NDArray[np.bool_]
    parameters: Array
    examples: Array
    momentum_sgd: NDArray[np.bool_]


@dataclass(frozen=True)
class Feature:
    """One entry of an observation.

    Attributes:
        low, high: bounds, to which the value is clipped.
        meaning: what it says, as shown in the documentation.
        formula: computes it, `[runs]`, or the a and b whose relative difference it is; non-finite results become 0.
            None for those of controls, which are computed together.
        control: the control that it tells of, if it does of one.
    """

    name: str
    low: float
    high: float
    meaning: str
    formula: Callable[[RunState], Array | Pair] | None = None
    control: str | None = None


_TINY = float(np.finfo(np.float64).tiny)


def relative_difference(a: Array, b: Array) -> Array:
    """r(a, b) = 2 (a - b) / (|a| + |b|), in -2..2; 0 where both are 0; NaN where either is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.maximum(np.maximum(np.abs(a), np.abs(b)), _TINY)
        a, b = a / largest, b / largest
        return np.asarray(2 * (a - b) / np.maximum(np.abs(a) + np.abs(b), _TINY))


def _change(signal: str, lag: int) -> Callable[[RunState], Pair]:
    return lambda s: (s.telemetry.value(signal), s.telemetry.value(signal, lag))


def _change_over(signal: str, share: int) -> Callable[[RunState], Pair]:
    """The change over one `share`-th of the run."""

    def formula(s: RunState) -> Pair:
        lag = max(1, round(int(s.telemetry.horizon[0]) / share))
        return s.telemetry.value(signal), s.telemetry.value(signal, lag)

    return formula


def _since_start(signal: str) -> Callable[[RunState], Pair]:
    def formula(s: RunState) -> Pair:
        past = s.telemetry.past(signal)
        return s.telemetry.value(signal), np.where(np.isfinite(past[:, 0]), past[:, 0], past[:, 1])

    return formula


def _above_best(s: RunState) -> Pair:
    return s.telemetry.value("val_loss"), _finite_or(s.telemetry.past("val_loss"), np.inf).min(axis=1)


def _since_best(s: RunState) -> Array:
    past = _finite_or(s.telemetry.past("val_loss"), np.inf)
    since = (s.telemetry.interval - past.argmin(axis=1)) / s.telemetry.horizon
    return np.where(np.isfinite(past).any(axis=1), since, 0.0)  # 0 in a run that has no validation losses


def _rank(s: RunState) -> Array:
    past, now = s.telemetry.past("val_loss"), s.telemetry.value("val_loss")
    measured = np.isfinite(past).sum(axis=1) - 1
    with np.errstate(invalid="ignore"):
        return np.asarray((past < now[:, None]).sum(axis=1) / np.maximum(measured, 1))


def _gap(s: RunState, lag: int = 0) -> Pair:
    return s.telemetry.value("val_loss", lag), s.telemetry.value("train_loss", lag)


def _gap_change(s: RunState) -> Array:
    return relative_difference(*_gap(s)) - relative_difference(*_gap(s, 2))


def _roughness(s: RunState) -> Array:
    last = np.array([s.telemetry.value("val_loss", lag) for lag in range(5)])
    return np.asarray(relative_difference(last[:-1], last[1:]).std(axis=0))


def _log10(signal: str, divisor: float, shift: float) -> Callable[[RunState], Array]:
    def formula(s: RunState) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((np.log10(s.telemetry.value(signal)) + shift) / divisor)

    return formula


def _noise(s: RunState) -> Array:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(s.telemetry.value("grad_norm_std") / s.telemetry.value("grad_norm"))


def _finite_or(x: Array, other: float) -> Array:
    return np.where(np.isfinite(x), x, other)


def _missing(signal: str) -> Callable[[RunState], Array]:
    return lambda s: np.isnan(s.telemetry.value(signal)).astype(np.float64)


def _non_finite(s: RunState) -> Array:
    broken = np.isinf(s.telemetry.value("val_loss")) | np.isinf(s.telemetry.value("train_loss"))
    return broken.astype(np.float64)


def _features_of(name: str) -> list[Feature]:
    return [
        Feature(f"{name}", 0, 1, f"{name} in use, normalized on its scale; 0 if the run lacks it as a control",
                control=name),
        Feature(f"{name}_offset", -2, 2, f"distance of {name} from the base rule's value, in limits of an offset",
                control=name),
        Feature(f"{name}_action", -1, 1, f"last action on {name}", control=name),
        Feature(f"{name}_available", 0, 1, f"whether the run has {name} as a control", control=name),
    ]  # fmt: skip


_LIMITS = np.array([RANGES[name].limit for name in CONTROLS])


def _of_controls(s: RunState) -> Array:
    """What `_features_of` lists, of all controls in their order, `[runs, 4 * controls]`."""
    normalized = np.where(s.available, SCALES.normalize(s.values), 0.0)
    distances = np.where(s.available, s.distances / _LIMITS, 0.0)
    return np.stack([normalized, distances, s.actions, s.available], axis=2).reshape(len(s.values), -1)


FEATURES: tuple[Feature, ...] = (
    Feature("progress", 0, 1, "share of the run that is done",
            lambda s: s.telemetry.interval / s.telemetry.horizon),
    Feature("horizon", 0, 1.5, "log2(intervals in the run) / 8", lambda s: np.log2(s.telemetry.horizon) / 8),
    Feature("parameters", 0, 1.5, "log10(trainable parameters) / 8",
            lambda s: np.log10(np.maximum(s.parameters, 1)) / 8),
    Feature("examples", 0, 1.5, "log10(training examples of the whole run) / 8; 0 while not known",
            lambda s: np.log10(s.examples) / 8),
    Feature("examples_known", 0, 1, "whether they are", lambda s: np.isfinite(s.examples).astype(np.float64)),
    Feature("momentum_sgd", 0, 1, "1 if the optimizer is SGD, 0 if it is adaptive",
            lambda s: s.momentum_sgd.astype(np.float64)),
    Feature("first_decision", 0, 1, "1 before training, 0 afterwards",
            lambda s: (s.telemetry.interval == 0).astype(np.float64)),
    *(Feature(f"val_change_{lag}", -2, 2, f"r(validation loss, that of {lag} intervals ago)", _change("val_loss", lag))
      for lag in (1, 2, 4, 8)),
    *(Feature(f"train_change_{lag}", -2, 2, f"r(training loss, that of {lag} intervals ago)",
              _change("train_loss", lag)) for lag in (1, 2, 4)),
    *(Feature(f"{short}_change_{name}", -2, 2, f"r({long} loss, that of 1/{share} of the run ago)",
              _change_over(f"{short}_loss", share))
      for short, long in (("val", "validation"), ("train", "training"))
      for name, share in (("eighth", 8), ("third", 3))),
    Feature("val_since_start", -2, 2, "r(validation loss, its first value)", _since_start("val_loss")),
    Feature("train_since_start", -2, 2, "r(training loss, its first value)", _since_start("train_loss")),
    Feature("val_above_best", 0, 2, "r(validation loss, the run's best)", _above_best),
    Feature("since_best", 0, 1, "intervals since the best validation loss / intervals in the run", _since_best),
    Feature("val_rank", 0, 1, "share of the run's earlier validation losses that were lower", _rank),
    Feature("val_roughness", 0, 2, "standard deviation of the last 4 changes of the validation loss", _roughness),
    Feature("generalization_gap", -2, 2, "r(validation loss, training loss)", _gap),
    Feature("generalization_gap_change", -2, 2, "its change over 2 intervals", _gap_change),
    Feature("grad_norm_change", -2, 2, "r(gradient norm, that of 1 interval ago)", _change("grad_norm", 1)),
    Feature("grad_norm_since_start", -2, 2, "r(gradient norm, its first value)", _since_start("grad_norm")),
    Feature("grad_noise", 0, 2, "standard deviation of the gradient norm / its mean, within the interval", _noise),
    Feature("grad_cosine", -1, 1, "mean cosine between gradient and momentum",
            lambda s: s.telemetry.value("grad_cosine")),
    Feature("update_ratio", -2, 2, "log10(distance moved in the interval / parameter norm) + 1",
            _log10("update_ratio", 1.0, 1.0)),
    Feature("update_ratio_change", -2, 2, "r(that ratio, that of 1 interval ago)", _change("update_ratio", 1)),
    Feature("val_missing", 0, 1, "1 if the last validation loss is missing", _missing("val_loss")),
    Feature("gradients_missing", 0, 1, "1 if gradient statistics are missing", _missing("grad_norm")),
    Feature("non_finite", 0, 1, "1 if the last loss was not finite", _non_finite),
    *(feature for name in CONTROLS for feature in _features_of(name)),
)  # fmt: skip

_FORMULAS = [feature.formula for feature in FEATURES if feature.formula is not None]

LOW = np.array([feature.low for feature in FEATURES], np.float32)
HIGH = np.array([feature.high for feature in FEATURES], np.float32)


def features_of(controls: Collection[str]) -> tuple[str, ...]:
    """Names of the features of runs that have no other controls than these, in the order of `FEATURES`."""
    return tuple(feature.name for feature in FEATURES if feature.control is None or feature.control in controls)


def observe(state: RunState) -> NDArray[np.float32]:
    """The observation of every run, `[runs, len(FEATURES)]`."""
    values = [formula(state) for formula in _FORMULAS]
    # All at once: with few runs, time goes into the number of calls.
    pairs = np.array([value for value in values if isinstance(value, tuple)])
    differences = iter(relative_difference(pairs[:, 0], pairs[:, 1]))
    measured = np.array([next(differences) if isinstance(value, tuple) else value for value in values]).T
    raw = np.concatenate([measured, _of_controls(state)], axis=1)
    return np.clip(_finite_or(raw, 0.0), LOW, HIGH).astype(np.float32, order="C")


def feature_table() -> str:
    """The features as lines of a text table: name, range, meaning."""
    width = max(len(feature.name) for feature in FEATURES)
    return "\n".join(f"{f.name:<{width}}  {f.low:>4g} .. {f.high:<4g} {f.meaning}" for f in FEATURES)
