"""What was learned on meta-train, as files: what `scripts/evaluate.py --learned` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .hypergradient_schedule import LearnedSchedule
from .proposer import Proposer
from .state_file import load_state
from .surrogate import Surrogate
from .warm_start import WarmStart

KINDS: dict[str, Any] = {
    "warm-start": WarmStart,
    "surrogate": Surrogate,
    "learned-schedule": LearnedSchedule,
    "recurrent-search": Proposer,
}
"""The entry `kind` of a file's state -> what it holds: methods of one trial, and a search's proposer."""


def read(path: Path) -> tuple[str, Any]:
    """The kind of a file, and what it holds.

    Raises:
        ValueError: no such file, a damaged one, or one of another kind.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give one that a script wrote with --save or --out")
    state = load_state(path)
    kind = state.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{path} holds {kind!r}, not one of {', '.join(KINDS)}")
    try:
        return str(kind), KINDS[kind].from_state_dict(state)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no {kind} that this version can read: {error}") from error


def read_all(paths: tuple[Path, ...]) -> dict[str, Any]:
    """By kind.

    Raises:
        ValueError: two files of a kind, which one table cannot hold; and as from `read`.
    """
    found: dict[str, Any] = {}
    for path in paths:
        kind, own = read(path)
        if kind in found:
            raise ValueError(f"{path} is a second {kind}; judge them one after the other")
        found[kind] = own
    return found
