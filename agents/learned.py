"""Methods of one trial that were learned on meta-train, as files: what `scripts/evaluate.py --learned` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .hypergradient_schedule import LearnedSchedule
from .state_file import load_state
from .surrogate import Surrogate
from .warm_start import WarmStart

KINDS: dict[str, Any] = {"warm-start": WarmStart, "surrogate": Surrogate, "learned-schedule": LearnedSchedule}
"""The entry `kind` of a file's state -> what it holds."""


def read(path: Path) -> tuple[str, Any]:
    """The name of a method, and the method.

    Raises:
        ValueError: no such file, a damaged one, or one of another kind.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give one that a script wrote with --save")
    state = load_state(path)
    kind = state.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{path} holds {kind!r}, not one of {', '.join(KINDS)}")
    return str(kind), KINDS[kind].from_state_dict(state)
