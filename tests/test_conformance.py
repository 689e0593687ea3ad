"""Every vector environment over the control problem does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conformance import CHECKS, COUNT, KINDS, Adapter, Kind, life
from tests.faults import Fault, actions


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def env(kind: Kind) -> Iterator[Adapter]:
    made = kind.make(COUNT)
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[Adapter], None], kind: Kind, env: Adapter) -> None:
    if check.__name__ in kind.lacks:
        pytest.skip("does not hold of this environment, which is not ours")
    check(env)


def test_life(kind: Kind) -> None:
    if "life" in kind.lacks:
        pytest.skip("does not hold of this environment, which is not ours")
    life(kind.make)


@pytest.mark.parametrize("fault", actions.FAULTS, ids=lambda fault: fault.name)
def test_any_actions(fault: Fault, tmp_path: Path) -> None:
    """As in `make faults`, fewer of them."""
    outcome = fault.run(60, tmp_path)
    assert outcome.failures == ()
    assert outcome.count == 60
