"""Bring all faults about in their long form and print what held; exit 1 if anything did not."""

from __future__ import annotations

import argparse
import importlib
import logging
import pkgutil
import re
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import faults
from tests.faults import Fault


def all_faults() -> list[Fault]:
    """Every module of this package lists its own under `FAULTS`."""
    modules = [m.name for m in pkgutil.iter_modules(faults.__path__, f"{faults.__name__}.") if "__main__" not in m.name]
    return [fault for name in sorted(modules) for fault in getattr(importlib.import_module(name), "FAULTS", ())]


def main() -> int:
    logging.getLogger("hyperpilot").addHandler(logging.NullHandler())  # what is logged is looked at, not shown
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose name matches this regular expression")
    parser.add_argument("--skip", default="$^", help="not those whose name matches this one, such as soak (3 hours)")
    parser.add_argument("--share", type=float, default=1.0, help="of the long form's counts, at least one each")
    arguments = parser.parse_args()
    table = Table("fault", "how many", "what must hold", "held", "seconds", "remark")
    console, failures = Console(width=None if sys.stdout.isatty() else 160), []
    for fault in all_faults():
        if not re.search(arguments.only, fault.name) or re.search(arguments.skip, fault.name):
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            outcome = fault.run(max(1, round(fault.count * arguments.share)), Path(folder))
        seconds = f"{time.monotonic() - started:.0f}"
        held = "yes" if not outcome.failures else f"NO ({len(outcome.failures)})"
        table.add_row(fault.name, f"{outcome.count:,}", fault.must_hold, held, seconds, outcome.remark)
        console.print(f"{fault.name}: {outcome.count:,}, held: {held}, {seconds} s {outcome.remark}", markup=False)
        failures += [f"{fault.name}: {failure}" for failure in outcome.failures]
    console.print(table)
    for failure in failures[:50]:
        console.print(failure, markup=False)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
