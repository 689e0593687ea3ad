"""The notebook runs, and is stored with outputs such as it then has. Takes some seconds."""

from __future__ import annotations

import re

from nbformat import NotebookNode

from tests.docs.notebook import NOTEBOOK, run, stored


def outputs(notebook: NotebookNode) -> list[list[str]]:
    """What kinds of outputs each cell of code has."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sorted(kind for entry in cell.outputs for kind in (entry.get("data") or [entry.name])) for cell in cells]


def test_it_runs_and_gives_what_is_stored() -> None:
    fresh, kept = run(), stored()
    assert outputs(fresh) == outputs(kept)
    assert ["image/png", "text/plain"] in outputs(kept)
    printed = "".join(entry.get("text", "") for cell in fresh.cells for entry in cell.get("outputs", ()))
    plain, tuned = map(float, re.findall(r"\d\.\d+", printed)[:2])
    assert tuned < plain
    assert printed.count("before epoch") == 8


def test_what_is_stored_is_small_and_of_no_machine() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 200_000
    assert not re.search(r"/(tmp|work|home|root|Users)/|site-packages|Traceback|Warning", text)
    counts = [cell.execution_count for cell in stored().cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
