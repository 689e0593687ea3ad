"""The tuner beside the constant default, in each trainer; and the page that says so."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro

from scripts import measure_trainers
from scripts.measure_trainers import EXAMPLES, FIGURES, Config, _command, measure
from tests.scripts.doors import Door, one_line

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.examples.plain_pytorch.EPOCHS", 4)


@pytest.mark.parametrize("name", ["plain", "lightning"])
def test_the_tuner_ends_lower_than_the_constant_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real data, five seeds, a fifth of the example's epochs."""
    example = EXAMPLES[name]
    pytest.importorskip(example.package)
    monkeypatch.setattr(f"scripts.examples.{example.module}.EPOCHS", 4)
    row = measure(example, range(5))
    assert np.mean(row["losses"]["tuned"]) < np.mean(row["losses"]["constant"])
    assert row["wins"] >= 4
    assert row["log_ratio"]["ci"][0] > 0


def test_writes_the_figures_into_the_page(door: Door, tmp_path: Path, short: None) -> None:
    page, file = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text("before\n<!-- figures -->\nold\n<!-- end of figures -->\nafter\n")
    for _ in range(2):  # the second time it replaces its own
        door(measure_trainers, "--trainers", "plain", "--seeds", 2, "--json", file, "--markdown", page)
    (row,) = json.loads(file.read_text())["rows"]
    text = page.read_text()
    assert text.startswith("before\n<!-- figures -->\n\n| trainer |")
    assert text.endswith("`\n\n<!-- end of figures -->\nafter\n")
    assert text.count("| plain PyTorch | 2 |") == 1
    assert f"| {np.mean(row['losses']['tuned']):.4f} |" in text
    command = "python scripts/measure_trainers.py --seeds 2 --trainers plain --json figures.json --markdown page.md"
    assert f"`{command}`" in text


def test_bad_input_is_one_line(door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text("no place")
    arguments = ["--json", file]
    one_line(door(measure_trainers, *arguments, "--trainers", "lightening", status=2), "lightening", "lightning")
    one_line(door(measure_trainers, *arguments, "--seeds", 1, status=2), "seeds must be at least 2")
    one_line(door(measure_trainers, *arguments, "--markdown", page, status=2), "no place for the figures")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    error = door(measure_trainers, *arguments, "--trainers", "lightning", status=2)
    one_line(error, "pip install 'hyperpilot[lightning]'")
    assert not file.exists()


def test_the_page_is_whole() -> None:
    """It has the figures of every trainer, and its code is of things that there are."""
    text = PAGE.read_text()
    table = FIGURES.search(text)
    assert table
    assert all(f"| {example.title} |" in table[0] for example in EXAMPLES.values())
    command = json.loads((PAGE.parents[1] / "results" / "trainers.json").read_text())["provenance"]["command"]
    assert f"`{command}`" in table[0]
    assert _command(tyro.cli(Config, args=shlex.split(command)[2:])) == command
    imports = re.findall(r"^from (agents[\w.]*) import (\w+)$", text, re.M)
    assert len(imports) == 3
    for module, name in imports:
        spec = importlib.util.find_spec(module)
        assert spec
        assert spec.origin
        assert re.search(rf"\b{name}\b", Path(spec.origin).read_text())
