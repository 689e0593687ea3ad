"""The policy on the engine: the tuner's decisions, guard included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from torch import nn

from agents.application import Cohort, MakeController, Run, train, train_cohort
from agents.controllers import (
    GRID,
    Attached,
    Replay,
    WithPolicy,
    with_policy,
)
from agents.policy import ControlPolicy
from agents.tuner import MAX_FACTOR, Tuner
from hpo_env.base_schedules import BaseSchedule, calibrated
from hpo_env.hyperparameters import CONTROLS, Array, Binding
from inner_models.batched_training import BatchedTraining
from inner_models.models import build_model
from inner_models.replicated_layers import parameter_count
from inner_models.signals import SIGNALS
from inner_models.tasks import Task, prepare
from inner_models.training import Training
from tests.rules import flat
from tests.tiny import random_policy
from tests.user_runs import Unsized

TASK = Task.named("digits/mlp", horizon=5, interval_examples=96, train_rows=96, eval_rows=64)
SGD = replace(TASK, optimizer="sgd")
TASKS = [TASK, SGD, Task.named("diabetes/linear", horizon=4, interval_examples=96, eval_rows=64)]

LONG = Task.named("digits/linear", interval_examples=192, train_rows=96, eval_rows=64)
ACTS: tuple[Literal["policy"], Literal["random"]] = ("policy", "random")


def moving(scale: float = 0.4) -> ControlPolicy:
    """A policy that moves every control, the batch size up."""
    policy = random_policy(seed=1, scale=scale)
    last = policy.network[-1]
    assert isinstance(last, nn.Linear)
    last.bias.data[list(CONTROLS).index("batch_size")] += 0.5
    return policy


def always(action: float) -> ControlPolicy:
    """A policy that moves every control alike, whatever it sees."""
    policy = random_policy()
    last = policy.network[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data.zero_()
    last.bias.data.fill_(action)
    return policy


def following(policy: ControlPolicy, optimizer: str, **schedule: float) -> ControlPolicy:
    """`policy`, with a base schedule that does not depend on the run."""
    base = flat(replace(SCHEDULE, **schedule)).to_dict()
    policy.header = replace(policy.header, base_rules={**policy.header.base_rules, optimizer: base})
    return policy


def parameters_of(task: Task) -> int:
    return parameter_count(build_model(task.model, prepare(task).dataset))


def base_of(task: Task, policy: ControlPolicy) -> BaseSchedule:
    """The schedule that the policy's rule has for the task."""
    examples = prepare(task).interval_examples * task.horizon
    return policy.header.base_rule(task.optimizer).schedule(examples, parameters_of(task))


def given(task: Task, lr_factor: float = 1.0) -> BaseSchedule:
    """A user's own values: the calibrated ones, but for the learning rate."""
    base = calibrated(task.optimizer)
    return replace(base, lr=base.lr * lr_factor)


def in_order(base: BaseSchedule) -> dict[str, float]:
    return {name: getattr(base, name) for name in CONTROLS}


def middles(task: Task) -> Array:
    """Where the task's intervals lie, 0..1 of the run."""
    return (np.arange(task.horizon) + 0.5) / task.horizon


def tuned(
    policy: ControlPolicy, seen: list[Tuner], *, values: Mapping[str, float], told: bool = True, **arguments: Any
) -> MakeController:
    """`Tuner` in a plain loop, on a run whose user has set `values`; it may be `told` how many examples there are."""

    def attach(run: Training) -> Tuner:
        binding = Binding(run.optimizer, run.model, run.batch_sampler)
        binding.write({name: value for name, value in values.items() if name in binding.available})
        if arguments.get("initial_loss"):
            arguments["initial_loss"] = run.evaluate("val")
        size = run.batch_sampler.batch_size
        tuner = Tuner(
            policy,
            run.optimizer,
            model=run.model,
            total_epochs=run.task.horizon,
            examples_per_epoch=run.data.interval_examples if told else None,
            batch_size=size,
            **arguments,
        )
        tuner.follow(run.batch_sampler if told else Unsized(run.batch_sampler))
        seen.append(tuner)
        return tuner

    return attach


def same(run: Run, plain: Run, tuner: Tuner) -> None:
    """Equal decisions on equal observations, equal values, equal curves."""
    np.testing.assert_allclose(run.val_loss, plain.val_loss, rtol=1e-2)
    np.testing.assert_allclose(run.train_loss, plain.train_loss, rtol=1e-2)
    assert run.controls.keys() == plain.controls.keys()
    for name, values in run.controls.items():
        np.testing.assert_allclose(values, plain.controls[name], rtol=1e-2, err_msg=name)
    observations = [entry["observation"] for entry in tuner.history]
    np.testing.assert_allclose(run.notes["observations"], observations, rtol=0.02, atol=0.02)
    assert run.notes["out_of_depth"] == [entry["out_of_depth"] for entry in tuner.history]


def acted(caplog: pytest.LogCaptureFixture) -> list[int]:
    """After which epochs a tuner's guard has acted."""
    return [int(text.split()[1].rstrip(":")) for text in caplog.messages if "restored the best snapshot" in text]


# -- the tuner's decisions ---------------------------------------------------------------------------------------------


METHODS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"guard": False}, {"guard": False}),
    ({"initial_loss": True}, {"initial_loss": True}),
    ({"start": "given", "lr_factor": 0.1}, {"start": "given"}),
    ({"start": "given", "lr_factor": 3.0}, {"start": "given"}),
    ({"controls": ("lr",)}, {"controls": ["lr"]}),
    ({"controls": ("lr", "batch_size")}, {"controls": ["lr", "batch_size"]}),
    ({"examples": False, "controls": ("lr", "weight_decay")}, {"told": False, "controls": ["lr", "weight_decay"]}),
    ({"controls": ("lr", "weight_decay"), "batch_size": 64}, {"controls": ["lr", "weight_decay"]}),
]
"""`WithPolicy`'s settings, and the tuner's."""


def values_of(task: Task, policy: ControlPolicy, method: Mapping[str, Any]) -> dict[str, float]:
    """What the user has set: controls that are left alone stand at the base."""
    own = given(task, method["lr_factor"]) if method.get("start") == "given" else base_of(task, policy)
    return in_order(own) | {name: method[name] for name in ("batch_size",) if name in method}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.optimizer}")
@pytest.mark.parametrize(("method", "arguments"), METHODS, ids=str)
def test_the_tuner_decides_the_same(task: Task, method: dict[str, Any], arguments: dict[str, Any]) -> None:
    policy = moving()
    tuners: list[Tuner] = []
    values = values_of(task, policy, method)
    for seed, run in zip((0, 7), train_cohort(task, WithPolicy(policy, **method, record=True), [0, 7]), strict=True):
        plain = train(task, tuned(policy, tuners, values=values, **arguments), seed)
        same(run, plain, tuners[-1])
        assert run.notes["guard"] == [entry["epoch"] for entry in tuners[-1].history if entry["guard"]] == []
        assert not any(run.notes["out_of_depth"])
        moved = [name for name in run.controls if len(set(run.controls[name])) > 1]
        assert set(moved) == set(tuners[-1].history[0]["hyperparameters"])


@pytest.mark.parametrize("epochs", [64, 65, 130])
@pytest.mark.parametrize("method", [METHODS[0], METHODS[3], METHODS[7]], ids=str)
def test_long_runs_are_decided_the_same(epochs: int, method: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """At every epoch, every second, every third; the base schedule moves in between."""
    task, policy = replace(LONG, horizon=epochs), moving(scale=0.2)
    per_decision = {64: 1, 65: 2, 130: 3}[epochs]
    tuners: list[Tuner] = []
    run = train_cohort(task, WithPolicy(policy, **method[0], record=True), [3])[0]
    plain = train(task, tuned(policy, tuners, values=values_of(task, policy, method[0]), **method[1]), 3)
    same(run, plain, tuners[-1])
    assert len(run.notes["observations"]) == math.ceil(epochs / per_decision)
    assert [entry["epoch"] for entry in tuners[-1].history] == list(range(0, epochs, per_decision))
    assert len(set(run.controls["lr"])) == epochs
    learnt = not method[1].get("told", True)  # the base has moved, too, when the length came to be known
    assert 5 < len(set(run.controls["weight_decay"])) <= math.ceil(epochs / per_decision) + learnt


@pytest.mark.parametrize("start", ["policy", "given"])
@pytest.mark.parametrize("task", [replace(SGD, horizon=11), replace(LONG, horizon=66)], ids=["short", "long"])
def test_out_of_its_depth_the_same(task: Task, start: Any) -> None:
    """Before 0.3 of the run and beyond 0.6 of it."""
    policy = moving()
    policy.header = replace(policy.header, trained_ranges={"progress": (0.4, 0.5)})
    tuners: list[Tuner] = []
    run = train_cohort(task, WithPolicy(policy, start=start, record=True), [0])[0]
    values = values_of(task, policy, {"start": start, "lr_factor": 1.0})
    same(run, train(task, tuned(policy, tuners, values=values, start=start), 0), tuners[-1])
    lost = run.notes["out_of_depth"]
    count = len(lost)
    assert lost == [not 0.3 < decision / count < 0.6 for decision in range(count)]
    base = (given(task) if start == "given" else base_of(task, policy)).values(middles(task))
    per_decision = math.ceil(task.horizon / 64)
    for decision, off in enumerate(lost):
        stretch = slice(per_decision * decision, per_decision * (decision + 1))
        for name, used in run.controls.items():
            if off:
                np.testing.assert_allclose(used[stretch], base[name][stretch], rtol=1e-9)
            elif name != "batch_size":  # that is moved to the next multiple of 16, if at all
                assert not np.allclose(used[stretch], base[name][stretch], rtol=1e-3), name


def test_a_policy_that_acts_at_random_knows_no_depth() -> None:
    policy = moving()
    policy.header = replace(policy.header, trained_ranges={"parameters": (0.0, 0.01)})
    steered, random = (train_cohort(TASK, WithPolicy(policy, acts=acts, record=True), [0])[0] for acts in ACTS)
    assert steered.notes["out_of_depth"] == [True] * TASK.horizon
    assert random.notes["out_of_depth"] == [False] * TASK.horizon
    base = base_of(TASK, policy).values(middles(TASK))
    for name, values in steered.controls.items():
        np.testing.assert_allclose(values, base[name], rtol=1e-9)
        assert not np.allclose(random.controls[name], base[name], rtol=0.01)


@pytest.mark.parametrize("action", [-1.0, 1.0])
def test_given_values_are_left_by_a_factor_of_a_thousand_at_most(action: float) -> None:
    tuners: list[Tuner] = []
    task = replace(TASK, horizon=10)
    own = given(task, factor := 1e-4 if action > 0 else 100.0)
    policy = following(always(action), task.optimizer, lr=calibrated(task.optimizer).lr)
    run = train_cohort(task, WithPolicy(policy, start="given", lr_factor=factor, record=True), [0])[0]
    same(run, train(task, tuned(policy, tuners, values=in_order(own), start="given"), 0), tuners[-1])
    reached = np.array(run.controls["lr"]) / own.values(middles(task))["lr"]
    assert MAX_FACTOR == 1000
    assert reached[3:8] == pytest.approx([MAX_FACTOR**action] * 5)


SCHEDULE = BaseSchedule(lr=0.01, batch_size=32, weight_decay=0.01, dropout=0.1)
RISING = Task.named("diabetes/linear", horizon=66, interval_examples=64, eval_rows=64, optimizer="sgd")
FAST = {"lr": 1.0, "warmup": 0.3}
"""A rate that rises until the run breaks, after it has learned something."""


@pytest.mark.parametrize(
    ("task", "lr", "initial_loss", "acts"),
    [
        # Hopeless from the start, and lowered until it works.
        (replace(SGD, horizon=9), 1e3, True, [1, 2, 3, 4]),
        (replace(TASKS[2], horizon=9, optimizer="sgd"), 1e3, True, [1, 2, 3, 4, 5]),
        # To the end.
        (replace(SGD, horizon=3), 1e30, False, [1, 2, 3]),
    ],
    ids=["falling", "falling-linear", "hopeless"],
)
def test_the_guard_acts_the_same(
    task: Task, lr: float, initial_loss: bool, acts: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "hyperpilot")  # at which every act is logged, not the first alone
    policy, tuners = always(0.0), list[Tuner]()
    factor = lr / calibrated("sgd").lr
    method = WithPolicy(policy, initial_loss=initial_loss, start="given", lr_factor=factor, record=True)
    run = train_cohort(task, method, [0])[0]
    own = given(task, factor)
    plain = train(
        task, tuned(policy, tuners, values=in_order(own), start="given", initial_loss=initial_loss or None), 0
    )
    assert run.notes["guard"] == acted(caplog) == acts
    in_history = [entry["epoch"] for entry in tuners[-1].history if entry["guard"]]
    assert in_history == [act for act in acts if act < task.horizon]  # the end is no decision
    same(run, plain, tuners[-1])
    lowered = np.array([0.25 ** sum(act <= interval for act in acts) for interval in range(task.horizon)])
    np.testing.assert_allclose(run.controls["lr"], own.values(middles(task))["lr"] * lowered, rtol=1e-9)
    np.testing.assert_allclose(np.exp(np.array(run.notes["offsets"])[:, 0]), lowered, rtol=1e-9)


@pytest.mark.parametrize(("epochs", "acts"), [(12, [3]), (66, [9]), (130, [13])])
def test_the_guard_acts_the_same_between_decisions(
    epochs: int, acts: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """In the longer runs, where it does not wait for one."""
    task = replace(RISING, horizon=epochs)
    policy, tuners = following(always(0.0), "sgd", **FAST), list[Tuner]()
    run = train_cohort(task, WithPolicy(policy, record=True), [0])[0]
    plain = train(task, tuned(policy, tuners, values=in_order(base_of(task, policy))), 0)
    assert run.notes["guard"] == acted(caplog) == acts
    same(run, plain, tuners[-1])
    lowered = np.where(np.arange(epochs) < acts[0], 1.0, 0.25)
    np.testing.assert_allclose(
        run.controls["lr"], base_of(task, policy).values(middles(task))["lr"] * lowered, rtol=1e-9
    )


@pytest.mark.parametrize("epochs", [66, 130])
def test_the_guard_and_the_policy_act_the_same(epochs: int, caplog: pytest.LogCaptureFixture) -> None:
    """Where both move the learning rate of a long run, and the policy all else."""
    task = replace(RISING, horizon=epochs)
    policy, tuners = following(moving(scale=0.2), "sgd", **FAST), list[Tuner]()
    run = train_cohort(task, WithPolicy(policy, record=True), [0])[0]
    plain = train(task, tuned(policy, tuners, values=in_order(base_of(task, policy))), 0)
    assert run.notes["guard"] == acted(caplog)
    assert any(act % math.ceil(epochs / 64) for act in run.notes["guard"])
    same(run, plain, tuners[-1])


def test_the_guard_brings_back_the_best_weights() -> None:
    """After divergence a run stands where its best interval had left it, not where it began."""
    policy = following(always(0.0), "sgd", **FAST)
    guarded, loose = (train_cohort(RISING, WithPolicy(policy, guard=guard), [0])[0] for guard in (True, False))
    assert guarded.notes == {"guard": [9]}
    assert guarded.val_loss[:9] == loose.val_loss[:9]
    assert guarded.val_loss[8] > 10
    assert loose.val_loss[9] > 10
    assert guarded.val_loss[9] < min(guarded.val_loss[:9])
    assert loose.notes == {"guard": []}


def test_what_the_tuner_starts_from_does_not_matter_where_the_policy_chooses() -> None:
    policy = random_policy(seed=1)
    runs = [train(TASK, tuned(policy, [], values=in_order(given(TASK, factor))), 0) for factor in (1e-3, 1.0, 1e3)]
    assert runs[0].val_loss == runs[1].val_loss == runs[2].val_loss
    assert runs[0].controls == runs[1].controls == runs[2].controls
    assert train(TASK, with_policy(policy), 0).val_loss == runs[0].val_loss
    # Given values do matter.
    others = [train(TASK, tuned(policy, [], values=in_order(given(TASK, f)), start="given"), 0) for f in (0.1, 1.0)]
    assert others[0].val_loss != others[1].val_loss


def test_controls_that_are_left_alone_follow_the_base_schedule() -> None:
    policy = moving()
    base = base_of(TASK, policy).values(middles(TASK))
    for moved in CONTROLS:
        run = train_cohort(TASK, WithPolicy(policy, controls=(moved,)), [0])[0]
        for name, values in run.controls.items():
            assert (values == base[name].tolist()) == (name != moved), (moved, name)


@pytest.mark.parametrize(
    "task",
    [*TASKS, replace(TASK, horizon=70, interval_examples=32)],
    ids=lambda task: f"{task.name}-{task.optimizer}-{task.horizon}",
)
@pytest.mark.parametrize("batch_size", [None, 128])
def test_a_replay_of_nothing_is_the_base_rules_schedule(task: Task, batch_size: float | None) -> None:
    policy, stay = random_policy(), np.zeros((1, GRID, len(CONTROLS)))
    run = train_cohort(task, Replay(policy.header.base_rules, stay, batch_size=batch_size), [0])[0]
    base = base_of(task, policy).at_batch_size(batch_size, task.optimizer == "sgd").values(middles(task))
    for name, values in run.controls.items():
        assert values == base[name].tolist()
    stays = train_cohort(task, WithPolicy(always(0.0), guard=False, batch_size=batch_size), [0])[0]
    for name, values in stays.controls.items():
        np.testing.assert_allclose(values, base[name], rtol=1e-12)
    assert stays.val_loss == pytest.approx(run.val_loss, rel=1e-3)


def test_given_values_do_not_follow_a_batch_size_that_stays() -> None:
    """They are the user's own, made for it."""
    method = WithPolicy(always(0.0), start="given", controls=("weight_decay",), batch_size=64, guard=False, record=True)
    run = train_cohort(TASK, method, [0])[0]
    expected = given(TASK).values(middles(TASK))
    np.testing.assert_allclose(run.controls["lr"], expected["lr"])
    assert run.controls["batch_size"] == [64] * TASK.horizon
    np.testing.assert_allclose(run.notes["offsets"], 0, atol=1e-12)


def test_the_guard_takes_verdicts_back_as_the_tuners_does() -> None:
    cohort = Cohort(BatchedTraining(TASK, [0, 1]))
    run = Attached(WithPolicy(always(0.0)), cohort)
    rates = [run.values["lr"]]
    for loss in (1.0, 9.0, 9.0, 9.0, 9.0):
        losses = {name: np.array([1.0, loss]) for name in ("train_loss", "val_loss")}
        run.step({**{name: np.ones(2) for name in SIGNALS}, **losses})
        rates.append(run.values["lr"])
    np.testing.assert_allclose([others / own for own, others in rates[:5]], [1, 1, 1 / 4, 1 / 16, 1 / 64])
    assert run.notes[1]["guard"] == [2, 3, 4]
    assert run._loop.state_dict()["lr_scale"].tolist() == [1, 1]


def test_values_do_not_outlast_a_run() -> None:
    """A controller that is asked once more, after the last interval, still answers."""
    cohort = Cohort(BatchedTraining(TASK, [0, 1]))
    signals = {name: np.ones(2) for name in ("train_loss", "val_loss")}
    rules = {kind: flat(BaseSchedule(1e-3, 32, 0.1, 0.1)).to_dict() for kind in ("adamw", "sgd")}
    methods: Sequence[Any] = (WithPolicy(random_policy()), Replay(rules, np.zeros((1, GRID, len(CONTROLS)))))
    for method in methods:
        controller = method.attach(cohort)
        for _ in range(TASK.horizon):
            last = {name: values.copy() for name, values in controller.values.items()}
            controller.step(signals)
        for name, values in controller.values.items():
            np.testing.assert_array_equal(values, last[name])
    assert last["lr"][0] == pytest.approx(1e-3 * (1 + math.cos(0.9 * math.pi)) / 2)
