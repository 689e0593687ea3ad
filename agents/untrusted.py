"""What strangers' files may contain: bounded bytes, strict JSON, and checks of values that say what is wrong.

All of these raise ValueErrors of one short line, whatever they are given.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

Check = Callable[[str, Any], None]
"""Raises a ValueError if a value (the second argument), which is called as the first one says, is not as it must be."""

_LONGEST_NUMBER = 40
"""Characters. No number that this package writes has more than 25."""


def shown(path: Path | str) -> str:
    """`path` as a message has it: on one line, not longer than 300 characters."""
    text = str(path) if str(path).isprintable() else ascii(str(path))
    return text if len(text) <= 300 else f"{text[:148]}...{text[-148:]}"


def read_regular(path: Path | str, most: int) -> bytes:
    """The bytes of a regular file, if it has no more than `most`. Links are followed, and pipes never waited for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too large, not a regular file, not to be read, or a name that no file can have.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            regular = stat.S_ISREG(status.st_mode)
            data = file.read(status.st_size) if regular and status.st_size <= most else b""
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not regular:
        raise ValueError("is not a regular file")
    if status.st_size > most:
        raise ValueError(f"has {status.st_size} bytes, more than {most}")
    return data


def read_json(text: str) -> dict[str, Any]:
    """A JSON object, all of whose numbers are finite and all of whose names come once.

    Raises:
        ValueError: none.
        RecursionError: nested too deeply.
    """
    value = json.loads(
        text, object_pairs_hook=_once, parse_int=_parse(int), parse_float=_parse(float), parse_constant=_parse(float)
    )
    if not isinstance(value, dict):
        raise ValueError(f"{short(value)} instead of an object")
    return value


def _parse(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text) if len(text) <= _LONGEST_NUMBER else math.inf
        if not math.isfinite(value):
            raise ValueError(f"the number {short(text)} is too large, too long or none")
        return value

    return parse


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, times), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {short(name)} comes {times} times")
    return value


def number(low: float, high: float) -> Check:
    """A number (not a bool) in `low..high`."""

    def check(where: str, value: Any) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            raise ValueError(f"{where} must be a number in {low:g}..{high:g}, not {short(value)}")

    return check


def integer(low: int, high: int) -> Check:
    """An integer (not a bool) in `low..high`."""

    def check(where: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{where} must be an integer in {low}..{high}, not {short(value)}")

    return check


def text(where: str, value: Any) -> None:
    """Up to 4096 printable characters: none that would move a terminal's cursor, or that no encoding knows."""
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise ValueError(f"{where} must be printable text of at most 4096 characters, not {short(value)}")


def one_of(*known: str) -> Check:
    """One of these names."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{where} must be one of {', '.join(known)}, not {short(value)}")

    return check


def items(check_item: Check, least: int, most: int) -> Check:
    """A list of `least..most` entries that pass."""
    length = f"{least}" if least == most else f"{least}..{most}"

    def check(where: str, value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(f"{where} must be a list of {length} entries, not {short(value)}")
        for index, item in enumerate(value):
            check_item(f"{where}[{index}]", item)

    return check


def table(entries: Mapping[str, Check], optional: Collection[str] = (), others: Check | None = None) -> Check:
    """An object of these entries, the optional ones perhaps, and none else unless `others` is given."""

    def check(where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {short(value)}")
        for name in sorted(entries.keys() - value.keys() - set(optional)):
            raise ValueError(f"{where} must have an entry {name!r}")
        for name, entry in value.items():
            text(f"a name in {where}", name)
            check_entry = entries.get(name, others)
            if check_entry is None:
                raise ValueError(f"{where} must not have an entry {short(name)}")
            check_entry(f"{where}.{name}" if name in entries else f"{where}[{short(name)}]", entry)

    return check


def anything(depth: int) -> Check:
    """Whatever JSON holds, lists and objects nested at most `depth` times."""

    def check(where: str, value: Any) -> None:
        if isinstance(value, dict | list) and not depth:
            raise ValueError(f"{where} must not be a list or an object: it is nested too deeply")
        if isinstance(value, str):
            text(where, value)
        elif isinstance(value, list):
            items(anything(depth - 1), 0, len(value))(where, value)
        elif isinstance(value, dict):
            table({}, others=anything(depth - 1))(where, value)

    return check
