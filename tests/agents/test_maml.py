"""MAML: gradients against values computed by hand, and what it learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from agents import maml
from agents.maml import Config, Examples, Initialization, Task

STEP = 0.9


class TwoParameters(nn.Module):
    """Logits (w x, b): a softmax over two classes with one weight and one bias."""

    def __init__(self, w: float, b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.w * x, self.b.expand_as(x)], -1)


def one_row(x: float, target: int) -> Examples:
    return Examples(torch.tensor([[x]]), torch.tensor([[target]]))


def by_hand(w: float, b: float, x: float, z: float, second_order: bool) -> tuple[float, float]:
    """d query / d (w, b) for a support row x of class 0 and a query row z of class 0.

    With z = w x - b and p = sigmoid(-z): loss = -log sigmoid(z), its slopes are -p x and p, its Hessian p (1 - p) times
    (x x, -x; -x, 1). One step gives w' = w + a p x and b' = b - a p; the chain rule is the rest.
    """
    p = 1 / (1 + math.exp(w * x - b))
    w1, b1 = w + STEP * p * x, b - STEP * p
    q = 1 / (1 + math.exp(w1 * z - b1))
    along_w, along_b = -q * z, q
    if not second_order:
        return along_w, along_b
    h = p * (1 - p)
    return (
        along_w * (1 - STEP * h * x * x) + along_b * STEP * h * x,
        along_w * STEP * h * x + along_b * (1 - STEP * h),
    )


@pytest.mark.parametrize("second_order", [True, False])
def test_gradient_of_two_parameters(second_order: bool) -> None:
    w, b, x, z = 0.4, -0.2, 1.5, 0.8
    model = TwoParameters(w, b)
    weights = dict(model.named_parameters())
    start = Initialization(weights, dict.fromkeys(weights, torch.tensor(STEP)))
    task = Task(one_row(x, 0), one_row(z, 0))
    maml.query_loss(model, start, task, 1, second_order=second_order).backward()  # type: ignore[no-untyped-call]
    expected = by_hand(w, b, x, z, second_order)
    found = [parameter.grad.item() for parameter in model.parameters() if parameter.grad is not None]
    assert found == pytest.approx(expected, rel=1e-5)
    assert by_hand(w, b, x, z, True) != pytest.approx(by_hand(w, b, x, z, False), rel=1e-2)


def test_adaptation_is_gradient_descent() -> None:
    """Several tasks at once, held to torch's own optimizer on one after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    support = Examples(torch.randn(5, 6, 3), torch.randint(2, (5, 6)))
    start = Initialization.of(model, 0.2)
    adapted = maml.adapt(model, start, support, 4)
    for task in range(5):
        model.load_state_dict(dict(start.weights))
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(support.inputs[task]), support.targets[task]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(adapted[name][task], parameter.detach())


def turned(tasks: int, rows: int, generator: torch.Generator) -> Callable[[], Task]:
    """Tasks that share all but a sign: points in the plane, classes by x for some and by -x for the others, the second
    coordinate noise."""

    def examples(signs: Tensor) -> Examples:
        inputs = torch.randn(tasks, rows, 2, generator=generator)
        return Examples(inputs, (inputs[..., 0] * signs > 0).long())

    def draw() -> Task:
        signs = torch.randint(2, (tasks, 1), generator=generator) * 2 - 1
        return Task(examples(signs), examples(signs))

    return draw


def test_meta_training_finds_weights_that_adapt_fast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    draw = turned(16, 4, torch.Generator().manual_seed(0))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = list[float]()
    found = maml.meta_train(
        model, draw, Config(iterations=150, lr=1e-2, steps=1), report=lambda _, loss: losses.append(loss)
    )
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    task = turned(200, 4, torch.Generator().manual_seed(1))()
    scores = {
        name: maml.accuracy(model, maml.adapt(model, start, task.support, 1), task.query).mean().item()
        for name, start in (("found", found), ("untrained", Initialization.of(model, 0.1)))
    }
    assert len(losses) == 150
    assert scores["found"] > 0.8
    assert scores["untrained"] < 0.7
    assert len({round(rate.item(), 6) for rate in found.rates.values()}) == 4  # each tensor learned its own


def test_rates_may_stay() -> None:
    torch.manual_seed(0)
    draw = turned(2, 4, torch.Generator().manual_seed(0))
    found = maml.meta_train(nn.Linear(2, 2), draw, Config(iterations=2, learn_rates=False, second_order=False))
    assert [rate.item() for rate in found.rates.values()] == pytest.approx([0.1, 0.1])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"targets must be \[tasks, rows\], at least one of each, not \[2, 0\]"):
        Examples(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"inputs are of \[2, 3\] tasks and rows, targets not"):
        Examples(torch.zeros(2, 3, 3), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="iterations must be 1 or more and steps 0 or more, not 600, -1"):
        Config(steps=-1)
    with pytest.raises(ValueError, match="lr and inner_lr must be positive"):
        Config(inner_lr=0.0)
    draw = turned(2, 4, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"the query loss is (nan|inf) in iteration"):
        maml.meta_train(nn.Linear(2, 2), draw, Config(inner_lr=1e38, steps=3))


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(maml, "query_loss", full)
    with pytest.raises(MemoryError, match=r"[1-5] inner steps do not fit into memory; take fewer or first order"):
        maml.meta_train(nn.Linear(2, 2), turned(1, 1, torch.Generator()), Config())
