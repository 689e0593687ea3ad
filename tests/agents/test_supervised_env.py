"""`SupervisedVecEnv`: what faults look like from outside, how many are forgiven, and stable-baselines3's methods."""

from __future__ import annotations

import gc
import logging
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor

import agents.supervised_env
from agents.supervised_env import SupervisedVecEnv
from inner_models.remote import Patience, Remote, end
from tests.faults import workers
from tests.faults.puppet import Nested, Order, Puppet, unreliable
from tests.faults.workers import workers_of

Make = Callable[..., Any]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes environments that are closed in the end, of puppets if nothing else is said, and resets them."""
    made = []

    def make(*env_fns: Callable[[], Any], seed: int | None = 3, **arguments: Any) -> Any:
        made.append(SupervisedVecEnv(env_fns or [Puppet, Puppet], **arguments))
        made[-1].seed(seed) if seed is not None else None
        made[-1].reset()
        return made[-1]

    yield make
    for env in made:
        env.close()
    assert workers_of(psutil.Process()) == []


def orders(*given: int) -> Any:
    return np.array(given)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "count"),
    [
        (workers.killed, 3),
        (workers.hung, 2),
        (workers.raising, 1),
        (workers.crashed, 2),
        (workers.learning, 1),
        (workers.orphaned, 2),
        (workers.interrupted, 1),
    ],
)
def test_faults(run: Callable[[int, Path], Any], count: int, tmp_path: Path) -> None:
    """As in `make faults`, a few times each."""
    assert run(count, tmp_path).failures == ()


@pytest.mark.parametrize(
    ("order", "line", "shown"),
    [
        (Order.RAISE, "ArithmeticError: told to raise", 'raise ArithmeticError("told to raise")'),
        (Order.HANG, "the worker did not answer in time, and was killed", "_obey"),
        (Order.HOLD, "the worker did not answer in time, and was killed", "_obey"),
        (Order.CRASH, "the worker died (Segmentation fault)", "string_at"),
        (Order.EXIT, "the worker died (exit code 3)", ""),
        (Order.QUIT, "SystemExit: told to quit", "_obey"),
    ],
)
def test_what_a_fault_looks_like(
    order: Order, line: str, shown: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    env = make(timeout=1.0)
    (first, other), *_ = env.step(orders(0, 0))
    observations, rewards, dones, (info, others) = env.step(orders(order, 0))
    assert (rewards.tolist(), dones.tolist()) == ([0, 1], [True, False])
    assert info.keys() == {"TimeLimit.truncated", "terminal_observation", "fault"}
    assert info["TimeLimit.truncated"] is True
    assert info["fault"] == line
    np.testing.assert_array_equal(info["terminal_observation"], first)
    assert observations[0, 1] == 0
    assert env.reset_infos[0]["fault"] == line
    # The other worker has lost nothing.
    np.testing.assert_array_equal(observations[1], other + np.array([0, 1, 0]))
    assert others == {"TimeLimit.truncated": False, "time": 2}
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hyperpilot", logging.WARNING)
    assert line in record.message
    assert shown in record.message


def test_equal_seeds_and_faults_give_equal_runs(make: Make) -> None:
    def run(seed: int | None) -> list[Any]:
        env = make(Puppet, seed=seed)
        seen = [env.reset_infos[0]]
        for order in (0, Order.RAISE, 0, Order.EXIT, *[0] * 6):
            observations, rewards, dones, _ = env.step(orders(order))
            seen.append((observations[0, :2].tolist(), rewards, dones, env.reset_infos[0]["seed"]))
        return seen

    first = run(3)
    np.testing.assert_equal(run(3), first)
    seeds = [first[step][3] for step in (2, 4)]
    assert len({3, *seeds}) == 3  # no episode twice
    assert {step[3] for step in run(None)[1:]} == {None}


def test_an_order_is_not_given_twice(make: Make, tmp_path: Path) -> None:
    """Not even a reset's: the new worker begins with a seed of its own."""
    flag = tmp_path / "flag"
    env = make(partial(Puppet, flag=flag))
    for order in (Order.EXIT, Order.RAISE):
        flag.write_text(order.name)
        env.seed(5)
        env.set_options({"level": 2})
        assert env.reset()[0, 1] == 0
        assert env.reset_infos[0]["seed"] != 5
        assert env.reset_infos[0]["options"] == {"level": 2}
        assert "fault" in env.reset_infos[0]
    assert env.reset_infos[0].keys() == {"seed", "options", "fault"}


@pytest.mark.parametrize("truncates", [False, True])
def test_a_fault_between_episodes_leaves_the_last_as_it_was(truncates: bool, make: Make, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    env = make(partial(Puppet, horizon=2, flag=flag, truncates=truncates))
    env.step(orders(0))
    flag.write_text("EXIT")
    observations, rewards, dones, (info,) = env.step(orders(0))
    assert (rewards[0], dones[0], observations[0, 1]) == (1, True, 0)
    assert info["terminal_observation"][1] == 2
    assert info["TimeLimit.truncated"] is truncates
    assert "fault" not in info
    assert "exit code 3" in env.reset_infos[0]["fault"]
    env.reset_infos.clear()


def test_restarts_that_fail_count(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flag = tmp_path / "flag"
    env = make(partial(unreliable, flag), max_restarts=2)
    flag.touch()
    *_, (info,) = env.step(orders(Order.RAISE))
    assert info["fault"] == "ArithmeticError: told to raise"
    assert [record.message.split("\n")[0] for record in caplog.records] == [
        "worker 0 is restarted: ArithmeticError: told to raise",
        "worker 0 is restarted: OSError: no room",
    ]
    with pytest.raises(RuntimeError, match="after 2 restarts"):
        env.step(orders(Order.EXIT))


def test_too_many_faults_end_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many within so many steps: those long ago are forgotten."""
    monkeypatch.setattr(agents.supervised_env, "_PER", 4)
    env = make(max_restarts=2)
    for _ in range(3):
        env.step(orders(Order.RAISE, 0))
        env.step(orders(0, 0))
    env.step(orders(0, Order.RAISE))
    with pytest.raises(RuntimeError, match=r"worker 0 failed, after 2 restarts within 4 steps: Arith.*") as raised:
        env.step(orders(Order.RAISE, 0))
    assert 'raise ArithmeticError("told to raise")' in str(raised.value)
    assert workers_of(psutil.Process()) == []
    with pytest.raises(RuntimeError, match="the environment is closed"):
        env.reset()


def test_no_fault_is_forgiven_if_none_may_be(make: Make) -> None:
    env = make(max_restarts=0)
    with pytest.raises(RuntimeError, match="worker 1 failed, after 0 restarts"):
        env.step(orders(0, Order.EXIT))


def test_a_killed_worker_is_noticed_at_the_next_step(make: Make) -> None:
    env = make()
    workers_of(psutil.Process())[0].kill()
    *_, infos = env.step(orders(0, 0))
    assert [info.get("fault") for info in infos].count("the worker died (Killed; out of memory?)") == 1


def test_restarts_leave_no_files_open(make: Make) -> None:
    env = make(Puppet)
    env.step(orders(Order.RAISE))
    gc.collect()  # what other tests have left
    before = psutil.Process().num_fds()
    for _ in range(3):
        env.step(orders(Order.EXIT))
    assert psutil.Process().num_fds() == before


# -- as of stable-baselines3 -------------------------------------------------------------------------------------------


def test_workers_start_light(make: Make) -> None:
    """They import what the environment needs; with torch, a restart would take seconds."""
    assert make(Puppet).get_attr("heavy") == [[]]
    assert "torch" in sys.modules


def test_workers_use_one_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    env = make(Puppet)
    env.step(orders(Order.EXIT))
    assert env.get_attr("threads") == ["1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_never_see_ctrl_c(make: Make) -> None:
    """From the first moment on: blocked, then ignored."""
    remote = Remote(pickle.dumps(Puppet))
    (worker,) = workers_of(psutil.Process())
    for _ in range(2):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
        assert (int(status["SigBlk"], 16) | int(status["SigIgn"], 16)) & 1 << (signal.SIGINT - 1)
        remote.receive(Patience(60))
        remote.send(str)
    end([remote])


def test_made_in_a_thread_that_ends(make: Make) -> None:
    """As in some notebooks: the workers live on."""
    made: list[Any] = []
    thread = threading.Thread(target=lambda: made.append(make()))
    thread.start()
    thread.join()
    (env,) = made
    *_, infos = env.step(orders(0, 0))
    assert [info["time"] for info in infos] == [1, 1]


def test_attributes_and_methods(make: Make) -> None:
    env = make(lambda: TimeLimit(Puppet(horizon=9), 4), lambda: Monitor(Puppet()))
    assert env.get_attr("horizon") == [9, 5]
    assert env.get_attr("horizon", 1) == env.get_attr("horizon", [1]) == [5]
    assert (env.has_attr("horizon"), env.has_attr("longitude")) == (True, False)
    with pytest.raises(AttributeError, match="longitude"):
        env.get_attr("longitude")
    env.set_attr("label", 7, indices=[0])
    assert env.get_attr("label", 0) == [7]
    assert env.env_method("double", 2, plus=1) == [5, 5]
    assert env.env_is_wrapped(Monitor) == [False, True]
    assert env.env_is_wrapped(TimeLimit, 0) == [True]
    assert env.env_is_wrapped(Monitor, 0) == [is_wrapped(TimeLimit(Puppet(), 4), Monitor)]
    image = env.render()
    assert image is not None
    assert image.shape == (4, 2, 3)
    # A call that fails says so; nothing is restarted.
    with pytest.raises(RuntimeError, match=r"TypeError: .*unexpected keyword"):
        env.env_method("double", 2, minus=1)
    for _ in range(4):
        *_, infos = env.step(orders(0, 0))
    assert [info["TimeLimit.truncated"] for info in infos] == [True, False]


def test_answers_to_interrupted_calls_are_dropped(make: Make) -> None:
    env = make(Puppet)
    for _ in range(3):
        env.step_async(orders(0))
    observations, *_, infos = env.step(orders(0))
    assert (observations[0, 1], infos[0]["time"]) == (4, 4)
    env.step_async(orders(0))
    assert env.reset()[0, 1] == 0
    assert env.step(orders(0))[0][0, 1] == 1


def test_spaces_of_several_parts(make: Make) -> None:
    env = make(Nested, Nested)
    observations, rewards, dones, infos = env.step(np.array([[0, 0], [1, 0]]))
    assert observations["image"].shape == (2, 300, 300)
    assert (observations["image"].dtype, observations["image"][0, 0, 0]) == (np.uint8, 2)
    assert observations["at"].tolist() == observations["pair"][1].tolist() == [2, 1]
    assert (rewards.tolist(), dones.tolist()) == ([0.5, 0], [False, True])
    assert "pickle" in infos[1]["fault"]


@pytest.mark.parametrize(
    ("env_fns", "arguments", "match"),
    [
        ([], {}, "there must be environments"),
        ([Puppet], {"timeout": 0}, "timeout above 0"),
        ([Puppet], {"timeout": float("nan")}, "timeout above 0"),
        ([Puppet], {"max_restarts": -1}, "max_restarts from 0 on"),
        ([Puppet, partial(Puppet, width=4)], {}, "environment 1 has other spaces"),
    ],
)
def test_bad_arguments(env_fns: list[Any], arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SupervisedVecEnv(env_fns, **arguments)
    assert workers_of(psutil.Process()) == []


def test_an_environment_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "flag").touch()
    with pytest.raises(RuntimeError, match="could not be made: OSError: no room") as raised:
        SupervisedVecEnv([Puppet, partial(unreliable, tmp_path / "flag")])
    assert "in unreliable" in str(raised.value)
    assert workers_of(psutil.Process()) == []


def test_environments_are_closed(make: Make, tmp_path: Path) -> None:
    """In their processes, if they are not busy."""

    class Closing(Puppet):
        def close(self) -> None:
            time.sleep(0.1)
            (tmp_path / "closed").touch()

    make(Closing).close()
    assert (tmp_path / "closed").exists()
