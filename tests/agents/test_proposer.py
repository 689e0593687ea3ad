"""The LSTM that proposes trials: it learns to search, from scores, and searches emulators as it says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.emulators import Emulators
from agents.meta_dataset import Studied
from agents.proposer import Config, History, Proposer, unroll
from agents.state_file import save_state
from hpo_env.hyperparameters import Array
from inner_models.tasks import Task
from tests.studied import bowl, studied

SMALL = Config(features=False, hidden=16, trials=6, updates=200, batch=32, lr=2e-2)


def bowls() -> list[Studied]:
    """Tasks that like small or large values of three controls: nothing but scores (or the features) tells which."""
    centers = [np.array([*sides, 0.5]) for sides in product((0.1, 0.9), repeat=3)]
    return [
        studied(bowl(center), features={"a": center[0], "b": center[1], "c": center[2], "constant": 1.0})
        for center in centers
    ]


@pytest.fixture(scope="module")
def tasks() -> list[Studied]:
    return bowls()


@pytest.fixture(scope="module")
def emulators(tasks: list[Studied]) -> Emulators:
    return Emulators(tasks)


def searched(proposer: Proposer, emulators: Emulators, tasks: list[Studied], trials: int = 6) -> Array:
    """Mean best score so far over many searches, `[trials]`."""
    which = torch.arange(len(tasks)).repeat(20)
    scores = unroll(
        proposer,
        emulators,
        which,
        proposer.contexts(tasks)[which],
        trials,
        torch.Generator().manual_seed(1),
        spread=0.0,
    )
    return np.asarray(scores.cummin(dim=1).values.mean(dim=0).detach().double().numpy())


def test_learns_to_search_from_scores(tasks: list[Studied], emulators: Emulators) -> None:
    sighted, blind = (searched(Proposer.fit(tasks, replace(SMALL, blind=b)), emulators, tasks) for b in (False, True))
    untrained = searched(Proposer((), torch.zeros(1), torch.ones(1), hidden=16), emulators, tasks)
    best = np.mean([min(one.scores.min(), 0.0) for one in tasks])
    assert sighted[0] == 0.0
    assert sighted[-1] < 0.9 * best  # both below 0
    assert sighted.mean() < min(blind.mean(), untrained.mean()) + 0.05 * best
    few = searched(Proposer.fit(tasks, replace(SMALL, features=True)), emulators, tasks)
    assert few[1] < sighted[1] + 0.2 * best  # where the feature tells, the first proposal knows


def test_learning_is_reproducible_and_leaves_the_global_generator_alone(tasks: list[Studied]) -> None:
    few = replace(SMALL, updates=3)
    before = torch.random.get_rng_state()
    reports: list[int] = []
    one = Proposer.fit(tasks, few, reports.append)
    assert reports == [1, 2, 3]
    assert torch.equal(torch.random.get_rng_state(), before)
    other, seeded = Proposer.fit(tasks, few), Proposer.fit(tasks, replace(few, seed=1))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert not torch.equal(one._cell.weight_hh, seeded._cell.weight_hh)


class Told(Proposer):
    """Proposes what it is told, and keeps what it was shown."""

    def __init__(self, proposals: Tensor) -> None:
        super().__init__((), torch.zeros(1), torch.ones(1))
        self.proposals, self.shown = proposals, list[tuple[Tensor, Tensor, Tensor]]()

    def forward(self, history: History, settings: Tensor, score: Tensor, noise: Tensor) -> tuple[Tensor, History]:
        self.shown.append((settings, score, noise))
        return self.proposals[len(self.shown) - 1].expand(len(score), -1), history


def test_unrolling_shows_noisy_scores_and_returns_true_ones(tasks: list[Studied], emulators: Emulators) -> None:
    proposals = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    told, which = Told(proposals), torch.zeros(2000, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    scores = unroll(told, emulators, which, torch.zeros(2000, 1), 4, generator, spread=0.0)
    function = emulators.draw(which[:1], generator, spread=0.0)
    expected = [float(function(place[None]) - function(emulators.calibrated[:1])) for place in proposals]
    assert scores[0].tolist() == pytest.approx([0.0, *expected], abs=1e-4)
    assert torch.equal(told.shown[0][0], emulators.calibrated[which])
    assert told.shown[0][1].abs().max() == 0
    noise = float(emulators.noise[0])
    seen = torch.stack([shown[1] for shown in told.shown[1:]])
    errors = seen - scores[:, 1:3].T
    assert errors.std(dim=1).tolist() == pytest.approx([2**0.5 * noise] * 2, rel=0.1)
    assert float((errors[0] * errors[1]).mean()) == pytest.approx(noise**2, rel=0.2)  # the calibrated run's, shared
    assert float(told.shown[1][2].std()) == pytest.approx(1.0, rel=0.05)


def test_proposals_depend_on_scores_unless_blind_and_on_the_best_trial() -> None:
    history = History(torch.zeros(2, 1), torch.full((2, 4), 0.5), torch.zeros(2))
    settings, noise = torch.full((2, 4), 0.2), torch.zeros(2, 4)
    for blind in (False, True):
        proposer = Proposer((), torch.zeros(1), torch.ones(1), blind=blind)
        proposals, after = proposer(history, settings, torch.tensor([-0.3, 0.3]), noise)
        assert ((proposals > 0) & (proposals < 1)).all()
        assert torch.equal(proposals[0], proposals[1]) == blind
        if not blind:
            assert after.score.tolist() == pytest.approx([-0.3, 0.0])
            assert after.settings[:, 0].tolist() == pytest.approx([0.2, 0.5])
        shifted, _ = proposer(history, settings, torch.tensor([-0.3, 0.3]), noise + 1)
        assert (shifted > proposals).all()


def test_what_is_saved_comes_back(tasks: list[Studied], tmp_path: Path) -> None:
    proposer = Proposer.fit(tasks, replace(SMALL, updates=2, features=True))
    assert proposer.names == ("a", "b", "c", "constant")
    proposer.save(tmp_path / "proposer.safetensors")
    again = Proposer.load(tmp_path / "proposer.safetensors")
    assert (again.names, again.blind, again.landmark_cost) == (proposer.names, False, proposer.landmark_cost)
    history = History(again.contexts(tasks), torch.full((8, 4), 0.5), torch.zeros(8))
    given = (history, torch.full((8, 4), 0.2), torch.zeros(8), torch.ones(8, 4))
    assert torch.equal(proposer(*given)[0], again(*given)[0])
    save_state(tmp_path / "other.safetensors", {"kind": "surrogate"})
    with pytest.raises(ValueError, match=r"other\.safetensors: this is not .* recurrent-search but of 'surrogate'"):
        Proposer.load(tmp_path / "other.safetensors")


def test_contexts_are_standardized_and_clipped(tasks: list[Studied]) -> None:
    proposer = Proposer.fit(tasks, replace(SMALL, updates=1, features=True))
    contexts = proposer.contexts(tasks)
    assert contexts[:, 1].std() == pytest.approx(1.0, rel=1e-5)
    assert contexts[:, [0, 4]].abs().max() == 0  # constants
    far = replace(tasks[0], features={**tasks[0].features, "a": 1e6})
    assert proposer.contexts([far])[0, 1] == 3.0


def test_bad_input(tasks: list[Studied]) -> None:
    with pytest.raises(ValueError, match="trials at least 2, not 128, 1000, 64 and 1"):
        Config(trials=1)
    with pytest.raises(ValueError, match="equally many trials, not with no tasks"):
        Proposer.fit([])
    proposer = Proposer.fit(tasks, replace(SMALL, updates=1))
    with pytest.raises(ValueError, match="has studied no task with sgd"):
        proposer.context(Task.named("wine/mlp", optimizer="sgd"))
    assert proposer.context(Task.named("wine/mlp")).tolist() == [0.0]
