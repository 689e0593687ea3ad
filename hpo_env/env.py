"""`HPOEnv`: one inner training run as a Gymnasium environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from hpo_env.actions import BaseSchedule, calibrated
from hpo_env.control import ControlLoop
from hpo_env.hyperparameters import CONTROLS, Binding
from hpo_env.observations import HIGH, LOW, feature_table
from hpo_env.rewards import diverged, log_fall
from inner_models.replicated_layers import parameter_count
from inner_models.tasks import Task, TaskDistribution, prepare
from inner_models.training import Training

Observation = NDArray[np.float32]
Action = NDArray[np.float32]

DEFAULT_TASK = "digits/mlp"
INFO_KEYS = ("train_loss", "val_loss", "diverged", *CONTROLS)


@dataclass(frozen=True)
class Variation:
    """What an episode draws besides its task, so that a policy meets runs that differ from the plain case.

    Attributes:
        mask_probability: chance that a control other than `lr` is taken away and stands at a random value.
        start_probability: chance that the base learning rate is multiplied by a log-uniform factor
            in 1 / start_factor .. start_factor.
        blind_probability: chance that the loss before training is not observed.
    """

    mask_probability: float = 0.0
    start_probability: float = 0.0
    start_factor: float = 10.0
    blind_probability: float = 0.0

    def __post_init__(self) -> None:
        probabilities = (self.mask_probability, self.start_probability, self.blind_probability)
        if not (all(0 <= probability <= 1 for probability in probabilities) and self.start_factor >= 1):
            raise ValueError(f"probabilities must lie in 0..1 and start_factor be at least 1, not {self}")


@dataclass(frozen=True)
class Episode:
    """What `reset` draws, apart from the task.

    Attributes:
        seed: seed of the inner training.
        fixed: controls taken away, and the values they stand at.
        lr_scale: factor on the base learning rate.
        blind: whether the loss before training is not observed.
    """

    seed: int
    fixed: dict[str, float]
    lr_scale: float
    blind: bool


def draw_episode(rng: np.random.Generator, variation: Variation) -> Episode:
    """Draw an episode. The environments share this, so that equal seeds give equal episodes in both."""
    seed = int(rng.integers(2**31))
    taken = rng.random(len(CONTROLS)) < variation.mask_probability
    values = rng.random(len(CONTROLS))
    perturbed, factor = rng.random() < variation.start_probability, rng.uniform(-1, 1)
    blind = bool(rng.random() < variation.blind_probability)
    fixed = {
        name: float(control.denormalize(np.asarray(unit)))
        for (name, control), mask, unit in zip(CONTROLS.items(), taken, values, strict=True)
        if mask and name != "lr"
    }
    return Episode(seed, fixed, float(variation.start_factor**factor) if perturbed else 1.0, blind)


def resolve_tasks(task: Task | str | None, tasks: TaskDistribution | None) -> Task | TaskDistribution:
    """The one of `task` and `tasks` that is given; the default task when neither is."""
    if task is not None and tasks is not None:
        raise ValueError("give either task or tasks, not both")
    if tasks is not None:
        return tasks
    return task if isinstance(task, Task) else Task.named(task or DEFAULT_TASK)


def observation_space() -> spaces.Box[np.float32]:
    return spaces.Box(LOW, HIGH, dtype=np.float32)


def action_space() -> spaces.Box[np.float32]:
    return spaces.Box(-1.0, 1.0, (len(CONTROLS),), dtype=np.float32)


class HPOEnv(gymnasium.Env[Observation, Action]):
    __doc__ = f"""Control the hyperparameters of one inner training run.

    ## Description
    Each episode trains an inner model from scratch. Before every interval of training (an epoch, unless the task says
    otherwise) an action moves the hyperparameters; the interval is trained; the observation tells how it went. The
    goal is the lowest validation loss at the end of the run. The test split is not part of the environment.

    ## Action space
    `Box(-1, 1, ({len(CONTROLS)},))`: one entry a control. Each moves the control's offset from the base schedule
    (calibrated AdamW or SGD with warm-up and cosine decay) on the control's own scale; 0 keeps the offset. The first
    action reaches further: it chooses the start.

    | entry | control | scale | first action, up to | later actions, up to |
    |---|---|---|---|---|
    | 0 | `lr` | log | x10 | x2 |
    | 1 | `batch_size` | log, multiples of 16 | x4 | x2 |
    | 2 | `weight_decay` | log | x30 | x3 |
    | 3 | `dropout` | logit | +-2.5 | +-1 |

    ## Observation space
    `Box` of these features, in order (r is the relative difference, 2 (a - b) / (|a| + |b|)):
```
{feature_table()}
```

    ## Rewards
    The fall of the logarithm of the validation loss over the interval, r_t = log V_(t-1) - log V_t, bounded as in
    `hpo_env.rewards.log_fall`; an episode's return is the fall over the whole run.

    ## Starting state
    `reset(seed=...)` fixes the task (if it is sampled), the initial weights, the order of the data and all noise.
    `options={{"task": Task}}` chooses the task of this episode.

    ## Episode end
    Terminated when the budget (the task's `horizon`) is spent, or when the run has diverged. Never truncated.

    ## Information
    `train_loss`, `val_loss`, `diverged` and the value of each control over the interval.

    ## Arguments
    - `task`: a `Task` or the name of one (`digits/mlp`), or `tasks`: a `TaskDistribution` to sample one each episode.
    - `variation`: further things to draw each episode (`Variation`).
    - `base`: the base schedule; calibrated for the task's optimizer when None.
    - `device`, `dtype`: where and in what precision the inner training runs.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        task: Task | str | None = None,
        tasks: TaskDistribution | None = None,
        variation: Variation | None = None,
        base: BaseSchedule | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        render_mode: None = None,
    ) -> None:
        self._tasks = resolve_tasks(task, tasks)
        self._variation = variation or Variation()
        self._base, self._device, self._dtype = base, device, dtype
        self.observation_space = observation_space()
        self.action_space = action_space()
        self._training: Training | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = self._tasks if isinstance(self._tasks, Task) else self._tasks.sample(self.np_random)
        self.task: Task = task
        episode = draw_episode(self.np_random, self._variation)
        training = Training(task, episode.seed, data=prepare(task), device=self._device, dtype=self._dtype)
        self._training = training
        self._binding = Binding(training.optimizer, training.model, training.batch_sampler)
        self._loop = ControlLoop(
            1,
            horizon=task.horizon,
            base=self._base or calibrated(task.optimizer),
            parameters=parameter_count(training.model),
            momentum_sgd=task.optimizer == "sgd",
        )
        self._initial = self._previous = np.array([training.evaluate("val")])
        lacking = {name: episode.fixed.get(name, 0.0) for name in CONTROLS if name not in self._binding.available}
        self._loop.restart(
            [0],
            {"val_loss": np.where(episode.blind, np.nan, self._initial)},
            fixed=[{**episode.fixed, **lacking}],
            lr_scale=np.array([episode.lr_scale]),
        )
        self._over = False
        return self._loop.observe()[0], self._info({"train_loss": np.nan, "val_loss": float(self._initial[0])}, False)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._training is None or self._over:
            raise gymnasium.error.ResetNeeded("call reset() before step(): there is no episode under way")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"an action must have shape {self.action_space.shape}, not {action.shape}")
        values = self._loop.decide(action.astype(np.float64)[None])
        self._binding.write({name: float(values[name][0]) for name in self._binding.available})
        signals = self._training.advance()
        self._loop.record({name: np.array([value]) for name, value in signals.items()})
        val_loss = np.array([signals["val_loss"]])
        reward = float(log_fall(self._previous, val_loss, self._initial)[0])
        lost = bool(diverged(np.array([signals["train_loss"]]), val_loss, self._initial)[0])
        self._previous = val_loss
        self._over = lost or int(self._loop.state.telemetry.interval[0]) >= self.task.horizon
        return self._loop.observe()[0], reward, self._over, False, self._info(signals, lost)

    def _info(self, signals: dict[str, float], lost: bool) -> dict[str, Any]:
        values = {name: float(value[0]) for name, value in self._loop.values().items()}
        losses = {name: float(signals[name]) for name in ("train_loss", "val_loss")}
        return {**losses, "diverged": lost, **values}
