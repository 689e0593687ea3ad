"""`HPOEnv`: one inner training run as a Gymnasium environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from hpo_env.actions import RANGES
from hpo_env.base_schedules import REGULARIZERS, BaseSchedule, calibrated_rule
from hpo_env.control import ControlLoop
from hpo_env.hyperparameters import CONTROLS, Array, Binding
from hpo_env.observations import HIGH, LOW, feature_table
from hpo_env.rewards import diverged, log_fall
from inner_models.replicated_layers import parameter_count
from inner_models.sampling import MICRO_BATCH
from inner_models.tasks import Task, TaskDistribution, prepare
from inner_models.torch_state import as_by_default
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
        start_probability: chance that the base schedule is off: its learning rate by a log-uniform factor in
            1 / start_factor .. start_factor, each other control, in half of these episodes, by up to the reach of a
            first decision.
        blind_probability: chance that the loss before training is not observed.
        untold_probability: chance that the length of the run is not told before its first interval.
        unmeasured_probability: chance that gradient statistics are never observed.
    """

    mask_probability: float = 0.0
    start_probability: float = 0.0
    start_factor: float = 100.0
    blind_probability: float = 0.0
    untold_probability: float = 0.0
    unmeasured_probability: float = 0.0

    def __post_init__(self) -> None:
        probabilities = [value for name, value in vars(self).items() if name.endswith("probability")]
        if not (all(0 <= probability <= 1 for probability in probabilities) and self.start_factor >= 1):
            raise ValueError(f"probabilities must lie in 0..1 and start_factor be at least 1, not {self}")


@dataclass(frozen=True)
class Episode:
    """What `reset` draws, apart from the task.

    Attributes:
        seed: seed of the inner training.
        fixed: controls taken away, and the values they stand at.
        shifts: by how much the base schedule is off, in scale units, one entry a control.
        blind: whether the loss before training is not observed.
        untold: whether the length of the run is not told before its first interval.
        unmeasured: whether gradient statistics are never observed.
    """

    seed: int
    fixed: dict[str, float]
    shifts: tuple[float, ...]
    blind: bool
    untold: bool
    unmeasured: bool


def draw_episode(rng: np.random.Generator, variation: Variation) -> Episode:
    """Draw an episode. The environments share this, so that equal seeds give equal episodes in both."""
    seed = int(rng.integers(2**31))
    others = np.random.default_rng([seed, 1])  # so that what is drawn for `REGULARIZERS` moves no other draw

    def uniform() -> Array:
        """In 0..1, one a control."""
        return np.concatenate([rng.random(len(CONTROLS) - len(REGULARIZERS)), others.random(len(REGULARIZERS))])

    taken = uniform() < variation.mask_probability
    values = uniform()
    perturbed, off = rng.random() < variation.start_probability, uniform() < 0.5
    reach = [math.log(variation.start_factor) if name == "lr" else RANGES[name].first for name in CONTROLS]
    shifts = np.where([perturbed and (name == "lr" or off[i]) for i, name in enumerate(CONTROLS)], reach, 0.0)
    shifts = shifts * (2 * uniform() - 1)
    hidden = rng.random(3) < [
        variation.blind_probability,
        variation.untold_probability,
        variation.unmeasured_probability,
    ]
    fixed = {
        name: float(control.denormalize(np.asarray(unit)))
        for (name, control), mask, unit in zip(CONTROLS.items(), taken, values, strict=True)
        if mask and name != "lr"
    }
    return Episode(seed, fixed, tuple(shifts.tolist()), *(bool(hide) for hide in hidden))


def observed(signals: Mapping[str, Array], hidden: NDArray[np.bool_]) -> dict[str, Array]:
    """What a control loop is told of `signals` `[runs]`: a loss that is not a number as an infinite one (NaN would say
    that it was not measured), and no gradient statistics of some runs, `hidden` `[runs]`."""
    return {
        name: np.where(np.isnan(values), np.inf, values) if name.endswith("_loss") else np.where(hidden, np.nan, values)
        for name, values in signals.items()
    }


def resolve_tasks(task: Task | str | None, tasks: TaskDistribution | None) -> Task | TaskDistribution:
    """The one of `task` and `tasks` that is given; the default task when neither is."""
    if task is not None and tasks is not None:
        raise ValueError("give either task or tasks, not both")
    if tasks is None:
        return _task(DEFAULT_TASK if task is None else task)
    if not isinstance(tasks, TaskDistribution):
        raise TypeError(f"tasks must be a TaskDistribution, such as inner_models.splits.META_TRAIN, not {tasks!r}")
    return tasks


def task_of(options: Mapping[str, Any] | None) -> Task | None:
    """The task that `reset` is to begin, if `options` names one.

    Raises:
        ValueError: there is another option.
    """
    others = sorted(set(options or {}) - {"task"})
    if others:
        raise ValueError(f"the only option of reset is 'task', not {', '.join(map(repr, others))}")
    task = (options or {}).get("task")
    return None if task is None else _task(task)


def _task(task: Task | str) -> Task:
    if not isinstance(task, Task | str):
        raise TypeError(f"a task must be a Task or the name of one, such as {DEFAULT_TASK!r}, not {task!r}")
    return Task.named(task) if isinstance(task, str) else task


def check_settings(variation: Variation | None, base: BaseSchedule | None, dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError, TypeError: one of an environment's arguments cannot be used; the message names it.
    """
    if not isinstance(variation, Variation | None):
        raise TypeError(f"variation must be a Variation, not {variation!r}")
    if not isinstance(base, BaseSchedule | None):
        raise TypeError(f"base must be a BaseSchedule, not {base!r}")
    if base and base.batch_size % MICRO_BATCH:
        raise ValueError(f"the base's batch_size must be a multiple of {MICRO_BATCH}, not {base.batch_size:g}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, not {dtype}")


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
    (AdamW or SGD calibrated for the run's length and size, with warm-up and cosine decay) on the control's own scale;
    0 keeps the offset. The first action reaches further: it chooses the start, and from a base that is off it reaches
    at least the rule's values.

    | entry | control | scale | first action, up to | later actions, up to |
    |---|---|---|---|---|
    | 0 | `lr` | log | x30 | x2.5 |
    | 1 | `batch_size` | log, multiples of 16 | x4 | x2 |
    | 2 | `weight_decay` | log | x30 | x3 |
    | 3 | `dropout` | logit | +-2.5 | +-1 |
    | 4 | `augmentation` | logit | +-2.5 | +-1 |
    | 5 | `label_smoothing` | logit | +-2.5 | +-1 |

    What a run lacks (dropout layers; what its task does not name in `regularizers`) stays at 0 whatever the action.

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
    `options={{"task": ...}}` chooses the task of this episode (a `Task` or its name).

    ## Episode end
    Terminated when the budget (the task's `horizon`) is spent, or when the run has diverged. Never truncated.

    ## Information
    `train_loss`, `val_loss`, `diverged` and the value of each control over the interval.

    ## Arguments
    - `task`: a `Task` or the name of one (`digits/mlp`), or `tasks`: a `TaskDistribution` to sample one each episode.
    - `variation`: further things to draw each episode (`Variation`).
    - `base`: the base schedule; that of the calibrated rule when None.
    - `device`, `dtype`: where and in what precision (`torch.float32` or `torch.float64`) the inner training runs.

    ## Several processes
    A process that has trained with several threads must not be forked, as PyTorch's threads do not survive it: give
    `AsyncVectorEnv` `context="spawn"`, or have what makes its environments call `torch.set_num_threads(1)` first, which
    also keeps them from fighting for the cores. One process with `gymnasium.make_vec` is faster than either.
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
        check_settings(variation, base, dtype)
        self._variation = variation or Variation()
        self._base, self._device, self._dtype = base, device, dtype
        self.observation_space = observation_space()
        self.action_space = action_space()
        self._training: Training | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        task = task_of(options)
        self._training = None  # whatever fails from here on, no episode is under way
        with as_by_default(self._device):
            return self._begin(task)

    def _begin(self, task: Task | None) -> tuple[Observation, dict[str, Any]]:
        if task is None:
            task = self._tasks if isinstance(self._tasks, Task) else self._tasks.sample(self.np_random)
        self.task = task
        episode = draw_episode(self.np_random, self._variation)
        training = Training(task, episode.seed, data=prepare(task), device=self._device, dtype=self._dtype)
        self._binding = Binding(training.optimizer, training.model, training.batch_sampler, training.criterion)
        self._loop = ControlLoop(
            1,
            horizon=task.horizon,
            rule=calibrated_rule(task.optimizer),
            given=self._base,
            parameters=parameter_count(training.model),
            momentum_sgd=task.optimizer == "sgd",
        )
        self._initial = self._previous = np.array([training.evaluate("val")])
        lacking = {name: 0.0 for name in CONTROLS if name not in self._binding.available}
        self._loop.restart(
            [0],
            {"val_loss": np.where(episode.blind, np.nan, self._initial)},
            examples=np.array([np.nan if episode.untold else training.data.interval_examples * task.horizon]),
            fixed=[{**episode.fixed, **lacking}],
            shifts=np.array([episode.shifts]),
        )
        self._unmeasured = np.array([episode.unmeasured])
        self._over = False
        self._training = training
        losses = {"train_loss": np.nan, "val_loss": float(self._initial[0])}
        return self._loop.observe()[0], self._info(losses, self._loop.values(), False)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if self._training is None or self._over:
            raise gymnasium.error.ResetNeeded("call reset() before step(): there is no episode under way")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"an action must have shape {self.action_space.shape}, not {action.shape}")
        values = self._loop.decide(action.astype(np.float64)[None])
        self._binding.write({name: float(values[name][0]) for name in self._binding.available})
        with as_by_default(self._device):
            signals = self._training.advance()
        self._loop.tell_examples(self._training.data.interval_examples * self.task.horizon)
        self._loop.record(observed({n: np.array([value]) for n, value in signals.items()}, self._unmeasured))
        val_loss = np.array([signals["val_loss"]])
        reward = float(log_fall(self._previous, val_loss, self._initial)[0])
        lost = bool(diverged(np.array([signals["train_loss"]]), val_loss, self._initial)[0])
        self._previous = val_loss
        self._over = lost or int(self._loop.state.telemetry.interval[0]) >= self.task.horizon
        return self._loop.observe()[0], reward, self._over, False, self._info(signals, values, lost)

    def close(self) -> None:
        """Let go of the training; `reset` begins another."""
        self._training = None

    @staticmethod
    def _info(signals: Mapping[str, float], values: Mapping[str, Array], lost: bool) -> dict[str, Any]:
        losses = {name: float(signals[name]) for name in ("train_loss", "val_loss")}
        return {**losses, "diverged": lost, **{name: float(value[0]) for name, value in values.items()}}
