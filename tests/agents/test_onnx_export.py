"""The ONNX file gives what torch gives, in a runtime that knows nothing of torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from agents import ControlPolicy
from agents.onnx_export import export
from agents.tuner import pretrained_path
from hpo_env.observations import FEATURES, HIGH, LOW
from tests.tiny import random_policy

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

WIDE = len(FEATURES)
TOLERANCE = 5e-6
"""Largest difference of an action, which lies in -1..1: float32 roundings, which differ by processor. Measured: 5e-7 in
100,000 rows with the shipped policy, 1.4e-6 with the one below, whose weights are large."""


def untypical_policy() -> ControlPolicy:
    """A policy whose every part matters: a normalization of its own, large weights that reach the final clamp."""
    policy = random_policy(seed=3, scale=3.0)
    policy.mean.copy_(torch.linspace(-1, 1, WIDE))
    policy.std.copy_(torch.linspace(0.2, 2, WIDE))
    return policy


POLICIES = {"shipped": lambda: ControlPolicy.load(pretrained_path()), "untypical": untypical_policy}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> ControlPolicy:
    return POLICIES[request.param]()


def own(policy: ControlPolicy, seen: NDArray[np.float32]) -> NDArray[np.float32]:
    """The features that the policy knows: the first ones."""
    return seen[:, : len(policy.header.features)]


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def observations(kind: str, rows: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(rows)
    drawn: dict[str, Callable[[], NDArray[Any]]] = {
        "within bounds": lambda: rng.uniform(LOW, HIGH, (rows, WIDE)),
        "at the bounds": lambda: np.where(rng.random((rows, WIDE)) < 0.5, LOW, HIGH),
        "beyond the clip": lambda: rng.normal(0, 1000, (rows, WIDE)),
        "infinite": lambda: np.where(rng.random((rows, WIDE)) < 0.5, -np.inf, np.inf),
        "zero": lambda: np.zeros((rows, WIDE)),
    }
    return drawn[kind]().astype(np.float32)


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("kind", ["within bounds", "at the bounds", "beyond the clip", "infinite", "zero"])
def test_the_same_actions_as_torch(policy: ControlPolicy, tmp_path: Path, kind: str, rows: int) -> None:
    export(policy, tmp_path / "policy.onnx")
    seen = observations(kind, rows)
    (actions,) = session(tmp_path / "policy.onnx").run(["action"], {"observation": own(policy, seen)})
    expected = policy.act(seen)[0][:, : len(policy.header.controls)]
    assert (actions.dtype, actions.shape) == (np.float32, expected.shape)
    assert np.abs(actions - expected).max() <= TOLERANCE


def test_the_untypical_policy_reaches_every_clip() -> None:
    """Else the comparison above would not notice that one is missing."""
    policy, seen = untypical_policy(), torch.from_numpy(observations("within bounds", 512))
    assert (((seen - policy.mean) / policy.std).abs() > 5).any()
    actions = policy(seen).abs()
    assert (actions == 1).any()
    assert (actions < 1).any()


def test_a_nan_spoils_its_own_row_alone(policy: ControlPolicy, tmp_path: Path) -> None:
    export(policy, tmp_path / "policy.onnx")
    seen = observations("within bounds", 3)
    seen[1, 5] = np.nan
    (actions,) = session(tmp_path / "policy.onnx").run(["action"], {"observation": own(policy, seen)})
    controls = len(policy.header.controls)
    expected = policy.act(seen)[0][:, :controls]
    rows = [[False] * controls, [True] * controls, [False] * controls]
    assert np.isnan(actions).tolist() == np.isnan(expected).tolist() == rows


def test_valid_and_self_describing(policy: ControlPolicy, tmp_path: Path) -> None:
    export(policy, tmp_path / "policy.onnx")
    onnx.checker.check_model(str(tmp_path / "policy.onnx"), full_check=True)
    runtime = session(tmp_path / "policy.onnx")
    (given,), (gives,) = runtime.get_inputs(), runtime.get_outputs()
    assert (given.name, given.type, given.shape) == (
        "observation",
        "tensor(float)",
        ["batch", len(policy.header.features)],
    )
    assert (gives.name, gives.type, gives.shape) == ("action", "tensor(float)", ["batch", len(policy.header.controls)])
    told = {name: json.loads(text) for name, text in runtime.get_modelmeta().custom_metadata_map.items()}
    assert told.pop("digest") == policy.digest
    assert told.pop("format_version") == 2
    assert told.pop("feature_bounds") == {f.name: [f.low, f.high] for f in FEATURES if f.name in policy.header.features}
    assert told == json.loads(json.dumps(asdict(policy.header)))
    assert told["features"] == [feature.name for feature in FEATURES][: len(told["features"])]
    assert told["controls"][:4] == ["lr", "batch_size", "weight_decay", "dropout"]


def test_the_same_bytes_every_time(policy: ControlPolicy, tmp_path: Path) -> None:
    for name in ("one.onnx", "other.onnx"):
        export(policy, tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_an_old_file_stays_when_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.onnx"
    export(random_policy(seed=0), path)
    before = path.read_bytes()

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="cannot write"):
        export(random_policy(seed=1), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.onnx"]
    assert path.read_bytes() == before


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'hyperpilot\[onnx\]'"):
        export(random_policy(), tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())
