"""Coverage-guided fuzzing of a tuner's inputs: `python -m tests.faults.fuzz_tuner -runs=N`, with libFuzzer's options.

An input is one or two calls to a tuner that lives on from input to input, as in a run, until one of them makes another.
What may happen: a ValueError, a TypeError, or that every value stays finite and within its control's range.
"""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

if __name__ == "__main__":  # who else imports this module wants no instrumented packages
    import atheris

    with atheris.instrument_imports(include=["agents", "hpo_env", "inner_models"]):
        import agents  # noqa: F401

from agents import Tuner
from inner_models.signals import SIGNALS
from tests.faults.signals import VALUES, WRONG, out_of_bounds
from tests.tiny import random_policy

ODD = [*VALUES.values(), *WRONG.values(), -1, 0, 1, 2.5, 1e-45, 2**62, 2**64]
POLICY = random_policy(seed=1, scale=2.0)


class Fuzzed:
    """The run in which the inputs are tried.

    Attributes:
        calls: what has been done to its tuner since it was made, to be printed where something does not hold.
    """

    def __init__(self, data: Any) -> None:
        self.dropout = nn.Dropout(0.2)
        self.model = nn.Sequential(nn.Linear(2, 2), self.dropout)
        self.calls: list[str] = []
        self.saved: Any = None
        self.make(data)

    def make(self, data: Any) -> None:
        for parameter in self.model.parameters():
            parameter.data.fill_(0.5)
        self.dropout.p = 0.2
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.model.parameters(), lr=0.003)
            if data.ConsumeBool()
            else torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        )
        arguments = {
            "total_epochs": data.PickValueInList([6, 6, 70, 1, *ODD]),
            "examples_per_epoch": data.PickValueInList([None, None, 100, *ODD]),
            "batch_size": data.PickValueInList([None, 16, 48, 256, 0, math.nan, "x", 2.5]),
            "max_factor": data.PickValueInList([None, None, 100.0, 1.5, math.inf, *ODD]),
            "initial_loss": data.PickValueInList([None, 1.0, *ODD]),
            "model": data.PickValueInList([self.model, None]),
            "start": data.PickValueInList(["policy", "given", "x"]),
            "controls": data.PickValueInList([None, ["lr"], ["dropout", "lr"], ["x"], "lr", [], [0]]),
            "signals": data.PickValueInList([("train_loss", "val_loss"), tuple(SIGNALS), (), None]),
            "guard": data.ConsumeBool(),
        }
        if data.remaining_bytes() == 0:  # a short input makes what most users make
            arguments = {"total_epochs": 6, "model": self.model, "batch_size": 48}
        made = Tuner(POLICY, optimizer, **arguments)
        self.optimizer, self.tuner, self.calls = optimizer, made, [f"Tuner({arguments})"]

    def step(self, data: Any) -> None:
        losses = {name: self.loss(data) for name in ("train_loss", "val_loss")}
        self.calls.append(f"step({losses})")
        self.tuner.step(**losses)

    def loss(self, data: Any) -> Any:
        kind = data.ConsumeIntInRange(0, 3)
        if kind == 0:
            return data.PickValueInList(ODD)
        number = data.ConsumeFloat() if kind == 1 else data.ConsumeFloatInRange(-1.0, 5.0)
        return torch.tensor(number) if kind == 3 else number

    def train(self, data: Any) -> None:
        gradient, steps = data.PickValueInList([1.0, math.nan, math.inf, 1e38, 0.0, None]), data.ConsumeIntInRange(1, 9)
        self.calls.append(f"train({gradient}, {steps})")
        for parameter in self.model.parameters():
            parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
        for _ in range(steps):
            self.optimizer.step()

    def sampler(self, data: Any) -> None:
        rows, seed = data.PickValueInList([50, np.int64(7), "abc", None, *ODD]), data.PickValueInList([0, 1, *ODD])
        self.calls.append(f"batch_sampler({rows}, {seed})")
        if not isinstance(rows, int) or rows < 10**6:
            self.tuner.batch_sampler(rows, seed=seed)

    def save(self, data: Any) -> None:
        self.calls.append("save")
        self.saved = self.tuner.state_dict()

    def load(self, data: Any) -> None:
        """Its own state, an earlier one, or another tuner's."""
        self.calls.append("load")
        self.tuner.load_state_dict(self.saved if data.ConsumeBool() else self.tuner.state_dict())


CALLS = [Fuzzed.step] * 6 + [Fuzzed.train] * 2 + [Fuzzed.make] * 2 + [Fuzzed.sampler, Fuzzed.save, Fuzzed.load]


def main() -> None:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    run = Fuzzed(atheris.FuzzedDataProvider(b""))

    def one_input(buffer: bytes) -> None:
        data = atheris.FuzzedDataProvider(buffer)
        if len(run.calls) > 500:  # no run has thousands of samplers
            run.make(atheris.FuzzedDataProvider(b""))
        for _ in range(2):
            call = data.PickValueInList(CALLS)
            try:
                call(run, data)
            except (ValueError, TypeError):  # the typed ones
                pass
            except Exception:
                print(*run.calls, sep="\n")
                raise
            if wrong := out_of_bounds(run.tuner):
                raise AssertionError("\n".join([*wrong, *run.calls]))
            if not data.remaining_bytes():
                return

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
