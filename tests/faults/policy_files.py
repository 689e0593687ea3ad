"""Policy files that were cut, damaged, replaced while read, or made by an attacker."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path

from agents import ControlPolicy, PolicyError
from agents.tuner import pretrained_path
from tests.faults import Fault, Outcome
from tests.faults.hostile import CANARY, HOSTILE
from tests.faults.policy_inputs import clear
from tests.tiny import random_policy

ROOT = Path(__file__).parents[2]
MEMORY = 256 << 20
SECONDS = 2.0
FUZZERS = 2

Identity = tuple[str, str]


def identity(policy: ControlPolicy) -> Identity:
    """All that a policy file says."""
    return policy.digest, json.dumps([policy.header.training, policy.header.scores], sort_keys=True)


def outcome(load: Callable[[], ControlPolicy], whole: Collection[Identity] = ()) -> str:
    """What came of `load`: `refused` in one short line, `intact` if it gave one of the `whole` policies, or what is
    wrong."""
    try:
        found = identity(load())
    except (PolicyError, FileNotFoundError) as error:
        return "refused" if clear(str(error)) else f"refused in these words: {str(error)!r}"
    except BaseException as error:
        return f"raised {error!r}"
    return "intact" if found in whole else "loaded as another policy"


def judged(outcomes: Mapping[str, str]) -> Outcome:
    """Of what was done -> what came of it."""
    wrong = [f"{name}: {found}" for name, found in outcomes.items() if found not in ("refused", "intact")]
    intact = sum(found == "intact" for found in outcomes.values())
    return Outcome(len(outcomes), tuple(wrong), f"{intact:,} loaded, as they were")


def cut(count: int, folder: Path) -> Outcome:
    """The shipped file's first n bytes, for `count` lengths n from none to all but one."""
    whole, path, outcomes = pretrained_path().read_bytes(), folder / "policy.safetensors", {}
    path.write_bytes(whole)
    for length in sorted({index * len(whole) // count for index in range(count)}, reverse=True):
        os.truncate(path, length)
        outcomes[f"{length} bytes"] = outcome(lambda: ControlPolicy.load(path))
    return judged(outcomes)


def flipped(count: int, folder: Path) -> Outcome:
    """One bit of the shipped file; every second time one of its header."""
    whole, path, rng, outcomes = pretrained_path().read_bytes(), folder / "policy.safetensors", random.Random(0), {}
    original = identity(ControlPolicy.from_bytes(whole))
    header = 8 + int.from_bytes(whole[:8], "little")
    for index in range(count):
        bit = rng.randrange(8 * (header if index % 2 else len(whole)))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        outcomes[f"flip {index}, of bit {bit}"] = outcome(lambda: ControlPolicy.load(path), [original])
    return judged(outcomes)


def replaced(count: int, folder: Path) -> Outcome:
    """While the file is read, another thread puts another one in its place, overwrites it, or cuts it."""
    path, other = folder / "policy.safetensors", folder / "other"
    contents = []
    for seed in range(2):
        random_policy(seed).save(path)
        contents.append(path.read_bytes())
    rng, stop = random.Random(0), threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            kind, data = rng.randrange(3), rng.choice(contents)
            if kind == 0:
                other.write_bytes(data)
                os.replace(other, path)
            elif kind == 1:
                with path.open("r+b", buffering=0) as file:
                    while file.tell() < len(data):
                        file.write(data[file.tell() : file.tell() + 256])
            else:
                os.truncate(path, rng.randrange(len(data)))

    thread = threading.Thread(target=disturb)
    thread.start()
    whole = [identity(ControlPolicy.from_bytes(data)) for data in contents]
    try:
        return judged({f"read {index}": outcome(lambda: ControlPolicy.load(path), whole) for index in range(count)})
    finally:
        stop.set()
        thread.join()


def hostile_files(count: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """`count` of the hostile files, in folders of their own: their names and paths."""
    stride = max(1, len(HOSTILE) // count)
    for name in islice(HOSTILE, 0, count * stride, stride):
        home = folder / name.replace("/", "")
        home.mkdir()
        yield name, HOSTILE[name](home)


def attacked(count: int, folder: Path, at_once: int = 1, seconds: float = SECONDS) -> Outcome:
    """Hostile files, loaded in fresh processes, `at_once` files in each; `seconds` are those of the processor."""
    failures, slowest, largest, files = list[str](), 0.0, 0, list(hostile_files(count, folder))
    for start in range(0, len(files), at_once):
        names, paths = zip(*files[start : start + at_once], strict=True)
        command = [sys.executable, "-m", "tests.faults.load_policy", *map(str, paths)]
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
        except subprocess.SubprocessError as error:
            failures.append(f"{', '.join(names)}: {error!r}")
            continue
        for name, line in zip(names, result.stdout.splitlines(), strict=True):
            found = json.loads(line)
            slowest, largest = max(slowest, found["seconds"]), max(largest, found["growth"])
            if not {"PolicyError", "OSError"} & set(found["error"]) or not clear(found["message"]):
                failures.append(f"{name}: {found}")
            if found["seconds"] > seconds or found["growth"] > MEMORY:
                failures.append(f"{name}: took {found['seconds']:.1f} s and {found['growth'] >> 20} MiB")
    failures += [f"{path.parent.name}: its code was run" for path in folder.rglob(CANARY)]
    return Outcome(len(files), tuple(failures), f"at most {slowest:.2f} s and {largest >> 20} MiB more")


def at_the_door(count: int, folder: Path) -> Outcome:
    """Hostile files given to `scripts/apply_policy.py --policy`."""
    failures, done = list[str](), 0
    for name, path in hostile_files(count, folder):
        done += 1
        command = [sys.executable, "scripts/apply_policy.py", "--policy", str(path), "--task", "wine/mlp"]
        result = subprocess.run(
            [*command, "--out", str(folder / "out")], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if result.returncode != 2 or not re.fullmatch(r"error: .+\n", result.stderr) or result.stdout:
            failures.append(f"{name}: exit {result.returncode}, {result.stderr[-300:]!r}")
    return Outcome(done, tuple(failures))


def fuzzed(count: int, folder: Path) -> Outcome:
    """Coverage-guided fuzzing of the reader, past the checksum."""
    command = [sys.executable, "-m", "tests.faults.fuzz_policy"]
    processes = []
    for index in range(FUZZERS):
        (home := folder / f"{index}").mkdir()
        options = [str(home), f"-runs={-(-count // FUZZERS)}", f"-seed={index + 1}"]
        with (folder / f"{index}.log").open("w") as log:  # a pipe would be full before it is read
            processes.append(subprocess.Popen([*command, *options], cwd=ROOT, stderr=log))
    for process in processes:
        process.wait()
    logs = [(folder / f"{index}.log").read_text(errors="replace") for index in range(FUZZERS)]
    executed = [int(number) for log in logs for number in re.findall(r"number_of_executed_units: (\d+)", log)]
    failures = [log[-2000:] for log, process in zip(logs, processes, strict=True) if process.returncode]
    if sum(executed) < count:
        failures.append(f"only {sum(executed)} inputs were tried")
    loaded = sum(int(number) for log in logs for number in re.findall(r"loaded: (\d+)", log)[-1:])
    return Outcome(sum(executed), tuple(failures), f"{loaded:,} were whole, and usable")


FAULTS = (
    Fault("policy file cut short", "a clear error, never a policy", cut, pretrained_path().stat().st_size),
    Fault("policy file with a flipped bit", "a clear error, or the same policy", flipped, 10_000),
    Fault("policy file replaced while read", "a clear error, or one of the policies", replaced, 2_000),
    Fault("hostile policy file", "a clear error for 2 s and 256 MiB; no code runs", attacked, len(HOSTILE)),
    Fault("hostile policy file at the door", "exit 2 with one line", at_the_door, 10),
    Fault("fuzzed policy file", "a PolicyError, or a policy that can be used", fuzzed, 700_000),
)
