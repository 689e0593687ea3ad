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
from hpo_env.differences import SHARES, Differences, Pair, When
from hpo_env.hyperparameters import CONTROLS, SCALES, Array
from hpo_env.telemetry import Telemetry


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
        formula: computes it, `[runs]`; non-finite results become 0. None for those made of `pairs`, and for those of
            controls, which are computed together.
        pairs, of_pairs: or the relative differences that it is made of, and how, from `[pairs, runs]`; a single
            one needs no how.
        control: the control that it tells of, if it does of one.
    """

    name: str
    low: float
    high: float
    meaning: str
    formula: Callable[[RunState], Array] | None = None
    pairs: tuple[Pair, ...] = ()
    of_pairs: Callable[[Array], Array] | None = None
    control: str | None = None


def _change(signal: str, since: When) -> tuple[Pair, ...]:
    return (((signal, 0), (signal, since)),)


def _gap(lag: int) -> Pair:
    return ("val_loss", lag), ("train_loss", lag)


def _since_best(s: RunState) -> Array:
    past = _finite_or(s.telemetry.past("val_loss"), np.inf)
    since = (s.telemetry.interval - past.argmin(axis=1)) / s.telemetry.horizon
    return np.where(np.isfinite(past).any(axis=1), since, 0.0)  # 0 in a run that has no validation losses


def _rank(s: RunState) -> Array:
    past, now = s.telemetry.past("val_loss"), s.telemetry.value("val_loss")
    measured = np.isfinite(past).sum(axis=1) - 1
    return np.asarray((past < now[:, None]).sum(axis=1) / np.maximum(measured, 1))


def _spread(x: Array) -> Array:
    """Standard deviation of the rows of `x`: numpy's own, to the last bit, in a third of its time."""
    away = x - np.add.reduce(x) / len(x)
    return np.asarray(np.sqrt(np.add.reduce(away * away) / len(x)))


def _log10(signal: str, divisor: float, shift: float) -> Callable[[RunState], Array]:
    return lambda s: np.asarray((np.log10(s.telemetry.value(signal)) + shift) / divisor)


def _noise(s: RunState) -> Array:
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
    """What `_features_of` lists, of all controls in their order, `[4 * controls, runs]`."""
    result = np.zeros((len(CONTROLS), 4, len(s.values)))
    np.copyto(result[:, 0], SCALES.normalize(s.values).T, where=s.available.T)
    np.copyto(result[:, 1], (s.distances / _LIMITS).T, where=s.available.T)
    result[:, 2], result[:, 3] = s.actions.T, s.available.T
    return result.reshape(-1, len(s.values))


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
    *(Feature(f"val_change_{lag}", -2, 2, f"r(validation loss, that of {lag} intervals ago)",
              pairs=_change("val_loss", lag)) for lag in (1, 2, 4, 8)),
    *(Feature(f"train_change_{lag}", -2, 2, f"r(training loss, that of {lag} intervals ago)",
              pairs=_change("train_loss", lag)) for lag in (1, 2, 4)),
    *(Feature(f"{short}_change_{name}", -2, 2, f"r({long} loss, that of 1/{share} of the run ago)",
              pairs=_change(f"{short}_loss", name))
      for short, long in (("val", "validation"), ("train", "training")) for name, share in SHARES.items()),
    Feature("val_since_start", -2, 2, "r(validation loss, its first value)", pairs=_change("val_loss", "first")),
    Feature("train_since_start", -2, 2, "r(training loss, its first value)", pairs=_change("train_loss", "first")),
    Feature("val_above_best", 0, 2, "r(validation loss, the run's best)", pairs=_change("val_loss", "best")),
    Feature("since_best", 0, 1, "intervals since the best validation loss / intervals in the run", _since_best),
    Feature("val_rank", 0, 1, "share of the run's earlier validation losses that were lower", _rank),
    Feature("val_roughness", 0, 2, "standard deviation of the last 4 changes of the validation loss",
            pairs=tuple((("val_loss", lag), ("val_loss", lag + 1)) for lag in range(4)), of_pairs=_spread),
    Feature("generalization_gap", -2, 2, "r(validation loss, training loss)", pairs=(_gap(0),)),
    Feature("generalization_gap_change", -2, 2, "its change over 2 intervals",
            pairs=(_gap(0), _gap(2)), of_pairs=lambda r: r[0] - r[1]),
    Feature("grad_norm_change", -2, 2, "r(gradient norm, that of 1 interval ago)", pairs=_change("grad_norm", 1)),
    Feature("grad_norm_since_start", -2, 2, "r(gradient norm, its first value)", pairs=_change("grad_norm", "first")),
    Feature("grad_noise", 0, 2, "standard deviation of the gradient norm / its mean, within the interval", _noise),
    Feature("grad_cosine", -1, 1, "mean cosine between gradient and momentum",
            lambda s: s.telemetry.value("grad_cosine")),
    Feature("update_ratio", -2, 2, "log10(distance moved in the interval / parameter norm) + 1",
            _log10("update_ratio", 1.0, 1.0)),
    Feature("update_ratio_change", -2, 2, "r(that ratio, that of 1 interval ago)", pairs=_change("update_ratio", 1)),
    Feature("val_missing", 0, 1, "1 if the last validation loss is missing", _missing("val_loss")),
    Feature("gradients_missing", 0, 1, "1 if gradient statistics are missing", _missing("grad_norm")),
    Feature("non_finite", 0, 1, "1 if the last loss was not finite", _non_finite),
    *(feature for name in CONTROLS for feature in _features_of(name)),
)  # fmt: skip

_MEASURED = [feature for feature in FEATURES if feature.control is None]
_differences = Differences(pair for feature in _MEASURED for pair in feature.pairs)
_FORMULAS = [(place, feature.formula) for place, feature in enumerate(_MEASURED) if feature.formula]
_OF_PAIRS = [
    (place, feature.of_pairs, _differences.places(feature.pairs))
    for place, feature in enumerate(_MEASURED)
    if feature.of_pairs
]
_OF_ONE = [place for place, feature in enumerate(_MEASURED) if feature.pairs and not feature.of_pairs]
_ONES = np.concatenate([_differences.places(_MEASURED[place].pairs) for place in _OF_ONE])

LOW = np.array([feature.low for feature in FEATURES], np.float32)
HIGH = np.array([feature.high for feature in FEATURES], np.float32)


_NAMES = [feature.name for feature in FEATURES]
_EXAMPLES, _EXAMPLES_KNOWN = _NAMES.index("examples"), _NAMES.index("examples_known")


def counted(observations: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which entries of observations `[..., len(FEATURES)]` count when it is asked what is usual: all but a number of
    examples that is not known, whose 0 is far from every known one."""
    result = np.ones(observations.shape, bool)
    result[..., _EXAMPLES] = observations[..., _EXAMPLES_KNOWN] != 0
    return result


def features_of(controls: Collection[str]) -> tuple[str, ...]:
    """Names of the features of runs that have no other controls than these, in the order of `FEATURES`."""
    return tuple(feature.name for feature in FEATURES if feature.control is None or feature.control in controls)


def observe(state: RunState) -> NDArray[np.float32]:
    """The observation of every run, `[runs, len(FEATURES)]`."""
    differences, raw = _differences(state.telemetry), np.empty((len(FEATURES), len(state.values)))
    raw[_OF_ONE] = differences[_ONES]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for place, formula in _FORMULAS:
            raw[place] = formula(state)
        for place, of_pairs, places in _OF_PAIRS:
            raw[place] = of_pairs(differences[places])
    raw[len(_MEASURED) :] = _of_controls(state)
    return np.clip(_finite_or(raw.T, 0.0), LOW, HIGH).astype(np.float32, order="C")


def feature_table() -> str:
    """The features as lines of a text table: name, range, meaning."""
    width = max(len(feature.name) for feature in FEATURES)
    return "\n".join(f"{f.name:<{width}}  {f.low:>4g} .. {f.high:<4g} {f.meaning}" for f in FEATURES)
