"""Searching by a proposer: what it is shown, what is trained, what is recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents import recurrent_search
from agents.application import train_cohort
from agents.calibration import SEARCHED
from agents.emulators import flattened
from agents.meta_dataset import from_unit, to_unit
from agents.meta_features import LANDMARK_COST, meta_features
from agents.proposer import History, Proposer
from agents.recurrent_search import RecurrentSearch
from agents.schedules import Cosine
from agents.searches import Searched
from hpo_env.base_schedules import calibrated
from hpo_env.hyperparameters import CONTROLS
from inner_models.batched_training import BatchedTraining
from inner_models.models import ModelSpec
from inner_models.tasks import Task

TASK = Task("digits", ModelSpec("mlp", 8, 1), horizon=5, interval_examples=64, train_rows=96, eval_rows=64)


class Watched(Proposer):
    """Keeps what it was shown and what it proposed."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__((), torch.zeros(1), torch.ones(1))
        self.requires_grad_(False)
        self.settings, self.scores, self.proposals = list[Tensor](), list[Tensor](), list[Tensor]()

    def forward(self, history: History, settings: Tensor, score: Tensor, noise: Tensor) -> tuple[Tensor, History]:
        proposals, history = super().forward(history, settings, score, noise)
        for kept, value in ((self.settings, settings), (self.scores, score), (self.proposals, proposals)):
            kept.append(value)
        return proposals, history


def timeless(searched: Sequence[Searched]) -> list[Searched]:
    return [replace(study, seconds=0.0) for study in searched]


@pytest.fixture(scope="module")
def proposer() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def found(proposer: Watched) -> list[Searched]:
    return RecurrentSearch(proposer, 4).run(TASK, [0, 3])


def test_the_first_trial_is_the_calibrated_schedule(found: list[Searched]) -> None:
    for study, run in zip(found, train_cohort(TASK, Cosine("calibrated"), [0, 3]), strict=True):
        assert study.trials[0].params == {name: getattr(calibrated("adamw"), name) for name in SEARCHED}
        assert study.trials[0].val_loss == pytest.approx(run.val_loss, rel=1e-4)
        assert study.test[0] == pytest.approx(run.test_loss, rel=1e-4)


def test_proposals_are_trained_and_their_scores_shown(found: list[Searched], proposer: Watched) -> None:
    start = to_unit(calibrated("adamw"), "adamw")
    assert proposer.settings[0].tolist() == [pytest.approx(start.tolist(), abs=1e-6)] * 2
    assert proposer.scores[0].tolist() == [0.0, 0.0]
    for index, study in enumerate(found):
        ends = np.array([trial.val_loss[-1] for trial in study.trials])
        scores = flattened(np.log(ends / ends[0]))
        for trial in range(1, 4):
            place = proposer.proposals[trial - 1][index].double().numpy()
            schedule = from_unit(place, "adamw")
            assert study.trials[trial].params == {name: getattr(schedule, name) for name in SEARCHED}
            if trial < 3:
                assert proposer.settings[trial][index].tolist() == pytest.approx(place.tolist())
                assert float(proposer.scores[trial][index]) == pytest.approx(scores[trial], abs=1e-5)
        assert study.trials[1].params != study.trials[2].params
    assert found[0].trials[1].params != found[1].trials[1].params  # each study draws its own


def test_a_trial_follows_the_cosine_schedule_from_fresh_weights(found: list[Searched]) -> None:
    training = BatchedTraining(TASK, [3])
    params = found[1].trials[2].params
    losses = []
    for interval in range(TASK.horizon):
        schedule = from_unit(to_unit(replace(calibrated("adamw"), **params), "adamw"), "adamw")
        values = schedule.values(np.asarray([(interval + 0.5) / TASK.horizon]))
        losses.append(float(training.advance({name: values[name] for name in CONTROLS})["val_loss"][0]))
    assert found[1].trials[2].val_loss == pytest.approx(losses, rel=1e-3)


def test_records(found: list[Searched]) -> None:
    for study in found:
        ends = [trial.val_loss[-1] for trial in study.trials]
        assert study.cost == [1.0, 2.0, 3.0, 4.0]
        assert study.best == np.minimum.accumulate(ends).tolist()
        changes = np.flatnonzero(np.diff([math.inf, *study.best]))
        assert len(set(study.test)) == len(changes)
        assert [len(trial.val_loss) for trial in study.trials] == [TASK.horizon] * 4
        assert not any(trial.pruned for trial in study.trials)
        assert Searched.from_dict(json.loads(json.dumps(asdict(study)))) == study


def test_test_losses_are_of_the_incumbent_where_its_validation_loss_was_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights at each interval are known by a counter: the test loss tells which were kept."""
    snapshots: list[Mapping[str, Tensor]] = []
    losses = iter([[1.0], [3.0], [2.0], [0.9], [0.5], [1.7]])  # the first and the third are better before their ends
    task = replace(TASK, horizon=2)

    class Scripted(BatchedTraining):
        def advance(self, hyperparameters: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
            return super().advance(hyperparameters) | {"val_loss": np.array(next(losses))}

    def held_out(training: BatchedTraining, kept: Sequence[Mapping[str, Tensor]], rows: object) -> list[float]:
        snapshots.extend(kept)
        return [10.0 + index for index in range(len(kept))]

    monkeypatch.setattr(recurrent_search, "BatchedTraining", Scripted)
    monkeypatch.setattr(recurrent_search, "held_out_losses", held_out)
    (found,) = RecurrentSearch(Watched(), 3).run(task, [0])
    assert found.best == [3.0, 0.9, 0.9]
    assert found.test == [10.0, 11.0, 11.0]
    steps = 64 // int(calibrated("adamw").batch_size)
    assert int(snapshots[0]["steps"]) == steps


def test_studies_are_reproducible_and_do_not_depend_on_cohort_mates(found: list[Searched]) -> None:
    assert timeless(RecurrentSearch(Watched(), 4).run(TASK, [0, 3])) == timeless(found)
    (alone,) = RecurrentSearch(Watched(), 4).run(TASK, [3])
    for one, other in zip(alone.trials, found[1].trials, strict=True):
        assert one.params == pytest.approx(other.params, rel=1e-3)
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_diverged_trials_teach_and_cannot_win(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both studies, or of the second alone."""

    class Fragile(BatchedTraining):
        def advance(self, hyperparameters: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
            self._state["values"][-int(2 * share) :] = math.nan
            return super().advance(hyperparameters)

    monkeypatch.setattr(recurrent_search, "BatchedTraining", Fragile)
    proposer = Watched()
    found = RecurrentSearch(proposer, 3).run(TASK, [0, 1])
    assert set(found[1].best) == set(found[1].test) == {math.inf}
    assert all(torch.isfinite(torch.stack(kept)).all() for kept in (proposer.scores, proposer.proposals))
    assert math.isfinite(found[0].best[0]) == math.isfinite(found[0].test[-1]) == (share < 1)


def test_models_without_dropout_have_none(proposer: Watched) -> None:
    (found,) = RecurrentSearch(proposer, 2).run(replace(TASK, model=ModelSpec("linear"), horizon=2), [0])
    assert all("dropout" not in trial.params for trial in found.trials)


def test_landmarks_are_in_the_cost() -> None:
    names = tuple(meta_features(TASK))
    proposer = Proposer(names, torch.zeros(1 + len(names)), torch.ones(1 + len(names))).requires_grad_(False)
    (found,) = RecurrentSearch(proposer, 2).run(TASK, [0])
    assert found.cost == [LANDMARK_COST + 1, LANDMARK_COST + 2]


def test_test_split_is_seen_at_the_end_alone(monkeypatch: pytest.MonkeyPatch, proposer: Watched) -> None:
    seen: list[str] = []

    class Evaluated(BatchedTraining):
        def evaluate(self, split: object) -> NDArray[np.float64]:
            seen.append(split if isinstance(split, str) else "held out")
            return super().evaluate(split)  # type: ignore[arg-type]

    monkeypatch.setattr(recurrent_search, "BatchedTraining", Evaluated)
    RecurrentSearch(proposer, 2).run(TASK, [0])
    assert "held out" in seen
    first = seen.index("held out")
    assert set(seen[:first]) == {"val"}
    assert set(seen[first:]) == {"held out"}


def test_bad_input(proposer: Watched) -> None:
    with pytest.raises(ValueError, match="budget must be at least 1, not 0"):
        RecurrentSearch(proposer, 0)
