"""Inspections of policies that are known to look at one thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agents.cells import Cell, Store
from agents.controllers import Elsewhere, WithPolicy
from agents.inspection import ALL_MEASURED, Permuted, action_changes, blind, inspect, responses, sets_of_features
from agents.policy import ControlPolicy
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES, HIGH, LOW
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from tests.linear import INDEX, linear_policy
from tests.tiny import random_policy

TASKS = (
    Task("digits", ModelSpec("mlp", 8, 1), horizon=4, interval_examples=64, train_rows=64, eval_rows=32),
    Task("wine", ModelSpec("mlp", 8, 1), horizon=3, interval_examples=64, train_rows=64, eval_rows=32),
)


def observations(seed: int = 0) -> dict[str, np.ndarray]:
    """Random ones of two tasks, `[runs, decisions, features]`; every run has every control."""
    rng = np.random.default_rng(seed)
    found = {}
    for label, decisions in (("short", 4), ("long", 8)):
        seen = rng.uniform(LOW, HIGH, (3, decisions, len(FEATURES))).astype(np.float32)
        seen[..., [INDEX[f"{name}_available"] for name in CONTROLS]] = 1
        found[label] = seen
    return found


def each_feature() -> np.ndarray:
    return np.eye(len(FEATURES), dtype=bool)


def test_a_policy_is_blind_to_what_it_does_not_weigh_and_what_never_varied() -> None:
    policy = linear_policy({"progress": {"lr": 0.5}, "non_finite": {"lr": 0.5}})
    assert set(INDEX) - set(blind(policy)) == {"progress", "non_finite"}
    policy.header.trained_ranges["non_finite"] = (0.0, 0.0)
    assert set(INDEX) - set(blind(policy)) == {"progress"}
    assert blind(random_policy()) == []


def test_a_monotone_response_is_recovered() -> None:
    policy = linear_policy({"val_roughness": {"lr": 0.5, "dropout": -0.25}})
    policy.header.trained_ranges["val_roughness"] = (0.0, 1.0)
    found = responses(policy, np.concatenate([o.reshape(-1, len(FEATURES)) for o in observations().values()]), 5)
    assert set(found) == {"val_roughness"}
    response = found["val_roughness"]
    np.testing.assert_allclose(response.values, [0, 0.25, 0.5, 0.75, 1])
    for quantile in response.actions:
        np.testing.assert_allclose(quantile[:, 0], [0, 0.125, 0.25, 0.375, 0.5], atol=1e-6)
        np.testing.assert_allclose(quantile[:, 3], [0, -0.0625, -0.125, -0.1875, -0.25], atol=1e-6)
    assert 0 <= response.usual[0] < response.usual[1] <= 2


def test_a_flag_is_seen_at_its_two_values() -> None:
    seen = observations()["long"].reshape(-1, len(FEATURES))
    assert responses(linear_policy({"momentum_sgd": {"lr": 0.5}}), seen)["momentum_sgd"].values.tolist() == [0, 1]


def test_only_the_feature_in_use_has_any_importance() -> None:
    policy = linear_policy({"grad_cosine": {"weight_decay": 0.5}})
    for change in action_changes(policy, observations(), each_feature()).values():
        used = change[INDEX["grad_cosine"]]
        assert (used[:, 2] > 0.1).all()
        assert not used[:, [0, 1, 3]].any()
        assert not np.delete(change, INDEX["grad_cosine"], axis=0).any()


def test_features_come_from_another_task_at_the_same_share_of_the_run() -> None:
    """With a feature that is the same for all runs of a task at a decision, the change is known."""
    seen = observations()
    for label, offset in (("short", 0.0), ("long", 0.5)):
        decisions = seen[label].shape[1]
        seen[label][..., INDEX["grad_cosine"]] = offset + 0.4 * (np.arange(decisions) // (decisions / 2))
    change = action_changes(linear_policy({"grad_cosine": {"lr": 1.0}}), seen, each_feature())
    for found in change.values():
        np.testing.assert_allclose(found[INDEX["grad_cosine"]][:, 0], 0.5, atol=1e-6)


def test_controls_that_a_run_lacks_do_not_count() -> None:
    seen = observations()
    seen["short"][..., INDEX["dropout_available"]] = 0
    change = action_changes(linear_policy({"grad_cosine": {"dropout": 1.0}}), seen, each_feature())
    assert np.isnan(change["short"][..., 3]).all()
    assert np.isfinite(change["short"][..., :3]).all()
    assert np.isfinite(change["long"]).all()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("cells"))


def test_an_inspection_finds_what_a_policy_looks_at(store: Store) -> None:
    """Offline and in runs; what a policy does not look at changes nothing there."""
    policy = linear_policy({"val_since_start": {"lr": 1.0}, "progress": {"dropout": 0.2}})
    policy.header.trained_ranges["progress"] = (0.0, 0.9)
    found = inspect(policy, TASKS, 2, store, workers=1)
    assert list(found.groups) == ["validation since start", ALL_MEASURED]
    assert list(found.features) == ["val_since_start"]
    assert set(found.responses) == {"val_since_start", "progress"}
    assert len(found.blind) == len(FEATURES) - 2
    assert (found.seeds, found.decisions, set(found.tasks)) == (2, 2 * (4 + 3), {"digits/mlp", "wine/mlp"})
    group, everything = found.groups["validation since start"], found.groups[ALL_MEASURED]
    assert group.action.low <= group.action.value <= group.action.high
    assert group.action.value > 0
    assert list(group.by_control) == ["lr", "batch_size", "weight_decay", "dropout"]
    assert group.by_control["lr"] > 0
    assert group.by_control["weight_decay"] == 0
    assert group.loss is not None
    assert group.loss.low <= group.loss.value <= group.loss.high
    assert any(group.loss_by_task.values()) if group.loss_by_task else False
    # Nothing else that is measured is looked at, so permuting it along leaves the runs as they are.
    assert everything.loss == group.loss


def test_permuting_what_is_not_looked_at_leaves_runs_as_they_are() -> None:
    policy = linear_policy({"val_since_start": {"lr": 1.0}})
    own = Cell(TASKS[0], WithPolicy(policy, record=True), (0, 1)).compute("cpu")
    elsewhere = Elsewhere(tuple(observations()["long"]))

    def losses(*features: str) -> list[list[float]]:
        cell = Cell(TASKS[0], Permuted(policy, sees=elsewhere, features=features), (0, 1))
        return [run.val_loss for run in cell.compute("cpu")]  # type: ignore[union-attr]

    assert losses("grad_cosine", "train_change_1") == [run.val_loss for run in own]  # type: ignore[union-attr]
    assert losses("val_since_start") != [run.val_loss for run in own]  # type: ignore[union-attr]


def test_the_sets_leave_out_what_cannot_be_judged() -> None:
    sets = sets_of_features(random_policy())
    assert "progress" not in sets
    for name, members in sets.items():
        assert members.any()
        assert not members[INDEX["progress"]], name
    assert not sets["gradient norm"][INDEX["grad_noise"]]


@pytest.mark.parametrize(("tasks", "seeds"), [(TASKS[:1], 2), (TASKS, 1)])
def test_too_little_to_permute(tasks: tuple[Task, ...], seeds: int, store: Store, policy: ControlPolicy) -> None:
    with pytest.raises(ValueError, match=f"not {len(tasks)} and {seeds}"):
        inspect(policy, tasks, seeds, store)


@pytest.fixture
def policy() -> ControlPolicy:
    return random_policy()


def test_permuted_cells_are_told_apart_by_their_features(policy: ControlPolicy) -> None:
    one = Permuted(policy, sees=Elsewhere(tuple(observations()["long"])), features=("progress",))
    assert Cell(TASKS[0], one, (0,)).key != Cell(TASKS[0], replace(one, features=("horizon",)), (0,)).key


def test_cache_folder_is_used_again(store: Store) -> None:
    before = sorted(Path(store.folder).iterdir())
    policy = linear_policy({"val_since_start": {"lr": 1.0}, "progress": {"dropout": 0.2}})
    policy.header.trained_ranges["progress"] = (0.0, 0.9)
    inspect(policy, TASKS, 2, store, workers=1)
    assert sorted(Path(store.folder).iterdir()) == before
