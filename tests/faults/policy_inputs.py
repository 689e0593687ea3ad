"""Inputs for fuzzing the policy reader, and what must hold of each.

Some are edited as bytes; the others as what they are, and most of those have a checksum that is right again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from agents import ControlPolicy, PolicyError, policy_file
from agents.tuner import pretrained_path
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from tests.faults.hostile import container, parts, seal, sealed

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 16, 2**31, 2**63, 2**64, 10**39, 0.0, -0.0, 0.5, 5e-324, 1e-7, 1e6, 1e9, 1e308,
    -1e308, "", "F32", "F64", "mean", "\ud800", "\x1b", "x" * 5000, [], [[]], [0], [1] * 20, {}, {"": 0},
    {"a": {"a": {"a": {}}}},
)  # fmt: skip
FLOATS = np.array([0, -0.0, 1e-45, -1e-45, 1, -1, 1e6, -1e6, 1.1e6, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)
_OBSERVATIONS = np.random.default_rng(0).uniform(-2, 2, (2, len(FEATURES))).astype(np.float32)

SEEDS = (pretrained_path().read_bytes(), sealed(*parts()))
"""Whole files."""

Edit = Callable[[bytes], bytes]


def clear(message: str) -> bool:
    """Whether an error is one short line."""
    return message.isprintable() and 10 < len(message) < 1000


def check(data: bytes) -> bool:
    """Whether `data` is a policy's; one that is must be usable, in all that depends on its file.

    Raises:
        Exception: what the reader, or a policy that it let through, should not have raised.
    """
    try:
        policy = ControlPolicy.from_bytes(data, "input")
    except PolicyError as error:
        if not clear(str(error)):
            raise AssertionError(f"unclear: {error!r}") from error
        return False
    header = policy.header
    actions, _ = policy.act(_OBSERVATIONS)
    assert (np.abs(actions) <= 1).all(), actions
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        policy.out_of_depth(_OBSERVATIONS)
        for kind in header.base_rules:
            schedule = header.base_rule(kind).schedule(1e9, 1e9)
            values = schedule.values(np.linspace(0, 1, 65))
            assert all(np.isfinite(values[name]).all() for name in CONTROLS), values
    again = ControlPolicy.from_bytes(policy_file.to_bytes(header, policy.state_dict()))
    assert (again.digest, again.header) == (policy.digest, header)
    return True


def mutated(data: bytes, rng: random.Random, edit: Edit) -> bytes:
    """`data`, edited somewhere; or a whole file, as most of what comes of editing is refused early."""
    if rng.random() < 0.3:
        data = rng.choice(SEEDS)
    if rng.random() < 0.4:
        return edit(data)
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        table, body = json.loads(data[8:start]), bytearray(data[start:])
        text = table.pop("__metadata__")[policy_file.FORMAT]
        payload = json.loads(text)
        payload.pop("sha256", None)
        kind = rng.randrange(5)
        if kind == 0:
            _change(payload, rng)
        elif kind == 1:
            _change(table, rng)
        elif kind == 2:
            at = 4 * rng.randrange(len(body) // 4)
            body[at : at + 4] = rng.choice(FLOATS).tobytes()
        elif kind == 3:
            text = edit(text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
            payload = json.loads(text)
            payload["sha256"] = seal({name: value for name, value in payload.items() if name != "sha256"}, table, body)
        else:
            return container(edit(data[8:start]), bytes(body))
        return sealed(payload, table, body)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return edit(data)


def _change(value: Any, rng: random.Random) -> None:
    """Change, remove or add one entry somewhere in `value`."""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.2:
            break
        value = value[key]
    kind = rng.randrange(6)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[rng.choice(("", "a", "\n", "self", *keys))] = value[key]
    elif kind == 1:
        value.insert(key, value[key])
    elif kind == 2 and type(value[key]) in (int, float):
        value[key] += rng.choice((-1, 1, 0.5, 1000))
    else:
        value[key] = rng.choice(NASTY)
