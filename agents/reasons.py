"""Why a policy decided as it did, in a line of plain words: `reason(policy, observation, action, before, stay, after)`.

What is named as a cause has been tested on the policy itself, by occlusion: a group of features is set to what is
typical (their mean in meta-training), and a control's cause is what would have taken a good part of its move away. What
the base schedule does by itself (warm-up, decay, and what follows from the length of the run) is told apart from the
policy's move. Features act together, so a move may have no cause that stands out; the line says so then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import CONTROLS, Array
from hpo_env.observations import FEATURES

from .policy import ControlPolicy

MOVED = 0.1
"""Actions below this, in -1..1, count as staying."""

CAUSE = 0.25
"""A group is a cause of a move if the move, without it, were smaller by at least this share of it."""

MOST_CAUSES = 2
"""Causes that are named for a control, at most."""

_CHANGED = 0.01  # smallest relative change of a value that is worth a word

_FAR = 1.99
"""A relative difference (-2..2) beyond this is of no factor: some 400 or more, or between values of two signs."""

Seen = Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Features that tell of one thing.

    Attributes:
        words: its present state, from the features' values and the epochs between two decisions.
        given: whether it is known before training.
    """

    name: str
    features: tuple[str, ...]
    words: Callable[[Seen, int], str]
    given: bool = False


def reason(
    policy: ControlPolicy,
    observation: NDArray[np.float32],
    action: Array,
    before: Mapping[str, float],
    stay: Mapping[str, float],
    after: Mapping[str, float],
    *,
    first: bool = False,
    out_of_depth: bool = False,
    guard: str | None = None,
    epochs: int = 1,
) -> str:
    """One decision in words. Controls that are not in `after` are never named.

    Args:
        observation: `[1, features]`.
        action: `[1, controls]`, what the policy answered.
        before: values in use up to here, of the controls that it may move.
        stay: values that the schedule would have given now, had the policy stayed where it was.
        after: values set.
        first: whether it is the decision before training.
        out_of_depth: whether the base schedule took over.
        guard: what the guard found wrong since the last decision.
        epochs: epochs between two decisions.
    """
    lowered = " at a quarter of the lr" if "lr" in after else ""
    parts = [f"guard: {guard}, so back to the best snapshot{lowered}"] if guard else []
    if out_of_depth:
        stay = after
    moved = {
        name: float(act)
        for name, act in zip(CONTROLS, action[0], strict=True)
        if name in after and abs(act) >= MOVED and not _alike(stay[name], after[name])
    }
    by = "guard and schedule" if guard else "schedule"
    tell = _value if first else _change
    told = {name: tell(name, before[name], stay[name], after[name], by) for name in after}
    for causes, names in _causes(policy, observation, moved, first, epochs).items():
        parts.append(f"{', '.join(told[name] for name in names)}: {' and '.join(causes) or 'no one cause stands out'}")
    rest = [told[name] for name in after if name not in moved and (first or not _alike(before[name], after[name]))]
    if rest or not moved:
        manner = "unlike any run of its training, so back to the schedule" if out_of_depth else "about as scheduled"
        parts.append(f"{manner}: {', '.join(rest) or 'no change'}")
    return ("start: " if first else "") + "; ".join(parts)


def occluded(policy: ControlPolicy, observation: NDArray[np.float32]) -> Array:
    """Actions without each of `GROUPS`, its features at their mean in meta-training, `[groups, controls]`.

    Args:
        observation: `[1, features]`.
    """
    return policy.act(np.where(_MEMBERS, policy.typical, observation))[0]


def _causes(
    policy: ControlPolicy, observation: NDArray[np.float32], moved: Mapping[str, float], first: bool, epochs: int
) -> dict[tuple[str, ...], list[str]]:
    """The causes of moves, in words, and the controls that they have moved."""
    found: dict[tuple[str, ...], list[str]] = {}
    if not moved:
        return found
    without = occluded(policy, observation)
    seen = dict(zip(_INDEX, observation[0].tolist(), strict=True))
    for column, name in enumerate(CONTROLS):
        if name in moved:
            shares = 1 - without[:, column] / moved[name]
            order = [index for index in np.argsort(-shares, kind="stable").tolist() if shares[index] >= CAUSE]
            groups = [GROUPS[index] for index in order if GROUPS[index].given or not first]
            causes = tuple(dict.fromkeys(group.words(seen, epochs) for group in groups[:MOST_CAUSES]))
            found.setdefault(causes, []).append(name)
    return found


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_CHANGED)


def _value(name: str, before: float, stay: float, after: float, by: str) -> str:
    """A value at the start, and the schedule's where it is another."""
    aside = "" if _alike(stay, after) else f" ({by}: {_number(name, stay)})"
    return f"{name} {_number(name, after)}{aside}"


def _change(name: str, before: float, stay: float, after: float, by: str) -> str:
    """A change of a value, and the schedule's part in it where it has one beside the policy."""
    change, own = _step(name, before, after), _step(name, before, stay)
    return f"{name} {change}" + (f" ({by}: {own})" if own != change and not _alike(before, stay) else "")


def _step(name: str, before: float, after: float) -> str:
    if name in ("lr", "weight_decay") and before > 0:
        factor = after / before
        return f"x{factor:.2f}" if 0.1 <= factor < 10 else f"x{factor:.2g}"
    return f"{_number(name, before)} -> {_number(name, after)}"


def _number(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "batch_size" else f"{value:.3g}"


def _times(difference: float) -> float:
    """a / b, of a relative difference r(a, b) (see `hpo_env.differences`) below `_FAR`."""
    return math.exp(2 * math.atanh(difference / 2))


def _change_of(difference: float) -> str:
    if abs(difference) > _FAR:
        return f"far {'up' if difference > 0 else 'down'}"
    times = _times(difference)
    if abs(times - 1) < _CHANGED:
        return "flat"
    if times >= 2:
        return f"up to {times:.2g} times"
    return f"{'up' if times > 1 else 'down'} {100 * abs(times - 1):.0f} %"


def _compared(difference: float, other: str) -> str:
    if abs(difference) > _FAR:
        return f"far {'above' if difference > 0 else 'below'} {other}"
    times = _times(difference)
    if abs(times - 1) < _CHANGED:
        return f"level with {other}"
    if times >= 2:
        return f"{times:.2g} times {other}"
    return f"{100 * abs(times - 1):.0f} % {'above' if times > 1 else 'below'} {other}"


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count > 1)}"


def _trend(loss: str, short: str) -> Callable[[Seen, int], str]:
    """The change over as many decisions as there are; a feature that is exactly 0 has not been measured."""

    def words(seen: Seen, epochs: int) -> str:
        for lag in (4, 2, 1):
            if difference := seen[f"{short}_change_{lag}"]:
                return f"{loss} loss {_change_of(difference)} over {_epochs(lag * epochs)}"
        return f"no earlier {loss} loss to compare with"

    return words


def _since_start(what: str, feature: str) -> Callable[[Seen, int], str]:
    def words(seen: Seen, epochs: int) -> str:
        if not seen[feature]:
            return f"no first {what} to compare with"
        return f"{what} {_change_of(seen[feature])} since the start"

    return words


def _best(seen: Seen, epochs: int) -> str:
    if seen["val_missing"]:
        return "validation loss not measured"
    if not seen["val_above_best"]:
        return "validation loss at its best"
    since = round(seen["since_best"] * 2 ** (8 * seen["horizon"])) * epochs
    return f"validation loss {_compared(seen['val_above_best'], 'its best')} of {_epochs(since)} ago"


def _gap(seen: Seen, epochs: int) -> str:
    gap, change = seen["generalization_gap"], seen["generalization_gap_change"]
    if not gap:
        return "no losses to compare with one another"
    trend = f", {'rising' if change > 0 else 'falling'} against it" if abs(change) > 2 * _CHANGED else ""
    return f"validation loss {_compared(gap, 'the training loss')}{trend}"


def _noise(seen: Seen, epochs: int) -> str:
    if seen["gradients_missing"]:
        return "gradients not measured"
    return f"gradient noise {seen['grad_noise']:.2f} of its norm"


def _update(seen: Seen, epochs: int) -> str:
    if not seen["update_ratio"]:
        return "step lengths not measured"
    return f"weights moved by {100 * 10 ** (seen['update_ratio'] - 1):.2g} % of their norm"


def _length(seen: Seen, epochs: int) -> str:
    decisions = f"{2 ** (8 * seen['horizon']):.0f} decisions"
    if not seen["examples_known"]:
        return f"a run of {decisions} and unknown length"
    return f"a run of {decisions} and {_about(10 ** (8 * seen['examples']))} examples"


def _about(count: float) -> str:
    """A whole number, to two digits."""
    digit = 10 ** max(math.floor(math.log10(max(count, 1))) - 1, 0)
    return f"{round(count / digit) * digit:,}"


def _in_use(name: str) -> Callable[[Seen, int], str]:
    def words(seen: Seen, epochs: int) -> str:
        if not seen[f"{name}_available"]:
            return "a control that the run lacks"
        return f"{name} at {_number(name, float(CONTROLS[name].denormalize(np.asarray(seen[name]))))}"

    return words


GROUPS: tuple[Group, ...] = (
    Group("validation trend", ("val_change_1", "val_change_2", "val_change_4", "val_change_8", "val_change_eighth",
          "val_change_third"), _trend("validation", "val")),
    Group("validation since start", ("val_since_start",), _since_start("validation loss", "val_since_start")),
    Group("validation and its best", ("val_above_best", "since_best", "val_rank", "val_missing"), _best),
    Group("validation roughness", ("val_roughness",),
          lambda seen, epochs: f"validation loss varies by {100 * seen['val_roughness']:.2g} % a decision"),
    Group("training trend", ("train_change_1", "train_change_2", "train_change_4", "train_change_eighth",
          "train_change_third"), _trend("training", "train")),
    Group("training since start", ("train_since_start",), _since_start("training loss", "train_since_start")),
    Group("generalization gap", ("generalization_gap", "generalization_gap_change"), _gap),
    Group("gradient norm", ("grad_norm_change", "grad_norm_since_start"),
          _since_start("gradient norm", "grad_norm_since_start")),
    Group("gradient noise", ("grad_noise", "gradients_missing"), _noise),
    Group("gradient direction", ("grad_cosine",),
          lambda seen, epochs: f"gradient at a cosine of {seen['grad_cosine']:+.2f} with its momentum"),
    Group("step length", ("update_ratio", "update_ratio_change"), _update),
    Group("a loss not finite", ("non_finite",),
          lambda seen, epochs: "a loss not finite" if seen["non_finite"] else "all losses finite"),
    Group("progress", ("progress", "first_decision"),
          lambda seen, epochs: f"{100 * seen['progress']:.0f} % of the run done"),
    Group("length of the run", ("horizon", "examples", "examples_known"), _length, given=True),
    Group("size of the model", ("parameters",),
          lambda seen, epochs: f"a model of {_about(10 ** (8 * seen['parameters']))} parameters", given=True),
    Group("optimizer", ("momentum_sgd",),
          lambda seen, epochs: "SGD" if seen["momentum_sgd"] else "an adaptive optimizer", given=True),
    *(Group(f"{name} in use", (name, f"{name}_offset", f"{name}_action", f"{name}_available"), _in_use(name))
      for name in CONTROLS),
)  # fmt: skip
"""All features, each in one group."""

_INDEX = {feature.name: index for index, feature in enumerate(FEATURES)}

_MEMBERS = np.array([[feature.name in group.features for feature in FEATURES] for group in GROUPS])
