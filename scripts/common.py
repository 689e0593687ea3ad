"""What the command-line doors share: bad input, output folders, devices, progress."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents.files import CONFIG_FILE, write_atomically
from agents.optional import MissingPackage
from inner_models.names import unknown

console = Console(soft_wrap=False, width=None if Console().is_terminal else 140)

Config = TypeVar("Config")

registry = tyro.constructors.ConstructorRegistry()
"""How tyro reads options; see `_choice`."""


@dataclass(kw_only=True)
class Quiet:
    """A script that can be told not to talk."""

    quiet: bool = False
    """Show no progress, tables or hints: errors and warnings stay, and so do the files."""


def fail(message: str) -> NoReturn:
    """Bad input: one line on standard error, exit 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a script as Ctrl-C does."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def run_main(config: type[Config], main: Callable[[Config], None]) -> None:
    """Parse the command line into `config` and call `main`. Exits with 2 on bad input, 130 after Ctrl-C, 143 when
    terminated."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _check_names(config, sys.argv[1:])
        settings = tyro.cli(config, registry=registry)
        console.quiet = isinstance(settings, Quiet) and settings.quiet
        main(settings)
    except (ValueError, OSError, MissingPackage) as error:
        fail(str(error))
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, Terminated) else 130) from None


def _check_names(config: type, given: Sequence[str]) -> None:
    """Fail at a command or an option that a script does not have, and suggest the nearest. tyro does neither where
    something required is missing, as it is when just that is mistyped."""
    if not {"-h", "--help"}.isdisjoint(given):
        return
    commands = {kind.__name__.lower(): kind for hint in get_type_hints(config).values() for kind in _kinds(hint)}
    kinds = [config, *commands.values()]
    command = next((word for word in given if not word.startswith("-")), None)
    if commands and command is not None:
        kinds = [config, commands[known("command", command, list(commands))]]
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items() if not _kinds(hint)}
    options = [f"--{name.replace('_', '-')}" for name in hints]
    flags = [f"--no-{name.replace('_', '-')}" for name, hint in hints.items() if hint is bool]
    for word in given:
        name = word.partition("=")[0]
        unread = not name.startswith("--") or name.startswith("--tyro-")  # values, and tyro's own
        if not unread and name.replace("_", "-") not in ("--", *options, *flags):
            raise ValueError(unknown("option", name, [*options, "--help"]))


def _kinds(hint: Any) -> list[type]:
    """The dataclasses that a field may be one of: commands."""
    return [kind for kind in get_args(hint) if isinstance(kind, type) and is_dataclass(kind)]


@registry.primitive_rule
def _choice(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
    """A `Literal` of strings, whose error suggests the nearest."""
    names = get_args(info.type) if get_origin(info.type) is Literal else ()
    if not names or not all(isinstance(name, str) for name in names):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(names)}}}",
        instance_from_str=lambda given: known("choice", given[0], list(names)),
        is_instance=lambda value: value in names,
        str_from_instance=lambda value: [value],
    )


def known(what: str, name: str, names: list[str]) -> str:
    """`name`, if it is one of `names`; otherwise an error that suggests the nearest."""
    if name not in names:
        raise ValueError(unknown(what, name, names))
    return name


def beside(path: Path, patterns: Iterable[str], *, cutoff: float = 0.0) -> list[Path]:
    """What may have been meant by `path`: entries of its folder, or of the first one above it that exists, that match
    one of the patterns or hold what does. The nearest names first, at most five, none less alike than `cutoff`."""
    folder = next(parent for parent in path.parents or path.absolute().parents if parent.is_dir())
    found = {match.relative_to(folder).parts[0] for pattern in patterns for match in folder.glob(pattern)}
    return [folder / name for name in difflib.get_close_matches(path.name, sorted(found), n=5, cutoff=cutoff)]


def at_least(config: Any, least: int, *names: str) -> None:
    """Fail unless each of these settings is `least` or more."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(config, name)}")


def check_device(device: str) -> None:
    """Fail unless torch can use `device`."""
    kind = device.split(":")[0]
    known("device", kind, ["cpu", "cuda"])
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available on this machine (torch sees no GPU); use --device cpu")


def check_out(out: Path) -> None:
    """Make the folder `out`; fail if it is not writable or already holds a run (which begins with `CONFIG_FILE`)."""
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"{out} already holds a run ({CONFIG_FILE}); choose another --out or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose another --out") from None


def write_config(out: Path, script: str, config: Any) -> None:
    """Write the effective settings of a script, a dataclass, into its run's folder."""
    values = asdict(config, dict_factory=lambda entries: {key: _plain(value) for key, value in entries})
    write_json(out / CONFIG_FILE, {"script": script, **values})


def recorded(path: Path) -> str:
    """A path for the command that is recorded with a result: as it was given, but of an absolute one, which says where
    things are on this machine, only the name."""
    return shlex.quote(path.name if path.is_absolute() else str(path))


def _plain(value: Any) -> Any:
    """A setting for JSON."""
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, making the folder if need be."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar: the yielded function takes what is done and a remark. Plain lines where there is no terminal,
    nothing where the script is quiet."""
    if console.quiet:
        yield lambda done, remark: None
        return
    if not console.is_terminal:
        shown = ""

        def report(done: int, remark: str) -> None:
            nonlocal shown
            if remark != shown:
                shown = remark
                print(f"{description}: {done}/{total} {remark}", flush=True)

        yield report
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(description, total=total, remark="")
        yield lambda done, remark: progress.update(bar, completed=done, remark=remark)


@contextmanager
def work_bar(description: str) -> Iterator[Callable[[float, float, str], None]]:
    """A progress bar of work: the yielded function takes the work done, all of it, and a remark, as
    `agents.cells.run_cells` reports them."""
    with progress_bar(description, 1000) as update:
        yield lambda done, total, remark: update(round(1000 * done / max(total, 1e-9)), remark)


def tensorboard_hint(folder: Path) -> str:
    """How to look at the events in `folder`."""
    python = Path(sys.executable)
    shown = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else "python"
    return f"look at the curves: {shown} scripts/show.py --logdir {folder}"
