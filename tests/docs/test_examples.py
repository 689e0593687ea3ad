"""The examples on the pages of concepts print what they show; what the pages list is what there is."""

from __future__ import annotations

import doctest
import math
from pathlib import Path
from typing import Any

import pytest

from hpo_env.actions import RANGES
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from tests.docs.pages import DOCS, blocks

CONCEPTS = sorted((DOCS / "concepts").glob("*.md"))
WITHOUT = ("index",)


@pytest.mark.parametrize("page", CONCEPTS, ids=lambda page: page.stem)
def test_examples(page: Path) -> None:
    names: dict[str, Any] = {}
    examples = [block.text for block in blocks(page) if block.language == "pycon"]
    assert bool(examples) != (page.stem in WITHOUT)
    for text in examples:
        test = doctest.DocTestParser().get_doctest(text, names, page.name, str(page), 0)
        assert test.examples
        runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
        assert not runner.failures, "".join(report)


def test_the_features_are_those_of_the_code() -> None:
    lines = [f"| `{f.name}` | {f.low:g} .. {f.high:g} | {f.meaning} |" for f in FEATURES]
    page = (DOCS / "concepts" / "observation.md").read_text()
    assert page.split("|---|---|---|\n")[1].splitlines() == lines
    assert f"{len(FEATURES)} numbers" in page
    assert f"{len(FEATURES)} unitless numbers" in (DOCS / "concepts" / "index.md").read_text()


def test_the_controls_are_those_of_the_code() -> None:
    rows = [line for line in (DOCS / "concepts" / "control.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(CONTROLS)
    for row, (name, control) in zip(rows, CONTROLS.items(), strict=True):
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        low, high = (f"{value:g}".replace("e-0", "e-") for value in (control.low, control.high))
        assert cells[0] == f"`{name}`"
        assert cells[1].split(",")[0] == f"{low} .. {high}"
        assert cells[2] == control.scale
        for cell, size in zip(cells[3:6], (getattr(RANGES[name], k) for k in ("first", "step", "limit")), strict=True):
            sign, number = cell.split()
            reach = math.exp(size) if sign == "x" else size
            assert float(number) == pytest.approx(reach)
