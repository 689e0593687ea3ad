"""Share a policy: to and from the Hugging Face Hub, and as ONNX for programs without Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from agents.hub import pull, push
from agents.onnx_export import export
from agents.policy import ControlPolicy
from agents.tuner import pretrained_path
from agents.untrusted import read_json
from scripts.common import Quiet, console, run_main


@dataclass
class Push:
    """Put a policy into a repository of the Hub, with a model card; prints the commit to pin."""

    repo: str
    """Repository, as user/name; made if need be."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""
    results: Path | None = None
    """What scripts/evaluate.py --json wrote about this policy, for the card."""
    private: bool = False
    """Make a repository that others cannot see."""


@dataclass
class Pull:
    """Get a policy from a repository of the Hub, checked, as a file."""

    repo: str
    """Repository, as user/name."""
    out: Path
    """File to write."""
    revision: str = "main"
    """The hash of a commit; with --digest also a branch or tag. Left out without --digest: an error that names one."""
    digest: str | None = None
    """What the policy's digest must be."""


@dataclass
class Onnx:
    """Write a policy as an ONNX file."""

    out: Path
    """File to write."""
    policy: Path | None = None
    """Policy file; the one that ships with hyperpilot when left out."""


@tyro.conf.configure(tyro.conf.CascadeSubcommandArgs)  # --quiet behind the command, too
@dataclass
class Config(Quiet):
    """Share a policy: to and from the Hugging Face Hub, and as ONNX for programs without Python.

    Needs the extra `hub` or `onnx`, and for push a token of the Hub (`hf auth login`). Takes seconds.

        python scripts/share_policy.py push --repo me/my-policy --policy runs/default/policy.safetensors
        python scripts/share_policy.py pull --repo me/my-policy --revision HASH --out policy.safetensors
        python scripts/share_policy.py onnx --out policy.onnx
    """

    what: tyro.conf.OmitSubcommandPrefixes[Push | Pull | Onnx]


def main(config: Config) -> None:
    what = config.what
    if isinstance(what, Pull):
        policy = pull(what.repo, revision=what.revision, digest=what.digest)
        policy.save(what.out)
        console.print(f"{what.out}: policy {policy.digest}", soft_wrap=True)
        return
    policy = ControlPolicy.load(what.policy or pretrained_path())
    if isinstance(what, Onnx):
        export(policy, what.out)
        console.print(f"{what.out}: policy {policy.digest}", soft_wrap=True)
        return
    results = _results(what.results) if what.results else None
    commit = push(policy, what.repo, private=what.private, results=results)
    console.print(f"{what.repo}: policy {policy.digest} at revision {commit}", soft_wrap=True)


def _results(path: Path) -> dict[str, Any]:
    try:
        return read_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"--results {path} is not what scripts/evaluate.py --json writes: {error}") from None


if __name__ == "__main__":
    run_main(Config, main)
