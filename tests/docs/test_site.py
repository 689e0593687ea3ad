"""The documentation site: built strictly, without a network, and complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, "WARNING" in result.stderr) == (0, False), result.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("")
        at = name.parent if name.name == "index" else name
        assert (site / at / "index.html").is_file()


def test_links_out_of_the_folder_lead_to_what_they_name(site: Path) -> None:
    observation = (site / "concepts/observation/index.html").read_text()
    assert 'href="../../source/hpo_env/observations.py/"' in observation
    assert "relative_difference" in (site / "source/hpo_env/differences.py/index.html").read_text()
    base = (site / "concepts/base/index.html").read_text()
    assert 'href="../../source/hpo_env/base_rule.json"' in base
    source = (ROOT / "hpo_env/base_rule.json").read_bytes()
    assert (site / "source/hpo_env/base_rule.json").read_bytes() == source


def test_docstrings_are_rendered(site: Path) -> None:
    page = (site / "reference/agents/index.html").read_text()
    assert 'id="agents.tuner.Tuner.step"' in page
    assert "Parameters:" in page
    assert not re.search(r"<p>(Args|Attributes|Raises|Returns):", page)
    environment = (site / "reference/hpo_env/index.html").read_text()
    assert 'id="starting-state"' in environment
    assert "val_roughness" in environment


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        tags = re.findall(r"<(?:script|link|img|iframe|source|video)\b[^>]*>", page.read_text())
        assert tags
        assert [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet
