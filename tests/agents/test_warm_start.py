"""The warm start: nearest tasks recommend, the learned distance finds what matters, and nonsense is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import warm_start
from agents.application import train_cohort
from agents.cells import Cell
from agents.controllers import WithPolicy
from agents.learned_distance import Learning, expected_scores, learn_weights, same_dataset
from agents.meta_dataset import Studied, sampled
from agents.meta_features import meta_features
from agents.state_file import load_state, save_state
from agents.warm_start import METRICS, Beginning, Metric, PolicyWarmStart, WarmStart
from hpo_env.base_schedules import BaseSchedule
from hpo_env.hyperparameters import Array
from inner_models.models import ModelSpec
from inner_models.tasks import OptimizerName, Task
from tests.fabricated import runs
from tests.tiny import random_policy

TRIALS = 4
NOISE = 20
"""Features that say nothing."""


def task(name: str, number: int = 0, optimizer: OptimizerName = "adamw") -> Task:
    return Task(name, ModelSpec("mlp", 8, 1), optimizer, horizon=3, interval_examples=48, train_rows=64, seed=number)


def studied(features: dict[str, float], best: int, of: Task, margin: float = 0.5) -> Studied:
    """A task on which the trial `best` is better than the calibrated schedule, and the others are worse."""
    ends = [1.0 - margin if trial == best else 1.2 + 0.1 * trial for trial in range(TRIALS)]
    return Studied(of, features, runs(*ends), runs(1.0, 1.0))


def told(monkeypatch: pytest.MonkeyPatch, **features: float) -> None:
    """Whatever the task, these are its meta-features."""
    monkeypatch.setattr(warm_start, "meta_features", lambda task: features)


def two_kinds(optimizer: OptimizerName = "adamw") -> list[Studied]:
    """Small tasks, which like trial 1, and large ones, which like trial 2; on a scale unlike that of `depth`."""
    names = ("digits", "wine", "iris")
    small = [studied({"size": 100.0 + n, "depth": 0.1 * n}, 1, task(names[n], n, optimizer)) for n in range(3)]
    large = [studied({"size": 900.0 + n, "depth": 0.1 * n}, 2, task(names[n], n, optimizer)) for n in range(3)]
    return [*small, *large]


def noisy(count: int = 48, seed: int = 0) -> list[Studied]:
    """One feature decides which trial is best, the others are noise. Eight data sets."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        features = {"kind": float(rng.choice([-1, 1])), **{f"noise-{n}": float(rng.normal()) for n in range(NOISE)}}
        found.append(studied(features, 1 if features["kind"] > 0 else 2, task(f"teacher-{number % 8}", number)))
    return found


# -- what is recommended -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_tasks_recommend(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    start = WarmStart.fit(two_kinds(), metric, neighbours=3)
    for size, best in ((120.0, 1), (880.0, 2)):
        told(monkeypatch, size=size, depth=0.1)
        assert start.choose(task("vowel")) == best
        assert start.suggest(task("vowel")).to_dict() == pytest.approx(sampled("adamw", TRIALS)[best].to_dict())


def test_the_mean_score_decides_not_the_most_frequent_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks gain a little from trial 1, one gains a lot from trial 2, all equally near."""
    features = {"size": 1.0}
    tasks = [studied(features, 1, task("digits"), 0.01), studied(features, 1, task("wine"), 0.01)]
    told(monkeypatch, size=1.0)
    start = WarmStart.fit([*tasks, studied(features, 2, task("iris"), 0.9)], "euclidean", neighbours=3)
    assert start.choose(task("vowel")) == 2


def test_nearer_neighbours_weigh_more(monkeypatch: pytest.MonkeyPatch) -> None:
    near = [studied({"size": 0.0}, 1, task("digits"))]
    far = [studied({"size": size}, 2, task("wine", number)) for number, size in enumerate((9.0, -9.0, 10.0))]
    told(monkeypatch, size=0.0)
    assert WarmStart.fit([*near, *far], "euclidean", neighbours=3).choose(task("vowel")) == 1


def test_scales_and_constants_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    distances: list[Array] = []
    for factor in (1.0, 1000.0):
        told(monkeypatch, size=300 * factor, depth=0.1, constant=7.0)
        moved = [
            replace(one, features={**one.features, "size": one.features["size"] * factor, "constant": 7.0})
            for one in two_kinds()
        ]
        distances.append(WarmStart.fit(moved, "euclidean", 1).distances(task("vowel")))
        told(monkeypatch, size=300 * factor, depth=0.1, constant=8.0)  # one beyond: a deviation of nothing known
        assert np.isfinite(WarmStart.fit(moved, "euclidean", 1).distances(task("vowel"))).all()
    np.testing.assert_allclose(distances[0], distances[1])


def test_an_outlier_is_no_farther_than_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    start = WarmStart.fit(two_kinds(), "euclidean", 1)
    told(monkeypatch, size=1e9, depth=0.1)
    assert start.distances(task("vowel")).max() < 2 * warm_start.CLIP
    assert start.choose(task("vowel")) == 2


def test_cosine_is_blind_to_length(monkeypatch: pytest.MonkeyPatch) -> None:
    start = WarmStart.fit(two_kinds(), "cosine", 1)
    table = start.tables["adamw"]
    found: list[Array] = []
    for factor in (1, 2):
        own = dict(zip(start.features, (table.mean + factor * table.std * [0.4, -0.2]).tolist(), strict=True))
        told(monkeypatch, **own)
        found.append(start.distances(task("vowel")))
    np.testing.assert_allclose(found[0], found[1])
    assert found[0].min() >= 0
    assert found[0].max() <= 2


def test_each_optimizer_has_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = [replace(one, task=replace(one.task, optimizer="sgd")) for one in two_kinds()[:3]]
    start = WarmStart.fit([*two_kinds()[3:], *sgd], "learned", 3)
    told(monkeypatch, size=500.0, depth=0.1)
    assert start.choose(task("vowel", optimizer="sgd")) == 1
    assert start.choose(task("vowel")) == 2
    assert start.suggest(task("vowel", optimizer="sgd")).to_dict() == pytest.approx(sampled("sgd", 2)[1].to_dict())


# -- the learned distance ----------------------------------------------------------------------------------------------


def test_the_learned_distance_finds_the_feature_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    right: dict[Metric, int] = {"euclidean": 0, "learned": 0}
    for metric in right:
        start = WarmStart.fit(noisy(), metric, 4)
        for one in noisy(seed=1):
            told(monkeypatch, **one.features)
            right[metric] += start.choose(task("vowel")) == one.scores.argmin()
    assert right["learned"] >= 46 > right["euclidean"]
    weights = WarmStart.fit(noisy(), "learned", 4).tables["adamw"].weights
    assert weights[0] > 2 * weights[1:].max()
    assert (weights > 0).all()


def test_what_soft_neighbours_recommend_by_hand() -> None:
    """Task 0 hears 1 and 2 at squared distances 1 and 4; 3 shares its data set."""
    places = torch.tensor([[0.0], [1.0], [2.0], [0.0]], dtype=torch.float64)
    scores = torch.tensor([[0.3, -0.1], [-0.2, 0.4], [0.1, 0.0], [5.0, 5.0]], dtype=torch.float64)
    own = same_dataset(["a", "b", "c", "a"])
    found = expected_scores(places, scores, own, torch.tensor([1.0], dtype=torch.float64), 0.5)
    near = 1 / (1 + np.exp(-3.0))
    heard = near * scores[1].numpy() + (1 - near) * scores[2].numpy()
    first = 1 / (1 + np.exp((heard[0] - heard[1]) / 0.5))
    assert found[0].item() == pytest.approx(first * 0.3 + (1 - first) * -0.1)


def test_learning_lowers_its_objective() -> None:
    start = WarmStart.fit(noisy(), "euclidean", 4)
    table = start.tables["adamw"]
    names = [one.task.dataset for one in noisy()]
    learning = Learning()

    def objective(weights: Any) -> float:
        group = (torch.from_numpy(table.places), torch.from_numpy(table.scores), same_dataset(names))
        return float(expected_scores(*group, torch.as_tensor(weights), learning.temperature).mean())

    size = len(start.features)
    learned = learn_weights(table.places, table.scores, names, learning)
    assert objective(learned) < objective(np.full(size, learning.scale / size)) - 0.02
    held = learn_weights(table.places, table.scores, names, replace(learning, pull=1e6))
    np.testing.assert_allclose(held, learning.scale / size, rtol=0.2)


# -- on runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_cohort_follows_the_suggestion(optimizer: OptimizerName) -> None:
    """With the true meta-features, through the judge's cell."""
    own = task("digits", optimizer=optimizer)
    names = tuple(meta_features(own))
    start = WarmStart.fit(
        [replace(one, features=dict.fromkeys(names, 0.0)) for one in two_kinds(optimizer)], neighbours=2
    )
    cell = Cell(own, start, (0, 1))
    run = cell.compute("cpu")[1]
    expected = start.suggest(own).values((np.arange(3) + 0.5) / 3)
    for name, values in run.controls.items():  # type: ignore[union-attr]
        assert values == pytest.approx(expected[name])
    assert cell.key != Cell(own, replace(start, neighbours=3), (0, 1)).key


def test_a_policy_begins_with_the_suggestion_and_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    own, policy = task("digits"), random_policy(scale=2.0)
    monkeypatch.setattr(WarmStart, "suggest", lambda self, task: BaseSchedule(5e-3, 32, 0.3, 0.2))
    start = WarmStart.fit(two_kinds(), neighbours=2)
    (run,) = train_cohort(own, PolicyWarmStart(policy, start), [0])
    (alone,) = train_cohort(own, WithPolicy(policy), [0])
    rule = policy.header.base_rule("adamw")
    lr = 5e-3 * rule.schedule(144, 1).values(np.array([1 / 6]))["lr"] / rule.schedule(144, 1).lr
    assert [run.controls[name][0] for name in ("lr", "batch_size", "weight_decay")] == pytest.approx([lr[0], 32, 0.3])
    assert run.controls["lr"][0] != pytest.approx(alone.controls["lr"][0], rel=0.05)
    beginning = Beginning(policy, BaseSchedule(1e-3, 16, 0.01, 0.1), BaseSchedule(9e9, 16, 0.01, 0.1))
    observation = np.random.default_rng(0).uniform(size=(2, len(policy.header.features))).astype(np.float32)
    observation[:, policy.header.features.index("first_decision")] = (1, 0)
    actions = beginning.act(observation)[0]
    np.testing.assert_allclose(actions[0, 1:], 0, atol=1e-12)
    assert actions[0, 0] > 1  # the control loop clips it
    np.testing.assert_array_equal(actions[1], policy.act(observation)[0][1])


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_it_comes_back_from_disk(metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = WarmStart.fit(two_kinds(), metric, 2)
    start.save(tmp_path / "start")
    again = WarmStart.load(tmp_path / "start")
    told(monkeypatch, size=880.0, depth=0.2)
    np.testing.assert_array_equal(again.distances(task("vowel")), start.distances(task("vowel")))
    assert again.suggest(task("vowel")) == start.suggest(task("vowel"))
    assert Cell(task("vowel"), again, (0,)).key == Cell(task("vowel"), start, (0,)).key


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "maml"}, "it is of a maml"),
        ({"metric": "euclid"}, "did you mean 'euclidean'"),
        ({"neighbours": 7}, "neighbours must lie in 1..6, not 7"),
        ({"features": ("size",)}, "tables of 1 features are needed"),
        ({"tables": {}}, "and at least one"),
        ({"tables": None}, "NoneType"),
        ({"mean": torch.zeros(3)}, "std must be finite and of the shape"),
        ({"std": torch.zeros(2)}, "std must be above 0"),
        ({"weights": torch.tensor([1.0, -1.0])}, "no weight below"),
        ({"weights": torch.tensor([1.0, torch.inf])}, "weights must be finite"),
    ],
)
def test_a_file_that_cannot_be_used(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    WarmStart.fit(two_kinds(), "euclidean", 2).save(tmp_path / "start")
    state = load_state(tmp_path / "start")
    holder = state if changed.keys() <= state.keys() else state["tables"]["adamw"]
    holder.update(changed)
    save_state(tmp_path / "start", state)
    with pytest.raises(ValueError, match=message) as error:
        WarmStart.load(tmp_path / "start")
    assert str(tmp_path / "start") in str(error.value)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = WarmStart.fit
    with pytest.raises(ValueError, match="unknown metric 'cosin'; did you mean 'cosine'"):
        fit(two_kinds(), "cosin", 2)  # type: ignore[arg-type]
    for neighbours in (0, 7):
        with pytest.raises(ValueError, match=rf"neighbours must lie in 1..6, not {neighbours}; .* 6 with adamw"):
            fit(two_kinds(), "euclidean", neighbours)
    with pytest.raises(ValueError, match="there must be studied tasks"):
        fit([])
    with pytest.raises(ValueError, match="no task with sgd was studied, only with adamw"):
        fit(two_kinds(), "euclidean", 2).suggest(task("digits", optimizer="sgd"))
    with pytest.raises(ValueError, match="two data sets or more, not on digits alone"):
        fit([replace(one, task=task("digits")) for one in two_kinds()], "learned", 2)
    first, *others = two_kinds()
    with pytest.raises(ValueError, match="differ in the names of their features"):
        fit([replace(first, features={"size": 1.0}), *others], "euclidean", 2)
    with pytest.raises(ValueError, match="differ in their numbers of trials"):
        fit([replace(first, runs=first.runs[1:]), *others], "euclidean", 2)
