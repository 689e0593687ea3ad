"""Coverage-guided fuzzing of the policy reader: `python -m tests.faults.fuzz_policy CORPUS -runs=N`; needs atheris."""

from __future__ import annotations

import random
import sys
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["agents.policy", "agents.policy_file", "agents.untrusted"]):
        from tests.faults import policy_inputs

    folder, tried, loaded = Path(sys.argv[1]), 0, 0
    for index, seed in enumerate(policy_inputs.SEEDS):
        (folder / f"seed-{index}").write_bytes(seed)

    def test(data: bytes) -> None:
        nonlocal tried, loaded
        tried += 1
        loaded += policy_inputs.check(data)
        if tried % 1000 == 0:
            print(f"tried: {tried}, loaded: {loaded}", file=sys.stderr)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return policy_inputs.mutated(data, random.Random(seed), lambda part: bytes(atheris.Mutate(part, most)))[:most]

    options = ["-max_len=60000", "-len_control=0", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([*sys.argv, *options, f"-artifact_prefix={folder}/found-"], test, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
