"""Runs that are spread over several processes by DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inner_models.signals import SIGNALS

from .tolerance import Notices


def world_size(model: nn.Module | None, notices: Notices | None) -> int:
    """Processes that train `model` together.

    Args:
        notices: where to tell that there are several, but that nothing in `model` is distributed; None where all of
            them are given the same losses.
    """
    replica = _replica(model)
    if replica is not None:
        return torch.distributed.get_world_size(replica.process_group)
    if notices and _started() and (ranks := torch.distributed.get_world_size()) > 1:
        notices.tell(
            "ranks",
            "%d processes, but no DistributedDataParallel in the model: losses are not averaged over them, and each "
            "may set other values; pass the DistributedDataParallel as model",
            ranks,
        )
    return 1


def averaged(signals: Mapping[str, float], model: nn.Module | None) -> dict[str, float]:
    """The mean of every signal over the processes that measured it (not NaN), the same to the last bit in all of them.

    A collective call: each of them must make it.

    Args:
        signals: some of `inner_models.signals.SIGNALS`.
        model: what they train; if nothing in it is distributed, `signals` come back as they are.
    """
    replica = _replica(model)
    if replica is None:
        return dict(signals)
    known = {name: value for name, value in signals.items() if not math.isnan(value)}
    pairs = [[known.get(name, 0.0), float(name in known)] for name in SIGNALS]
    sums = torch.tensor(pairs, dtype=torch.float64, device=next(replica.parameters()).device)
    torch.distributed.all_reduce(sums, group=replica.process_group)
    return {name: total / count for name, (total, count) in zip(SIGNALS, sums.tolist(), strict=True) if count}


def _replica(model: nn.Module | None) -> DistributedDataParallel | None:
    """The distributed model in `model`: all of it, or a part, as where it was compiled or stands beside an average."""
    parts = model.modules() if model is not None and _started() else ()
    return next((part for part in parts if isinstance(part, DistributedDataParallel)), None)


def _started() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
