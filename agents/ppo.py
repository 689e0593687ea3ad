"""Meta-training with stable-baselines3's PPO: many small training runs, one policy."""

from __future__ import annotations

import copy
import io
import json
import pickle
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, TensorBoardOutputFormat, configure
from stable_baselines3.common.utils import set_random_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from hpo_env.base_schedules import calibrated_rule
from hpo_env.observations import FEATURES
from inner_models.splits import datasets_of

from .files import CONFIG_FILE, write_atomically
from .meta_validation import MetaValidation, Score
from .policy import ControlPolicy, PolicyHeader
from .presets import MetaTrainingConfig, effective_config
from .rollouts import RolloutPPO, RolloutWorkers
from .vec_env import CohortVecEnv

HIDDEN = (64, 64)

UNSEEN_VARIANCE = 1e-6
"""A feature that varied less than this over meta-training says nothing: the policy is exported blind to it."""

POLICY_FILE, CHECKPOINT_FILE = "policy.safetensors", "checkpoint.pt"

CURVES = {
    "meta_validation/log_ratio_to_calibrated": "ln(final validation loss of the calibrated schedule / of the policy), "
    "interquartile mean over meta-validation tasks x seeds; above 0 the policy is better. It chooses the checkpoint.",
    "meta_validation/return": "fall of ln(validation loss) over a run, mean over meta-validation tasks and seeds",
    "meta_validation_log_ratio/*": "the same task by task, mean over seeds",
    "inner/final_val_loss": "validation loss at the end of the inner trainings that ended in this rollout, mean",
    "inner/diverged_share": "share of them that diverged",
    "control/*_mean": "value that the policy gave the control, geometric mean over inner trainings",
    "rollout/ep_rew_mean": "fall of ln(validation loss) over an inner training, mean over the last 100",
    "rollout/ep_len_mean": "length of an inner training, in intervals",
    "time/fps": "decisions a second",
    "train/*": "PPO's own losses and statistics (see stable-baselines3)",
}
"""TensorBoard tag -> meaning and unit. The horizontal axis counts decisions."""


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
    """Meta-train a policy; leave `policy.safetensors` (the best on meta-validation), a checkpoint, the effective config
    and TensorBoard events in `out`.

    Args:
        seed: fixes the policy's initial weights, the tasks and all that is drawn in them.
        device: where the inner models train, `cpu` or `cuda`; the policy itself is small and stays on the CPU.
        resume: go on from the checkpoint in `out`; rollouts begin on fresh episodes.
        provenance: entries for the policy's header.
        report: called after every rollout and meta-validation.

    Raises:
        FileNotFoundError: `resume` without a checkpoint.
        KeyboardInterrupt: interrupted; the checkpoint of the last update is kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = _read_checkpoint(out / CHECKPOINT_FILE) if resume else None
    done = int(checkpoint["timesteps"]) if checkpoint else 0
    write_atomically(out / CONFIG_FILE, json.dumps(effective_config(config, seed, device), indent=2).encode())
    workers = config.workers if device == "cpu" else 0
    set_random_seed(seed + done)
    env = CohortVecEnv(
        config.tasks,
        cohorts=config.cohorts,
        replicas=config.replicas,
        variation=config.variation,
        workers=workers,
        device=device,
        seed=int(np.random.SeedSequence([seed, done]).generate_state(1)[0] % 2**31),
    )
    try:
        model = build(config, env)
        callback = _Callback(config, out, seed, device, provenance or {}, report, max(1, workers))
        if checkpoint:
            _restore(model, callback, checkpoint)
        folder = str(out / "tensorboard")
        if checkpoint:  # what was logged after the checkpoint is about to be logged again
            SummaryWriter(folder, purge_step=done + 1).close()
        model.set_logger(configure(folder, ["tensorboard"]))
        if done < config.timesteps:
            model.learn(config.timesteps - done, callback=callback, reset_num_timesteps=done == 0)
            callback.finish()
    finally:
        env.close()
    return ControlPolicy.load(out / POLICY_FILE)


def validation_history(out: Path) -> list[dict[str, float]]:
    """Every meta-validation of the run in `out`, those before a resume included: timesteps, return, log ratio."""
    history: list[dict[str, float]] = _read_checkpoint(out / CHECKPOINT_FILE)["callback"]["history"]
    return history


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
    """The deterministic policy of a model with its input normalization."""
    policy, actor = ControlPolicy(header), model.actor
    policy.mean.copy_(torch.from_numpy(actor.mean))
    policy.std.copy_(torch.from_numpy(actor.std))
    extractor = model.policy.mlp_extractor.policy_net
    linear = [m for m in [*extractor, model.policy.action_net] if isinstance(m, torch.nn.Linear)]
    own = [m for m in policy.network if isinstance(m, torch.nn.Linear)]
    for target, source in zip(own, linear, strict=True):
        target.load_state_dict(source.state_dict())
    own[0].weight.data[:, torch.from_numpy(model.obs_rms.var) < UNSEEN_VARIANCE] = 0
    return policy.eval()


class _Callback(BaseCallback):
    """Meta-validation, checkpoints and logging."""

    model: RolloutPPO

    def __init__(
        self,
        config: MetaTrainingConfig,
        out: Path,
        seed: int,
        device: str,
        provenance: dict[str, Any],
        report: Callable[[Progress], None],
        workers: int,
    ) -> None:
        super().__init__()
        self.config, self.out, self.run_seed, self.device = config, out, seed, device
        self._provenance, self._report = provenance, report
        seeds = range(10_000, 10_000 + config.validation_seeds)
        self._validate = MetaValidation(config.validation, seeds, workers=workers, device=device)
        self.history: list[dict[str, float]] = []
        self.best = -np.inf
        self.seconds = 0.0
        self._last_validation = 0
        self._resumed = False
        mean = get_ema_multi_avg_fn(config.averaging)  # type: ignore[no-untyped-call]
        self._averaged = AveragedModel(ControlPolicy(self._header({})), multi_avg_fn=mean)

    def restore(self, state: dict[str, Any]) -> None:
        self._averaged.load_state_dict(state["averaged"])
        self.history, self.best, self.seconds = state["history"], state["best"], state["seconds"]
        self._last_validation, self._resumed = state["last_validation"], True

    def state(self) -> dict[str, Any]:
        return {
            "averaged": self._averaged.state_dict(),
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
        if self.num_timesteps:
            _write_checkpoint(self.out / CHECKPOINT_FILE, self.model, self.state())

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
        shown = {"seed": self.run_seed, **{k: v for k, v in asdict(self.config).items() if isinstance(v, int | float)}}
        metrics = {"meta_validation/best_log_ratio_to_calibrated": float(self.best)}
        self.logger.record("hparams", HParam(shown, metrics), exclude=("stdout",))
        self.logger.record("meta_validation/best_log_ratio_to_calibrated", float(self.best))
        self.logger.dump(self.num_timesteps)
        _write_checkpoint(self.out / CHECKPOINT_FILE, self.model, self.state())

    def _explain_curves(self) -> None:
        lines = [f"- `{tag}`: {meaning}" for tag, meaning in CURVES.items()]
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                output.writer.add_text("about/curves", "\n".join(lines))

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

    def _seen(self) -> dict[str, tuple[float, float]]:
        """Feature -> the least and the largest value seen so far; nothing before the first rollout."""
        extremes = zip(FEATURES, self.model.observation_low, self.model.observation_high, strict=True)
        return {feature.name: (float(low), float(high)) for feature, low, high in extremes if low <= high}

    def _header(self, scores: dict[str, Any]) -> PolicyHeader:
        tasks = self.config.tasks
        return PolicyHeader(
            hidden=HIDDEN,
            base_rules={kind: calibrated_rule(kind).to_dict() for kind in ("adamw", "sgd")},
            trained_ranges={"horizons": tasks.horizons, **(self._seen() if scores else {})},
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


def _write_checkpoint(path: Path, model: RolloutPPO, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "timesteps": model.num_timesteps,
            "updates": model._n_updates,
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "normalizer": {
                "mean": torch.from_numpy(model.obs_rms.mean),
                "var": torch.from_numpy(model.obs_rms.var),
                "count": float(model.obs_rms.count),
                "low": torch.from_numpy(model.observation_low),
                "high": torch.from_numpy(model.observation_high),
            },
            "callback": state,
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: no checkpoint at {path}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)  # tensors and plain values only: no code runs
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"the checkpoint {path} is damaged; train anew in another folder") from error
    return checkpoint


def _restore(model: RolloutPPO, callback: _Callback, checkpoint: dict[str, Any]) -> None:
    model.policy.load_state_dict(checkpoint["policy"])
    model.policy.optimizer.load_state_dict(checkpoint["optimizer"])
    model.num_timesteps, model._n_updates = checkpoint["timesteps"], checkpoint["updates"]
    normalizer = checkpoint["normalizer"]
    model.obs_rms.mean, model.obs_rms.var = normalizer["mean"].numpy(), normalizer["var"].numpy()
    model.obs_rms.count = normalizer["count"]
    model.observation_low, model.observation_high = normalizer["low"].numpy(), normalizer["high"].numpy()
    callback.restore(checkpoint["callback"])
