"""What a tuner's state in a user's checkpoint must look like."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

from .untrusted import Check, anything, items, number, table

VERSION = 6


def check(state: Any, own: Mapping[str, Any]) -> None:
    """Compare a state with that of the tuner that is to load it. The tuner's parts check theirs.

    Raises:
        ValueError: it is of another version, of a tuner made with other arguments, or damaged.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if type(version) is not int or version != VERSION:
        newer = type(version) is int and version > VERSION
        upgrade = ": upgrade hyperpilot" if newer else ""
        raise ValueError(f"it has version {short(version)}; this hyperpilot reads {VERSION}{upgrade}")
    for name, value in own["settings"].items():
        if state["settings"][name] != value:
            raise ValueError(f"it is of a run with {name}={short(state['settings'][name])}, not {value!r}")
    moved = dict.fromkeys(filter(None, own["settings"]["controls"].split(", ")), number(0, 1e9))
    losses = dict.fromkeys(("train_loss", "val_loss"), anything(0))
    epoch = table({"values": table(moved), "losses": table(losses, optional=losses), "guard": anything(0)})
    table(
        {
            **dict.fromkeys([*own, "guard"], _by_its_part),
            "verdict": anything(0),
            "hyperparameters": table(dict.fromkeys(own["hyperparameters"], number(0, 1e9))),
            "shares": table({name: shares_of(name, len(shares)) for name, shares in own["shares"].items()}),
            "history": items(table(dict.fromkeys(own["history"][0], anything(2))), 1, sys.maxsize),
            "epochs": items(epoch, 0, sys.maxsize),
        }
    )("it", dict(state))


def shares_of(name: str, count: int) -> Check:
    """Parameter groups may have been added since, modules not."""
    return items(number(0, 1), 0 if name in ("lr", "weight_decay") else count, count)


def _by_its_part(where: str, value: Any) -> None:
    """What is checked where it is used."""
