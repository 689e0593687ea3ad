"""Adaptation: a finished policy goes on learning, from a few runs of the one task that it is to be used for.

PPO (Schulman et al. 2017, arXiv:1707.06347), made for few runs:

- no critic: a run's return is by how much its log validation loss fell in all, less the mean of its cohort's other runs
  (the leave-one-out baseline of Kool, van Hoof and Welling 2019). The runs of a cohort share weights and data order;
- exploration that lasts: one draw for the first decision, one held over all later ones, since the noise of single
  decisions drowns in that of the others (coloured noise: Hollenstein, Martius and Piater 2024, arXiv:2312.11091). The
  draws of a cohort are pairs of opposites along orthogonal directions (Choromanski et al. 2018, arXiv:1804.02395);
- input normalization and base schedule stay as they are, and so does all that the policy is blind to.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from hpo_env.base_schedules import calibrated_rule
from hpo_env.control import MAX_DECISIONS
from hpo_env.env import Variation
from hpo_env.hyperparameters import CONTROLS, Array, finite_positive
from hpo_env.observations import FEATURES, counted
from hpo_env.rewards import leave_one_out
from hpo_env.vector_env import HPOVectorEnv
from inner_models.tasks import Task

from .board import ABOUT, META_TRAINING_TAGS, about, write_hparams
from .files import CONFIG_FILE, only_writer, write_atomically
from .inspection import blind
from .policy import ControlPolicy, PolicyHeader

ADAPTED_FILE = "policy.safetensors"

_NAMES = [feature.name for feature in FEATURES]

_TAGS = {tag: meaning for tag, meaning in META_TRAINING_TAGS.items() if not tag.startswith("meta_validation")}


@dataclass(frozen=True)
class Settings:
    """Of an adaptation.

    Attributes:
        episodes: runs of the task to learn from, rounded up to whole cohorts.
        replicas: runs in a cohort, at most. After each cohort the policy is updated.
        steps: gradient steps of an update, each on the whole cohort.
        learning_rate: Adam's, falling linearly to zero over the updates.
        clip: PPO's.
        kl: an update ends where the policy is this far from the one that acted, in nats a decision.
        noise: standard deviation of the exploration; actions lie in -1..1.
    """

    episodes: int = 32
    replicas: int = 8
    steps: int = 8
    learning_rate: float = 1e-3
    clip: float = 0.2
    kl: float = 0.075
    noise: float = 0.15

    def __post_init__(self) -> None:
        for name in ("episodes", "replicas"):
            if (value := getattr(self, name)) < 2:
                raise ValueError(f"{name} must be at least 2, not {value}: only others say what a run is worth")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be 0 or a positive number, not {self.learning_rate}")
        for name in ("clip", "kl", "noise"):
            finite_positive(name, getattr(self, name))

    @property
    def cohort(self) -> int:
        """Runs in each cohort."""
        return min(self.replicas, self.episodes)

    @property
    def updates(self) -> int:
        return -(-self.episodes // self.cohort)


@dataclass(frozen=True)
class Cohort:
    """What the runs of a cohort saw and did. A run counts up to its end, if it diverges.

    Attributes:
        observations: `[decisions, runs, features]`.
        noise: of the actions on the controls in the policy's header, in standard deviations, `[decisions, runs, ...]`.
        under_way: which decisions count, `[decisions, runs]`.
        falls: by how much each run's log validation loss fell in all, `[runs]`.
        scalars: TensorBoard tag -> value.
    """

    observations: NDArray[np.float32]
    noise: NDArray[np.float32]
    under_way: NDArray[np.bool_]
    falls: Array
    scalars: dict[str, float]


def adapt(
    policy: ControlPolicy,
    task: Task,
    out: Path,
    settings: Settings | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    provenance: dict[str, Any] | None = None,
    report: Callable[[int, float], None] = lambda runs, fall: None,
) -> ControlPolicy:
    """Adapt a policy to a task; leave it with the effective config and TensorBoard events in `out`.

    It is attached as `Tuner` does it (no loss before training), and sees validation losses alone. It is short, and
    begins anew if it is interrupted.

    Args:
        policy: stays as it is.
        settings: the defaults when left out.
        seed: fixes all that is drawn.
        device: where the inner models train, `cpu` or `cuda`.
        provenance: entries for this adaptation's record in the header.
        report: called after each cohort with the number of runs so far, and by how much the log validation loss fell,
            mean over the cohort.

    Raises:
        ValueError: the policy cannot be adapted to this task; the message says why.
        FileExistsError: `out` holds a policy.
        FolderInUse: another process trains in `out`.
    """
    settings = settings or Settings()
    _check(policy, task)
    with only_writer(out):
        if (out / ADAPTED_FILE).exists():
            raise FileExistsError(f"{out} already holds a policy; choose another folder")
        env = HPOVectorEnv(settings.cohort, task=task, variation=Variation(blind_probability=1.0), device=device)
        env.reset(seed=seed)  # an impossible task shows here, and leaves nothing
        config = {"seed": seed, "device": device, "policy": policy.digest, **asdict(settings), "task": asdict(task)}
        write_atomically(out / CONFIG_FILE, json.dumps(config, indent=2).encode())
        started = time.monotonic()
        adapted, rng = copy.deepcopy(policy), np.random.default_rng(seed)
        optimizer = torch.optim.Adam(adapted.parameters())
        with SummaryWriter(str(out / "tensorboard")) as writer:
            writer.add_text(ABOUT, about(_TAGS, "decisions"))
            for update in range(settings.updates):
                cohort = train_runs(adapted, env, settings.noise, rng)
                rate = settings.learning_rate * (1 - update / settings.updates)
                optimizer.param_groups[0]["lr"] = rate
                scalars = {
                    **cohort.scalars,
                    **improve(adapted, optimizer, cohort, settings),
                    "train/learning_rate": rate,
                }
                adapted.header = _widened(adapted, cohort, task.horizon)
                runs = (update + 1) * settings.cohort
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, runs * task.horizon)
                report(runs, float(cohort.falls.mean()))
            _write_hparams(writer, task, settings, seed, runs * task.horizon)
        record = {
            **(provenance or {}),
            "from": policy.digest,
            "task": task.name,
            "episodes": runs,
            "seed": seed,
            "seconds": round(time.monotonic() - started),
            "device": device,
            "machine": platform.machine(),
            "torch": torch.__version__,
        }
        adapted.header = _header(adapted, task, record)
        adapted.save(out / ADAPTED_FILE)
    return adapted


def _check(policy: ControlPolicy, task: Task) -> None:
    if task.horizon > MAX_DECISIONS:
        raise ValueError(
            f"adapt on runs of at most {MAX_DECISIONS} epochs, not {task.horizon}: longer ones decide less"
        )
    if policy.header.base_rule(task.optimizer) != calibrated_rule(task.optimizer):
        raise ValueError("the policy deviates from another base schedule than this hyperpilot's; meta-train it anew")


def train_runs(policy: ControlPolicy, env: HPOVectorEnv, noise: float, rng: np.random.Generator) -> Cohort:
    """Train a cohort's runs under the policy, with exploration."""
    runs, unseen = env.num_envs, np.isin(_NAMES, blind(policy))
    observations, _ = env.reset(seed=[int(rng.integers(2**31))] * runs)
    controls = len(policy.header.controls)
    first, later = opposites(runs, controls, rng), opposites(runs, controls, rng)
    seen, draws = list[NDArray[np.float32]](), list[NDArray[np.float32]]()
    counts: list[NDArray[np.bool_]] = []
    falls, ends, left = np.zeros(runs), np.full(runs, np.nan), np.ones(runs, bool)
    lost = np.zeros(runs, bool)
    used: dict[str, list[Array]] = {name: [] for name in CONTROLS}
    while left.any():
        seen.append(np.where(unseen, policy.typical, observations))  # so that nothing is learned from these
        draws.append(later if counts else first)
        counts.append(left)
        with torch.inference_mode():
            actions = policy.means(torch.from_numpy(seen[-1])) + noise * torch.from_numpy(draws[-1])
            taken = actions.clamp(-1, 1) * policy.share(torch.from_numpy(seen[-1]))[:, None]
            actions = policy.on_all_controls(taken)
        observations, rewards, terminated, _, infos = env.step(actions.numpy())
        falls += np.where(left, rewards, 0)
        final = infos["final_info"] if terminated.any() else infos
        ends = np.where(left & terminated, final["val_loss"], ends)
        lost |= left & terminated & final["diverged"]
        for name in CONTROLS:
            used[name].append(np.where(terminated, final[name], infos[name])[left])
        left = left & ~terminated
    scalars = {
        "rollout/ep_rew_mean": float(falls.mean()),
        "rollout/ep_len_mean": float(np.sum(counts, axis=0).mean()),
        "inner/final_val_loss": float(ends.mean()),
        "inner/diverged_share": float(lost.mean()),
    }
    for name, values in used.items():
        if (positive := np.concatenate(values)).min() > 0:
            scalars[f"control/{name}_mean"] = float(np.exp(np.log(positive).mean()))
    return Cohort(np.stack(seen), np.stack(draws), np.stack(counts), falls, scalars)


def opposites(runs: int, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draws for the exploration, `[runs, size]`, each of length sqrt(size): orthogonal ones and their opposites, then
    others."""
    turned = [np.linalg.qr(rng.standard_normal((size, size)))[0] * math.sqrt(size) for _ in range(-(-runs // size))]
    return np.concatenate([sign * rows for rows in turned for sign in (1, -1)])[:runs].astype(np.float32)


def improve(
    policy: ControlPolicy, optimizer: torch.optim.Optimizer, cohort: Cohort, settings: Settings
) -> dict[str, float]:
    """PPO's update. Both policies are Gaussian with the same constant noise: the log ratio of an action that was drawn
    as `mean + noise * draw` is sum(draw * shift - shift^2 / 2), and their divergence sum(shift^2) / 2, where shift is
    the move of the mean in standard deviations.

    Returns:
        TensorBoard tag -> value; nothing where all runs fell alike.
    """
    worth = leave_one_out(cohort.falls)
    if not (spread := worth.std()):
        return {}
    counts = torch.from_numpy(cohort.under_way)
    draws, observations = (torch.from_numpy(part)[counts] for part in (cohort.noise, cohort.observations))
    advantages = torch.from_numpy((worth / spread).astype(np.float32)).expand(counts.shape)[counts]
    with torch.no_grad():
        before = policy.means(observations)
    for _ in range(settings.steps):
        shift = (policy.means(observations) - before) / settings.noise
        divergence = shift.square().sum(1).mean().item() / 2
        ratio = (draws * shift - shift.square() / 2).sum(1).exp()
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        if divergence > settings.kl:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {
        "train/approx_kl": divergence,
        "train/clip_fraction": (ratio != clipped).float().mean().item(),
        "train/policy_gradient_loss": loss.item(),
    }


def _widened(policy: ControlPolicy, cohort: Cohort, horizon: int) -> PolicyHeader:
    """The header, its ranges widened by what the policy now has seen. What it is blind to stays as it was."""
    ranges = dict(policy.header.trained_ranges)
    unseen = blind(policy)
    seen = cohort.observations[cohort.under_way]
    known = counted(seen)
    low = seen.min(axis=0, where=known, initial=np.inf).tolist()
    high = seen.max(axis=0, where=known, initial=-np.inf).tolist()
    found = {**dict(zip(_NAMES, zip(low, high, strict=True), strict=True)), "horizons": (horizon,) * 2}
    for name in ranges.keys() - set(unseen):
        ranges[name] = (min(ranges[name][0], found[name][0]), max(ranges[name][1], found[name][1]))
    return replace(policy.header, trained_ranges=ranges)


def _header(policy: ControlPolicy, task: Task, record: dict[str, Any]) -> PolicyHeader:
    """The header with a record of the adaptation; the scores of the policy that it began from hold no more."""
    training = dict(policy.header.training)
    training["datasets"] = sorted({*training.get("datasets", []), task.dataset})
    training["adaptations"] = [*training.get("adaptations", []), record]
    return replace(policy.header, training=training, scores={})


def _write_hparams(writer: SummaryWriter, task: Task, settings: Settings, seed: int, step: int) -> None:
    hparams: dict[str, str | float] = {
        "method": "adaptation",
        "task": task.name,
        "optimizer": task.optimizer,
        "epochs": task.horizon,
        "seed": seed,
        "training/timesteps": step,
        "training/replicas": settings.cohort,
        "training/epochs": settings.steps,
        "training/learning_rate": settings.learning_rate,
        "training/clip": settings.clip,
        "training/log_std": math.log(settings.noise),
    }
    write_hparams(writer, hparams, {}, step)
