"""`Trajectory`: what a tuner did in a run, as a JSON file, read as if from a stranger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import repr as short
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hpo_env.hyperparameters import CONTROLS

from .files import write_atomically
from .untrusted import Check, anything, integer, items, number, one_of, read_json, read_regular, shown, table, text

TRAJECTORY_FILE = "trajectory.json"
"""Name of the file in a run's folder."""

FORMAT = "hyperpilot-trajectory"
FORMAT_VERSION = 1
MAX_EPOCHS = 100_000
MAX_BYTES = 64 << 20
_TINY = 1e-12


def _own_version() -> str:
    try:
        return version("hyperpilot")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


@dataclass(frozen=True)
class Trajectory:
    """What a tuner did in a run.

    Attributes:
        total_epochs: the length of the run that the tuner was told.
        optimizer: the class of the run's optimizer, such as `AdamW`.
        values: control -> the value that each finished epoch was trained with; the largest over parameter groups.
        losses: `train_loss`, `val_loss` -> each finished epoch's; None where it was not measured or not finite.
        guard: what the guard undid at the end of each finished epoch, None where nothing.
        decisions: the tuner's `history`: the epoch that a decision is for, the signals and observation that it saw, the
            action, the values set, the guard, whether the policy was out of its depth, and the reason in words. What
            is not finite is None.
        examples_per_epoch: training examples in an epoch, if known.
        policy: the policy's digest.
        hyperpilot: version of this package.
    """

    total_epochs: int
    optimizer: str
    values: dict[str, list[float]]
    losses: dict[str, list[float | None]] = field(default_factory=dict)
    guard: list[str | None] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    examples_per_epoch: int | None = None
    policy: str | None = None
    hyperpilot: str = field(default_factory=_own_version)

    @classmethod
    def of_epochs(
        cls, epochs: Sequence[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]], **entries: Any
    ) -> Self:
        """The trajectory of a run.

        Args:
            epochs: for each finished one, its `values` (control -> value), its `losses` (those measured) and what the
                `guard` undid at its end (None for nothing).
            decisions: the tuner's history.
            entries: the other attributes.
        """
        controls = epochs[0]["values"] if epochs else {}
        losses = [name for name in _LOSSES if any(name in epoch["losses"] for epoch in epochs)]
        return cls(
            values={name: [epoch["values"][name] for epoch in epochs] for name in controls},
            losses=_plain({name: [epoch["losses"].get(name) for epoch in epochs] for name in losses}),
            guard=[epoch["guard"] for epoch in epochs],
            decisions=_plain(decisions),
            **entries,
        )

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls that the tuner moved."""
        return tuple(self.values)

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return len(self.guard)

    def values_for(self, total_epochs: int) -> dict[str, list[float]]:
        """Control -> the value of each epoch of a run of this length: the recorded ones if the length is the same, else
        interpolated over the share of the run, on the control's scale. What an unfinished run lacks is its last value.
        """
        if total_epochs == self.total_epochs:
            return {name: (values + values[-1:] * total_epochs)[:total_epochs] for name, values in self.values.items()}
        at = (np.arange(self.epochs) + 0.5) / self.total_epochs
        to = (np.arange(total_epochs) + 0.5) / total_epochs
        return {name: _interpolated(name, values, at, to) for name, values in self.values.items()}

    def to_json(self) -> str:
        """One line of JSON.

        Raises:
            ValueError: it is longer than `from_json` permits.
        """
        payload = {"format": FORMAT, "format_version": FORMAT_VERSION, **_plain(asdict(self))}
        _check(payload)
        return json.dumps(payload, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: no such text, damaged, or of a later version; the message says which and what to do.
        """
        mend = "copy it again, or save it anew"
        try:
            payload = read_json(text)
            found = payload.get("format_version")
            if payload.get("format") != FORMAT:
                mend = "give what Trajectory.save wrote"
            elif type(found) is int and found > FORMAT_VERSION:
                mend = "upgrade hyperpilot"
            _check(payload)
        except RecursionError:
            raise ValueError(f"cannot be used as a trajectory: it is nested too deeply; {mend}") from None
        except ValueError as error:
            raise ValueError(f"cannot be used as a trajectory: {error}; {mend}") from None
        return cls(**{entry.name: payload[entry.name] for entry in fields(cls)})

    def save(self, path: Path | str) -> None:
        """Write it to a file. An earlier one at `path` stays whole until the new one is.

        Raises:
            ValueError: it is longer than `load` permits.
            OSError: not written.
        """
        write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as in `from_json`; or it cannot be read.
        """
        try:
            return cls.from_json(read_regular(path, MAX_BYTES).decode(errors="surrogateescape"))
        except ValueError as error:
            raise ValueError(f"{shown(path)} {error}") from None


def _interpolated(name: str, values: list[float], at: NDArray[np.float64], to: NDArray[np.float64]) -> list[float]:
    """`values` at the shares `at` of a run, at the shares `to`: never outside of what was recorded, which may lie below
    the control's own range."""
    control = CONTROLS[name]
    low, high = max(min(values), _TINY), max(values)
    if control.scale == "logit":
        high = min(high, 1 - _TINY)
    if not low < high:
        return values[:1] * len(to)
    multiple = control.multiple
    if multiple and any(value % multiple for value in values):  # a user's own sizes
        multiple = 1
    scale = replace(control, low=low, high=high, multiple=multiple)
    return [float(value) for value in scale.from_scale(np.interp(to, at, scale.to_scale(np.asarray(values))))]


def _plain(value: Any) -> Any:
    """As JSON has it: what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _or_null(check: Check) -> Check:
    def check_other(where: str, value: Any) -> None:
        if value is not None:
            check(where, value)

    return check_other


def _flag(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, not {short(value)}")


_LOSSES = ("train_loss", "val_loss")
_NUMBER = _or_null(number(-1e300, 1e300))
_TEXT = _or_null(text)
_VALUES = {name: number(0, 1 if control.scale == "logit" else 1e9) for name, control in CONTROLS.items()}
_VALUES["batch_size"] = number(1, 1e9)
_DECISION = {
    "epoch": integer(0, MAX_EPOCHS),
    "signals": table({}, others=_NUMBER),
    "observation": items(_NUMBER, 0, 1000),
    "action": items(_NUMBER, 0, 100),
    "hyperparameters": table(_VALUES, optional=_VALUES),
    "guard": _TEXT,
    "out_of_depth": _flag,
    "reason": text,
}


def _check(payload: dict[str, Any]) -> None:
    """Raise a ValueError that names what is not as `save` writes it."""
    one_of(FORMAT)("its format", payload.get("format"))
    integer(FORMAT_VERSION, FORMAT_VERSION)("its format_version", payload.get("format_version"))
    items(_TEXT, 0, MAX_EPOCHS)("its guard", payload.get("guard"))
    epochs = len(payload["guard"])
    table(
        {
            **dict.fromkeys(("format", "format_version", "guard"), anything(1)),
            "hyperpilot": text,
            "policy": _TEXT,
            "total_epochs": integer(1, MAX_EPOCHS),
            "optimizer": text,
            "examples_per_epoch": _or_null(integer(1, 2**63)),
            "values": table({name: items(check, epochs, epochs) for name, check in _VALUES.items()}, optional=_VALUES),
            "losses": table(dict.fromkeys(_LOSSES, items(_NUMBER, epochs, epochs)), optional=_LOSSES),
            "decisions": items(table(_DECISION, optional=("reason",), others=anything(3)), 0, MAX_EPOCHS),
        }
    )("it", payload)
