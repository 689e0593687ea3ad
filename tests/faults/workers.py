"""Worker processes of `SupervisedVecEnv` that are killed, hang or raise; and their parent killed, interrupted or
stopped."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.faults import Fault, Outcome, hear_ctrl_c
from tests.faults.puppet import Order, Puppet

RESTART, CLOSE = 10.0, 5.0
"""Seconds that these may take."""

ROOT = Path(__file__).parents[2]


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The worker processes that a process has started."""
    found = []
    for child in process.children(recursive=True):
        try:
            if any("spawn_main" in part for part in child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


class Watched:
    """Steps a `SupervisedVecEnv` of puppets, and notes what does not hold.

    Attributes:
        failures: what did not hold.
        slowest: seconds of the slowest restart; the mean, where a step took several.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.failures: list[str] = []
        self.slowest = 0.0
        self._before = env.reset()

    @property
    def restarts(self) -> int:
        return int(sum(self.env._restarts))

    def step(self, *orders: int) -> str:
        """Take a step; puppets without an order just step. Returns the first one's fault, if any."""
        actions = np.zeros(self.env.num_envs, np.int64)
        actions[: len(orders)] = orders
        started, restarts = time.monotonic(), self.restarts
        observations, rewards, dones, infos = self.env.step(actions)
        if self.restarts > restarts:
            self.slowest = max(self.slowest, (time.monotonic() - started) / (self.restarts - restarts))
        replaced = observations[:, 2] != self._before[:, 2]
        for index, (before, after, info) in enumerate(zip(self._before, observations, infos, strict=True)):
            last = info["terminal_observation"] if dones[index] else after
            if "fault" in info:
                held = replaced[index] and info["TimeLimit.truncated"] and rewards[index] == 0
                expected = before
            else:
                held = rewards[index] == 1 and (dones[index] or not replaced[index])
                expected = before + np.array([0, 1, 0], np.float32)
            held = held and np.array_equal(last, expected) and (after[1] == 0) == dones[index]
            if not held:
                self.failures.append(f"{before} became {after}, {rewards[index]}, {dones[index]}, {info}")
        self._before = observations
        return str(infos[0].get("fault", ""))

    def finish(self, count: int) -> Outcome:
        """Take some last steps in peace, close, and say what came of it."""
        for _ in range(20):
            self.step()
        self.failures += closed(self.env)
        if self.slowest > RESTART:
            self.failures.append(f"a restart took {self.slowest:.1f} s")
        remark = f"slowest restart {self.slowest:.1f} s"
        return Outcome(count, tuple(self.failures), remark)


def closed(env: Any) -> list[str]:
    """Close an environment. Returns what does not hold."""
    started = time.monotonic()
    env.close()
    seconds = time.monotonic() - started
    failures = [f"close took {seconds:.1f} s"] if seconds > CLOSE else []
    return failures + [f"left over: {worker}" for worker in workers_of(psutil.Process())]


@contextmanager
def quietly() -> Iterator[None]:
    """Without the log of every fault."""
    log = logging.getLogger("hyperpilot")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def puppets(count: int, max_restarts: int, timeout: float = 60.0, **arguments: Any) -> Any:
    from agents.supervised_env import SupervisedVecEnv  # not for workers, which import this module's neighbours

    env = SupervisedVecEnv([partial(Puppet, **arguments)] * count, timeout=timeout, max_restarts=max_restarts)
    env.seed(0)
    return env


def killed(count: int, folder: Path) -> Outcome:
    """Kill workers at random moments, starting ones included."""
    rng, victims = random.Random(0), list[psutil.Process]()

    def kill() -> None:
        while len(victims) < count:
            time.sleep(rng.uniform(0, 0.4))
            for victim in rng.sample(alive := workers_of(psutil.Process()), k=min(1, len(alive))):
                victim.kill()
                victim.wait()
                victims.append(victim)

    with quietly():
        watched = Watched(puppets(3, max_restarts=count, seconds=0.002))
        killer = threading.Thread(target=kill)
        killer.start()
        while killer.is_alive():
            watched.step()
        outcome = watched.finish(len(victims))
    if not len(victims) == watched.restarts == count:
        return replace(outcome, failures=(*outcome.failures, f"{len(victims)} killed, {watched.restarts} restarts"))
    return outcome


def hung(count: int, folder: Path) -> Outcome:
    """Let workers hang, every other time holding Python's lock; and close with hung workers."""
    with quietly():
        watched = Watched(puppets(2, max_restarts=count, timeout=0.5))
        for number in range(count):
            fault = watched.step(Order.HOLD if number % 2 else Order.HANG)
            if "in time" not in fault:
                watched.failures.append(f"said to be {fault!r}")
            watched.step()
        outcome = watched.finish(count)
        env = puppets(3, max_restarts=0)
        env.reset()
        env.step_async(np.array([Order.HANG, Order.HOLD, Order.STEP]))
        workers_of(psutil.Process())[0].suspend()
        return Outcome(count, (*outcome.failures, *closed(env)), outcome.remark)


def raising(count: int, folder: Path) -> Outcome:
    """Each thousandth step of a process raises."""
    with quietly():
        watched = Watched(puppets(1, max_restarts=2, raises_every=1000))
        for _ in range(1000 * count):
            watched.step()
        if watched.restarts != count:
            watched.failures.append(f"{watched.restarts} restarts")
        return watched.finish(count)


def crashed(count: int, folder: Path) -> Outcome:
    """Workers that end themselves, by a segmentation fault every other time."""
    with quietly():
        watched = Watched(puppets(1, max_restarts=count))
        for number in range(count):
            fault = watched.step(Order.CRASH if number % 2 else Order.EXIT)
            if not fault.startswith("the worker died"):
                watched.failures.append(f"said to be {fault!r}")
            watched.step()
        return watched.finish(count)


def learning(count: int, folder: Path) -> Outcome:
    """Kill a worker while stable-baselines3's PPO learns on `HPOEnv`s, once in each rollout."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    from agents.supervised_env import SupervisedVecEnv
    from hpo_env.env import HPOEnv
    from inner_models.tasks import Task

    class Killer(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.faults: list[str] = []

        def _on_rollout_start(self) -> None:
            workers_of(psutil.Process())[0].kill()

        def _on_step(self) -> bool:
            self.faults += [info["fault"] for info in self.locals["infos"] if "fault" in info]
            return True

    task, killer = Task.named("digits/linear", horizon=4, interval_examples=32, train_rows=64, eval_rows=64), Killer()
    steps = 8
    with quietly():
        env = SupervisedVecEnv([partial(HPOEnv, task)] * 2, max_restarts=count)
        model = PPO("MlpPolicy", env, n_steps=steps, batch_size=2 * steps, device="cpu", seed=0)
        model.learn(2 * steps * count, callback=killer)
        failures = closed(env)
    if model.num_timesteps != 2 * steps * count or len(killer.faults) != count:
        failures.append(f"{model.num_timesteps} steps, {killer.faults}")
    return Outcome(count, tuple(failures))


_PARENT = """
import sys, threading
import numpy as np
from tests.faults.workers import puppets
threaded, seconds, timeout, *orders = map(float, sys.argv[1:])
print("starting", flush=True)
def run():
    env = puppets(len(orders), max_restarts=0, timeout=timeout, seconds=seconds)
    env.reset()
    env.step_async(np.array(orders))
    print("stepping", flush=True)
    env.step_wait()
    env.close()
    print("done", flush=True)
if threaded:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
else:
    run()
"""


class Parent(subprocess.Popen[str]):
    """A process, leader of a group, whose workers take one step (what the orders say, or `seconds` of sleep). They may
    be made in another thread than the main one."""

    def __init__(self, *orders: Order, threaded: bool = False, seconds: float = 0, timeout: float = 60) -> None:
        arguments = [str(float(argument)) for argument in (threaded, seconds, timeout, *orders)]
        command = [sys.executable, "-c", _PARENT, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        super().__init__(  # type: ignore[call-overload]
            command, cwd=ROOT, text=True, start_new_session=True, preexec_fn=hear_ctrl_c, **pipes
        )

    def wait_for(self, line: str) -> None:
        assert self.stdout is not None
        while (read := self.stdout.readline().strip()) != line:
            assert read, f"ended before {line!r}"

    def signal_group(self, number: int) -> None:
        os.killpg(self.pid, number)

    def said(self) -> tuple[str, str]:
        """Standard output and error, once it has ended; it is killed if that takes too long."""
        try:
            return self.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.signal_group(signal.SIGKILL)
            output, errors = self.communicate()
            return output, f"it did not end: {errors}"

    def outlived_by(self, workers: list[psutil.Process]) -> list[str]:
        """Which of its workers are there 10 s after its end; they are then killed."""
        _, left = psutil.wait_procs(workers, timeout=RESTART)
        for worker in left:
            worker.kill()
        return [f"left over: {worker}" for worker in left]


def orphaned(count: int, folder: Path) -> Outcome:
    """Kill the parent of workers that are idle and that hang (holding Python's lock, if the main thread made them); or
    that are only starting, every third time."""
    rng, failures = random.Random(0), list[str]()
    for number in range(count):
        threaded = number % 2 == 1
        with Parent(Order.STEP, Order.HANG, Order.HANG if threaded else Order.HOLD, threaded=threaded) as parent:
            parent.wait_for("starting" if number % 3 == 2 else "stepping")
            while not (workers := workers_of(psutil.Process(parent.pid))):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            parent.kill()
            failures += parent.outlived_by(workers)
    return Outcome(count, tuple(failures))


def interrupted(count: int, folder: Path) -> Outcome:
    """Press Ctrl-C while workers start or step: only the parent says so, and all end."""
    rng, failures = random.Random(0), list[str]()
    for number in range(count):
        with Parent(Order.HANG, Order.HOLD, Order.STEP) as parent:
            parent.wait_for("starting" if number % 2 else "stepping")
            while not (workers := workers_of(psutil.Process(parent.pid))):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.3) * (number > 1))
            parent.signal_group(signal.SIGINT)
            _, errors = parent.said()
            failures += parent.outlived_by(workers)
            if (
                "KeyboardInterrupt" not in errors
                or "it did not end" in errors
                or "spawn_main" in errors
                or "Process-" in errors
            ):
                failures.append(errors)
    return Outcome(count, tuple(failures))


def stopped(count: int, folder: Path) -> Outcome:
    """Stop everything in the middle of a step (Ctrl-Z), for longer than a step may take, and let it go on."""
    failures = []
    for _ in range(count):
        with Parent(Order.STEP, Order.STEP, seconds=1, timeout=4) as parent:
            parent.wait_for("stepping")
            time.sleep(0.5)
            parent.signal_group(signal.SIGSTOP)
            time.sleep(6)
            parent.signal_group(signal.SIGCONT)
            output, errors = parent.said()
            if parent.returncode != 0 or "done" not in output:
                failures.append(errors)
    return Outcome(count, tuple(failures))


_GOES_ON = "the run goes on from a fresh episode, within 10 s; close within 5 s; nothing left over"
FAULTS = (
    Fault("environment's worker killed", _GOES_ON, killed, 100),
    Fault("environment's worker hung", _GOES_ON, hung, 50),
    Fault("environment raises once in 1,000 steps", _GOES_ON, raising, 5),
    Fault("environment's worker exits or crashes", _GOES_ON, crashed, 50),
    Fault("environment's worker killed under PPO.learn", "it learns to the end", learning, 5),
    Fault("parent of environments killed", "no worker is left over", orphaned, 10),
    Fault("Ctrl-C with environments in workers", "no worker's traceback; none is left over", interrupted, 10),
    Fault("Ctrl-Z with environments in workers", "no time passes for workers", stopped, 3),
)
