"""Meta-training: it learns, it leaves what it says, two runs are equal, and it goes on where it was interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.utils import set_random_seed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from agents.checkpoints import Checkpoints
from agents.policy import ControlPolicy, PolicyHeader
from agents.policy_file import of_controls
from agents.ppo import HIDDEN, UNSEEN_VARIANCE, Progress, build, export, meta_train
from agents.presets import MetaTrainingConfig
from agents.rollouts import RolloutWorkers, Step
from agents.vec_env import CohortEnv, CohortVecEnv
from hpo_env.env import Variation
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from inner_models.tasks import Regularizer
from tests.faults.resume import curves, entries
from tests.tiny import TINY, TINY_CONFIG

Array = NDArray[np.float32]


# -- a problem whose solution is known ---------------------------------------------------------------------------------


class Quadratics:
    """Gradient descent on f(x) = h x^2 / 2, each run with a curvature h of its own, which is seen as log h / SPAN.

    The learning rate is exp(offset); the first action moves the offset by up to SPAN, later ones by up to 1. One step
    multiplies x by 1 - lr h, so the best there is, is to jump to lr = 1 / h (the action -log h / SPAN) and to stay
    there. The reward is the fall of log(x^2 + FLOOR), with x^2 capped.
    """

    SPAN, HORIZON, FLOOR, CAP = 2.5, 4, 1e-2, 10.0
    BEST = float(np.log((1 + FLOOR) / FLOOR))

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._x = np.ones(runs)

    def reset(self, seed: int) -> Array:
        self._rng = np.random.default_rng(seed)
        return self._begin()

    def step(self, actions: NDArray[Any]) -> Step:
        before = np.log(self._x**2 + self.FLOOR)
        self._offset += np.clip(actions[:, 0], -1, 1) * (1.0 if self._time else self.SPAN)
        factor = 1 - np.exp(np.minimum(self._offset + self._log_h, 5.0))
        self._x = np.minimum(np.abs(self._x * factor), self.CAP)
        self._time += 1
        rewards = before - np.log(self._x**2 + self.FLOOR)
        done = self._time == self.HORIZON
        infos = [{"terminal_observation": row} for row in self._observe()] if done else [{}] * self._runs
        return self._begin() if done else self._observe(), rewards, np.full(self._runs, done), infos

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("this problem is never interrupted")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("this problem is never interrupted")

    def _begin(self) -> Array:
        self._time = 0
        self._log_h = self._rng.uniform(-self.SPAN, self.SPAN, self._runs)
        self._offset, self._x = np.zeros(self._runs), np.ones(self._runs)
        return self._observe()

    def _observe(self) -> Array:
        progress = np.full(self._runs, self._time / self.HORIZON)
        return np.stack([self._log_h / self.SPAN, progress], axis=1).astype(np.float32)


def share_of_best(decide: Callable[[Array], NDArray[Any]]) -> float:
    """Mean return over 256 runs, over the best possible."""
    env = Quadratics(256)
    observations, total = env.reset(1000), np.zeros(256)
    for _ in range(env.HORIZON):
        observations, rewards, _, _ = env.step(decide(observations))
        total += rewards
    return float(total.mean()) / env.BEST


TOY = MetaTrainingConfig(
    timesteps=8192, cohorts=4, replicas=16, rollout_steps=8, validate_every=1, validation_seeds=1, minibatch=128,
    learning_rate=2e-3,
)  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_is_real(seed: int) -> None:
    rng = np.random.default_rng(0)
    assert share_of_best(lambda seen: np.where(seen[:, 1:] == 0, -seen[:, :1], 0.0)) == pytest.approx(1.0)
    assert share_of_best(lambda seen: np.zeros((len(seen), 1))) < 0.3
    assert share_of_best(lambda seen: rng.uniform(-1, 1, (len(seen), 1))) < 0.3

    set_random_seed(seed)
    runs, boxes = TOY.cohorts * TOY.replicas, [spaces.Box(-1.0, 1.0, (size,), np.float32) for size in (2, 1)]
    model = build(TOY, RolloutWorkers(lambda: Quadratics(runs), runs, *boxes, seed=seed))
    stand_ins = tuple(feature.name for feature in FEATURES[:2])  # for the curvature and the progress
    header = PolicyHeader(hidden=HIDDEN, base_rules={}, features=stand_ins, controls=("lr",))
    shares = []
    for timesteps in (0, TOY.timesteps):
        model.learn(timesteps)
        policy = export(model, header)

        def act(seen: Array, policy: ControlPolicy = policy) -> Array:  # its features are none of the package's
            with torch.inference_mode():
                normalized = (torch.from_numpy(seen) - policy.mean) / policy.std
                found: Array = policy.network(normalized).clamp(-1, 1).numpy()
            return found

        shares.append(share_of_best(act))
    assert shares[0] < 0.3
    assert shares[1] > 0.9


# -- the real thing, tiny ----------------------------------------------------------------------------------------------

ROLLOUT = 64


@pytest.fixture(scope="module", autouse=True)
def _event_files_in_order() -> Iterator[None]:
    """TensorBoard reads files by name: second, process, number. Numbers of three digits keep this module's in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
        yield


def tags(out: Path) -> dict[str, list[int]]:
    """Every scalar tag's steps, as TensorBoard shows them."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def repeated(steps: dict[str, list[int]]) -> list[str]:
    """Tags whose steps do not increase strictly."""
    return [tag for tag, values in steps.items() if values != sorted(set(values))]


def checkpoint(out: Path) -> dict[str, Any]:
    newest = Checkpoints(out).newest()
    assert newest is not None
    return {"timesteps": newest.step, **newest.state["model"], **newest.state}


def weights(states: Iterable[torch.Tensor]) -> list[list[float]]:
    return [state.flatten().tolist() for state in states]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ControlPolicy, list[Progress]]:
    out = tmp_path_factory.mktemp("run")
    reports: list[Progress] = []
    policy = meta_train(TINY_CONFIG, out, seed=3, provenance={"preset": "tiny"}, report=reports.append)
    return out, policy, reports


def test_what_a_run_leaves(finished: tuple[Path, ControlPolicy, list[Progress]]) -> None:
    out, policy, reports = finished
    left = {"policy.safetensors", "config.json", "checkpoints", "tensorboard", "writer.lock"}
    assert left == {path.name for path in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert (config["timesteps"], config["seed"], config["device"]) == (256, 3, "cpu")
    assert ControlPolicy.load(out / "policy.safetensors").header == policy.header
    assert checkpoint(out)["timesteps"] == 256

    assert {report.timesteps for report in reports} == set(range(0, 257, 16))
    scores = [report.score for report in reports if report.score is not None]
    assert [report.timesteps for report in reports if report.score] == [0, 128, 256]
    best = max(scores, key=lambda score: score.log_ratio_iqm)
    assert policy.header.scores["log_ratio_iqm"] == best.log_ratio_iqm
    assert policy.header.scores["log_ratios"] == best.log_ratios
    assert policy.header.training["preset"] == "tiny"
    assert policy.header.training["datasets"] == ["digits", "wine"]


def test_curves(finished: tuple[Path, ControlPolicy, list[Progress]]) -> None:
    steps = tags(finished[0])
    assert steps["meta_validation/return"] == steps["meta_validation/log_ratio_to_calibrated"] == [0, 128, 256]
    for tag in ("control/lr_mean", "rollout/ep_rew_mean", "inner/final_val_loss"):
        assert steps[tag] == [64, 128, 192, 256], tag
    assert repeated(steps) == []


def test_curves_of_updates(finished: tuple[Path, ControlPolicy, list[Progress]]) -> None:
    assert tags(finished[0])["train/loss"] == [64, 128, 192, 256]


def test_equal_seeds_give_equal_policies(finished: tuple[Path, ControlPolicy, list[Progress]], tmp_path: Path) -> None:
    out, policy, _ = finished
    again = meta_train(TINY_CONFIG, tmp_path / "again", seed=3)
    assert weights(again.state_dict().values()) == weights(policy.state_dict().values())
    assert again.header.scores == policy.header.scores
    last = weights(checkpoint(out)["policy"].values())
    assert weights(checkpoint(tmp_path / "again")["policy"].values()) == last
    meta_train(TINY_CONFIG, tmp_path / "other", seed=4)
    assert weights(checkpoint(tmp_path / "other")["policy"].values()) != last


def interrupt_at(timesteps: int, *, after_validation: bool = False) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.timesteps >= timesteps and (progress.score is not None) == after_validation:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(
    ("timesteps", "after_validation", "kept"),
    [(16, False, 0), (112, False, 64), (128, True, 64), (160, False, 128), (256, True, 192)],
)
def test_resumed_exactly(
    finished: tuple[Path, ControlPolicy, list[Progress]],
    tmp_path: Path,
    timesteps: int,
    after_validation: bool,
    kept: int,
) -> None:
    """Interrupted in a rollout, or right after a meta-validation, before its checkpoint."""
    out, policy, _ = finished
    with pytest.raises(KeyboardInterrupt):
        meta_train(TINY_CONFIG, tmp_path, seed=3, report=interrupt_at(timesteps, after_validation=after_validation))
    assert checkpoint(tmp_path)["timesteps"] == kept
    reports: list[Progress] = []
    resumed = meta_train(TINY_CONFIG, tmp_path, seed=3, resume=True, report=reports.append)
    assert reports[0].timesteps == kept + 16
    assert reports[-1].timesteps == TINY_CONFIG.timesteps
    assert weights(resumed.state_dict().values()) == weights(policy.state_dict().values())
    assert resumed.header.scores == policy.header.scores
    assert entries(checkpoint(tmp_path)) == entries(checkpoint(out))
    assert curves(tmp_path) == curves(out)


def test_resumed_again_and_again_with_workers(tmp_path: Path) -> None:
    """Episodes longer than a rollout, bad starts, and two processes that are made anew each time."""
    tasks = replace(TINY, horizons=(5, 7))
    config = replace(TINY_CONFIG, workers=2, tasks=tasks, variation=Variation(start_probability=0.9))
    meta_train(config, tmp_path / "whole", seed=5)
    for timesteps in (80, 144, 224):
        with pytest.raises(KeyboardInterrupt):
            meta_train(config, tmp_path / "cut", seed=5, resume=timesteps > 80, report=interrupt_at(timesteps))
    meta_train(config, tmp_path / "cut", seed=5, resume=True)
    assert entries(checkpoint(tmp_path / "cut")) == entries(checkpoint(tmp_path / "whole"))
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")


def test_resumed_with_other_workers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As on another machine: networks and normalization go on, episodes begin anew."""
    with pytest.raises(KeyboardInterrupt):
        meta_train(TINY_CONFIG, tmp_path, seed=3, report=interrupt_at(208))
    before = checkpoint(tmp_path)
    meta_train(replace(TINY_CONFIG, learning_rate=0.0, workers=2), tmp_path, seed=3, resume=True)
    assert "episodes begin anew" in caplog.text
    after = checkpoint(tmp_path)
    assert after["timesteps"] == TINY_CONFIG.timesteps
    assert weights(after["policy"].values()) == weights(before["policy"].values())
    assert after["normalizer"]["count"] == before["normalizer"]["count"] + ROLLOUT
    first, last = before["optimizer"][0]["step"], after["optimizer"][0]["step"]
    assert last == first + TINY_CONFIG.epochs * ROLLOUT // TINY_CONFIG.minibatch
    assert repeated(tags(tmp_path)) == []


def test_a_damaged_checkpoint_is_passed_over(
    finished: tuple[Path, ControlPolicy, list[Progress]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    newest = sorted((out / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    meta_train(TINY_CONFIG, out, seed=3, resume=True)
    assert "damaged" in caplog.text
    assert entries(checkpoint(out)) == entries(checkpoint(finished[0]))
    assert curves(out) == curves(finished[0])


def test_resuming_a_finished_run_changes_nothing(
    finished: tuple[Path, ControlPolicy, list[Progress]], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    policy = meta_train(TINY_CONFIG, out, seed=3, resume=True)
    assert policy.header == finished[1].header
    assert (out / "policy.safetensors").read_bytes() == (finished[0] / "policy.safetensors").read_bytes()
    assert repeated(tags(out)) == []


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        meta_train(TINY_CONFIG, tmp_path / "new", resume=True)


def test_a_run_is_not_trained_over(finished: tuple[Path, ControlPolicy, list[Progress]]) -> None:
    before = checkpoint(finished[0])
    with pytest.raises(FileExistsError, match="resume=True"):
        meta_train(TINY_CONFIG, finished[0], seed=3)
    assert entries(checkpoint(finished[0])) == entries(before)


FOUR = ("lr", "batch_size", "weight_decay", "dropout")


@pytest.mark.parametrize("regularizers", [(), ("label_smoothing",)])
def test_a_policy_has_the_controls_that_its_tasks_had(regularizers: tuple[Regularizer, ...], tmp_path: Path) -> None:
    tasks = replace(TINY, regularizers=regularizers)
    policy = meta_train(replace(TINY_CONFIG, timesteps=ROLLOUT, tasks=tasks), tmp_path)
    assert policy.header.controls == (*FOUR, *regularizers)
    assert set(policy.header.trained_ranges) == {"horizons", *policy.header.features}


def test_the_range_of_examples_is_of_those_that_were_known(tmp_path: Path) -> None:
    config = replace(TINY_CONFIG, timesteps=ROLLOUT, variation=Variation(untold_probability=0.5))
    ranges = meta_train(config, tmp_path).header.trained_ranges
    assert ranges["examples_known"] == (0, 1)
    assert ranges["examples"][0] > 0.1


@pytest.mark.parametrize("controls", [tuple(CONTROLS), FOUR])
def test_export_equals_the_trained_policy(controls: tuple[str, ...]) -> None:
    set_random_seed(0)
    model = build(TINY_CONFIG, CohortVecEnv(TINY, cohorts=2, replicas=8))
    model.learn(2 * ROLLOUT)
    policy = export(model, PolicyHeader(hidden=HIDDEN, base_rules={}, **of_controls(controls)))
    assert not policy.training
    env = CohortEnv(TINY, 2, 8, Variation(), "cpu")
    env.reset(1)
    rng = np.random.default_rng(0)
    observations = [env.step(rng.uniform(-1, 1, (16, len(CONTROLS))).astype(np.float32))[0] for _ in range(8)]
    seen = np.concatenate([*observations, 50 * observations[0]]).astype(np.float32)  # some beyond the clip
    unseen = model.obs_rms.var < UNSEEN_VARIANCE
    assert 0 < unseen.sum() < len(unseen) / 2
    blind, _ = policy.act(np.where(unseen, 7.0, seen).astype(np.float32))
    seen = np.where(unseen, model.obs_rms.mean, seen).astype(np.float32)
    np.testing.assert_array_equal(policy.act(seen)[0], blind)
    expected, _ = model.predict(model.actor.normalize(seen).numpy(), deterministic=True)
    expected[:, len(controls) :] = 0
    found, _ = policy.act(seen)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found).max() > 0.01
    assert (policy.std != 1).any()


def test_what_is_saved_is_the_average(finished: tuple[Path, ControlPolicy, list[Progress]], tmp_path: Path) -> None:
    def last_and_average(out: Path) -> tuple[torch.Tensor, torch.Tensor]:
        state = checkpoint(out)
        average = state["callback"]["averaged"]["module.network.4.weight"]
        return state["policy"]["action_net.weight"][: len(average)], average  # the tasks have no other controls

    meta_train(replace(TINY_CONFIG, averaging=0.0), tmp_path, seed=3)
    last, average = last_and_average(tmp_path)
    assert torch.equal(last, average)  # no memory: the last policy itself
    same_last, smoothed = last_and_average(finished[0])
    assert torch.equal(same_last, last)  # averaging does not touch the training
    assert not torch.equal(smoothed, last)
    # The first policy decides almost nothing (its last layer is near zero), so an average with it is a smaller step.
    assert 0.1 < float(smoothed.norm() / last.norm()) < 1


def test_strength_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    config = replace(TINY_CONFIG, timesteps=ROLLOUT)
    weak = meta_train(replace(config, strength=0.25), tmp_path / "weak")
    assert weak.header.strength == 0.25
    assert meta_train(config, tmp_path / "whole").header.strength == 1
    one, other = (checkpoint(tmp_path / name) for name in ("weak", "whole"))
    assert all(torch.equal(one["policy"][name], tensor) for name, tensor in other["policy"].items())
    assert one["callback"]["history"] != other["callback"]["history"]  # but not the scores
