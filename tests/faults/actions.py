"""Actions that no sound policy takes, on every kind of inner model: what leaves the environment stays sound."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpo_env.base_schedules import REGULARIZERS, BaseSchedule
from hpo_env.env import Variation
from hpo_env.hyperparameters import CONTROLS
from hpo_env.vector_env import HPOVectorEnv
from inner_models.models import ModelSpec
from inner_models.tasks import Task
from tests.conformance import EXPLOSIVE, OfGymnasium, Step
from tests.faults import Fault, Outcome

DATASETS = {
    "linear": "digits",
    "mlp": "digits",
    "cnn": "digits",
    "gru": "waveforms",
    "transformer": "markov-text-0",
    "autoencoder": "digits",
}
HORIZON, REPLICAS = 3, 20
STEPS = 2 * HORIZON
VARIATION = Variation(
    mask_probability=0.2,
    start_probability=0.5,
    blind_probability=0.3,
    untold_probability=0.3,
    unmeasured_probability=0.3,
)

Pattern = Callable[[np.random.Generator, tuple[int, int]], NDArray[Any]]
_LARGEST = float(np.finfo(np.float32).max)
PATTERNS: dict[str, Pattern] = {
    "stay": lambda rng, shape: np.zeros(shape),
    "random": lambda rng, shape: rng.uniform(-1, 1, shape),
    "edges": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "up": lambda rng, shape: np.ones(shape),
    "down": lambda rng, shape: -np.ones(shape),
    "beyond": lambda rng, shape: rng.normal(0, 1e3, shape),
    "endless": lambda rng, shape: rng.choice([-np.inf, -_LARGEST, _LARGEST, np.inf], shape),
    "tiny": lambda rng, shape: rng.choice([-1e-45, -1e-20, 1e-20, 1e-45], shape),
    "holes": lambda rng, shape: np.where(rng.random(shape) < 0.5, np.nan, rng.uniform(-1, 1, shape)),
    "nothing": lambda rng, shape: np.full(shape, np.nan),
}
"""How the actions `[steps, controls]` of a run are drawn."""


@cache
def environment(kind: str, optimizer: str, base: BaseSchedule | None) -> OfGymnasium:
    spec: Any = kind
    task = Task(
        DATASETS[kind],
        ModelSpec(spec, width=8, depth=1),
        optimizer,  # type: ignore[arg-type]
        horizon=HORIZON,
        interval_examples=32,
        train_rows=64,
        eval_rows=64,
    )
    return OfGymnasium(lambda count: HPOVectorEnv(count, task, variation=VARIATION, base=base), REPLICAS)


def check(env: OfGymnasium, step: Step, explosive: bool) -> None:
    """What must hold of any step."""
    for row in (*step.observations, *step.last):
        assert env.observation_space.contains(row), row  # of finite bounds
    assert np.isfinite(step.rewards).all(), step.rewards
    for info, terminated in zip(step.infos, step.terminated, strict=True):
        assert terminated or not info["diverged"], info
        assert info["diverged"] or np.isfinite([info["train_loss"], info["val_loss"]]).all(), info
        for name, control in CONTROLS.items():
            value = info[name]
            if name == "lr":  # the base schedule's own decay goes lower than the control's range
                assert 0 <= value <= (EXPLOSIVE.lr if explosive else control.high), info
            else:  # a run may lack these
                assert control.low <= value <= control.high or (name in ("dropout", *REGULARIZERS) and value == 0), info


def sequences(kind: str, count: int, folder: Path) -> Outcome:
    """Run `count` sequences of actions, two horizons long, drawn by Hypothesis; some of them on runs that diverge."""
    seen, diverged = 0, 0

    @settings(
        max_examples=-(-count // REPLICAS),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        seed=st.integers(0, 2**31),
        optimizer=st.sampled_from(["adamw", "sgd"]),
        explosive=st.booleans(),
        patterns=st.lists(
            st.tuples(st.sampled_from(list(PATTERNS)), st.integers(0, 2**31)), min_size=REPLICAS, max_size=REPLICAS
        ),
    )
    def run(seed: int, optimizer: str, explosive: bool, patterns: list[tuple[str, int]]) -> None:
        nonlocal seen, diverged
        env = environment(kind, optimizer, EXPLOSIVE if explosive else None)
        shape = (STEPS, len(CONTROLS))
        drawn = [PATTERNS[name](np.random.default_rng(number), shape) for name, number in patterns]
        observations, _ = env.reset(seed)
        assert all(env.observation_space.contains(row) for row in observations)
        length = np.zeros(REPLICAS, int)
        for actions in np.stack(drawn, axis=1).astype(np.float32):
            step = env.step(actions)
            check(env, step, explosive)
            length += 1
            lost = np.array([info["diverged"] for info in step.infos])
            assert (step.terminated == (lost | (length == HORIZON))).all()
            assert not step.truncated.any()
            length[step.terminated] = 0
            diverged += int(lost.sum())
        seen += REPLICAS

    failures = []
    try:
        run()
    except AssertionError as error:
        failures.append("\n".join([str(error), *getattr(error, "__notes__", [])]))
    return Outcome(seen, tuple(failures), f"{diverged:,} runs diverged")


FAULTS = tuple(
    Fault(f"any actions, {kind}", "finite, within bounds, of the right length", partial(sequences, kind), 1000)
    for kind in DATASETS
)
