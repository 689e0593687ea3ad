"""Error texts for names that a user may have mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, given: str, known: Iterable[str], *, shown: Iterable[str] | None = None) -> str:
    """One line that names `given`, the nearest known name if one is near, and all known names.

    >>> unknown("model", "mpl", ["cnn", "mlp"])
    "unknown model 'mpl'; did you mean 'mlp'? known: cnn, mlp"

    Args:
        what: kind of thing that is named.
        given: the unknown name.
        known: names to choose the nearest from.
        shown: how to list the known names, where `known` is too long to show; `known` itself when None.
    """
    known = list(known)
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.55)
    hint = f" did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {what} {given!r};{hint} known: {', '.join(known if shown is None else shown)}"
