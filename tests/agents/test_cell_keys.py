"""What names a cell: its task, its method with all settings, its seeds and the code that it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import cells
from agents.calibration import RandomTrials
from agents.cells import Cell, _code_of, _needed, code_version, describe
from agents.controllers import Elsewhere, Replay, WithPolicy
from agents.population_based import PopulationBased
from agents.schedules import Constant, Cosine, OneCycle, Plateau, WarmupStableDecay
from agents.searches import OptunaSearch
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from tests.tiny import random_policy

TASK = Task("digits", ModelSpec("mlp", 8, 1), horizon=2, interval_examples=32, train_rows=64, eval_rows=32)
OTHER = replace(TASK, dataset="wine", optimizer="sgd")

# -- keys --------------------------------------------------------------------------------------------------------------


def policy_variants() -> list[Any]:
    changed = random_policy()
    next(changed.parameters()).data[0, 0] += 1e-6
    based = random_policy()
    based.header = replace(
        based.header, base_rules={**based.header.base_rules, "sgd": based.header.base_rules["adamw"]}
    )
    ranged = random_policy()
    ranged.header = replace(ranged.header, trained_ranges={"progress": (0.0, 1.0)})
    rows = np.zeros((2, 3), np.float32)
    seen = [Elsewhere((rows,)), Elsewhere((rows + 1,)), Elsewhere((rows, rows)), Elsewhere((rows,), seed=1)]
    own = random_policy()
    return [
        *(WithPolicy(policy) for policy in (own, random_policy(1), changed, based, ranged)),
        WithPolicy(own, guard=False),
        WithPolicy(own, initial_loss=True),
        WithPolicy(own, examples=False),
        WithPolicy(own, record=True),
        WithPolicy(own, controls=("lr",)),
        WithPolicy(own, start="given"),
        WithPolicy(own, start="given", lr_factor=0.1),
        WithPolicy(own, batch_size=64),
        WithPolicy(own, sees="nothing"),
        WithPolicy(own, acts="random"),
        *(WithPolicy(own, sees=elsewhere) for elsewhere in seen),
    ]


def test_what_is_in_a_users_file_matters(tmp_path: Path) -> None:
    keys = set()
    for number in (1.0, 2.0, 1.0):
        np.savez(tmp_path / "own.npz", inputs=np.full((20, 2), number), targets=np.ones(20))
        keys.add(Cell(Task.named(f"npz:{tmp_path / 'own.npz'}/mlp"), Constant(), (0,)).key)
    assert len(keys) == 2


def test_provenance_and_scores_do_not_matter() -> None:
    told = random_policy()
    told.header = replace(told.header, training={"seed": 1}, scores={"rse": 3})
    assert Cell(TASK, WithPolicy(told), (0,)).key == Cell(TASK, WithPolicy(random_policy()), (0,)).key


def test_equal_settings_have_equal_keys() -> None:
    makers: list[Any] = [
        Constant,
        lambda: RandomTrials(0, 2),
        lambda: WithPolicy(random_policy()),
        lambda: Replay({"adamw": {"lr": 0.1}}, np.arange(8.0).reshape(1, 2, 4)),
        lambda: WithPolicy(random_policy(), sees=Elsewhere((np.zeros((2, 3), np.float32),))),
    ]
    for make in makers:
        assert Cell(TASK, make(), (0, 1)).key == Cell(replace(TASK), make(), (0, 1)).key
    assert Cell(TASK, Cosine(), (0,)).key == Cell(TASK, Cosine("default", 1.0), (0,)).key


def test_any_difference_makes_another_key() -> None:
    offsets = np.arange(8.0).reshape(1, 2, 4)
    base = {"adamw": {"lr": 0.1}}
    methods = [
        Constant(),
        Constant("calibrated"),
        Cosine(),
        Cosine("calibrated"),
        Cosine(lr_factor=0.1),
        Cosine(batch_size=64),
        Plateau(),
        WarmupStableDecay(),
        WarmupStableDecay(decay=0.1),
        OneCycle(),
        RandomTrials(0, 2),
        RandomTrials(2, 2),
        RandomTrials(0, 2, seed=1),
        Replay(base, offsets),
        Replay({"adamw": {"lr": 0.2}}, offsets),
        Replay(base, offsets + 1e-12),
        Replay(base, offsets, batch_size=64),
        Replay(base, offsets.reshape(1, 4, 2)),
        Replay(base, offsets.astype(np.float32)),
        OptunaSearch("tpe", 4),
        OptunaSearch("gp", 4),
        PopulationBased(4),
        *policy_variants(),
    ]
    tasks = [
        TASK,
        OTHER,
        replace(TASK, horizon=3),
        replace(TASK, seed=1),
        replace(TASK, label_noise=0.1),
        replace(TASK, model=replace(TASK.model, activation="gelu")),
        replace(TASK, train_rows=65),
    ]
    keys = [Cell(TASK, method, (0, 1)).key for method in methods]
    keys += [Cell(task, Constant(), (0, 1)).key for task in tasks[1:]]
    keys += [Cell(TASK, Constant(), seeds).key for seeds in ((0,), (1, 0), (0, 2), (0, 1, 2))]
    assert len(set(keys)) == len(keys)


def test_a_description_is_complete_or_refused() -> None:
    described = describe(Cell(TASK, Cosine(), (0,)).method)
    assert described == {"Cosine": {"values": "default", "lr_factor": 1.0, "batch_size": None}}
    assert describe(TASK)["Task"]["model"]["ModelSpec"]["width"] == 8
    with pytest.raises(TypeError, match="no description of a function"):
        describe({"made by": lambda: None})


# -- the version of the code -------------------------------------------------------------------------------------------

SOURCE = '''
"""What it is."""

import math

LIMIT = 3
"""Most."""


def double(x: float, unused: str = "a") -> float:
    """Twice."""
    # because
    if x > LIMIT:
        return 2 * x
    return x + x
'''


def test_texts_are_not_code() -> None:
    same = [
        SOURCE.replace('"""What it is."""', '"""Other."""'),
        SOURCE.replace('"""What it is."""\n', ""),
        SOURCE.replace('    """Twice."""\n', ""),
        SOURCE.replace('"""Most."""', ""),
        SOURCE.replace("    # because\n", "    # not\n\n"),
        SOURCE.replace('x: float, unused: str = "a"', "\n    x: float,\n    unused: str = 'a',\n"),
        SOURCE.replace("return 2 * x", "return (2 * x)  # twice"),
    ]
    assert all(source != SOURCE for source in same)
    assert {_code_of(source) for source in same} == {_code_of(SOURCE)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "2.0 * x"),
        ("x + x", "x - x"),
        ("x > LIMIT", "x >= LIMIT"),
        ("LIMIT = 3", "LIMIT = 4"),
        ('= "a"', '= "b"'),
        ("double", "twice"),
        ("import math\n", ""),
        ("    if x > LIMIT:\n        return 2 * x\n", ""),
    ],
)
def test_code_is_code(old: str, new: str) -> None:
    assert old in SOURCE
    assert _code_of(SOURCE.replace(old, new)) != _code_of(SOURCE)


def behind(module: str) -> set[str]:
    return {path.relative_to(cells._ROOT).with_suffix("").as_posix() for path in _needed(cells._path(module))}


def test_the_modules_behind_a_method() -> None:
    assert behind("agents.schedules") >= {"agents/schedules", "agents/application", "inner_models/batched_training"}
    assert behind("agents.schedules") >= {"inner_models/generators", "inner_models/twins_sequences"}
    assert not behind("agents.schedules") & {"agents/controllers", "agents/tuner", "hpo_env/observations"}
    assert behind("agents.controllers") >= {"agents/tuner", "agents/policy", "agents/watch", "hpo_env/observations"}
    assert behind("agents.searches") >= {"agents/searches", "agents/application", "agents/calibration"}
    assert code_version("agents.schedules") != code_version("agents.controllers")


@pytest.mark.parametrize(
    ("file", "touches"),
    [
        ("inner_models/updates.py", "both"),
        ("hpo_env/hyperparameters.py", "both"),
        ("hpo_env/actions.py", "controllers"),
        ("agents/application.py", "both"),
        ("agents/tuner.py", "controllers"),
        ("agents/summary.py", "none"),
        ("agents/cells.py", "none"),
        ("hpo_env/base_schedule.json", "both"),
    ],
)
def test_a_change_reaches_those_that_run_it(
    file: str, touches: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(cells.__file__).parents[1]
    for package in ("inner_models", "hpo_env", "agents"):
        (tmp_path / package).mkdir()
        for path in [*(root / package).glob("*.py"), *(root / package).glob("*.json")]:
            (tmp_path / package / path.name).write_text(path.read_text())
    monkeypatch.setattr(cells, "_ROOT", tmp_path)
    version = code_version.__wrapped__
    before = {name: version(f"agents.{name}") for name in ("schedules", "controllers")}
    changed = tmp_path / file
    if file.endswith("py"):
        changed.write_text(f"# A remark.\n{changed.read_text()}")
        assert {name: version(f"agents.{name}") for name in before} == before
        changed.write_text(f"{changed.read_text()}\nMORE = 1\n")
    else:
        changed.write_text(changed.read_text().replace("0.05", "0.06"))
    moved = [name for name in before if version(f"agents.{name}") != before[name]]
    assert moved == {"both": ["schedules", "controllers"], "controllers": ["controllers"], "none": []}[touches]
