"""One of the processes of `test_distributed.py`: `python -m tests.recipes.ranks RANK FOLDER`.

Two of them train on halves of 255 digits and meet through files in the folder. Each leaves there what it saw.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

from agents import ControlPolicy, Tuner
from agents.replay import Replay
from tests.recipes.page import Moving, Recipe

ROWS = 255
BROKEN, ENDS = 3, 5
"""The epoch in which rank 1 has no loss, and the one before which a run is ended."""

FEW: dict[str, Any] = {"controls": ["lr", "weight_decay"]}
"""Without the batch size: ranks that disagree on it have unlike numbers of batches, and wait for each other forever."""


class Run:
    """A recipe's model and data on this rank.

    Args:
        wrapped: makes what is trained, and given to the tuner, of the distributed model.
        arguments: others of the tuner's.
    """

    def __init__(
        self, rank: int, wrapped: Callable[[nn.Module], Any] = lambda replica: replica, **arguments: Any
    ) -> None:
        self.rank, self.recipe = rank, Recipe("distributed").watch()
        self.model = wrapped(DistributedDataParallel(self.recipe["model"]))
        rows = Subset(self.recipe["train_set"], range(ROWS))
        self.sampler: DistributedSampler[Any] = DistributedSampler(rows)
        self.loader = DataLoader(rows, batch_size=32, sampler=self.sampler)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        known = {"model": self.model, "loader": self.loader, "total_epochs": self.recipe["EPOCHS"]}
        self.tuner = Tuner.pretrained(self.optimizer, **{**known, **arguments})
        self.told: list[float] = []

    def train(self, *, until: int = 8, broken: int | None = None) -> dict[str, Any]:
        """Go on to an epoch. Returns what this rank saw.

        Args:
            broken: the epoch in which the training loss of rank 1 is not finite.
        """
        while self.tuner.epoch < until:
            epoch = self.tuner.epoch
            self.sampler.set_epoch(epoch)
            torch.manual_seed(2 * epoch + self.rank)
            loss = self.recipe["train"](self.model, self.optimizer, self.loader)
            if self.rank and epoch == broken:
                loss = math.nan
            self.told.append(loss)
            val_loss = None if self.rank else self.recipe["validate"](self.recipe["model"])
            self.tuner.step(train_loss=loss, val_loss=val_loss)
        weights = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return {
            "told": self.told,
            "rows": self.recipe.rows,
            "history": self.tuner.history,
            "final": self.tuner.hyperparameters,
            "weights": weights.double().sum().item(),
            "finite": bool(weights.isfinite().all()),
        }


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """A run that is ended, its checkpoint by rank 0, and a new one that goes on from there."""
    run = Run(rank)
    run.train(until=ENDS)
    if rank == 0:
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        torch.save({**state, "tuner": run.tuner.state_dict()}, folder / "checkpoint")
    dist.barrier()
    state = torch.load(folder / "checkpoint", weights_only=True)
    run = Run(rank)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.tuner.load_state_dict(state["tuner"])
    return run.train()


def warned(rank: int) -> list[list[str]]:
    """What is logged of a tuner whose model holds the distributed one, of one with a bare model, of one with none, and
    of a replay with none.
    """
    log, handler = logging.getLogger("hyperpilot"), BufferingHandler(1000)
    log.addHandler(handler)
    seen, bare = [], Recipe("distributed")["model"]
    for model in ({}, {"model": bare}, {"model": None}):
        run = Run(rank, nn.Sequential, **FEW, **model)
        run.train(until=2)
        seen.append([record.getMessage() for record in handler.buffer])
        handler.flush()
    Replay(run.tuner.trajectory, run.optimizer, total_epochs=2)
    log.removeHandler(handler)
    return [*seen, [record.getMessage() for record in handler.buffer]]


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    seen = {
        "ordinary": Run(rank).train(),
        "broken": Run(rank).train(broken=BROKEN),
        "resumed": resumed(rank, folder),
        "held": Run(rank, nn.Sequential, **FEW).train(),
        "compiled": Run(rank, partial(torch.compile, backend="eager"), **FEW).train(),
        "warned": warned(rank),
    }
    ControlPolicy.act = Moving("batch_size")  # type: ignore[method-assign,assignment]
    seen["moving"] = Run(rank).train()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort a process whose interpreter ends (pytorch#190489)


if __name__ == "__main__":
    main()
