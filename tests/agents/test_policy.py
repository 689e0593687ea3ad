"""The policy file: whole or refused, and nothing in it is ever run."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from agents import ControlPolicy, PolicyError, policy_file
from agents.policy import PolicyHeader
from agents.policy_file import FORMAT
from hpo_env.observations import FEATURES
from tests.rules import RULES
from tests.tiny import random_policy

OBSERVATIONS = np.random.default_rng(0).uniform(-2, 2, (32, len(PolicyHeader(hidden=(), base_rules={}).features)))
RULE = random_policy().header.base_rules
RANGES = random_policy().header.ranges


@pytest.fixture
def path(tmp_path: Path) -> Path:
    random_policy().save(tmp_path / "policy.safetensors")
    return tmp_path / "policy.safetensors"


def identical(one: ControlPolicy, other: ControlPolicy) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return one.header == other.header and mine.keys() == theirs.keys() and all(mine[k].equal(theirs[k]) for k in theirs)


def write(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A file with a correct checksum over any contents, as an attacker could write it."""
    payload = {**header, "sha256": policy_file.digest(header, tensors)}
    save_file(tensors, path, {FORMAT: json.dumps(payload)})


def valid_parts() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    policy = random_policy()
    return {"format_version": policy_file.FORMAT_VERSION, **asdict(policy.header)}, dict(policy.state_dict())


# -- round trip --------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    policy = random_policy(seed=5)
    policy.mean.copy_(torch.linspace(-1, 1, len(policy.mean)))
    policy.std.copy_(torch.linspace(0.5, 2, len(policy.std)))
    policy.header = replace(
        policy.header,
        trained_ranges={"horizons": (8, 48), "val_change_1": (-0.5, 0.25)},
        training={"seed": 5, "datasets": ["digits"]},
        scores={"log_ratios": {"a": 0.25}},
    )
    policy.save(tmp_path / "new" / "folder" / "policy.safetensors")
    loaded = ControlPolicy.load(str(tmp_path / "new" / "folder" / "policy.safetensors"))
    assert identical(policy, loaded)
    actions, state = policy.act(OBSERVATIONS.astype(np.float32))
    np.testing.assert_array_equal(loaded.act(OBSERVATIONS.astype(np.float32))[0], actions)
    assert state is None
    assert actions.shape == (32, len(policy.header.controls))
    assert 0 < np.abs(actions).max() <= 1
    assert not loaded.training


def test_saving_twice_gives_equal_bytes(path: Path) -> None:
    before = path.read_bytes()
    ControlPolicy.load(path).save(path)
    assert path.read_bytes() == before


def test_a_valid_handwritten_file_loads(path: Path) -> None:
    """So that the refusals below are of what each of them changes."""
    write(path, *valid_parts())
    assert identical(ControlPolicy.load(path), random_policy())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_base_rules_come_along(path: Path, kind: str) -> None:
    found = ControlPolicy.load(path).header
    assert found.base_rule(kind) == RULES[kind]
    assert found.base_rules == {name: rule.to_dict() for name, rule in RULES.items()}


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0xFF, 0x01, 0x20])
def test_one_flipped_byte(path: Path, mask: int) -> None:
    whole, original = path.read_bytes(), ControlPolicy.load(path)
    tensors_at = 8 + int.from_bytes(whole[:8], "little")
    positions = {*range(8), *np.linspace(8, len(whole) - 1, 400, dtype=int).tolist()}
    refused = set()
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
        try:
            assert identical(ControlPolicy.load(path), original), position
        except PolicyError:
            refused.add(position)
    assert {position for position in positions if position >= tensors_at} <= refused
    assert len(refused) > 0.95 * len(positions)


def test_truncated(path: Path) -> None:
    whole = path.read_bytes()
    tensors_at = 8 + int.from_bytes(whole[:8], "little")
    for length in np.linspace(0, len(whole) - 1, 100, dtype=int).tolist():
        path.write_bytes(whole[:length])
        reason = "do not hold its header" if length < tensors_at else "bytes of tensors instead of"
        with pytest.raises(PolicyError, match=f"not a whole safetensors file .*{reason}"):
            ControlPolicy.load(path)


def test_trailing_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    with pytest.raises(PolicyError):
        ControlPolicy.load(path)


class Canary:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_no_code(path: Path, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "ran")
    for data in (pickle.dumps(canary), pickle.dumps(canary, protocol=0)):
        path.write_bytes(data)
        with pytest.raises(PolicyError, match="not a whole safetensors file"):
            ControlPolicy.load(path)
    torch.save(canary, path)
    with pytest.raises(PolicyError, match="not a whole safetensors file"):
        ControlPolicy.load(path)
    assert not canary.path.exists()
    path.write_bytes(pickle.dumps(canary))
    pickle.loads(path.read_bytes())  # the canary does sing
    assert canary.path.exists()


# -- files that are whole, but not for this version --------------------------------------------------------------------


def test_newer_format_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(policy_file, "FORMAT_VERSION", policy_file.FORMAT_VERSION + 1)
        random_policy().save(path)
        assert identical(ControlPolicy.load(path), random_policy())
    with pytest.raises(PolicyError, match="upgrade hyperpilot"):
        ControlPolicy.load(path)


@pytest.mark.parametrize("version", [1, 0, -1, "2", None, [2]])
def test_other_format_versions(path: Path, version: Any) -> None:
    header, tensors = valid_parts()
    write(path, {**header, "format_version": version}, tensors)
    with pytest.raises(PolicyError, match="format version"):
        ControlPolicy.load(path)


OTHERS: list[tuple[str, Any]] = [
    ("features", (*PolicyHeader(hidden=(), base_rules={}).features, "barometer")),
    ("features", []),
    ("features", "progress"),
    ("controls", tuple(reversed(random_policy().header.controls))),
    ("controls", None),
    ("ranges", {**RANGES, "lr": {**RANGES["lr"], "step": 0.5}}),
    ("ranges", {"lr": RANGES["lr"]}),
]


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_made_for_another_problem(path: Path, name: str, value: Any) -> None:
    header, tensors = valid_parts()
    write(path, {**header, "trained_ranges": {"barometer": [0, 1]}, name: value}, tensors)
    with pytest.raises(PolicyError, match=f"other {name}"):
        ControlPolicy.load(path)


def test_plain_safetensors(path: Path) -> None:
    save_file(dict(random_policy().state_dict()), path)
    with pytest.raises(PolicyError, match="not a hyperpilot policy"):
        ControlPolicy.load(path)


@pytest.mark.parametrize("text", ["[1]", '"x"', "3", "null", "{}", "{", "[" * 100_000, '{"format_version": 1}'])
def test_a_header_that_is_none(path: Path, text: str) -> None:
    save_file(dict(random_policy().state_dict()), path, {FORMAT: text})
    with pytest.raises(PolicyError, match=r"its header cannot be read|nested too deeply"):
        ControlPolicy.load(path)


ROW = RULE["adamw"]["coefficients"]


def adamw(**changes: Any) -> dict[str, Any]:
    return {**RULE, "adamw": {**RULE["adamw"], **changes}}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("hidden", [-5], "header.hidden[0] must be an integer in 1..4096, not -5"),
        ("hidden", [8, 0], "header.hidden[1]"),
        ("hidden", [True], "not True"),
        ("hidden", [16.0], "not 16.0"),
        ("hidden", ["x"], "not 'x'"),
        ("hidden", [10**9], "1000000000"),
        ("hidden", [8] * 99, "header.hidden must be a list of 0..16 entries"),
        ("hidden", 16, "header.hidden"),
        ("base_rules", {}, "'adamw'"),
        ("base_rules", ["adamw"], "header.base_rules"),
        ("base_rules", {**RULE, "lion": RULE["adamw"]}, "'lion'"),
        ("base_rules", {**RULE, "adamw": []}, "header.base_rules.adamw"),
        ("base_rules", adamw(coefficients={}), "header.base_rules.adamw.coefficients"),
        ("base_rules", adamw(coefficients=1), "header.base_rules.adamw.coefficients"),
        ("base_rules", adamw(coefficients={**ROW, "momentum": [0, 0, 0]}), "'momentum'"),
        ("base_rules", adamw(coefficients={**ROW, "lr": [0, 0]}), "coefficients.lr"),
        ("base_rules", adamw(coefficients={**ROW, "lr": "012"}), "coefficients.lr"),
        ("base_rules", adamw(coefficients={**ROW, "lr": [0, 0, "0"]}), "coefficients.lr[2]"),
        ("base_rules", adamw(coefficients={**ROW, "lr": [0, 0, True]}), "coefficients.lr[2]"),
        ("base_rules", adamw(coefficients={**ROW, "lr": [1e308, -1e308, 0]}), "1e+308"),
        ("base_rules", adamw(warmup=2.0), "header.base_rules.adamw.warmup"),
        ("base_rules", adamw(warmup=False), "header.base_rules.adamw.warmup"),
        ("base_rules", adamw(warmup=5e-324), "header.base_rules.adamw.warmup"),
        ("base_rules", {**RULE, "sgd": {"lr": 1e-3, "weight_decay": 0.1}}, "header.base_rules.sgd"),
        ("base_schedules", {}, "'base_schedules'"),
        ("required_signals", ["train_loss", "horoscope"], "'horoscope'"),
        ("required_signals", [["train_loss"]], "header.required_signals[0]"),
        ("required_signals", None, "header.required_signals"),
        ("required_signals", "train_loss", "header.required_signals"),
        ("ranges", {**RANGES, "dropout": {**RANGES["dropout"], "step": True}}, "header.ranges['dropout']['step']"),
        ("trained_ranges", {"horizons": [1, 2, 3]}, "header.trained_ranges.horizons"),
        ("trained_ranges", {"horizons": 8}, "header.trained_ranges.horizons"),
        ("trained_ranges", {"horizons": ["few", "many"]}, "'few'"),
        ("trained_ranges", {"progress": [0.0, None]}, "header.trained_ranges.progress[1]"),
        ("trained_ranges", {"progress": [0.5, 0.25]}, "0.5..0.25"),
        ("trained_ranges", {"progress": [-1e300, 1e300]}, "-1e+300"),
        ("trained_ranges", {"barometer": [0, 1]}, "'barometer'"),
        ("trained_ranges", [1], "header.trained_ranges"),
        ("strength", 1.5, "header.strength"),
        ("strength", "half", "header.strength"),
        ("strength", None, "header.strength"),
        ("training", ["seed"], "header.training"),
        ("training", {"preset": ["default"]}, "header.training.preset"),
        ("training", {"seconds": "2097"}, "header.training.seconds"),
        ("training", {"a": {"b": {"c": {"d": {}}}}}, "nested too deeply"),
        ("training", {"command": "\x1b[2J"}, "'\\x1b[2J'"),
        ("training", {"datasets": ["\ud800"]}, "header.training['datasets'][0]"),
        ("training", {"\u202ename": 1}, "a name in header.training"),
        ("training", {"command": "x" * 5000}, "4096"),
        ("scores", {"timesteps": 0.5}, "header.scores.timesteps"),
        ("scores", None, "header.scores"),
        ("surprise", 1, "'surprise'"),
        ("x" * 10_000, 1, "xxx..."),
    ],
)
def test_a_header_that_does_not_fit(path: Path, field: str, value: Any, named: str) -> None:
    header, tensors = valid_parts()
    write(path, {**header, field: value}, tensors)
    with pytest.raises(PolicyError, match=rf"does not fit format version.*{re.escape(named)}") as error:
        ControlPolicy.load(path)
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


@pytest.mark.parametrize("field", [name for name in asdict(random_policy().header) if name != "strength"])
def test_a_header_that_lacks_an_entry(path: Path, field: str) -> None:
    header, tensors = valid_parts()
    del header[field]
    write(path, header, tensors)
    with pytest.raises(PolicyError, match=f"does not fit format version.*'{field}'"):
        ControlPolicy.load(path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"hidden": [16]', '"hidden": [16], "hidden": [16]', "'hidden' comes 2 times"),
        ('"warmup": 0.1', '"warmup": 0.1, "warmup": 0.1', "'warmup' comes 2 times"),
        ('"hidden": [16]', '"hidden": [1e400]', "'1e400'"),
        ('"hidden": [16]', '"hidden": [NaN]', "'NaN'"),
        ('"hidden": [16]', '"hidden": [-Infinity]', "'-Infinity'"),
        ('"hidden": [16]', f'"hidden": [{"9" * 5000}]', "'99999"),
        ('"hidden": [16]', f'"hidden": [16.{"0" * 5000}]', "'16.000"),
        ('"hidden": [16]', '"hidden": ["\n"]', "control character"),
        ("{", "\ufeff{", "BOM"),
    ],
)
def test_json_that_readers_disagree_about(path: Path, old: str, new: str, named: str) -> None:
    header, tensors = valid_parts()
    text = json.dumps({**header, "sha256": policy_file.digest(header, tensors)})
    assert old in text
    save_file(tensors, path, {FORMAT: text.replace(old, new, 1)})
    with pytest.raises(PolicyError, match=f"its header cannot be read.*{named}"):
        ControlPolicy.load(path)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_base_rule_is_missing(path: Path, kind: str) -> None:
    header, tensors = valid_parts()
    write(path, {**header, "base_rules": {kind: header["base_rules"][kind]}}, tensors)
    with pytest.raises(PolicyError, match="does not fit format version"):
        ControlPolicy.load(path)


@pytest.mark.parametrize("change", ["missing", "additional", "scalar", "shape", "double", "integer", "float8"])
def test_tensors_that_do_not_fit(path: Path, change: str) -> None:
    header, tensors = valid_parts()
    mean = tensors["mean"]
    if change == "missing":
        del tensors["mean"]
    elif change == "additional":
        tensors["extra"] = mean.clone()
    else:
        tensors["mean"] = {
            "scalar": torch.tensor(1.0),
            "shape": mean[:-1].clone(),
            "double": mean.double(),
            "integer": mean.long(),
            "float8": mean.to(torch.float8_e4m3fn),
        }[change]
    write(path, header, tensors)
    with pytest.raises(PolicyError, match="tensors that do not fit its header"):
        ControlPolicy.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("name", ["mean", "std", "network.0.weight", "network.2.bias"])
def test_weights_that_are_not_finite(path: Path, name: str, value: float) -> None:
    header, tensors = valid_parts()
    tensors[name].view(-1)[1] = value
    write(path, header, tensors)
    with pytest.raises(PolicyError, match=f"{name} that are not finite"):
        ControlPolicy.load(path)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_deviation_that_is_not_positive(path: Path, value: float) -> None:
    header, tensors = valid_parts()
    tensors["std"][3] = value
    write(path, header, tensors)
    with pytest.raises(PolicyError, match="std"):
        ControlPolicy.load(path)


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    before, policy = path.read_bytes(), random_policy(seed=1)
    policy.std[3] = float("nan")
    with pytest.raises(PolicyError, match="the policy holds weights in std that are not finite"):
        policy.save(path)
    policy = random_policy(seed=1)
    policy.header = replace(policy.header, training={"command": "\x1b[2J"})
    with pytest.raises(PolicyError, match=r"header.training\['command'\] must be printable"):
        policy.save(path)
    assert path.read_bytes() == before


def test_too_large(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(PolicyError, match="more than 67108864"):
        ControlPolicy.load(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no policy file at"):
        ControlPolicy.load(tmp_path / "absent.safetensors")


def test_a_link_is_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path.name)
    assert identical(ControlPolicy.load(tmp_path / "link"), random_policy())


def test_bytes_are_as_good_as_a_file(path: Path) -> None:
    data = path.read_bytes()
    assert identical(ControlPolicy.from_bytes(data), random_policy())
    with pytest.raises(PolicyError, match=r"^mail is not a whole safetensors file"):
        ControlPolicy.from_bytes(data[:-1], "mail")


def test_loading_draws_no_random_numbers(path: Path) -> None:
    torch.manual_seed(3)
    ControlPolicy.load(path)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert drawn.equal(torch.rand(4))


# -- out of its depth --------------------------------------------------------------------------------------------------


def seen(**features: float) -> NDArray[np.float32]:
    """`[1, features]`, all but these 0."""
    return np.array([[features.get(name, 0.0) for name in random_policy().header.features]], np.float32)


def knowing(**ranges: tuple[float, float]) -> ControlPolicy:
    policy = random_policy()
    policy.header = replace(policy.header, trained_ranges=ranges)
    return policy


@pytest.mark.parametrize(
    ("value", "lost"),
    [(0.0, False), (0.75, False), (1.24, False), (1.26, True), (-0.24, False), (-0.26, True), (2.0, True)],
)
def test_as_far_outside_as_the_range_is_wide(value: float, lost: bool) -> None:
    policy = knowing(val_change_1=(-0.25, 0.25), train_change_1=(0.25, 0.75))
    assert policy.out_of_depth(seen(train_change_1=value)).tolist() == [lost]


def test_what_never_varied_does_not_count() -> None:
    """Policies are blind to it: a run without a control that all of the meta-training had is none of their depths."""
    policy = knowing(parameters=(0.5, 0.5), lr_available=(1.0, 1.0))
    assert policy.out_of_depth(seen(parameters=0.9, lr_available=0.0)).tolist() == [False]
    assert knowing(parameters=(0.5, 0.51)).out_of_depth(seen(parameters=0.9)).tolist() == [True]


@pytest.mark.parametrize(
    ("examples", "lost"),
    [({}, False), ({"examples": 0.2}, True), ({"examples": 0.41}, False), ({"examples": 0.9}, True)],
)
def test_examples_count_where_they_are_known(examples: dict[str, float], lost: bool) -> None:
    """Their 0 says that they are not, and is far outside of what was."""
    policy = knowing(examples=(0.5, 0.6))
    assert policy.out_of_depth(seen(**examples, examples_known=bool(examples))).tolist() == [lost]


def test_each_run_is_looked_at_by_itself() -> None:
    policy = knowing(progress=(0.0, 1.0), horizons=(8, 64), val_change_1=(-0.1, 0.1))
    rows = np.concatenate([seen(), seen(progress=1.0), seen(val_change_1=1.0), seen(train_change_1=2.0)])
    found = policy.out_of_depth(rows)
    assert found.dtype == bool
    assert found.tolist() == [False, False, True, False]


@pytest.mark.parametrize("ranges", [{}, {"horizons": (8, 64)}])
def test_without_ranges_nothing_is_out_of_depth(ranges: dict[str, tuple[float, float]]) -> None:
    assert not knowing(**ranges).out_of_depth(OBSERVATIONS.astype(np.float32)).any()


def test_ranges_survive_the_file(path: Path) -> None:
    policy = knowing(progress=(0.0, 0.25), lr=(0.5, 0.6))
    policy.save(path)
    rows = np.random.default_rng(0).uniform(-0.5, 1.5, (64, len(policy.header.features))).astype(np.float32)
    lost = policy.out_of_depth(rows)
    assert 0 < lost.sum() < 64
    np.testing.assert_array_equal(ControlPolicy.load(path).out_of_depth(rows), lost)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_interrupted_save_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException], call: str
) -> None:
    before = path.read_bytes()

    def interrupt(*_: Any) -> None:
        raise interruption

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(interruption):
        random_policy(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# -- strength ----------------------------------------------------------------------------------------------------------


def test_later_decisions_are_taken_by_the_strength() -> None:
    policy, rng = random_policy(scale=2.0), np.random.default_rng(0)
    seen = rng.uniform(-1, 1, (64, len(FEATURES))).astype(np.float32)
    first = [feature.name for feature in FEATURES].index("first_decision")
    seen[:, first] = np.arange(64) % 2
    whole = policy.act(seen)[0]
    assert (np.abs(whole) == 1).any()
    policy.header = replace(policy.header, strength=0.25)
    taken = policy.act(seen)[0]
    np.testing.assert_array_equal(taken[1::2], whole[1::2])
    np.testing.assert_allclose(taken[::2], whole[::2] / 4)
    with torch.inference_mode():
        np.testing.assert_allclose(policy(torch.from_numpy(seen)), taken, rtol=1e-5, atol=1e-6)


def test_a_file_without_a_strength_has_all_of_it(path: Path) -> None:
    header, tensors = valid_parts()
    digest = random_policy().digest
    del header["strength"]
    write(path, header, tensors)
    assert ControlPolicy.load(path).header.strength == 1
    assert ControlPolicy.load(path).digest == digest
    weaker = random_policy()
    weaker.header = replace(weaker.header, strength=0.5)
    assert weaker.digest != digest
