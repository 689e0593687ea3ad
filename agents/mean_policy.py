"""The mean of several policies, as one policy: what meta-training from several seeds is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .policy import ControlPolicy, PolicyHeader


@torch.no_grad()
def mean_policy(policies: Sequence[ControlPolicy], strength: float = 1.0) -> ControlPolicy:
    """The policy whose actions are the mean of several policies' actions: their networks side by side, as one.

    It is their mean, before clipping to -1..1 and up to rounding, wherever no feature lies more than
    `OBSERVATION_CLIP` standard deviations from its mean. The ranges of its header span theirs; it has no scores.

    Args:
        policies: at least two, of the same controls, base rules and number of layers.
        strength: of the mean (`PolicyHeader`), whatever theirs are.

    Raises:
        ValueError: fewer than two policies, policies with different controls, base rules or numbers of layers, or a
            strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of a policy must lie in 0..1, not {strength}")
    headers = [policy.header for policy in policies]
    if len(headers) < 2:
        raise ValueError(f"a mean needs at least two policies, not {len(headers)}")
    kinds: dict[str, list[Any]] = {
        "controls": [header.controls for header in headers],
        "base rules": [header.base_rules for header in headers],
        "numbers of layers": [len(header.hidden) for header in headers],
    }
    for what, found in kinds.items():
        if any(one != found[0] for one in found):
            raise ValueError(f"policies with different {what} have no mean; give policies of the same preset")
    result = ControlPolicy(_header(headers, strength))
    result.mean.copy_(torch.stack([policy.mean for policy in policies]).mean(0))
    result.std.copy_(torch.stack([policy.std for policy in policies]).mean(0))
    for depth, target in enumerate(result.linear_layers):
        layers = [policy.linear_layers[depth] for policy in policies]
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers]
        whole = torch.block_diag(*weights)  # type: ignore[no-untyped-call]
        if depth == 0:  # all see the same features, but each normalizes them in its own way
            shares = [weight / policy.std for weight, policy in zip(weights, policies, strict=True)]
            shifts = [share @ (result.mean - policy.mean) for share, policy in zip(shares, policies, strict=True)]
            biases = [bias + shift for bias, shift in zip(biases, shifts, strict=True)]
            whole = torch.cat(shares) * result.std
        together = torch.cat(biases)
        if depth == len(headers[0].hidden):
            whole, together = (part.unflatten(0, (len(policies), -1)).mean(0) for part in (whole, together))
        target.weight.copy_(whole)
        target.bias.copy_(together)
    return result.eval()


def _header(headers: Sequence[PolicyHeader], strength: float) -> PolicyHeader:
    signals = dict.fromkeys(name for header in headers for name in header.required_signals)
    ranges: dict[str, tuple[float, float]] = {}
    for header in headers:
        for name, (low, high) in header.trained_ranges.items():
            known = ranges.get(name, (low, high))
            ranges[name] = min(low, known[0]), max(high, known[1])
    return replace(
        headers[0],
        hidden=tuple(map(sum, zip(*(header.hidden for header in headers), strict=True))),
        required_signals=tuple(signals),
        strength=strength,
        trained_ranges=ranges,
        training=_training([header.training for header in headers]),
        scores={},
    )


def _training(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all have in common, the sums of what they cost, and under `mean_of` the rest of each."""
    common = {name: value for name, value in members[0].items() if all(own.get(name) == value for own in members)}
    rest = [{name: value for name, value in own.items() if name not in common} for own in members]
    sums = {name: sum(own.get(name, 0) for own in members) for name in ("timesteps", "seconds")}
    return {**common, **sums, "mean_of": rest}
