"""Checkpoints: that what comes back is what was saved, or the one before, or an error."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save

from agents import Tuner
from agents import state_file as module
from agents.checkpoints import Checkpoint, Checkpoints
from tests.faults import storage
from tests.tiny import random_policy

MARKS = ("$float", "$tensor", "$tuple", "$pairs")
"""Names that mean something in a file."""

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.sampled_from(MARKS) | st.text(), inner, max_size=4)
    ),
    max_leaves=20,
)


def newest(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.newest()
    assert found is not None
    return found


def steps(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.stem[11:]) for path in checkpoints.folder.iterdir())


def test_tensors_come_back(tmp_path: Path) -> None:
    weights = torch.randn(3, 4)
    tensors = {
        "weights": weights,
        "the same": weights,
        "transposed": weights.t(),
        "row": weights[1],
        "trained": torch.nn.Parameter(torch.tensor([math.nan, math.inf, -0.0])),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "sha256": torch.tensor([True, False]),
        "half": torch.randn(5, dtype=torch.bfloat16),
        "double": torch.randn(5, dtype=torch.float64),
        'quoted"sha256":"': torch.arange(4, dtype=torch.uint8),
    }
    path = Checkpoints(tmp_path).save(7, {"a": [{"b": tensors}], "c": torch.tensor(5)})
    found = newest(Checkpoints(tmp_path))
    assert (found.path, found.step, found.state["c"]) == (path, 7, 5)
    (loaded,) = found.state["a"]
    assert loaded["b"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded["b"][name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    with safe_open(path, framework="pt") as file:  # by its own reader
        assert len(file.keys()) == len(tensors) + 1


@settings(max_examples=40, deadline=None)
@given(state=st.dictionaries(st.sampled_from(MARKS) | st.text(), PLAIN, max_size=4))
def test_the_state_comes_back(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoints = Checkpoints(tmp_path_factory.getbasetemp())
    checkpoints.save(0, state)
    assert repr(newest(checkpoints).state) == repr(state)  # which tells -0.0 from 0, True from 1, and knows NaN


def test_generators_come_back(tmp_path: Path) -> None:
    rng, seal = np.random.default_rng(0), '"sha256":"' + "0" * 64 + '"'
    state = {"rng": rng.bit_generator.state, seal: seal, "best": np.float64(0.1), "large": 10**1000}
    Checkpoints(tmp_path).save(0, state)
    found, other = newest(Checkpoints(tmp_path)).state, np.random.default_rng(1)
    assert found == state
    other.bit_generator.state = found["rng"]
    assert other.random() == rng.random()


@pytest.mark.parametrize(
    "value",
    [{(1, 2): 3}, {None: 2}, {True: 2}, {0.5: 2}, np.int64(3), np.zeros(2), b"", {1}, 1j, Path()],
    ids=repr,
)
def test_what_a_state_cannot_hold(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a checkpoint's state cannot hold"):
        Checkpoints(tmp_path).save(0, {"a": [value]})
    assert not list(tmp_path.iterdir())


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step must be 0 or more, not -1"):
        Checkpoints(tmp_path).save(-1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    assert checkpoints.newest() is None
    for number, step in enumerate([5, 9, 10, 99, 100, 10**12, 10**13]):
        storage.save(checkpoints, step, 10)
        assert newest(checkpoints).step == step
        assert len(steps(checkpoints)) == min(keep, number + 1)
    storage.save(checkpoints, 7, 10)  # back again: what is newer is left alone
    assert set(steps(checkpoints)) >= {7, 10**13}


def test_a_step_saved_again_is_the_later_one(tmp_path: Path) -> None:
    for value in (1, 2):
        Checkpoints(tmp_path).save(0, {"value": value})
    assert newest(Checkpoints(tmp_path)).state == {"value": 2}


def test_damaged_ones_are_passed_over_and_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 8, 9):
        storage.save(checkpoints, step, 10)
    path = max(checkpoints.folder.iterdir())
    path.write_bytes(b"")
    assert newest(checkpoints).step == 8
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hyperpilot", logging.WARNING)
    assert str(path) in record.getMessage()
    for step in (2, 3, 4):
        storage.save(checkpoints, step, 10)
    assert steps(checkpoints) == [3, 4, 8, 9]
    for path in checkpoints.folder.iterdir():
        path.write_bytes(b"?" * 100)
    with pytest.raises(ValueError, match=rf"all 4 checkpoints in {checkpoints.folder} are damaged; train anew"):
        checkpoints.newest()


def sealed(payload: Any, tensors: dict[str, torch.Tensor] | None = None) -> bytes:
    """A file whose checksum is right, whatever else is not."""
    data = save(
        tensors or {}, {module.FORMAT: payload if isinstance(payload, str) else json.dumps(payload), "sha256": "0" * 64}
    )
    return data.replace(b'"' + b"0" * 64, b'"' + hashlib.sha256(data).hexdigest().encode(), 1)


GOOD = {"version": module.FORMAT_VERSION, "step": 1, "state": {}}


@pytest.mark.parametrize(
    "payload",
    [
        "", "{", "[]", "null", "[" * 100_000, "1" * 5000, {}, {**GOOD, "version": 1}, {**GOOD, "step": 0},
        {**GOOD, "state": 3}, {**GOOD, "state": {"$float": 10**400}},
        {**GOOD, "state": {"a": {"$float": []}}}, {**GOOD, "state": {"a": {"$tensor": "9"}}}, {**GOOD, "state": ["a"]},
        {**GOOD, "state": {"a": {"$pairs": [[1]]}}}, {**GOOD, "state": {"a": {"$tuple": 3}}},
    ],
    ids=lambda payload: str(payload)[:40],
)  # fmt: skip
def test_nonsense_under_a_right_checksum(payload: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    storage.save(checkpoints, 0, 10)
    path = checkpoints.folder / "checkpoint-000000000001.safetensors"
    path.write_bytes(sealed(GOOD))
    assert newest(checkpoints).step == 1
    path.write_bytes(sealed(payload))
    assert newest(checkpoints).step == 0
    assert len(caplog.records) == 1


def test_other_files_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    others = ["checkpoint-1.pt", "checkpoint-x.safetensors", "checkpoint-2.safetensors.bak", "notes", ".hidden"]
    storage.save(checkpoints, 0, 10)
    for name in others:
        (checkpoints.folder / name).touch()
    assert newest(checkpoints).step == 0
    storage.save(checkpoints, 1, 10)
    assert all((checkpoints.folder / name).exists() for name in others)
    (checkpoints.folder / "checkpoint-000000000002.safetensors").mkdir()
    assert newest(checkpoints).step == 1
    assert "checkpoint-000000000002.safetensors is damaged" in caplog.text


def test_a_file_is_a_checkpoint_by_its_seal_alone(tmp_path: Path) -> None:
    """A file that is whole but unsealed, or sealed but for one digit."""
    checkpoints = Checkpoints(tmp_path)
    storage.save(checkpoints, 0, 10)
    path = checkpoints.folder / "checkpoint-000000000000.safetensors"
    data = path.read_bytes()
    seal = re.search(rb'"sha256":"(\w{64})"', data)
    assert seal is not None
    for other in (b"0" * 64, seal[1].upper(), seal[1][::-1]):
        path.write_bytes(data.replace(seal[1], other))
        assert load(path.read_bytes()).keys() == {"0"}
        with pytest.raises(ValueError, match="all 1 checkpoints"):
            checkpoints.newest()


def test_kills(tmp_path: Path) -> None:
    assert storage.kills(4, tmp_path / "moments", storage.LARGE, at_calls=False).failures == ()
    assert storage.kills(16, tmp_path / "calls", storage.SMALL, at_calls=True).failures == ()


def test_failing_calls(tmp_path: Path) -> None:
    outcome = storage.failing_calls(1000, tmp_path, errors=(errno.ENOSPC,))
    assert outcome.failures == ()
    assert (outcome.count, outcome.remark) == (24, "12 calls in a save")


@pytest.mark.parametrize(
    ("fault", "count"),
    [(storage.file_size_limit, 3), (storage.full_disk, 3), (storage.cuts, 1000), (storage.flips, 100)],
)
def test_what_the_long_form_does_more_often(fault: Any, count: int, tmp_path: Path) -> None:
    outcome = fault(count, tmp_path)
    assert outcome.failures == ()
    if not outcome.count:
        pytest.skip(outcome.remark)


def test_a_tuners_state_comes_back_with_its_snapshot(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    tuner = Tuner(random_policy(), optimizer, model=model, total_epochs=3)
    tuner.step(train_loss=1.0, val_loss=2.0)
    state = tuner.state_dict()
    module.save_state(tmp_path / "tuner.safetensors", state)
    assert repr(module.load_state(tmp_path / "tuner.safetensors")) == repr(state)
