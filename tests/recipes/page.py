"""The code on docs/recipes.md, taken from there and run as it stands."""

from __future__ import annotations

import re
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hpo_env.hyperparameters import CONTROLS

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"

SNIPPETS: dict[str, str] = dict(re.findall(r'^```python title="(\w+)\.py"\n(.*?)^```$', PAGE.read_text(), re.M | re.S))
"""Title -> code, in the page's order. All others go on from `setup`."""

UNTRAINED = 2.3


class Recipe(dict[str, Any]):
    """The names that a recipe works with: those of `setup` at first, which a test may look at or replace.

    Attributes:
        rows: once `watch` was called, the examples in every batch that the model was trained on.
    """

    def __init__(self, name: str) -> None:
        super().__init__(__name__="__main__")
        self._name = name
        self._run("setup")
        self.rows: list[int] = []

    def watch(self) -> Recipe:
        """Look at the batches that reach the model."""
        self["model"].register_forward_pre_hook(self._see)
        return self

    def run(self) -> Recipe:
        """Run the recipe's own code."""
        return self._run(self._name)

    @property
    def sizes(self) -> list[int]:
        """The batch size that the tuner set for every epoch."""
        return [int(entry["hyperparameters"]["batch_size"]) for entry in self["tuner"].history]

    def _see(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if model.training:
            self.rows.append(len(inputs[0]))

    def _run(self, name: str) -> Recipe:
        exec(compile(SNIPPETS[name], f"{PAGE.name}: {name}", "exec"), self)
        return self


class Moving:
    """In place of `ControlPolicy.act`: moves one control by these actions in turn, and leaves the rest alone."""

    def __init__(self, control: str, *actions: float) -> None:
        self._control = control
        self._actions = cycle(actions or (1.0, -1.0))

    def __call__(self, observation: NDArray[np.float32], state: Any = None) -> tuple[NDArray[np.float64], Any]:
        action = next(self._actions)
        return np.array([[action if name == self._control else 0.0 for name in CONTROLS]]), state


def batches(rows: int, size: int) -> list[int]:
    """The examples in every batch of a pass."""
    return [size] * (rows // size) + [rows % size] * (rows % size > 0)


def script(name: str) -> str:
    """A recipe as a program of its own."""
    return SNIPPETS["setup"] + "\n\n" + SNIPPETS[name]
