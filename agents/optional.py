"""Packages that only some users have: imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, *, extra: str) -> ModuleType:
    """The module `name`, imported now.

    Args:
        extra: the extra of hyperpilot that installs it.

    Raises:
        ImportError: it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise  # installed, but something that it needs is not
        raise ImportError(f"{error.name} is not installed; pip install 'hyperpilot[{extra}]'", name=name) from None
