"""Optimizer steps: equal to torch's own, the same bits compiled, and a fallback that says so once."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from inner_models import updates
from inner_models.updates import BETA1, BETA2, Fused, adamw, sgd

Step = Any
COMPILER = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")


def arguments(optimizer: str, replicas: int = 3, parameters: int = 1037) -> list[Tensor]:
    """Buffers, decays and columns; the second replica does not step."""
    generator = torch.Generator().manual_seed(0)
    buffers = [torch.randn(replicas, parameters, generator=generator) for _ in range(3)]
    if optimizer == "adamw":
        buffers.append(torch.rand(replicas, parameters, generator=generator))
    decays = (torch.arange(parameters) < parameters // 2).float()
    lr, decay = torch.tensor([1e-2, 3e-3, 0.1])[:replicas], torch.tensor([0.1, 0.2, 0.0])[:replicas]
    one = torch.ones(replicas)
    if optimizer == "adamw":
        rise1, rise2, unbias = one * (1 - BETA1), one * (1 - BETA2), one / (1 - BETA2**3) ** 0.5
        table = [one / 2, rise1, rise2, lr * decay, lr / (1 - BETA1**3), unbias]
    else:
        table = [one / 2, decay, one * 0.1, lr]
    columns = torch.stack(table, dim=1)
    if replicas > 1:
        columns[1] = 0
    return [*buffers, decays, columns]


def copies(values: list[Tensor]) -> list[Tensor]:
    return [value.clone() for value in values]


@pytest.mark.parametrize(("name", "step"), [("adamw", adamw), ("sgd", sgd)])
def test_equals_torch(name: str, step: Step) -> None:
    """Three steps of one replica against torch.optim, from the start."""
    p = torch.randn(1, 20, dtype=torch.float64)
    lr, decay = 0.05, 0.3
    reference = [torch.nn.Parameter(p[0, :12].clone()), torch.nn.Parameter(p[0, 12:].clone())]
    groups: list[dict[str, Any]] = [
        {"params": [parameter], "weight_decay": value} for parameter, value in zip(reference, (decay, 0.0), strict=True)
    ]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=lr) if name == "adamw" else torch.optim.SGD(groups, lr=lr, momentum=0.9)
    )
    moments = [torch.zeros_like(p) for _ in range(2 if name == "adamw" else 1)]
    decays = (torch.arange(20) < 12).double()
    for count in range(1, 4):
        g = torch.randn(1, 20, dtype=torch.float64)
        for parameter, part in zip(reference, (g[0, :12], g[0, 12:]), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
        summed = 4 * g  # of four micro-batches
        columns = (
            [0.25, 1 - BETA1, 1 - BETA2, lr * decay, lr / (1 - BETA1**count), (1 - BETA2**count) ** -0.5]
            if name == "adamw"
            else [0.25, decay, 0.1, lr]
        )
        step(p, summed, *moments, decays, torch.tensor([columns], dtype=torch.float64), True)
        torch.testing.assert_close(p[0], torch.cat([r.detach() for r in reference]), rtol=1e-12, atol=1e-12)
        assert not summed.any()


@pytest.mark.parametrize(("name", "step"), [("adamw", adamw), ("sgd", sgd)])
def test_a_replica_whose_batch_is_not_full_stays_as_it_is(name: str, step: Step) -> None:
    before = arguments(name)
    after = copies(before)
    step(*after, True)
    for old, new in zip(before[:-2], after[:-2], strict=True):
        assert torch.equal(old[1], new[1])
        assert not torch.equal(old[0], new[0])
    kept = copies(before)
    step(*kept, False)
    assert torch.equal(kept[1], before[1])  # gradients, where none are to be cleared


@COMPILER
@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize(("name", "step"), [("adamw", adamw), ("sgd", sgd)])
def test_compiled_equals_plain_bit_for_bit(name: str, step: Step, clear: bool) -> None:
    compiled = torch.compile(step, dynamic=True)
    for replicas, parameters in ((3, 1037), (3, 16), (1, 100)):
        plain, fast = (arguments(name, replicas, parameters) for _ in range(2))
        for _ in range(3):
            step(*plain, clear)
            compiled(*fast, clear)
        for a, b in zip(plain, fast, strict=True):
            assert torch.equal(a, b)


def add_one(x: Tensor, times: bool) -> None:
    x.add_(1)


def test_compiling_is_put_off_and_changes_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_(function: Step, **_: Any) -> Step:
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    fused, x = Fused(add_one), torch.zeros(3)
    fused(x, True)
    assert compiled == []
    monkeypatch.setattr(updates, "COMPILE_AFTER", 0.0)
    for _ in range(3):
        fused(x, True)
    assert compiled == ["add_one"]
    assert x.tolist() == [4.0] * 3


def test_elsewhere_no_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the bits change with it. (The meta device stands in for one.)"""
    made: list[list[bool]] = []

    def compile_(function: Step, **_: Any) -> Step:
        made.append([])
        return lambda x, flag: made[-1].append(flag)

    monkeypatch.setattr(torch, "compile", compile_)
    fused, x = Fused(add_one), torch.zeros(3, device="meta")
    for _ in range(2):
        fused(x, False)
    assert made == [[True, False, False, False]]  # both kinds beforehand
    fused(y := torch.zeros(3), False)
    assert y.tolist() == [1.0] * 3


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(updates, "COMPILE_AFTER", 0.0)
    fused, x = Fused(add_one), torch.zeros(3)
    with caplog.at_level(logging.WARNING, logger="hyperpilot"):
        for _ in range(3):
            fused(x, True)
    assert x.tolist() == [3.0] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "add_one could not be compiled, so inner training is slower: no compiler"
    ]
