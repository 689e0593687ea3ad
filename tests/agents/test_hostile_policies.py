"""Policy files that were damaged, or made to harm: short forms of the faults in `tests.faults.policy_files`."""

from __future__ import annotations

import math
import pickle
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch

from agents import ControlPolicy, PolicyError, Tuner, policy_file
from agents.untrusted import shown
from tests.faults import Outcome, policy_files
from tests.faults.hostile import CANARY, HOSTILE, PICKLES, parts, sealed
from tests.faults.policy_inputs import SEEDS, check, mutated
from tests.tiny import random_policy


@pytest.fixture
def folder() -> Iterator[Path]:
    """Unlike pytest's own, gone after the test: some of these files are large."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("fault", [policy_files.cut, policy_files.flipped, policy_files.replaced])
def test_a_file_that_is_not_whole(fault: Callable[[int, Path], Outcome], folder: Path) -> None:
    found = fault(250, folder)
    assert (found.count, found.failures) == (250, ())


def _failing(error: BaseException) -> Callable[[], ControlPolicy]:
    def load() -> ControlPolicy:
        raise error

    return load


def test_the_judge_of_these_faults_is_strict() -> None:
    policy, changed = random_policy(), random_policy()
    changed.header = replace(changed.header, scores={"a": 1})
    loads: dict[str, Callable[[], ControlPolicy]] = {
        "other weights": lambda: random_policy(seed=1),
        "other scores": lambda: changed,
        "two lines": _failing(PolicyError("a line\nand another")),
        "another error": _failing(KeyError("lr")),
        "an exit": _failing(SystemExit()),
    }
    whole = [policy_files.identity(policy)]
    outcomes = {name: policy_files.outcome(load, whole) for name, load in loads.items()}
    assert len(policy_files.judged(outcomes).failures) == len(loads)
    assert policy_files.outcome(lambda: policy, whole) == "intact"
    assert policy_files.outcome(_failing(PolicyError("the file is damaged"))) == "refused"


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
def test_hostile_files_do_no_harm(folder: Path) -> None:
    """All in one process here, and whatever time they take."""
    found = policy_files.attacked(len(HOSTILE), folder, at_once=len(HOSTILE), seconds=math.inf)
    assert (found.count, found.failures) == (len(HOSTILE), ())
    assert len(HOSTILE) > 100


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("a pickle", pickle.load),
        ("a pickle of protocol 0", pickle.load),
        ("torch.save", lambda file: torch.load(file, weights_only=False)),
        ("torch.save in the old form", lambda file: torch.load(file, weights_only=False)),
        ("joblib, compressed", joblib.load),
        ("numpy objects", lambda file: np.load(file, allow_pickle=True)),
    ],
)
def test_the_canaries_do_sing(folder: Path, name: str, load: Callable[[Any], Any]) -> None:
    path = folder / "policy.safetensors"
    path.write_bytes(PICKLES[name](folder))
    with pytest.raises(PolicyError, match="not a whole safetensors file"):
        ControlPolicy.load(path)
    assert not (folder / CANARY).exists()
    with path.open("rb") as file:
        load(file)
    assert (folder / CANARY).exists()


def test_mutated_files() -> None:
    """What the fuzzer does, without its guidance."""
    rng, whole = random.Random(0), 0

    def edit(data: bytes) -> bytes:
        edited = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(edited) + 1)
            edited[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        return bytes(edited)

    for _ in range(1000):
        whole += check(mutated(rng.choice(SEEDS), rng, edit))
    assert 20 < whole < 500


def test_a_checksum_of_the_tests_own_fits() -> None:
    """The format, written down a second time."""
    assert policy_files.identity(ControlPolicy.from_bytes(sealed(*parts()))) == policy_files.identity(random_policy())


@pytest.mark.parametrize("row", [(1000, 1000, 1000), (-1000, -1000, -1000), (1000, -1000, 1000)])
@pytest.mark.parametrize("warmup", [0, 1e-6, 1])
@pytest.mark.filterwarnings("error")
def test_the_most_extreme_header_does_not_stop_a_tuner(row: tuple[float, float, float], warmup: float) -> None:
    payload, table, body = parts()
    for rule in payload["base_rules"].values():
        rule |= {"coefficients": dict.fromkeys(rule["coefficients"], row), "warmup": warmup}
    payload |= {"required_signals": [], "trained_ranges": dict.fromkeys(("horizons", "progress"), (-1e9, 1e9))}
    weights = np.frombuffer(body, np.float32)
    extreme = np.where(weights > 0, np.float32(1e6), np.float32(-1e6))
    begin, end = (offset // 4 for offset in table["std"]["data_offsets"])
    extreme[begin:end] = 1e-45
    policy = ControlPolicy.from_bytes(sealed(payload, table, bytearray(extreme.tobytes())))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    optimizer = torch.optim.AdamW(model.parameters())
    tuner = Tuner(policy, optimizer, model=model, total_epochs=4, batch_size=32, examples_per_epoch=100)
    for loss in (1.0, 0.5, math.inf, 1e30):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        values = tuner.step(train_loss=loss, val_loss=loss)
        assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize(
    "name",
    [
        "a hundred tensors too many", "an enormous shape", "a shape that overflows", "halves and doubles",
        "overlapping tensors", "a gap between tensors", "bytes after the tensors", "offsets that go back",
        "offsets beyond 64 bits", "a tensor twice", "deep lists",
    ],
)  # fmt: skip
def test_the_library_is_not_asked(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would refuse too is refused before."""
    monkeypatch.setattr(policy_file, "deserialize", lambda data: pytest.fail("asked"))
    with pytest.raises(PolicyError):
        ControlPolicy.load(HOSTILE[name](folder))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a link to a pipe", "is not a regular file"),
        ("a link to /dev/zero", "is not a regular file"),
        ("a folder", "cannot be read: Is a directory"),
        ("a link to itself", "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=f"{reason}; give a policy file"):
        ControlPolicy.load(HOSTILE[name](folder))


@pytest.mark.parametrize("path", ["\0", "\ud800", "a\nb", "x" * 5000, "~", ""])
def test_odd_paths(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((PolicyError, FileNotFoundError)) as error:
        ControlPolicy.load(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_ordinary_paths_are_shown_as_they_are() -> None:
    assert shown(Path("runs/my policy-é.safetensors")) == "runs/my policy-é.safetensors"
