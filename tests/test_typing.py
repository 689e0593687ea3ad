"""What a user's type checker makes of the package: it is typed, and says where it is used wrongly."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.recipes.page import script

ROOT = Path(__file__).parents[1]

RIGHT = """
import gymnasium
import torch
from torch import nn

import hpo_env
from agents import ControlPolicy, PolicyError, Tuner
from agents.integrations.lightning import TunerCallback as LightningTuner
from agents.integrations.transformers import TunerCallback as TransformersTuner

model = nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())
try:
    policy: ControlPolicy = ControlPolicy.load("policy.safetensors")
except PolicyError as error:
    raise SystemExit(str(error)) from error
tuner: Tuner = Tuner(policy, optimizer, model=model, total_epochs=3)
tuner = Tuner.pretrained(optimizer, model=model, total_epochs=3, start="given", controls=["lr"], guard=False)
tuner = Tuner.load("policy.safetensors", optimizer, total_epochs=3, examples_per_epoch=1000)
values: dict[str, float] = tuner.step(train_loss=torch.tensor(1.0), val_loss=None)
state: dict[str, object] = tuner.state_dict()
env: gymnasium.Env[object, object] = gymnasium.make("hyperpilot/HPO-v0", task="digits/mlp")
print(values["lr"], state, env, hpo_env.HPOEnv, LightningTuner(start="given"), TransformersTuner(controls=["lr"]))
"""

WRONG = {
    'Tuner(policy, optimizer, total_epochs="30")': "arg-type",
    'Tuner(policy, optimizer, total_epochs=30, start="fine-tune")': "arg-type",
    "Tuner(policy, optimizer, total_epochs=30, epochs=30)": "call-arg",
    "Tuner(policy, model, total_epochs=30)": "arg-type",
    'Tuner.pretrained(optimizer, total_epochs="30")': "arg-type",
    'Tuner.pretrained(optimizer, total_epochs=30, start="mine")': "arg-type",
    "Tuner.pretrained(optimizer, total_epoch=30)": "call-arg",
    "Tuner.pretrained(optimizer)": "call-arg",
    'Tuner.load("policy.safetensors", optimizer, total_epochs=30, model=optimizer)': "arg-type",
    'LightningTuner(controlls=["lr"])': "call-arg",
    'TransformersTuner(guard="yes")': "arg-type",
    "tuner.step(1.0, 1.0)": "call-arg",
    'tuner.step(train_loss="low")': "arg-type",
    "tuner.learning_rate": "attr-defined",
    "policy.act([1.0])": "arg-type",
}
"""A mistake -> the code of mypy's error."""

RECIPES = ("schedulers", "steps", "accumulation", "mixed_precision", "checkpoint", "workers")
"""The other recipes meet gaps in torch's own types."""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says of a user's files: strict, in a folder and an environment of their own, where the packages are
    installed as `make install` does it, and are typed only if their py.typed says so."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "env")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    (site / "installed.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-sklearn.*]\nignore_missing_imports = True\n")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(RIGHT + "\n".join(WRONG))
    (folder / "example.py").write_text((ROOT / "scripts/examples/plain_pytorch.py").read_text())
    for name in RECIPES:
        (folder / f"{name}.py").write_text(script(name))
    options = ["--python-executable", str(folder / "env/bin/python"), "--cache-dir", str(ROOT / ".mypy_cache/user")]
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *options, "."]
    done = subprocess.run([*command, "--exclude", "^env/"], cwd=folder, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["right", "example", *RECIPES])
def test_right_uses(complaints: list[str], name: str) -> None:
    assert [line for line in complaints if line.startswith(f"{name}.py:")] == []


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_found(complaints: list[str], mistake: str) -> None:
    number = RIGHT.count("\n") + 1 + list(WRONG).index(mistake)
    codes = [line.rsplit("[", 1)[1] for line in complaints if re.match(rf"wrong\.py:{number}: error", line)]
    assert codes == [f"{WRONG[mistake]}]"]


def test_nothing_else_is_found(complaints: list[str]) -> None:
    """In the packages themselves, above all."""
    assert [line for line in complaints if not re.match(r"\w+\.py:", line)] == []


def test_the_installed_packages_are_found(tmp_path: Path) -> None:
    """From a folder of the user's own, in the environment that runs these tests. An editable install must be one that
    type checkers can follow: `make install` asks for that. What is in them is not looked at."""
    (tmp_path / "mine.py").write_text("import agents\n\nprint(agents.Tuner)\n")
    options = ["--strict", "--follow-imports", "skip", "--cache-dir", str(ROOT / ".mypy_cache/installed")]
    command = [sys.executable, "-m", "mypy", *options, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
