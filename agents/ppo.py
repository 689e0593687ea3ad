"""Meta-training with stable-baselines3's PPO: many small training runs, one policy."""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat, configure
from stable_baselines3.common.utils import set_random_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from hpo_env.base_schedules import REGULARIZERS, calibrated_rule
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES, counted
from inner_models.splits import datasets_of

from .board import ABOUT, BEST_LOG_RATIO, META_TRAINING_TAGS, TRAINING_HPARAMS, about, write_hparams
from .checkpoints import Checkpoint, Checkpoints
from .files import CONFIG_FILE, only_writer, write_atomically
from .meta_validation import MetaValidation, Score
from .policy import ControlPolicy, PolicyHeader
from .policy_file import of_controls
from .presets import MetaTrainingConfig, effective_config
from .rollout_ppo import RolloutPPO
from .rollouts import RolloutWorkers
from .vec_env import CohortVecEnv

HIDDEN = (64, 64)

UNSEEN_VARIANCE = 1e-6
"""A feature that varied less than this over meta-training says nothing: the policy is exported blind to it."""

POLICY_FILE = "policy.safetensors"

_log = logging.getLogger("hyperpilot")


@dataclass(frozen=True)
class Progress:
    """What a meta-training reports as it goes. `score` is set right after a meta-validation."""

    timesteps: int
    total: int
    score: Score | None = None


def meta_train(
    config: MetaTrainingConfig,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    provenance: dict[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> ControlPolicy:
    """Meta-train a policy; leave `policy.safetensors` (the best on meta-validation), checkpoints, the effective config
    and TensorBoard events in `out`.

    Args:
        seed: fixes the policy's initial weights, the tasks and all that is drawn in them.
        device: where the inner models train, `cpu` or `cuda`; the policy itself is small and stays on the CPU.
        resume: go on from the newest whole checkpoint in `out`, exactly: on the same CPU all comes out as if the run
            had not stopped. With another device or number of workers, new episodes begin.
        provenance: entries for the policy's header.
        report: called after every rollout and meta-validation.

    Raises:
        FileNotFoundError, FileExistsError: `resume` without a checkpoint; a checkpoint, but no `resume`.
        FolderInUse: another process trains in `out`.
        ValueError: all checkpoints in `out` are damaged.
        KeyboardInterrupt: interrupted; the checkpoint of the last update is kept.
    """
    with only_writer(out):
        checkpoints = Checkpoints(out)
        if not resume and checkpoints.newest():
            raise FileExistsError(f"{out} already holds a run: give resume=True or choose another folder")
        checkpoint = _found(checkpoints, out) if resume else None
        write_atomically(out / CONFIG_FILE, json.dumps(effective_config(config, seed, device), indent=2).encode())
        workers = config.workers if device == "cpu" else 0
        begins = checkpoint is None or checkpoint.state["arrangement"] != [device, workers]
        drawn = checkpoint.step if checkpoint and begins else 0  # not the episodes of the beginning once more
        set_random_seed(seed + drawn)
        env = CohortVecEnv(
            config.tasks,
            cohorts=config.cohorts,
            replicas=config.replicas,
            variation=config.variation,
            workers=workers,
            device=device,
            seed=int(np.random.SeedSequence([seed, drawn]).generate_state(1)[0] % 2**31),
        )
        try:
            model = build(config, env)
            model.counted = counted
            callback = _Callback(config, out, checkpoints, seed, device, provenance or {}, report, env)
            folder = out / "tensorboard"
            if checkpoint:
                if begins:
                    _log.warning("episodes begin anew: the checkpoint is of %s", checkpoint.state["arrangement"])
                model.load_state_dict(checkpoint.state["model"], episodes=not begins)
                callback.restore(checkpoint.state["callback"])
                _rewind(folder, checkpoint.state["events"])
            model.set_logger(configure(str(folder), ["tensorboard"]))
            done = model.num_timesteps
            if done < config.timesteps:
                model.learn(config.timesteps - done, callback=callback, reset_num_timesteps=checkpoint is None)
                callback.finish()
        finally:
            env.close()
    return ControlPolicy.load(out / POLICY_FILE)


def validation_history(out: Path) -> list[dict[str, float]]:
    """Every meta-validation of the run in `out`, those before a resume included: timesteps, return, log ratio."""
    history: list[dict[str, float]] = _found(Checkpoints(out), out).state["callback"]["history"]
    return history


def _found(checkpoints: Checkpoints, out: Path) -> Checkpoint:
    newest = checkpoints.newest()
    if newest is None:
        raise FileNotFoundError(f"nothing to resume: no checkpoint in {out}")
    return newest


def _rewind(folder: Path, events: Mapping[str, int]) -> None:
    """Cut TensorBoard's event files back to what a checkpoint found there: what came after is about to be logged again.

    Args:
        events: file name -> bytes.
    """
    for path in folder.glob("*tfevents*"):
        if path.name in events:
            os.truncate(path, min(events[path.name], path.stat().st_size))
        else:
            path.unlink()


def build(config: MetaTrainingConfig, env: RolloutWorkers) -> RolloutPPO:
    """The model to meta-train, untrained."""
    return RolloutPPO(
        "MlpPolicy",
        env,
        n_steps=config.rollout_steps,
        batch_size=config.minibatch,
        n_epochs=config.epochs,
        learning_rate=lambda remaining: remaining * config.learning_rate,
        gamma=1.0,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        ent_coef=config.entropy,
        policy_kwargs={"net_arch": list(HIDDEN), "log_std_init": config.log_std},
        device="cpu",
        seed=None,
    )


def export(model: RolloutPPO, header: PolicyHeader) -> ControlPolicy:
    """The deterministic policy of a model with its input normalization: as much of it as the header's controls need."""
    policy, actor = ControlPolicy(header), model.actor
    read = np.flatnonzero(np.isin([feature.name for feature in FEATURES], header.features))
    moved = np.flatnonzero(np.isin(list(CONTROLS), header.controls))
    policy.mean.copy_(torch.from_numpy(actor.mean[read]))
    policy.std.copy_(torch.from_numpy(actor.std[read]))
    extractor = model.policy.mlp_extractor.policy_net
    weights = [m.state_dict() for m in [*extractor, model.policy.action_net] if isinstance(m, torch.nn.Linear)]
    weights[0]["weight"] = torch.where(torch.from_numpy(model.obs_rms.var) < UNSEEN_VARIANCE, 0, weights[0]["weight"])
    weights[0]["weight"] = weights[0]["weight"][:, read]
    weights[-1] = {name: tensor[moved] for name, tensor in weights[-1].items()}
    for layer, own in zip(policy.linear_layers, weights, strict=True):
        layer.load_state_dict(own)
    return policy.eval()


class _Callback(BaseCallback):
    """Meta-validation, checkpoints and logging."""

    model: RolloutPPO

    def __init__(
        self,
        config: MetaTrainingConfig,
        out: Path,
        checkpoints: Checkpoints,
        seed: int,
        device: str,
        provenance: dict[str, Any],
        report: Callable[[Progress], None],
        env: RolloutWorkers,
    ) -> None:
        super().__init__()
        self.config, self.out, self.run_seed, self.device = config, out, seed, device
        self._checkpoints, self._provenance, self._report = checkpoints, provenance, report
        seeds = range(10_000, 10_000 + config.validation_seeds)
        self._validate = MetaValidation(config.validation, seeds, device=device, map=env.map)
        self.history: list[dict[str, float]] = []
        self.best = -np.inf
        self.seconds = 0.0
        self._last_validation = 0
        self._resumed = False
        mean = get_ema_multi_avg_fn(config.averaging)  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(ControlPolicy(self._header({})), multi_avg_fn=mean)

    def restore(self, state: Mapping[str, Any]) -> None:
        self._averaged.load_state_dict(state["averaged"])
        self.history, self.best, self.seconds = list(state["history"]), state["best"], state["seconds"]
        self._last_validation, self._resumed = state["last_validation"], True

    def state(self) -> dict[str, Any]:
        return {
            "averaged": dict(self._averaged.state_dict()),
            "history": self.history,
            "best": float(self.best),
            "seconds": self.seconds,
            "last_validation": self._last_validation,
        }

    def _average(self) -> None:
        """Take the model's present policy into the running average, which is what is scored and saved."""
        self._averaged.update_parameters(export(self.model, self._header({})))

    def _on_training_start(self) -> None:
        self._clock = time.monotonic()
        self._start = self.num_timesteps
        if not self._resumed:
            self._average()
            self._explain_curves()
            self._meta_validate()

    def _on_rollout_start(self) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        self.logger.dump(self.num_timesteps)  # of the update just done; else a later step would get it, or two would
        if self.num_timesteps > self._start:
            self._average()
        if self.num_timesteps - self._last_validation >= self.config.validate_every:
            self._meta_validate()
        if not self._resumed or self.num_timesteps > self._start:
            self._save()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "final" in info:
                self.logger.record_mean("inner/final_val_loss", float(info["final"]["val_loss"]))
                self.logger.record_mean("inner/diverged_share", float(info["final"]["diverged"]))
            for name, value in info.get("controls", {}).items():
                self.logger.record_mean(f"control/{name}_mean", value)
        self._report(Progress(self.num_timesteps, self.config.timesteps))
        return True

    def finish(self) -> None:
        """Score the last policy and log the run's hyperparameters."""
        self._average()
        if self._last_validation != self.num_timesteps:
            self._meta_validate()
        self.logger.dump(self.num_timesteps)
        tasks = self.config.tasks
        hparams = {
            "method": "meta-training",
            "task": f"{len(datasets_of(tasks))} data sets",
            "optimizer": ", ".join(sorted(set(tasks.optimizers))),
            "seed": self.run_seed,
            **{f"training/{name}": getattr(self.config, name) for name in TRAINING_HPARAMS},
        }
        for writer in self._writers():
            write_hparams(writer, hparams, {BEST_LOG_RATIO: float(self.best)}, self.num_timesteps)
        self._save()

    def _save(self) -> None:
        """Write a checkpoint, with the sizes of the event files as they are now."""
        for writer in self._writers():
            writer.flush()
        state = {
            "arrangement": [self.device, self.config.workers if self.device == "cpu" else 0],
            "model": self.model.state_dict(),
            "callback": self.state(),
            "events": {path.name: path.stat().st_size for path in (self.out / "tensorboard").glob("*tfevents*")},
        }
        self._checkpoints.save(self.num_timesteps, state)

    def _writers(self) -> list[SummaryWriter]:
        return [output.writer for output in self.logger.output_formats if isinstance(output, TensorBoardOutputFormat)]

    def _explain_curves(self) -> None:
        for writer in self._writers():
            writer.add_text(ABOUT, about(META_TRAINING_TAGS, "decisions"))

    def _meta_validate(self) -> None:
        self._last_validation = self.num_timesteps
        policy = copy.deepcopy(self._averaged.module)
        assert isinstance(policy, ControlPolicy)
        score = self._validate(policy)
        self.history.append(
            {
                "timesteps": self.num_timesteps,
                "return": score.mean_return,
                "log_ratio_to_calibrated": score.log_ratio_iqm,
            }
        )
        self.logger.record("meta_validation/return", score.mean_return)
        self.logger.record("meta_validation/log_ratio_to_calibrated", score.log_ratio_iqm)
        for name, ratio in score.log_ratios.items():
            self.logger.record(f"meta_validation_log_ratio/{name}", ratio)
        self.logger.dump(self.num_timesteps)
        if score.log_ratio_iqm > self.best:
            self.best = score.log_ratio_iqm
            policy.header = self._header(
                {
                    "split": "meta-validation",
                    "measure": "ln(final validation loss of the calibrated schedule / of the policy)",
                    "seeds": self.config.validation_seeds,
                    "timesteps": self.num_timesteps,
                    "log_ratio_iqm": score.log_ratio_iqm,
                    "mean_return": score.mean_return,
                    "mean_return_calibrated": self._validate.base_return,
                    "log_ratios": score.log_ratios,
                }
            )
            policy.save(self.out / POLICY_FILE)
        self._report(Progress(self.num_timesteps, self.config.timesteps, score))

    def _seen(self, names: Collection[str]) -> dict[str, tuple[float, float]]:
        """Of features by name, the least and the largest value seen so far; nothing before the first rollout."""
        extremes = zip(FEATURES, self.model.observation_low, self.model.observation_high, strict=True)
        return {
            feature.name: (float(low), float(high))
            for feature, low, high in extremes
            if feature.name in names and low <= high
        }

    def _header(self, scores: dict[str, Any]) -> PolicyHeader:
        tasks = self.config.tasks
        parts = of_controls([name for name in CONTROLS if name not in REGULARIZERS or name in tasks.regularizers])
        return PolicyHeader(
            hidden=HIDDEN,
            base_rules={kind: calibrated_rule(kind).to_dict() for kind in ("adamw", "sgd")},
            **parts,
            strength=self.config.strength,
            trained_ranges={"horizons": tasks.horizons, **(self._seen(parts["features"]) if scores else {})},
            training={
                **self._provenance,
                "algorithm": "PPO",
                "seed": self.run_seed,
                "timesteps": self.num_timesteps,
                "seconds": round(self.seconds),
                "device": self.device,
                "machine": platform.machine(),
                "datasets": sorted(datasets_of(tasks)),
                "optimizers": sorted(set(tasks.optimizers)),
                "versions": {
                    "torch": torch.__version__,
                    "stable_baselines3": stable_baselines3.__version__,
                    "python": platform.python_version(),
                },
            },
            scores=scores,
        )
