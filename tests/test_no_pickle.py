"""Nothing of ours unpickles what lies on a disk: unpickling runs whatever code the file's author likes."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_architecture import ROOT, SOURCES

PICKLERS = ("_pickle", "cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "shelve")
READERS = ("load", "loads", "read_pickle", "Unpickler", "load_from_zip_file")
"""Names under which packages offer reading; all but those below must be looked at."""

HARMLESS = {
    "json.loads": "JSON",
    "ControlPolicy.load": "a policy file: see agents/policy_file.py",
    "cls.load": "the tuner's, which is ControlPolicy.load",
    "Tuner.load": "the same",
    "Trajectory.load": "JSON: see agents/trajectory.py",
    "scripts.examples.plain_pytorch.load": "a function that makes a data set",
    "safetensors.torch.load": "bytes of tensors",
    "Proposer.load": "a state file: see agents/state_file.py",
    "store.load": "finished cells, as JSON",
    "spec.load": "a function that makes a data set",
    "self.state.telemetry.load": "arrays that are there",
}
"""What may be called anywhere, and what it reads."""

REFUSES = "allow_pickle=False"
"""What makes a call of numpy's read arrays alone."""

FROM_PROCESSES = {
    "inner_models/remote.py": ("pickle", "pickle.loads"),
    "agents/supervised_env.py": ("cloudpickle",),
    "agents/rollouts.py": ("ActorCriticPolicy.load",),
}
"""Module -> what it uses to talk to the processes that it starts itself, through pipes: nothing of it is on a disk."""


def readers(source: str) -> Iterator[str]:
    """What in `source` could unpickle: modules imported for that, functions that read, arguments that permit it."""
    nodes = list(ast.walk(ast.parse(source)))
    refusing = {
        id(node.func) for node in nodes if isinstance(node, ast.Call) and REFUSES in map(ast.unparse, node.keywords)
    }
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in (*PICKLERS, "joblib"))
        elif isinstance(node, ast.ImportFrom) and node.module:
            root = node.module.split(".")[0]
            for name in (alias.name for alias in node.names):
                if root in PICKLERS or name in READERS or (root == "joblib" and name not in ("Parallel", "delayed")):
                    yield f"{node.module}.{name}"
        elif isinstance(node, ast.Attribute) and node.attr in READERS and id(node) not in refusing:
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and node.value in (*PICKLERS, *READERS):
            yield repr(node.value)  # for getattr and import_module
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"allow_pickle={ast.unparse(node.value)}"


FOUND = {str(path.relative_to(ROOT)): sorted(set(readers(path.read_text()))) for path in SOURCES}


@pytest.mark.parametrize("path", FOUND)
def test_nothing_is_unpickled_from_disk(path: str) -> None:
    assert [name for name in FOUND[path] if name not in (*HARMLESS, *FROM_PROCESSES.get(path, ()))] == []


def test_all_exceptions_are_needed() -> None:
    found = {name for names in FOUND.values() for name in names}
    assert set(HARMLESS) - found == set()
    assert {path: names for path, names in FROM_PROCESSES.items() if not set(names) <= set(FOUND[path])} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import numpy, cloudpickle as cp",
        "from pickle import Unpickler",
        "def f():\n    import dill",
        "import joblib",
        "from joblib import load as read",
        "import torch\ntorch.load('policy.pt', weights_only=True)",
        "from torch import load",
        "from torch.serialization import load",
        "np.load('a.npz')",
        "np.loadtxt(x, allow_pickle=allow)",
        "read(path, allow_pickle=True)",
        "pd.read_pickle('a')",
        "PPO.load(path)",
        "load = PPO.load",
        "getattr(torch, 'load')(path)",
        "importlib.import_module('pickle')",
        "self.model.policy.load(path)",
    ],
)
def test_unpickling_is_found(source: str) -> None:
    assert [name for name in readers(source) if name not in HARMLESS]


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads(text)",
        "from joblib import Parallel, delayed",
        "np.load_list, np.loadtxt('a')",
        "np.savez(path, allow_pickle=False)",
        "np.load('a.npz', allow_pickle=False)",
        "module.load_state_dict(state)",
        "from safetensors.torch import load as deserialize",
    ],
)
def test_other_reading_is_not(source: str) -> None:
    assert not [name for name in readers(source) if name not in HARMLESS]
