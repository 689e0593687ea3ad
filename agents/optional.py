"""Packages that only some users have: imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackage(ImportError):
    """A package of an extra is not installed; the message holds the command that installs it."""


def require(name: str, *, extra: str) -> ModuleType:
    """The module `name`, imported now.

    Args:
        extra: the extra of hyperpilot that installs it.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise  # installed, but something that it needs is not
        command = f"pip install 'hyperpilot[{extra}]'"
        raise MissingPackage(f"{error.name} is not installed; {command}", name=name) from None
