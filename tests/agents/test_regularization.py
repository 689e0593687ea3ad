"""Augmentation and label smoothing in searches, in fixed strengths, and in a user's plain loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from agents import Augment, Tuner
from agents.application import Run, train_cohort
from agents.calibration import REGULARIZER_RANGE, RandomTrials, sample_schedules
from agents.cells import Store
from agents.population_based import Population
from agents.regularization import AtStrengths, measure
from agents.replay import Replay
from agents.schedules import Cosine
from agents.searches import OptunaSearch
from hpo_env import HPOEnv, HPOVectorEnv, Variation
from hpo_env.base_schedules import REGULARIZERS, calibrated, calibrated_rule
from hpo_env.env import draw_episode
from hpo_env.hyperparameters import CONTROLS
from inner_models.batched_training import BatchedTraining
from inner_models.tasks import Regularizer, Task
from tests.user_runs import Loop, constant_policy, through_a_file

BOTH: tuple[Regularizer, ...] = ("augmentation", "label_smoothing")
PLAIN = Task.named("digits/mlp", horizon=3, interval_examples=96, train_rows=96, eval_rows=64)
TASK = replace(PLAIN, regularizers=BOTH)


class Regularized(Loop):
    """A user's plain loop, with an augmentation before the model and a smoothed loss."""

    def __init__(self, strength: float = 0.1, smoothing: float = 0.1) -> None:
        super().__init__()
        self.augment = Augment("image", strength)
        self.model = nn.Sequential(self.augment, self.model)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def epoch(self, number: int, batch_size: int = 64) -> tuple[float, float]:
        torch.manual_seed(number)
        self.model.train()
        for rows in torch.split(torch.randperm(192), batch_size):
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(self.train.inputs[rows]), self.train.targets[rows])
            loss.backward()
            self.optimizer.step()
        self.model.eval()
        with torch.no_grad():
            return loss.item(), cross_entropy(self.model(self.val.inputs), self.val.targets).item()


def attached(run: Regularized, **arguments: Any) -> Tuner:
    policy = constant_policy(augmentation=0.5, label_smoothing=-0.4)
    given = {"model": run.model, "criterion": run.criterion, "total_epochs": 4, **arguments}
    return Tuner(policy, run.optimizer, **given)


def test_a_tuner_moves_both_in_a_plain_loop() -> None:
    run = Regularized()
    tuner = attached(run, start="given", max_factor=20.0)
    used = []
    for epoch in range(4):
        used.append((run.augment.strength, run.criterion.label_smoothing))
        assert tuner.hyperparameters["augmentation"] == run.augment.strength
        assert tuner.hyperparameters["label_smoothing"] == run.criterion.label_smoothing
        train_loss, val_loss = run.epoch(epoch)
        tuner.step(train_loss=train_loss, val_loss=val_loss)
    odds = np.array(used) / (1 - np.array(used)) * 9  # of the user's tenth, whose odds are 1/9
    first = np.log((0.1 / 0.9) / (0.005 / 0.995))  # to the rule's 0.005, which is further than 2.5
    expected = np.exp(np.outer(first + np.arange(4), [0.5, -0.4])).clip(1 / 20, 20)
    low, high = (limit / (1 - limit) * 9 for limit in (0.005, 0.5))
    np.testing.assert_allclose(odds, expected.clip(low, high), rtol=1e-6)
    assert "augmentation" in tuner.history[0]["reason"]
    assert {entry["hyperparameters"].keys() >= set(BOTH) for entry in tuner.history} == {True}


def test_what_is_off_or_not_handed_over_stays_as_it_is() -> None:
    off = Regularized(0.0, 0.0)
    assert set(attached(off).hyperparameters) == {"lr", "weight_decay", "dropout"}
    assert (off.augment.strength, off.criterion.label_smoothing) == (0.0, 0.0)
    kept = Regularized()
    tuner = attached(kept, model=None, criterion=None)
    tuner.step(train_loss=1.0, val_loss=1.0)
    assert (kept.augment.strength, kept.criterion.label_smoothing) == (0.1, 0.1)
    alone = Regularized()
    tuner = attached(alone, controls=["label_smoothing"])
    assert alone.augment.strength == 0.1
    assert alone.criterion.label_smoothing != 0.1


def test_they_are_in_checkpoints_and_replays(tmp_path: Path) -> None:
    whole, stopped = Regularized(), Regularized()
    tuners = [attached(run) for run in (whole, stopped)]
    for epoch in range(2):
        for tuner in tuners:
            tuner.step(train_loss=1.0 / (epoch + 1), val_loss=1.0)
    resumed = attached(again := Regularized())
    resumed.load_state_dict(through_a_file(tuners[1].state_dict()))
    values = tuners[0].step(train_loss=0.3, val_loss=0.9)
    assert resumed.step(train_loss=0.3, val_loss=0.9) == values
    assert (again.augment.strength, again.criterion.label_smoothing) == tuple(values[name] for name in BOTH)
    tuners[0].step(train_loss=0.2, val_loss=0.8)
    tuners[0].trajectory.save(tmp_path / "run.json")
    run = Regularized()
    replay = Replay.load(tmp_path / "run.json", run.optimizer, model=run.model, criterion=run.criterion, total_epochs=4)
    for epoch in range(4):
        recorded = {name: tuners[0].trajectory.values[name][epoch] for name in BOTH}
        assert {"augmentation": run.augment.strength, "label_smoothing": run.criterion.label_smoothing} == recorded
        replay.step()


# -- the environments --------------------------------------------------------------------------------------------------


def test_a_run_without_them_is_as_it_was() -> None:
    """Whatever is asked of the controls that it lacks: same observations, rewards and losses; they stand at 0."""
    rng = np.random.default_rng(0)
    calm = rng.uniform(-1, 1, (3, 2, len(CONTROLS))).astype(np.float32)
    wild = calm.copy()
    wild[..., 4:] = rng.uniform(-1, 1, wild[..., 4:].shape)
    for variation in (Variation(), Variation(mask_probability=0.5, start_probability=1.0)):
        found = []
        for actions in (calm, wild):
            env = HPOVectorEnv(2, task=PLAIN, variation=variation)
            seen: list[np.ndarray] = [env.reset(seed=1)[0]]
            for action in actions:
                observation, reward, *_, info = env.step(action)
                seen += [observation, reward]
                values = info.get("final_info", info)
                assert not np.concatenate([values[name] for name in BOTH]).any()
            found.append(np.concatenate([np.ravel(part) for part in seen]))
        np.testing.assert_array_equal(found[0], found[1])


def test_a_run_with_them_is_moved_by_them() -> None:
    env = HPOEnv(TASK)
    _, info = env.reset(seed=0)
    base = calibrated_rule("adamw").peaks(np.array([np.nan]), np.array([1.0]))
    assert {name: info[name] for name in BOTH} == {name: base[name][0] for name in BOTH}
    assert {name: info[name] for name in BOTH} == pytest.approx(REGULARIZERS)
    up = np.array([0, 0, 0, 0, 1, 1], np.float32)
    after = env.step(up)[4]
    for name in BOTH:
        odds = REGULARIZERS[name] / (1 - REGULARIZERS[name]) * np.exp(2.5)
        assert after[name] == pytest.approx(odds / (1 + odds), rel=1e-5)


def test_draws_for_them_move_no_others() -> None:
    variation = Variation(mask_probability=0.5, start_probability=0.5)
    rng, reference = np.random.default_rng(3), np.random.default_rng(3)
    episode = draw_episode(rng, variation)
    reference.integers(2**31)
    taken, values = reference.random(4) < 0.5, reference.random(4)  # as when there were four
    reference.random()
    reference.random(4), reference.uniform(-1, 1, 4), reference.random(3)
    assert reference.random() == rng.random()
    old = list(CONTROLS)[1:4]
    assert [name in episode.fixed for name in old] == taken[1:].tolist()
    expected = {name: CONTROLS[name].denormalize(values[list(CONTROLS).index(name)]) for name in old}
    assert all(episode.fixed[name] == expected[name] for name in old if name in episode.fixed)


# -- searches ----------------------------------------------------------------------------------------------------------


def test_random_search_covers_them_where_a_task_has_them() -> None:
    without = sample_schedules("adamw", 50, np.random.default_rng(0))
    both = sample_schedules("adamw", 50, np.random.default_rng(0), regularizers=BOTH)
    for plain, schedule in zip(without, both, strict=True):
        assert replace(schedule, augmentation=0.0, label_smoothing=0.0) == plain
    drawn = np.array([[getattr(schedule, name) for name in BOTH] for schedule in both])
    low, high = REGULARIZER_RANGE
    assert low <= drawn.min() < 2 * low
    assert high / 2 < drawn.max() <= high
    assert 0.3 < (drawn < np.sqrt(low * high)).mean() < 0.7
    assert (drawn[:, 0] != drawn[:, 1]).all()
    chunks = [train_cohort(TASK, RandomTrials(start, 2), [0, 0]) for start in (0, 2)]
    found = [[run.controls[name][0] for name in BOTH] for chunk in chunks for run in chunk]
    np.testing.assert_allclose(found, drawn[:4])


def test_populations_and_optuna_move_them() -> None:
    training = BatchedTraining(TASK, [0] * 5)
    population = Population(training, range(5), seed=0)
    before = {name: population.values(name) for name in BOTH}
    population.observe(np.arange(5.0))
    population.select()
    assert all((population.values(name) != before[name]).any() for name in BOTH)
    others = Population(BatchedTraining(PLAIN, [0] * 5), range(5), seed=0)  # for which nothing may be drawn
    assert list(others._values) == ["lr", "batch_size", "weight_decay", "dropout"]
    (found,) = OptunaSearch("tpe", 3).run(TASK, [0])
    assert all(set(BOTH) < trial.params.keys() for trial in found.trials)
    assert len({trial.params["augmentation"] for trial in found.trials}) == 3
    (grid,) = OptunaSearch("grid", 2).run(TASK, [0])
    assert {trial.params[name] for trial in grid.trials for name in BOTH} == {0.0}


# -- fixed strengths ---------------------------------------------------------------------------------------------------


def test_fixed_strengths() -> None:
    runs = train_cohort(TASK, AtStrengths("augmentation", (0.0, 0.3)), [0, 1] * 2)
    assert [run.controls["augmentation"] for run in runs] == [[0.0] * 3] * 2 + [[0.3] * 3] * 2
    assert all(run.controls["label_smoothing"] == [0.0] * 3 for run in runs)
    plain = train_cohort(PLAIN, Cosine("calibrated"), [0, 1])
    for run, other in zip(runs[:2], plain, strict=True):
        assert run.val_loss == pytest.approx(other.val_loss, rel=1e-6)
        assert run.test_loss == pytest.approx(other.test_loss, rel=1e-6)
    assert runs[2].val_loss != runs[0].val_loss
    with pytest.raises(ValueError, match="3 runs cannot be divided evenly among 2 strengths"):
        train_cohort(TASK, AtStrengths("augmentation", (0.0, 0.3)), [0, 1, 2])


def test_effects_are_ratios_to_the_run_without(tmp_path: Path) -> None:
    tasks = {"digits": PLAIN, "diabetes": replace(PLAIN, dataset="diabetes")}
    effects = measure(tasks, (0.2, 0.4), Store(tmp_path), seeds=2, workers=1)
    assert [(effect.label, effect.modality, effect.regularizer) for effect in effects] == [
        ("digits", "image", "augmentation"),
        ("diabetes", "table", "augmentation"),
        ("digits", "image", "label_smoothing"),
    ]

    def final(regularizer: Regularizer, strength: float) -> list[float]:
        schedule = AtStrengths(regularizer, (strength,))
        runs: list[Run] = train_cohort(replace(PLAIN, regularizers=(regularizer,)), schedule, [0, 1])
        return [run.val_loss[-1] for run in runs]

    for effect in (effects[0], effects[2]):
        ratio = np.log(final(effect.regularizer, 0.0)) - np.log(final(effect.regularizer, 0.4))
        np.testing.assert_allclose(effect.val[1], ratio, rtol=1e-3, atol=1e-5)
        assert effect.test.shape == effect.val.shape == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 1}, "seeds must be at least 2, not 1"),
        ({"strengths": ()}, "strengths must lie between 0 and 1, not none at all"),
        ({"strengths": (0.1, 1.0)}, "not 0.1, 1.0"),
        ({"strengths": (0.0,)}, "not 0.0"),
    ],
)
def test_what_a_measurement_refuses(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure({"digits": PLAIN}, **{"strengths": (0.1,), "store": Store(tmp_path), **arguments})


def test_the_calibrated_schedule_has_them() -> None:
    schedule = calibrated("adamw")
    assert {name: getattr(schedule, name) for name in REGULARIZERS} == REGULARIZERS
    assert json.loads(json.dumps(schedule.to_dict()))["label_smoothing"] == REGULARIZERS["label_smoothing"]
