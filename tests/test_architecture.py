"""The import rule: arrows between packages never point upward, and a saved policy does not need stable-baselines3."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RL = ("stable_baselines3", "sb3_contrib")
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "inner_models": ("hpo_env", "agents", "scripts", "gymnasium", "tensorboard", *RL),
    "hpo_env": ("agents", "scripts", "tensorboard", *RL),
    "agents": ("scripts",),
    "scripts": (),
}
"""Package -> what it never imports, not even inside a function."""

LEARNING = ("ppo", "rollout_ppo", "rollouts", "supervised_env", "vec_env")
"""The modules of `agents` that may import stable-baselines3 when they are imported; others do so in functions, if at
all."""

SOURCES = [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports anywhere. Relative ones stay within their package, and are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def run_on_import(tree: ast.Module) -> ast.Module:
    """The part of a module that importing it runs: without the bodies of functions, and what only type checkers see."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...

        def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
            return ast.Constant(None)

        def visit_If(self, node: ast.If) -> ast.AST:
            if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                return ast.Module(node.orelse, [])
            return self.generic_visit(node)

    pruned = Prune().visit(tree)
    assert isinstance(pruned, ast.Module)
    return pruned


def upward(package: str, source: str) -> list[str]:
    """Imports of `source`, a module of `package`, that point upward."""
    return [name for name in imports(ast.parse(source)) if name.split(".")[0] in FORBIDDEN[package]]


def eager_rl(source: str) -> list[str]:
    """Imports of stable-baselines3 that importing `source` runs, directly or through one of `LEARNING`."""
    learning = tuple(f"agents.{name}" for name in LEARNING)
    tree = run_on_import(ast.parse(source))
    named = [
        f"agents.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and ((node.level == 1 and not node.module) or node.module == "agents")
        for alias in node.names
    ]
    relative = [
        f"agents.{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    ]
    return [name for name in (*imports(tree), *named, *relative) if name.split(".")[0] in RL or name in learning]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_points_upward(path: Path) -> None:
    assert upward(path.relative_to(ROOT).parts[0], path.read_text()) == []


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parent.name == "agents"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_only_learning_needs_stable_baselines3(path: Path) -> None:
    if path.stem not in LEARNING:
        assert eager_rl(path.read_text()) == []


def test_importing_agents_leaves_stable_baselines3_alone() -> None:
    """What runs, as against what is written: no import of the package brings it in by another way."""
    modules = [f"agents.{path.stem}" for path in (ROOT / "agents").glob("*.py") if path.stem not in LEARNING]
    program = f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
    program += f"print([name for name in {RL} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_there_are_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FORBIDDEN)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("inner_models", "import gymnasium"),
        ("inner_models", "from hpo_env import HPOEnv"),
        ("inner_models", "def f():\n    import hpo_env.env as e"),
        ("inner_models", "import importlib\nimportlib.import_module('stable_baselines3.ppo')"),
        ("hpo_env", "import numpy, agents.policy"),
        ("hpo_env", "from stable_baselines3.common.vec_env import VecEnv"),
        ("hpo_env", "try:\n    import tensorboard\nexcept ImportError: pass"),
        ("agents", "from scripts.train_agent import main"),
    ],
)
def test_upward_arrows_are_found(package: str, source: str) -> None:
    assert len(upward(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("inner_models", "from inner_models.tasks import Task\nimport torch"),
        ("hpo_env", "import gymnasium\nfrom inner_models import tasks"),
        ("agents", "import hpo_env\nimport stable_baselines3"),
        ("scripts", "import agents.ppo"),
    ],
)
def test_downward_arrows_are_not(package: str, source: str) -> None:
    assert upward(package, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import stable_baselines3",
        "from sb3_contrib import RecurrentPPO",
        "class A:\n    from stable_baselines3 import PPO",
        "if True:\n    import stable_baselines3.ppo",
        "from agents.ppo import train",
        "from agents import vec_env",
        "from . import policy, ppo",
        "from .vec_env import CohortVecEnv",
    ],
)
def test_eager_imports_are_found(source: str) -> None:
    assert len(eager_rl(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def train():\n    from stable_baselines3 import PPO",
        "class A:\n    async def f(self):\n        from agents.ppo import train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from agents.ppo import Settings",
        "from . import policy\nfrom .tuner import Tuner\nfrom agents.policy import ControlPolicy",
    ],
)
def test_lazy_imports_are_not(source: str) -> None:
    assert eager_rl(source) == []
