"""A Hub on this machine: the endpoints that huggingface_hub asks to make a repository, commit to it and read from it.

Files that end in `.safetensors` go the way of large files (preupload, LFS batch, PUT, and a redirect when read), others
come in the commit itself, as on the real Hub. Its other way for large files, Xet, is not there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

constants = pytest.importorskip("huggingface_hub.constants")

TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    """Commits by their hash, each a table of files; branches and tags by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add files to what `ref` names."""
        tree = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        seal = hashlib.sha1(repr((len(self.commits), sorted(tree.items()))).encode()).hexdigest()
        self.commits[seal], self.refs[ref] = tree, seal
        return seal


@dataclass
class FakeHub:
    """The state of the Hub, and what was asked of it.

    Attributes:
        requests: `METHOD path` of every request.
        claims: headers that answers about large files have whatever the file is, such as `X-Linked-Size`.
        status: what is answered to everything, if not 0.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    claims: dict[str, str] = field(default_factory=dict)
    status: int = 0


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


@contextmanager
def fake_hub(cache: Path) -> Iterator[FakeHub]:
    """A hub that serves on a free port of the loopback interface until the context is left.

    Meanwhile nobody is logged in, downloads are kept in the folder `cache`, and whoever asks for another machine fails.
    """
    with pytest.MonkeyPatch.context() as patch, _served() as hub:
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING_FACE_")):
                patch.delenv(name)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr("socket.getaddrinfo", partial(_resolve_here, socket.getaddrinfo))
        yield hub


def _resolve_here(resolve: Callable[..., Any], host: Any, *arguments: Any, **named: Any) -> Any:
    assert host in (b"127.0.0.1", "127.0.0.1", "localhost"), f"a test asked for {host}"
    return resolve(host, *arguments, **named)


@contextmanager
def _served() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: it is not held back for the client's acknowledgement of its head

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.status:
                raise Refused(self.hub.status)
            for pattern, answer in _ROUTES.items():
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    answer(self, body, *(unquote(part) for part in match.groups() if part is not None))
                    return
            raise Refused(501)
        except Refused as refused:
            self._answer(b"{}", refused.status, {"X-Error-Code": refused.code} if refused.code else {})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: dict[str, Any]) -> None:
        self._answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    @property
    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._is_owner):
            raise Refused(404 if self._is_owner else 401, "RepoNotFound")
        if write and not self._is_owner:
            raise Refused(403)
        return found

    def _resolve(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(name)
        seal = repository.refs.get(revision, revision)
        if seal not in repository.commits:
            raise Refused(404, "RevisionNotFound")
        return seal, repository.commits[seal]

    def create(self, body: bytes) -> None:
        if not self._is_owner:
            raise Refused(401)
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        address = json.dumps({"url": f"{self.hub.endpoint}/{name}"}).encode()
        if name in self.hub.repositories:
            self._answer(address, 409)
            return
        repository = Repository(private=asked.get("visibility") == "private" or asked.get("private") is True)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[name] = repository
        self._answer(address)

    def validate_card(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self._json({"errors": [], "warnings": []})

    def about(self, body: bytes, name: str, revision: str = "main") -> None:
        seal, files = self._resolve(name, revision)
        self._json(
            {
                "id": name,
                "sha": seal,
                "private": self._repository(name).private,
                "siblings": [{"rfilename": file} for file in files],
            }
        )

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.refs:
            raise Refused(409)
        repository.refs[branch] = repository.refs["main"]
        self._json({})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self._repository(name, write=True)
        _, files = self._resolve(name, revision)
        self._json(
            {
                "files": [
                    {
                        "path": path,
                        "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": hashlib.sha256(files[path]).hexdigest() if path in files else None,
                    }
                    for path in (file["path"] for file in json.loads(body)["files"])
                ]
            }
        )

    def batch(self, body: bytes, name: str) -> None:
        self._repository(name, write=True)
        objects = json.loads(body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def put_large(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._answer(b"")

    def commit(self, body: bytes, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch not in repository.refs:
            raise Refused(404, "RevisionNotFound")
        files = {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.large[line["value"]["oid"]]
        seal = repository.commit(files, branch)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{seal}", "commitOid": seal, "success": True})

    def file(self, body: bytes, name: str, revision: str, path: str) -> None:
        seal, files = self._resolve(name, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound")
        data, headers = files[path], {"X-Repo-Commit": seal}
        oid = hashlib.sha256(data).hexdigest()
        if not path.endswith(".safetensors"):
            self._answer(data, headers={**headers, "ETag": f'"{oid}"'})
            return
        self.hub.large[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), **self.hub.claims}
        # To another host name, as a storage is: the client stops here for the metadata, and keeps its token to itself.
        location = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/large/{oid}"
        self._answer(b"", 302, {**headers, **linked, "Location": location})

    def get_large(self, body: bytes, oid: str) -> None:
        assert self.headers.get("Authorization") is None
        self._answer(self.hub.large[oid])


_NAME = "([^/]+/[^/]+)"
_ROUTES: dict[str, Callable[..., None]] = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate_card,
    f"GET /api/models/{_NAME}(?:/revision/([^/]+))?": _Handler.about,
    f"POST /api/models/{_NAME}/branch/([^/]+)": _Handler.branch,
    f"POST /api/models/{_NAME}/preupload/([^/]+)": _Handler.preupload,
    f"POST /api/models/{_NAME}/commit/([^/]+)": _Handler.commit,
    f"POST /{_NAME}\\.git/info/lfs/objects/batch": _Handler.batch,
    "PUT /large/([0-9a-f]+)": _Handler.put_large,
    "GET /large/([0-9a-f]+)": _Handler.get_large,
    f"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)": _Handler.file,
}
