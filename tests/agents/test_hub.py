"""Sharing policies: the real client library against a hub on this machine. No test reaches a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from agents import ControlPolicy, PolicyError, policy_file
from agents.hub import FILENAME, HubError, pull, push
from agents.model_card import model_card
from agents.tuner import pretrained_path
from tests.agents.fake_hub import TOKEN, FakeHub, constants, fake_hub
from tests.test_architecture import ROOT
from tests.tiny import random_policy

REPO = "somebody/tuner"
OWNER: dict[str, Any] = {"token": TOKEN}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache") as running:
        yield running


@pytest.fixture
def policy() -> ControlPolicy:
    return random_policy(seed=1)


def sent(hub: FakeHub, policy: ControlPolicy | Path, **arguments: Any) -> str:
    return push(policy, REPO, endpoint=hub.endpoint, **{**OWNER, **arguments})


# -- round trip --------------------------------------------------------------------------------------------------------


def test_round_trip(hub: FakeHub, policy: ControlPolicy) -> None:
    commit = sent(hub, policy)
    pulled = pull(REPO, revision=commit, digest=policy.digest, endpoint=hub.endpoint)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert (pulled.header, pulled.digest) == (policy.header, policy.digest)
    assert all(pulled.state_dict()[name].equal(tensor) for name, tensor in policy.state_dict().items())


def test_a_file(hub: FakeHub) -> None:
    pulled = pull(REPO, revision=sent(hub, pretrained_path()), endpoint=hub.endpoint)
    shipped = ControlPolicy.load(pretrained_path())
    assert (pulled.header, pulled.digest) == (shipped.header, shipped.digest)


def test_a_later_push_does_not_change_what_is_pinned(hub: FakeHub, policy: ControlPolicy) -> None:
    first, other = sent(hub, policy), random_policy(seed=2)
    second = sent(hub, other)
    assert pull(REPO, revision=first, endpoint=hub.endpoint).digest == policy.digest
    assert pull(REPO, revision=second, endpoint=hub.endpoint).digest == other.digest != policy.digest
    assert pull(REPO, digest=other.digest, endpoint=hub.endpoint).digest == other.digest
    with pytest.raises(PolicyError, match=f"holds the policy {other.digest}, not {policy.digest}"):
        pull(REPO, digest=policy.digest, endpoint=hub.endpoint)


def test_what_may_move_is_refused_and_the_commit_named(hub: FakeHub, policy: ControlPolicy) -> None:
    sent(hub, policy)
    repository = hub.repositories[REPO]
    repository.refs["v1"] = repository.refs["main"]
    for name in ("main", "v1"):
        with pytest.raises(ValueError, match=repository.refs["main"]) as refusal:
            pull(REPO, revision=name, endpoint=hub.endpoint)
        assert not isinstance(refusal.value, PolicyError)
    assert not [request for request in hub.requests if request.startswith("GET /large")]  # nothing was downloaded
    named = re.findall("[0-9a-f]{40}", str(refusal.value))[0]
    assert pull(REPO, revision=named, endpoint=hub.endpoint).digest == policy.digest


def test_on_a_branch(hub: FakeHub, policy: ControlPolicy) -> None:
    for _ in range(2):  # made, then found
        commit = sent(hub, policy, revision="trial")
    assert FILENAME in hub.repositories[REPO].commits[commit]
    assert FILENAME not in hub.repositories[REPO].commits[hub.repositories[REPO].refs["main"]]


def test_what_is_in_the_cache_needs_no_network(
    hub: FakeHub, policy: ControlPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = sent(hub, policy)
    pull(REPO, revision=commit, endpoint=hub.endpoint)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(REPO, revision=commit, endpoint=hub.endpoint).digest == policy.digest
    assert hub.requests == []


# -- hostile files -----------------------------------------------------------------------------------------------------


def test_tampered_files_are_refused(hub: FakeHub, policy: ControlPolicy) -> None:
    commit = sent(hub, policy)
    files = hub.repositories[REPO].commits[commit]
    flipped = bytearray(files[FILENAME])
    flipped[-3] ^= 1
    files[FILENAME] = bytes(flipped)
    with pytest.raises(PolicyError, match="is damaged"):
        pull(REPO, revision=commit, endpoint=hub.endpoint)


def test_another_policy_in_its_place_is_told_by_the_digest(hub: FakeHub, policy: ControlPolicy) -> None:
    """A whole file with a correct checksum of its own: somebody else's policy."""
    commit, other = sent(hub, policy), random_policy(seed=9)
    hub.repositories[REPO].commits[commit][FILENAME] = policy_file.to_bytes(other.header, other.state_dict())
    with pytest.raises(PolicyError, match="do not use it"):
        pull(REPO, revision=commit, digest=policy.digest, endpoint=hub.endpoint)


def test_no_policy(hub: FakeHub, policy: ControlPolicy) -> None:
    sent(hub, policy)
    commit = hub.repositories[REPO].commit({"other.safetensors": b"PK\3\4 a pickle, say"})
    with pytest.raises(PolicyError, match="not a whole safetensors file"):
        pull(REPO, revision=commit, filename="other.safetensors", endpoint=hub.endpoint)


def test_a_file_too_large_is_not_downloaded(hub: FakeHub, policy: ControlPolicy) -> None:
    commit = sent(hub, policy)
    hub.claims = {"X-Linked-Size": str(policy_file.MAX_BYTES + 1)}
    with pytest.raises(PolicyError, match=f"{policy_file.MAX_BYTES + 1} bytes"):
        pull(REPO, revision=commit, endpoint=hub.endpoint)
    assert not [request for request in hub.requests if request.startswith("GET /large")]


def test_a_name_outside_of_the_repository(hub: FakeHub, policy: ControlPolicy) -> None:
    commit = sent(hub, policy)
    with pytest.raises(HubError):
        pull(REPO, revision=commit, filename="../../other.safetensors", endpoint=hub.endpoint)


def test_what_could_not_be_pulled_is_not_pushed(hub: FakeHub, policy: ControlPolicy, tmp_path: Path) -> None:
    policy.mean.fill_(torch.nan)
    (tmp_path / "other").write_bytes(b"no policy")
    for unfit in (policy, tmp_path / "other"):
        with pytest.raises(PolicyError):
            sent(hub, unfit)
    with pytest.raises(FileNotFoundError, match="no policy file"):
        sent(hub, tmp_path / "none")
    with pytest.raises(ValueError, match="repo_id must be user/name, not 'tuner'"):
        push(random_policy(), "tuner", endpoint=hub.endpoint)
    assert hub.requests == []


# -- errors of one line ------------------------------------------------------------------------------------------------


def refusal(hub: FakeHub, revision: str = 40 * "0", **arguments: Any) -> str:
    with pytest.raises(HubError) as error:
        pull(**{"repo_id": REPO, "revision": revision, "endpoint": hub.endpoint, **arguments})
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def test_what_is_not_there(hub: FakeHub, policy: ControlPolicy) -> None:
    commit = sent(hub, policy)
    assert refusal(hub, repo_id="somebody/else").startswith("somebody/else: no such repository, or a private one")
    assert refusal(hub).endswith(f"no revision '{40 * '0'}' there")
    assert refusal(hub, commit, filename="a.safetensors").endswith(f"no file 'a.safetensors' at revision '{commit}'")
    assert "Repo id" in refusal(hub, repo_id="not//a name")


def test_private_repositories(hub: FakeHub, policy: ControlPolicy) -> None:
    commit = sent(hub, policy, private=True)
    assert hub.repositories[REPO].private
    assert "hf auth login" in refusal(hub, commit)
    assert pull(REPO, revision=commit, token=TOKEN, endpoint=hub.endpoint).digest == policy.digest


def test_a_private_push_never_lands_in_public(hub: FakeHub, policy: ControlPolicy) -> None:
    sent(hub, policy)
    before = dict(hub.repositories[REPO].commits)
    with pytest.raises(HubError, match="exists and is public"):
        sent(hub, random_policy(seed=5), private=True)
    assert hub.repositories[REPO].commits == before


def test_not_logged_in(hub: FakeHub, policy: ControlPolicy) -> None:
    with pytest.raises(HubError, match=r"HTTP 401: log in \(hf auth login\) or give a token"):
        sent(hub, policy, token=None)
    sent(hub, policy)
    with pytest.raises(HubError, match="HTTP 403: log in"):
        sent(hub, policy, token="hf_of_somebody_else")


def test_offline(hub: FakeHub, policy: ControlPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(hub)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        sent(hub, policy)
    assert hub.requests == []


def test_no_network(hub: FakeHub, policy: ControlPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    nobody = "http://127.0.0.1:9"
    assert "the Hub cannot be reached" in refusal(hub, endpoint=nobody)
    with pytest.raises(HubError, match=r"the Hub cannot be reached \(ConnectError\)"):
        push(policy, REPO, token=TOKEN, endpoint=nobody)


def test_a_hub_out_of_order(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.status = 503
    assert refusal(hub).endswith("the Hub answers with HTTP 503")


def test_without_the_package(policy: ControlPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: push(policy, REPO), lambda: pull(REPO, revision=40 * "0")):
        with pytest.raises(ImportError, match=r"pip install 'hyperpilot\[hub\]'"):
            call()


def test_imported_only_when_used() -> None:
    program = "import sys, agents.hub, agents.onnx_export; print({'huggingface_hub', 'onnx'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# -- the card ----------------------------------------------------------------------------------------------------------

RESULTS = json.loads((ROOT / "results/meta_test.json").read_text())


def metadata(card: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_card_names_the_commit_that_holds_the_policy(hub: FakeHub, policy: ControlPolicy) -> None:
    commit = sent(hub, policy)
    repository = hub.repositories[REPO]
    card = repository.commits[repository.refs["main"]]["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    call = code.split("policy = ")[1].split("tuner =")[0].strip()
    pulled = eval(call.removesuffix(")") + "endpoint=endpoint)", {"pull": pull, "endpoint": hub.endpoint})
    assert pulled.digest == policy.digest
    assert commit in call
    assert metadata(card) == {
        "library_name": "hyperpilot",
        "license": "mit",
        "tags": ["hyperpilot", "hyperparameter-optimization", "reinforcement-learning", "pytorch"],
    }


def test_the_shipped_policy_and_its_evaluation() -> None:
    policy = ControlPolicy.load(pretrained_path())
    assert RESULTS["provenance"]["policy"] == policy.digest
    card = model_card(policy, REPO, 40 * "a", RESULTS)
    for row in (
        "| `letter/mlp` | 25 [17, 46] | 3 | +0.959 [+0.927, +0.992] | +0.956 [+0.921, +0.981] |",
        "| `pydoc-topics/transformer` | >= 256 [256, 256] | 238 | +0.062 [+0.056, +0.068] | +0.043 [+0.038, +0.049] |",
        "| all | 59 | 13.5 | +0.057 [+0.049, +0.065] | +0.063 [+0.053, +0.075] |",
        "| `0-satimage-mlp` | 0.03323 |",
        "| dropout | 0.005 to 0.5 | 12.2 | 1.82 | 148 |",
        "- `log_ratio_iqm`: 0.06171",
        "- `timesteps`: `737280`",
    ):
        assert row in card.splitlines(), row
    assert "n = 5 seeds of each task" in card
    assert "Runs of 8 to 64 decisions, of models with 6 to 208,000 parameters, over at most 131,000" in card


def test_no_figure_but_those_given(policy: ControlPolicy) -> None:
    """A policy without scores: the card has no tables but the controls', and says so."""
    card = model_card(policy, REPO, 40 * "a")
    scores = card.split("## Scores")[1].split("## Limits")[0]
    assert scores.split("\n\n")[1:-1] == [
        "No evaluation on unseen tasks was given.",
        "The file itself holds no scores.",
    ]
    assert not re.search(r"\d", scores)
    assert "The file does not say how it was trained." in card
    assert "The file does not say how long and how large the runs were." in card


def test_results_of_another_policy(hub: FakeHub, policy: ControlPolicy) -> None:
    for results in (RESULTS, {}, {"provenance": None}, {**RESULTS, "tasks": 3}):
        with pytest.raises(ValueError, match="the results cannot be shown with this policy"):
            sent(hub, policy, results=results)
    assert hub.requests == []


def test_a_strangers_words_stay_words(policy: ControlPolicy) -> None:
    """Headers are free text: none of it becomes a heading, a link, a tag or a column."""
    words = "` <script>alert(1)</script> | [a](http://b) `"
    policy.header = replace(
        policy.header, training={words: words, "sets": [words, 1.5]}, scores={"log_ratios": {words: words}}
    )
    lines = [line for line in model_card(policy, REPO, 40 * "a").splitlines() if "script" in line]
    assert len(lines) == 3
    for line in lines:
        outside = "".join(line.split("`")[::2])
        assert not re.search(r"[<>\[\](]", outside)
    assert lines[-1].count("|") == 3


# -- docs/sharing.md ---------------------------------------------------------------------------------------------------


def test_the_lines_in_the_documentation_run(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/meta_test.json").write_text(json.dumps(RESULTS))
    ControlPolicy.load(pretrained_path()).save("policy.safetensors")
    monkeypatch.setattr("agents.hub.push", partial(push, endpoint=hub.endpoint, token=TOKEN))
    monkeypatch.setattr("agents.hub.pull", partial(pull, endpoint=hub.endpoint))
    model = torch.nn.Linear(4, 1)
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": DataLoader(TensorDataset(torch.zeros(64, 4)), batch_size=16),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sharing.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4
    assert hub.repositories.keys() == {"you/tuner"}
    assert "(1, 4)" in capsys.readouterr().out
