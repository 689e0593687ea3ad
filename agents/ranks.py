"""Runs that are spread over several processes by DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inner_models.signals import SIGNALS


def world_size(model: nn.Module | None) -> int:
    """Processes that train `model` together."""
    if isinstance(model, DistributedDataParallel):
        return torch.distributed.get_world_size(model.process_group)
    return 1


def averaged(signals: Mapping[str, float], model: nn.Module | None) -> dict[str, float]:
    """The mean of every signal over the processes that measured it (not NaN), the same to the last bit in all of them.

    A collective call: each of them must make it.

    Args:
        signals: some of `inner_models.signals.SIGNALS`.
        model: what they train; if it is not distributed, `signals` come back as they are.
    """
    if not isinstance(model, DistributedDataParallel):
        return dict(signals)
    known = {name: value for name, value in signals.items() if not math.isnan(value)}
    pairs = [[known.get(name, 0.0), float(name in known)] for name in SIGNALS]
    sums = torch.tensor(pairs, dtype=torch.float64, device=next(model.parameters()).device)
    torch.distributed.all_reduce(sums, group=model.process_group)
    return {name: total / count for name, (total, count) in zip(SIGNALS, sums.tolist(), strict=True) if count}
