"""The notebook, run. `python -m tests.docs.notebook` stores it with its new outputs."""

from __future__ import annotations

import os

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.docs.pages import DOCS, ROOT

NOTEBOOK = DOCS / "notebooks" / "first_run.ipynb"


def stored() -> NotebookNode:
    """The notebook as it is in the repository."""
    notebook: NotebookNode = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    return notebook


def run() -> NotebookNode:
    """The notebook with the outputs of a run in a new process."""
    notebook = stored()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    client = NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=300,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": path})
    return notebook


if __name__ == "__main__":
    nbformat.write(run(), NOTEBOOK)  # type: ignore[no-untyped-call]
