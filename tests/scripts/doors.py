"""Calling the command-line doors."""

from __future__ import annotations

from collections.abc import Callable

Door = Callable[..., str]
"""Calls a script's main with arguments; returns what it printed on standard error."""


def one_line(text: str, *parts: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    assert text.startswith("error: ")
    for part in parts:
        assert part in text
