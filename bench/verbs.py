"""Time and peak memory of the Makefile's verbs, as a newcomer meets them, put on record.

    python bench/verbs.py demo test

Set-up that is already done does not count; run a verb once before.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from record import ROOT, append

TOPIC = "verbs"


def main(verbs: list[str]) -> int:
    """Run `make` for each verb; the first exit code that is not 0."""
    if not verbs or any(not verb.isidentifier() for verb in verbs):
        print("usage: python bench/verbs.py VERB ...", file=sys.stderr)
        return 2
    for verb in verbs:
        started = time.monotonic()
        done = subprocess.run(["make", verb], cwd=ROOT)
        seconds = time.monotonic() - started
        if done.returncode != 0:
            return done.returncode
        # Of the children so far the largest: give a verb alone to be sure that it is that one's.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        command = f"make {verb}"
        append(TOPIC, f"{command}/time", round(seconds), "s", command=command)
        append(TOPIC, f"{command}/peak memory", round(peak, 2), "GiB", command=command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
