"""Policy files as an attacker could make them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import socket
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch

from agents.policy_file import FORMAT, FORMAT_VERSION
from hpo_env.hyperparameters import CONTROLS
from hpo_env.observations import FEATURES
from tests.tiny import random_policy

Table = dict[str, Any]

CANARY = "ran"
"""The folder that appears beside a file whose code was run."""


class Canary:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


_WIDE, _ACTIONS = len(FEATURES), len(CONTROLS)


def container(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file of whatever header: JSON, or a text or bytes that may be none."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data + body


def parts() -> tuple[Table, Table, bytearray]:
    """Of a whole file: the policy's header without its checksum, the tensors' table, and their bytes."""
    policy, table, body = random_policy(), Table(), bytearray()
    for name, tensor in policy.state_dict().items():
        begin = len(body)
        body += tensor.numpy().tobytes()
        table[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, len(body)]}
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(policy.header)})), table, body


def seal(payload: Table, table: Mapping[str, Any], body: bytes | bytearray) -> str:
    """The checksum that a file must have. Written anew from the format's description."""
    digest = hashlib.sha256(json.dumps(payload, sort_keys=True).encode())
    for name in sorted(table):
        begin, end = table[name]["data_offsets"]
        digest.update(f"{name}torch.float32{tuple(table[name]['shape'])}".encode() + body[begin:end])
    return digest.hexdigest()


def sealed(payload: Table, table: Mapping[str, Any], body: bytes | bytearray, **metadata: Any) -> bytes:
    """A file whose checksum is right whatever it holds, if it can be."""
    try:
        checksum = seal(payload, table, body)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        checksum = "0" * 64
    text = json.dumps({**payload, "sha256": checksum})
    return container({"__metadata__": {FORMAT: text, **metadata}, **table}, bytes(body))


def _payload(**changes: Any) -> bytes:
    payload, table, body = parts()
    return sealed({**payload, **changes}, table, body)


def _row(*row: Any) -> bytes:
    payload, table, body = parts()
    payload["base_rules"]["adamw"]["coefficients"]["lr"] = list(row)
    return sealed(payload, table, body)


def _tensor(name: str, **changes: Any) -> bytes:
    payload, table, body = parts()
    table[name] |= changes
    return sealed(payload, table, body)


def _weights(name: str, value: float) -> bytes:
    payload, table, body = parts()
    begin = table[name]["data_offsets"][0]
    body[begin : begin + 4] = np.float32(value).tobytes()
    return sealed(payload, table, body)


def _text(old: str, new: str) -> bytes:
    """A change of the policy header's text that JSON readers may disagree about; the checksum is that of the value."""
    payload, table, body = parts()
    text = json.dumps({**payload, "sha256": seal(payload, table, body)})
    assert old in text
    return container({"__metadata__": {FORMAT: text.replace(old, new, 1)}, **table}, bytes(body))


def _outer(old: str, new: str) -> bytes:
    """The same for the safetensors header."""
    whole = sealed(*parts())
    size = 8 + int.from_bytes(whole[:8], "little")
    text = whole[8:size].decode()
    assert old in text
    return container(text.replace(old, new, 1), whole[size:])


def _large() -> bytes:
    """As large as a policy file may be, and whole but for the last of its weights."""
    payload, table, _ = parts()
    payload["hidden"], end = [4000, 4000], 0
    shapes = {"mean": [_WIDE], "network.0.bias": [4000], "network.0.weight": [4000, _WIDE], "network.2.bias": [4000]}
    shapes |= {
        "network.4.bias": [_ACTIONS],
        "network.4.weight": [_ACTIONS, 4000],
        "std": [_WIDE],
        "network.2.weight": [4000, 4000],
    }
    for name, shape in shapes.items():
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    weights = np.full(end // 4, 1e-3, np.float32)
    weights[-1] = math.nan
    return sealed(payload, table, bytearray(weights.tobytes()))


def _moved(change: Callable[[Table], None], grow: int = 0) -> bytes:
    payload, table, body = parts()
    change(table)
    return sealed(payload, table, body + bytes(grow))


def _overlap(table: Table) -> None:
    table["std"]["data_offsets"] = table["mean"]["data_offsets"]


def _gap(table: Table) -> None:
    for entry in table.values():
        if entry["data_offsets"][0]:
            entry["data_offsets"] = [offset + 64 for offset in entry["data_offsets"]]


def _backwards(table: Table) -> None:
    table["mean"]["data_offsets"].reverse()


def _add(**entries: Any) -> Callable[[Table], None]:
    return lambda table: table.update(entries)


def _empty(shape: list[int]) -> Table:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}


def _saved(write: Callable[[Any, io.BytesIO], Any]) -> Callable[[Path], bytes]:
    """What some library's own way of saving makes of the canary."""

    def data(folder: Path) -> bytes:
        buffer = io.BytesIO()
        write(Canary(folder / CANARY), buffer)
        return buffer.getvalue()

    return data


def _zip(canary: Canary, buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data", json.dumps({":serialized:": pickle.dumps(canary).hex()}))
        archive.writestr("policy.pth", pickle.dumps(canary))


def _bomb(_: Any, buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as file:
        for _ in range(128):
            file.write(bytes(1 << 20))


def _tar(canary: Canary, buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("../../policy.pkl")
        info.size = len(data := pickle.dumps(canary))
        archive.addfile(info, io.BytesIO(data))


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "a pickle": _saved(pickle.dump),
    "a pickle of protocol 0": _saved(lambda canary, file: pickle.dump(canary, file, protocol=0)),
    "torch.save": _saved(torch.save),
    "torch.save in the old form": _saved(
        lambda canary, file: torch.save(canary, file, _use_new_zipfile_serialization=False)
    ),
    "joblib": _saved(joblib.dump),
    "joblib, compressed": _saved(lambda canary, file: joblib.dump(canary, file, compress=3)),
    "numpy objects": _saved(lambda canary, file: np.save(file, np.array([canary]), allow_pickle=True)),
    "numpy objects in a zip": _saved(lambda canary, file: np.savez(file, mean=np.array([canary]))),
    "a zip as of stable-baselines3": _saved(_zip),
    "a tar": _saved(_tar),
    "a pickle as a safetensors header": lambda folder: container(pickle.dumps(Canary(folder / CANARY))),
    "a pickle in the policy's header": lambda folder: _payload(
        training={"preset": pickle.dumps(Canary(folder / CANARY), protocol=0).decode()}
    ),
    "a pickle in place of the tensors": lambda folder: container(
        {"mean": _empty([])}, pickle.dumps(Canary(folder / CANARY))
    ),
}
"""Each would run code if it were unpickled."""

WHOLE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "zeros": lambda: bytes(4096),
    "a header of 2**64-1 bytes": lambda: b"\xff" * 8 + b"{}",
    "a header of 2**63 bytes": lambda: (1 << 63).to_bytes(8, "little") + b"{}",
    "an empty header": lambda: bytes(8) + bytes(64),
    "60 MB of JSON": lambda: container('{"a":[' + "1," * (30 << 20) + "1]}"),
    "100 MB of JSON": lambda: container('{"a":"' + "x" * (100 << 20) + '"}'),
    "1 MB of small objects": lambda: container('{"a":[' + "{}," * 340_000 + "{}]}"),
    "80,000 names": lambda: container({f"{name:x}": 0 for name in range(80_000)}),
    "ten million tensors": lambda: container("{" + ",".join(['"a":0'] * 10_000_000) + "}"),
    "as many tensors as fit": lambda: container({f"{name:x}": _empty([0]) for name in range(15_000)}),
    "a zip bomb": lambda: _saved(_bomb)(Path()),
    "a gzip bomb": lambda: gzip.compress(bytes(128 << 20), 1),
    "UTF-16": lambda: container(sealed(*parts())[8:].decode("latin-1").encode("utf-16")),
    "a byte order mark": lambda: container(b"\xef\xbb\xbf{}"),
    "not UTF-8": lambda: container(b'{"\xff\xfe": 1}'),
    "deep lists": lambda: container("[" * 500_000),
    "deep objects": lambda: container('{"a":' * 150_000),
    "deep, and whole": lambda: container('{"a":' + "[" * 400_000 + "]" * 400_000 + "}"),
    "a deep policy header": lambda: _text('"training": {}', f'"training": {"[" * 900}{"]" * 900}'),
    "deep provenance": lambda: _payload(training={"a": [[[[[["deep"]]]]]]}),
    "a list as the header": lambda: container("[]"),
    "metadata that is a list": lambda: container({"__metadata__": [FORMAT]}),
    "metadata that is no text": lambda: container({"__metadata__": {FORMAT: {"format_version": 2}}}),
    "more metadata": lambda: sealed(*parts(), format="pt"),
    "no metadata": lambda: container(dict(list(parts()[1].items())), bytes(parts()[2])),
    "a newer version": lambda: _payload(format_version=99),
    "a much newer version": lambda: _payload(format_version=10**39),
    "a version that is a float": lambda: _payload(format_version=2.0),
    "a version that is a bool": lambda: _payload(format_version=True),
    "a version that is text": lambda: _payload(format_version="2"),
    "NaN weights": lambda: _weights("network.0.weight", math.nan),
    "infinite weights": lambda: _weights("network.2.bias", -math.inf),
    "enormous weights": lambda: _weights("network.0.weight", 3e38),
    "64 MB of weights, the last NaN": _large,
    "a NaN mean": lambda: _weights("mean", math.nan),
    "a std of 0": lambda: _weights("std", 0.0),
    "a std of -1": lambda: _weights("std", -1.0),
    "a wrong shape": lambda: _tensor("network.0.weight", shape=[_WIDE, 16]),
    "a flat shape": lambda: _tensor("network.0.weight", shape=[_WIDE * 16]),
    "a shape of many axes": lambda: _tensor("mean", shape=[_WIDE] + [1] * 5000),
    "an enormous shape": lambda: _tensor("mean", shape=[10**7, 10**7]),
    "a shape that overflows": lambda: _tensor("mean", shape=[2**63, 2]),
    "a negative shape": lambda: _tensor("mean", shape=[-_WIDE]),
    "a shape of bools": lambda: _tensor("network.2.bias", shape=[True, 4]),
    "an empty tensor": lambda: _moved(_add(extra=_empty([0, 2**20]))),
    "a hundred tensors too many": lambda: _moved(_add(**{f"{name}": _empty([0]) for name in range(100)})),
    "a tensor too many": lambda: _moved(_add(**{"../../etc/passwd": _empty([0])})),
    "a tensor named in two scripts": lambda: _moved(lambda table: table.update({"m\u0435an": table.pop("mean")})),
    "a tensor named as half a character": lambda: _moved(_add(**{"\ud800": _empty([0])})),
    "halves and doubles": lambda: _tensor("mean", dtype="F64", shape=[_WIDE], data_offsets=[0, 8 * _WIDE]),
    "integers": lambda: _tensor("mean", dtype="I32"),
    "eight bits": lambda: _tensor("mean", dtype="F8_E4M3"),
    "a type in small letters": lambda: _tensor("mean", dtype="f32"),
    "no type": lambda: _tensor("mean", dtype=None),
    "a tensor entry too many": lambda: _tensor("mean", strides=[0]),
    "overlapping tensors": lambda: _moved(_overlap),
    "a gap between tensors": lambda: _moved(_gap, grow=64),
    "bytes after the tensors": lambda: sealed(*parts()) + b"more",
    "offsets that go back": lambda: _moved(_backwards),
    "offsets below zero": lambda: _tensor("mean", data_offsets=[-4 * _WIDE, 0]),
    "offsets that are floats": lambda: _tensor("mean", data_offsets=[0.0, 4.0 * _WIDE]),
    "offsets beyond 64 bits": lambda: _tensor("mean", data_offsets=[0, 2**64 + 4 * _WIDE]),
    "three offsets": lambda: _tensor("mean", data_offsets=[0, 4 * _WIDE, 4 * _WIDE]),
    "a tensor twice": lambda: _outer('"mean": ', '"mean": {}, "mean": '),
    "the metadata twice": lambda: _outer('{"__metadata__"', '{"__metadata__": {}, "__metadata__"'),
    "a header entry twice": lambda: _text('"hidden": [16]', '"hidden": [4096], "hidden": [16]'),
    "the checksum twice": lambda: _text('"sha256"', '"sha256": "", "sha256"'),
    "1e400": lambda: _text('"warmup": 0.05', '"warmup": 1e400'),
    "an integer of 200,000 digits": lambda: _text('"hidden": [16]', f'"hidden": [{"9" * 200_000}]'),
    "NaN in the header": lambda: _text('"warmup": 0.05', '"warmup": NaN'),
    "full-width digits": lambda: _text('"hidden": [16]', '"hidden": [\uff11\uff16]'),
    "a NUL in a name": lambda: _payload(**{"hid\0den": [16]}),
    "a name that Python knows": lambda: _payload(__class__="os.system", self=1),
    "a terminal's commands": lambda: _payload(scores={"\x1b]0;owned\x07": 1}),
    "text from right to left": lambda: _payload(training={"command": "\u202egnp.exe"}),
    "half a character": lambda: _payload(training={"command": "\ud83d"}),
    "a feature in two scripts": lambda: _payload(features=["progr\u0435ss", *parts()[0]["features"][1:]]),
    "no features": lambda: _payload(features=[]),
    "bools as widths": lambda: _payload(hidden=[True]),
    "a width of a billion": lambda: _payload(hidden=[10**9]),
    "four billion weights": lambda: _payload(hidden=[4096] * 16),
    "a million layers": lambda: _payload(hidden=[1] * 300_000),
    "a base rule of text": lambda: _row("0", "0", "0"),
    "a base rule that overflows": lambda: _row(1e308, 1e308, -1e308),
    "a base rule of two numbers": lambda: _row(0, 0),
    "another optimizer's base rule": lambda: _payload(base_rules={"lion": {}}),
    "a signal that is none": lambda: _payload(required_signals=["__import__"]),
    "trained ranges that overflow": lambda: _payload(trained_ranges={"progress": [-1e308, 1e308]}),
    "a source file": lambda: b"import os; os.mkdir('ran')\n" * 100,
}
"""All of these are refused by what they contain."""


def _written(data: Callable[[Path], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "policy.safetensors"
        path.write_bytes(data(folder))
        return path

    return write


def _link(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "link").symlink_to(target)
        return folder / "link"

    return make


def _sparse(folder: Path) -> Path:
    path = folder / "policy.safetensors"
    with path.open("wb") as file:
        file.write(sealed(*parts()))
        file.truncate(10 << 30)
    return path


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return _link("pipe")(folder)


def _socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket"))
    return folder / "socket"


def _odd_name(folder: Path) -> Path:
    path = folder / "two\nlines \x1b[2J\u202e.safetensors"
    path.write_bytes(b"{}")
    return path


def _below_a_file(folder: Path) -> Path:
    return _written(lambda _: sealed(*parts()))(folder) / "policy.safetensors"


PATHS: dict[str, Callable[[Path], Path]] = {
    "a link to itself": _link("link"),
    "a link to nothing": _link("nowhere"),
    "a link to /dev/zero": _link("/dev/zero"),
    "a link to /dev/stdin": _link("/dev/stdin"),
    "a link to /proc/self/mem": _link("/proc/self/mem"),
    "a link to the root": _link("/"),
    "a link to a pipe": _pipe,
    "a socket": _socket,
    "a folder": lambda folder: folder,
    "a sparse file of 10 GB": _sparse,
    "a name of two lines": _odd_name,
    "a name of 5,000 characters": lambda folder: folder / ("x" * 5000),
    "a name below a file": _below_a_file,
}
"""All of these are refused by what they are."""


HOSTILE: dict[str, Callable[[Path], Path]] = {
    **{name: _written(data) for name, data in PICKLES.items()},
    **PATHS,
    **{name: _written(lambda _, data=data: data()) for name, data in WHOLE.items()},  # type: ignore[misc]
}
"""Every hostile file: its name, and what makes it in an empty folder."""
