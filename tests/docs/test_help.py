"""What the scripts say of themselves, what they leave unsaid with --quiet, and names that they do not know."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import tyro

from scripts import apply_policy, common
from tests.docs.pages import ROOT

SCRIPTS: dict[str, ModuleType] = {
    path.stem: importlib.import_module(f"scripts.{path.stem}")
    for path in sorted((ROOT / "scripts").glob("*.py"))
    if path.stem not in ("__init__", "common")
}
INTERACTIVE = ("show",)
"""Prints what it is for."""

OF_A_SPLIT = ("measure_scale", "learn_schedule", "measure_adaptation")
"""Scripts that take tasks of a split alone: they suggest one of these."""

REQUIRED = {
    "task": "digits/mlp",
    "policies": "nowhere/policy.safetensors",
    "out": "nowhere/out",
    "json": "nowhere/figures.json",
}


def call(module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """A script's exit status."""
    monkeypatch.setattr(sys, "argv", [f"scripts/{module.__name__.split('.')[1]}.py", *arguments])
    try:
        common.run_main(module.Config, module.main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def examples(module: ModuleType) -> list[list[str]]:
    """The arguments of the commands that a script's help gives as examples."""
    name = f"python scripts/{module.__name__.split('.')[1]}.py"
    lines = (module.Config.__doc__ or "").splitlines()
    return [shlex.split(line.removeprefix(f"        {name}")) for line in lines if line.startswith(f"        {name}")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_for_and_gives_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SCRIPTS[name]
    assert call(module, ["--help"], monkeypatch) == 0
    text = capsys.readouterr().out
    first, *_ = (module.Config.__doc__ or "").splitlines()
    assert first.endswith(".")
    assert first in text
    assert f"python scripts/{name}.py" in text
    for given in examples(module):
        tyro.cli(module.Config, args=given, registry=common.registry)  # exits if it is not understood


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_explained(name: str) -> None:
    tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text())
    asked = {"Config"} if name != "share_policy" else {"Push", "Pull", "Onnx"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in asked:
            kinds = [type(line) for line in node.body[1:]]  # after its docstring
            assert kinds == [ast.AnnAssign, ast.Expr] * (len(kinds) // 2), node.name
            asked.remove(node.name)
    assert not asked


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in INTERACTIVE])
def test_quiet_is_an_option_and_nothing_gets_around_it(name: str) -> None:
    assert issubclass(SCRIPTS[name].Config, common.Quiet)
    tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
    assert calls == []


def test_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "wine/mlp", "--epochs", "1", "--out", str(tmp_path / "a")]
    assert call(apply_policy, [*arguments, "--quiet"], monkeypatch) == 0
    assert capsys.readouterr() == ("", "")
    assert "policy" in json.loads((tmp_path / "a" / apply_policy.RESULT_FILE).read_text())
    assert call(apply_policy, [*arguments, "--quiet"], monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "already holds a run" in printed.err
    assert call(apply_policy, [*arguments[:-1], str(tmp_path / "b")], monkeypatch) == 0
    assert "training wine/mlp: 1/" in capsys.readouterr().out  # a later call is not quiet


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mistyped_option_is_told_the_nearest(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even a required one, and behind a command."""
    for given in examples(SCRIPTS[name]):
        for at in (index for index, word in enumerate(given) if word.startswith("--")):
            swapped = f"{given[at][:-2]}{given[at][-1]}{given[at][-2]}"
            assert call(SCRIPTS[name], [*given[:at], swapped, *given[at + 1 :]], monkeypatch) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: unknown option {swapped!r}; did you mean {given[at]!r}? known: ")


def test_other_spellings_of_options_are_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task=wine/mlp", "--out", "nowhere", "--no-quiet", "--device=cdua"]
    assert call(apply_policy, arguments, monkeypatch) == 2
    assert "unknown device 'cdua'" in capsys.readouterr().err
    assert call(apply_policy, ["--tsak", "wine/mlp", "--help"], monkeypatch) == 0


def choices() -> list[tuple[str, str, str]]:
    """Script, option and last choice of every option with choices."""
    found = []
    for name, module in SCRIPTS.items():
        for field, hint in get_type_hints(module.Config).items():
            if get_origin(hint) is Literal:
                found.append((name, field, get_args(hint)[-1]))
    return found


def mistyped(module: ModuleType, option: str, value: str) -> list[str]:
    required = (f.name for f in fields(module.Config) if f.default is MISSING and f.name in REQUIRED)
    given: dict[str, Any] = {name: REQUIRED[name] for name in required}
    given[option] = value
    return [word for name, what in given.items() for word in (f"--{name.replace('_', '-')}", what)]


@pytest.mark.parametrize(("name", "option", "choice"), choices())
def test_a_mistyped_choice_is_told_the_nearest(
    name: str, option: str, choice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(SCRIPTS[name], mistyped(SCRIPTS[name], option, choice[:-1]), monkeypatch) == 2
    text = re.sub(r"\W+", " ", capsys.readouterr().err)
    assert re.sub(r"\W+", " ", f"unknown choice {choice[:-1]} did you mean {choice}") in text


@pytest.mark.parametrize(
    ("option", "value", "nearest"),
    [
        ("device", "cdua", "cuda"),
        ("preset", "defualt", "default"),
        ("task", "lettr/mlp", "letter"),
        ("task", "letter/mpl", "mlp"),
        ("tasks", "digitz/mlp", "digits"),
        ("trainers", "lightnig", "lightning"),
    ],
)
def test_a_mistyped_name_is_told_the_nearest(
    option: str,
    value: str,
    nearest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = 0
    for name, module in SCRIPTS.items():
        if get_type_hints(module.Config).get(option) in (str, tuple[str, ...]) and name not in OF_A_SPLIT:
            assert call(module, mistyped(module, option, value), monkeypatch) == 2
            text = capsys.readouterr().err
            assert len(text.splitlines()) == 1, name
            assert f"{value.split('/')['/mpl' in value]!r}; did you mean {nearest!r}?" in text, name
            asked += 1
    assert asked
    assert list(tmp_path.iterdir()) == []  # found out before anything is written
