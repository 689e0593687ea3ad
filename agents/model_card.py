"""The page that a policy has on the Hub. Every figure on it comes from the policy's header or from an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from hpo_env.actions import RANGES
from hpo_env.hyperparameters import CONTROLS

from .policy import ControlPolicy
from .policy_file import PolicyHeader

_TOP = """\
---
library_name: hyperpilot
license: mit
tags:
- hyperpilot
- hyperparameter-optimization
- reinforcement-learning
- pytorch
---
"""


def model_card(policy: ControlPolicy, repo_id: str, revision: str, results: Mapping[str, Any] | None = None) -> str:
    """The card in Markdown, with the metadata that the Hub reads.

    Args:
        repo_id, revision: where the policy lies, for the lines that load it.
        results: what `scripts/evaluate.py --json` wrote about this policy.

    Raises:
        ValueError: the results are of another policy, or not an evaluation's.
    """
    header = policy.header
    widths = " x ".join(str(width) for width in (len(header.features), *header.hidden, len(header.controls)))
    return (
        "\n\n".join(
            [
                f"{_TOP}\n# {repo_id}",
                f"A policy for hyperpilot: it sets {', '.join(header.controls)} of a PyTorch training while that runs, "
                f"from its loss curves and gradient statistics. A multilayer perceptron, {widths}, in one safetensors "
                "file; loading it runs no code.",
                "## Use",
                "`pip install 'hyperpilot[hub]'`, then",
                _usage(policy, repo_id, revision),
                "and `tuner.step(train_loss=..., val_loss=...)` at the end of every epoch. The commit names this very "
                "file; the digest is that of all that decides, and is checked after the download.",
                "## Controls",
                "A decision moves each control away from a base schedule, by a factor (of the odds, for dropout).",
                _table(
                    ("control", "values", "first decision", "later ones", "farthest from the base"),
                    _controls(header),
                ),
                "## Trained on",
                _trained_ranges(header.trained_ranges),
                _entries(header.training) or "The file does not say how it was trained.",
                "## Scores",
                _evaluated(policy, results) if results is not None else "No evaluation on unseen tasks was given.",
                _validated(header.scores),
                "## Limits",
                "Where a run looks unlike those that it was trained on, the tuner warns and the base schedule takes "
                f"over. It needs {' and '.join(header.required_signals) or 'no loss'} to decide well. Nothing was "
                "measured beyond what stands above.",
            ]
        )
        + "\n"
    )


def _usage(policy: ControlPolicy, repo_id: str, revision: str) -> str:
    return f"""\
```python
from agents import Tuner
from agents.hub import pull

policy = pull(
    "{repo_id}",
    revision="{revision}",
    digest="{policy.digest}",
)
tuner = Tuner(policy, optimizer, model=model, loader=loader, total_epochs=30)
```"""


def _controls(header: PolicyHeader) -> Iterable[tuple[str, ...]]:
    for name in header.controls:
        control = CONTROLS[name]
        reach = RANGES[name]
        factors = (f"{math.exp(move):.3g}" for move in (reach.first, header.strength * reach.step, reach.limit))
        yield name, f"{control.low:g} to {control.high:g}", *factors


def _trained_ranges(ranges: Mapping[str, tuple[float, float]]) -> str:
    if not {"horizons", "parameters", "examples"} <= ranges.keys():
        return "The file does not say how long and how large the runs were."
    (shortest, longest), (fewest, most) = ranges["horizons"], (10 ** (8 * end) for end in ranges["parameters"])
    examples = 10 ** (8 * ranges["examples"][1])
    return (
        f"Runs of {shortest:g} to {longest:g} decisions, of models with {_round(fewest)} to {_round(most)} parameters, "
        f"over at most {_round(examples)} training examples."
    )


def _validated(scores: Mapping[str, Any]) -> str:
    """The scores in the header, which were taken to choose among the policies of one training."""
    if not scores:
        return "The file itself holds no scores."
    by_task = scores.get("log_ratios")
    tasks = by_task if isinstance(by_task, dict) else {}
    rows = [(_code(name), _figure(value)) for name, value in tasks.items()]
    parts = [
        "In the file itself, from the tasks that it was chosen on, which flatters it; no intervals were taken:",
        _entries({name: value for name, value in scores.items() if name != "log_ratios"}),
        _table(("task", "log ratio"), rows) if rows else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _evaluated(policy: ControlPolicy, results: Mapping[str, Any]) -> str:
    try:
        provenance, summary = results["provenance"], results["summary"]
        if provenance["policy"] != policy.digest:
            raise ValueError(f"they are of the policy {provenance['policy']}, not of {policy.digest}")
        cap, budget = summary["rse_cap"], provenance["budget"]
        rows = [
            (
                _code(label),
                f"{_capped(task['rse'], cap)} [{int(task['rse_ci'][0])}, {int(task['rse_ci'][1])}]",
                _capped(task["rse_calibrated"], cap),
                *(_ratio(task["methods"]["calibrated"][f"{split}_log_ratio"].values()) for split in ("val", "test")),
            )
            for label, task in results["tasks"].items()
        ]
        overall = (
            _ratio((summary[f"{split}_log_ratio_iqm"], *summary[f"{split}_log_ratio_ci"])) for split in ("val", "test")
        )
        calibrated = median(task["rse_calibrated"] for task in results["tasks"].values())
        rows.append(("all", _capped(summary["rse_median"], cap), _capped(calibrated, cap), *overall))
        return "\n\n".join(
            [
                f"On {_code(provenance['split'])}, n = {budget['seeds']:d} seeds of each task, paired. RSE is the "
                f"number of random-search trials that one run is worth (at most {cap:d}); the ratios are ln(loss of "
                "the calibrated schedule / loss of the policy), above 0 where the policy is better, with 95 % "
                "intervals.",
                _table(("task", "RSE", "RSE of the calibrated schedule", "validation", "test"), rows),
                "The last row has the median of the RSE and the interquartile mean of the ratios.",
            ]
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the results cannot be shown with this policy: {error}") from error


def _ratio(figures: Iterable[float]) -> str:
    value, low, high = figures
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _capped(equivalents: float, cap: int) -> str:
    return f">= {cap:d}" if equivalents >= cap else f"{equivalents:g}"


def _round(number: float) -> str:
    return f"{float(f'{number:.3g}'):,.0f}"


def _entries(values: Mapping[str, Any]) -> str:
    """A list of what a header says, whatever it is."""
    return "\n".join(f"- {_code(name)}: {_figure(value)}" for name, value in values.items())


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_code(name)} {_figure(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else _code(value)


def _code(value: Any) -> str:
    """As literal text in a line or a table, whatever a stranger wrote there."""
    return f"`{str(value).replace('`', chr(39)).replace('|', '/')}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
