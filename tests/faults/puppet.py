"""An environment that does what its action says, dying included. Nothing heavy is imported: workers start fast."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Observation = NDArray[np.float32]


class Order(IntEnum):
    """Actions."""

    STEP = 0
    RAISE = 1
    HANG = 2
    EXIT = 3
    CRASH = 4
    QUIT = 5
    HOLD = 6  # hang, holding Python's lock


class Puppet(gymnasium.Env[Observation, np.int64]):
    """Episodes of `horizon` steps that end, or are truncated if `truncates`.

    Observations are [a draw of the episode, steps of the episode so far, process id], rewards 1.

    Args:
        raises_every: every n-th step of a process raises, whatever the action; 0 for never.
        seconds: how long a step takes.
        flag: if this file exists at a reset, it is removed, and the order that it contains is obeyed.
        width: size of observations.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # type: ignore[misc]

    def __init__(
        self,
        horizon: int = 5,
        truncates: bool = False,
        raises_every: int = 0,
        seconds: float = 0,
        flag: Path | None = None,
        width: int = 3,
    ) -> None:
        self.horizon, self.truncates, self.raises_every, self.seconds = horizon, truncates, raises_every, seconds
        self.flag = flag
        self.observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = spaces.Discrete(len(Order))
        self.render_mode = "rgb_array"
        self.steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        if self.flag is not None and self.flag.exists():
            order = Order[self.flag.read_text()]
            self.flag.unlink()
            self._obey(order)
        self.time, self.draw = 0, self.np_random.random()
        return self._observation(), {"seed": seed, "options": options}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._obey(Order(int(action)))
        time.sleep(self.seconds)
        self.time += 1
        self.steps += 1
        if self.raises_every and self.steps % self.raises_every == 0:
            raise ArithmeticError(f"step {self.steps}\nof this process")
        over = self.time == self.horizon
        return self._observation(), 1.0, over and not self.truncates, over and self.truncates, {"time": self.time}

    @property
    def heavy(self) -> list[str]:
        """Heavy packages that this process has imported."""
        return [name for name in ("torch", "stable_baselines3") if name in sys.modules]

    @property
    def threads(self) -> str:
        """What this process lets numerical libraries use."""
        return os.environ["OMP_NUM_THREADS"]

    def render(self) -> Any:
        return np.full((2, 2, 3), self.time, np.uint8)

    def double(self, number: int, plus: int = 0) -> int:
        return 2 * number + plus

    def _observation(self) -> Observation:
        values = np.zeros(self.observation_space.shape or (), np.float32)
        values[:3] = self.draw, self.time, os.getpid()
        return values

    def _obey(self, order: Order) -> None:
        if order is Order.RAISE:
            raise ArithmeticError("told to raise")
        if order is Order.HANG:
            time.sleep(1e6)
        elif order is Order.EXIT:
            os._exit(3)
        elif order is Order.CRASH:
            ctypes.string_at(0)
        elif order is Order.QUIT:
            sys.exit("told to quit")
        elif order is Order.HOLD:
            sum(range(10**15))


def unreliable(flag: Path) -> Puppet:
    """A puppet, or a failure to make one where a file says so; it is then removed."""
    if flag.exists():
        flag.unlink()
        raise OSError("no room")
    return Puppet()


class Nested(gymnasium.Env[Any, Any]):
    """Observations of several parts, larger than a pipe takes at once; information that cannot travel, if asked for."""

    def __init__(self) -> None:
        parts = {"image": spaces.Box(0, 255, (300, 300), np.uint8), "at": spaces.Discrete(5)}
        self.observation_space = spaces.Dict({**parts, "pair": spaces.Tuple([parts["at"], parts["at"]])})
        self.action_space = spaces.MultiDiscrete([2, 2])
        self.render_mode = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self._observation(1), {}

    def step(self, action: Any) -> Any:
        info = {"function": lambda: 0} if action[0] else {}
        return self._observation(2), 0.5, False, False, info

    @staticmethod
    def _observation(at: int) -> Any:
        return {"image": np.full((300, 300), at, np.uint8), "at": at, "pair": (at, at)}
