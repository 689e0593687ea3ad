"""Recording: what the calls compute, and that buffers are shared only when their content is spent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from inner_models import programs
from inner_models.programs import Program, Tape, Workspace, same_memory

CPU = torch.device("cpu")


def make_tape(fresh: bool = True, training: bool = True) -> Tape:
    return Tape(Workspace(CPU, torch.float64), training=training, fresh=fresh)


def test_a_program_runs_on_what_its_buffers_hold() -> None:
    tape = make_tape()
    x, out = tape.take(3), tape.take(3)
    tape.call(torch.mul, x, 2, out=out)
    for value in (1.0, 5.0):
        x.fill_(value)
        tape.program.run()
        assert out.tolist() == [2 * value] * 3


@pytest.mark.parametrize("rows", [1, 31, 512, 509])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_right_however_they_are_divided(rows: int, transposed: bool) -> None:
    tape, generator = make_tape(), torch.Generator().manual_seed(0)
    a = torch.randn(2, rows, 64, generator=generator, dtype=torch.float64)
    b = torch.randn(2, 48, 64, generator=generator, dtype=torch.float64).transpose(1, 2)
    out = torch.empty(2, rows, 48, dtype=torch.float64)
    tape.matmul(a, b if transposed else b.contiguous(), out)
    tape.program.run()
    torch.testing.assert_close(out, a @ b)


def test_a_transposed_copy_follows_its_source() -> None:
    tape, x = make_tape(), torch.zeros(2, 3, dtype=torch.float64)
    copy = tape.transposed(x, 0.5)
    x.copy_(torch.arange(6).view(2, 3))
    tape.program.run()
    assert copy.is_contiguous()
    assert torch.equal(copy, x.T / 2)


def test_what_takes_in_data_runs_first() -> None:
    order: list[str] = []
    program = Program(CPU)
    program.add(order.append, "call")
    program.add_before(order.append, "before")
    program.run()
    assert order == ["before", "call"]


def test_released_memory_is_taken_again_and_other_memory_is_not() -> None:
    tape = make_tape()
    a, b = tape.take(4, 2), tape.take(8)
    assert not same_memory(a, b)
    tape.release(a.view(8)[2:])  # a view names its buffer
    assert same_memory(tape.take(8), a)
    assert not same_memory(tape.take(8), a)
    assert not same_memory(tape.take(8), b)


def test_the_smallest_sufficient_buffer_is_taken() -> None:
    tape = make_tape()
    large, small = tape.take(100), tape.take(10)
    tape.release(large, small)
    assert same_memory(tape.take(9), small)
    assert same_memory(tape.take(11), large)


def test_releasing_twice_or_a_foreign_tensor_does_nothing() -> None:
    tape = make_tape()
    a = tape.take(4)
    tape.release(a, a, torch.zeros(4))
    first, second = tape.take(4), tape.take(4)
    assert not same_memory(first, second)


def test_buffers_for_the_backward_pass_outlive_the_forward_pass_only_in_training() -> None:
    for training in (True, False):
        tape = make_tape(training=training)
        a = tape.take(4)
        tape.until_backward(a)
        assert same_memory(tape.take(4), a) is not training


def test_two_tapes_share_the_pool_of_their_workspace() -> None:
    workspace = Workspace(CPU, torch.float32)
    first = Tape(workspace, training=True, fresh=True).take(4)
    assert same_memory(Tape(workspace, training=False, fresh=False).take(4), first)
    assert workspace.named("x", (4,)) is workspace.named("x", (4,))
    assert not same_memory(workspace.named("x", (4,)), workspace.named("x", (2,)))


def test_buffers_have_the_type_asked_for() -> None:
    tape = make_tape()
    assert tape.take(3).dtype == torch.float64
    tokens = tape.take(2, 3, dtype=torch.int64)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 3)


@pytest.mark.parametrize("inner", [1, 4])
def test_matmul_with_views(inner: int) -> None:
    tape = make_tape()
    a = torch.randn(2, inner, 3, dtype=torch.float64).transpose(1, 2)
    b = torch.randn(2, inner, 5, dtype=torch.float64)
    whole = torch.zeros(2, 4, 5, dtype=torch.float64)
    tape.matmul(a, b, whole[:, 1:])
    tape.program.run()
    torch.testing.assert_close(whole[:, 1:], a @ b)
    assert not whole[:, 0].any()


@pytest.mark.parametrize("fresh", [True, False])
def test_parameter_gradients_are_written_or_added_to(fresh: bool) -> None:
    tape = make_tape(fresh=fresh)
    a, b = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    product, total, value = (torch.ones(2, *shape, dtype=torch.float64) for shape in ((3, 5), (4,), (3, 4)))
    tape.add_product(product, a, b)
    tape.add_sum(total, a, 1)
    tape.add_gradient(value, a)
    tape.program.run()
    before = 0 if fresh else 1
    torch.testing.assert_close(product, a @ b + before)
    torch.testing.assert_close(total, a.sum(1) + before)
    torch.testing.assert_close(value, a + before)


def test_a_shape_that_no_view_can_have_is_copied_at_every_run() -> None:
    tape = make_tape()
    x = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    flat, seen = tape.view(x.t(), 6), tape.view(x, 6)
    assert same_memory(seen, x)
    assert not same_memory(flat, x)
    tape.program.run()
    x.mul_(2)
    tape.program.run()
    assert flat.tolist() == x.t().reshape(6).tolist()


def test_a_program_without_a_cuda_graph_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does another one try."""
    tried: list[object] = []

    def fails(calls: object, device: object) -> None:
        tried.append(device)
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(programs, "_capture", fails)
    monkeypatch.setattr(Program, "_can_capture", True)
    runs: list[int] = []
    with caplog.at_level(logging.WARNING, logger="hyperpilot"):
        for _ in range(2):
            program = Program(torch.device("cuda"))
            program.add(runs.append, 0)
            for _ in range(5):
                program.run()
            assert not program.captured
    assert len(runs) == 10
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph could be captured, so inner training is slower: no graphs here"
    ]


@pytest.mark.parametrize("works", [True, False])
def test_a_capture_is_ended_and_its_stream_left(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its calls raise. (A stand-in for the device writes down what is asked of it.)"""
    asked: list[str] = []

    class Graph:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: asked.append(name)

    @contextmanager
    def entered(_: object) -> Iterator[None]:
        asked.append("enter")
        try:
            yield
        finally:
            asked.append("leave")

    for name, value in {"CUDAGraph": Graph, "stream": entered}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: Graph())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: asked.append("clear"), raising=False)
    monkeypatch.setattr(Program, "_can_capture", True)
    program = Program(torch.device("cuda"))

    def call() -> None:
        asked.append("call")
        if not works and asked.count("capture_begin") > asked.count("capture_end"):
            raise RuntimeError("not while capturing")

    program.add(call)
    for _ in range(4):
        program.run()
    capture = ["wait_stream", "enter", "clear", "capture_begin", "call", "capture_end", "leave"]
    after = ["wait_stream", "replay", "replay"] if works else ["call", "call"]
    assert asked == ["call", "call", *capture, *after]
    assert program.captured == works
