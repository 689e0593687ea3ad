"""Load policy files, and print what came of each as JSON: `python -m tests.faults.load_policy FILE...`

Seconds are those of the processor. Memory (on Linux alone) is by how many bytes the process grew at most, on top of
what importing took.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from agents import ControlPolicy


def load(path: str) -> dict[str, Any]:
    _forget_peak()
    before, started = _memory("VmRSS"), time.process_time()
    try:
        ControlPolicy.load(path)
        error = None
    except BaseException as caught:
        error = caught
    seconds = time.process_time() - started
    return {
        "error": [kind.__name__ for kind in type(error).__mro__],
        "message": str(error),
        "seconds": seconds,
        "growth": _memory("VmHWM") - before,
    }


def _memory(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) << 10


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(load(argument)), flush=True)
