"""Policies on the Hugging Face Hub. What comes from there is read as any stranger's file: checked, and never run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from . import policy_file
from .model_card import model_card
from .optional import require
from .policy import ControlPolicy, PolicyError

FILENAME = "policy.safetensors"


class HubError(OSError):
    """What was asked of the Hub could not be had or done; the message says why and what to do."""


def push(
    policy: ControlPolicy | Path | str,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    results: Mapping[str, Any] | None = None,
    endpoint: str | None = None,
) -> str:
    """Put a policy into a repository of the Hub, which is made if need be, with a new model card (`README.md`).

    Args:
        policy: the policy, or the path of its file.
        repo_id: the repository, as `user/name`.
        token: of an account that may write there; that of `hf auth login` or of `HF_TOKEN` when left out.
        private: make a repository that others cannot see.
        revision: the branch, made if need be; `main` when left out.
        message: of the commit.
        results: what `scripts/evaluate.py --json` wrote about this policy, for the card.
        endpoint: address of the Hub; `HF_ENDPOINT` or the public one when left out.

    Returns:
        The commit's hash: the `revision` that `pull` takes.

    Raises:
        ImportError: the package huggingface_hub is not installed.
        PolicyError, FileNotFoundError: not a policy that could be loaded again. Nothing was sent.
        ValueError: `repo_id` is not `user/name`, or the results are of another policy. Nothing was sent.
        HubError: not pushed; or private, but the repository is public, and nothing was sent.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be user/name, not {repo_id!r}")
    policy = policy if isinstance(policy, ControlPolicy) else ControlPolicy.load(policy)
    data = policy.to_bytes()
    model_card(policy, repo_id, "", results)  # fails before anything is sent
    hub = require("huggingface_hub", extra="hub")
    api = hub.HfApi(endpoint=endpoint, token=token, library_name="hyperpilot")

    def commit(name: str, content: bytes, message: str) -> str:
        addition = hub.CommitOperationAdd(name, content)
        return str(api.create_commit(repo_id, [addition], commit_message=message, revision=revision).oid)

    with _explained(repo_id):
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private)
        elif private and not api.repo_info(repo_id).private:
            raise HubError("it exists and is public: make it private on its page, or choose another name")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pinned = commit(FILENAME, data, message or f"Policy {policy.digest[:12]}")
        commit("README.md", model_card(policy, repo_id, pinned, results).encode(), "Model card")
    return pinned


def pull(
    repo_id: str,
    *,
    revision: str = "main",
    digest: str | None = None,
    filename: str = FILENAME,
    token: str | None = None,
    endpoint: str | None = None,
) -> ControlPolicy:
    """The policy in a repository of the Hub, pinned: by the hash of a commit, by the policy's own digest, or both.

    It is kept in the Hub's local cache; a commit that is there needs no network.

    Args:
        repo_id: the repository, as `user/name`.
        revision: the hash of a commit, all 40 digits; with `digest` also a branch or tag, which may move.
        digest: what `ControlPolicy.digest` must be. It does not cover provenance and scores.
        filename: of the policy in the repository.
        token: see `push`; for private repositories.
        endpoint: see `push`.

    Raises:
        ImportError: the package huggingface_hub is not installed.
        ValueError: neither a commit nor a digest; the message names the commit to pin.
        HubError: no such repository, revision or file, or the Hub cannot be reached.
        PolicyError: not a policy for this version (see `ControlPolicy.load`), or another one than `digest` says.
    """
    api = require("huggingface_hub", extra="hub").HfApi(endpoint=endpoint, token=token, library_name="hyperpilot")
    with _explained(repo_id, revision, filename):
        found = api.hf_hub_download(repo_id, filename, revision=revision, dry_run=True)
    if digest is None and not re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(
            f"{repo_id}: what {revision!r} names may change; give revision={found.commit_hash!r}, which it names now, "
            "or the policy's digest"
        )
    if found.file_size is not None and found.file_size > policy_file.MAX_BYTES:
        raise PolicyError(f"{filename} of {repo_id} has {found.file_size} bytes, more than a policy may have")
    with _explained(repo_id, revision, filename):
        path = api.hf_hub_download(repo_id, filename, revision=found.commit_hash)
    policy = ControlPolicy.load(path)
    if digest is not None and policy.digest != digest:
        raise PolicyError(
            f"{repo_id} at {found.commit_hash} holds the policy {policy.digest}, not {digest}; do not use it"
        )
    return policy


@contextmanager
def _explained(repo_id: str, revision: str = "", filename: str = "") -> Iterator[None]:
    errors = require("huggingface_hub.errors", extra="hub")
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:
        raise HubError(f"{repo_id}: {_reason(errors, error, revision, filename)}") from error


def _reason(errors: ModuleType, error: BaseException, revision: str, filename: str) -> str:
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # it was reached
    login = "log in (hf auth login) or give a token"
    reasons = {
        errors.GatedRepoError: f"access has to be asked for on its page; then {login}",
        errors.RepositoryNotFoundError: f"no such repository, or a private one: check the name, or {login}",
        errors.RevisionNotFoundError: f"no revision {revision!r} there",
        errors.RemoteEntryNotFoundError: f"no file {filename!r} at revision {revision!r}",
        errors.LocalEntryNotFoundError: "the Hub cannot be reached (or HF_HUB_OFFLINE is set), and the file is not in "
        "the local cache",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            return reason
    if isinstance(error, errors.HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or ""
        answer = " ".join(f"the Hub answers with HTTP {status} {said}".split())
        return f"{answer}: {login} that may do this" if status in (401, 403) else answer
    if isinstance(error, errors.HTTPError):
        return f"the Hub cannot be reached ({type(error).__name__}); check the connection"
    return " ".join(str(error).split())
