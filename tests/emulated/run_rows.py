"""Runs rows in a process of its own: ``python -m tests.emulated.run_rows LIBRARY [options]``.

For libraries that may end the process (AddressSanitizer, planted bugs). Prints one line per row and
exits with 1 at the first that does not match the reference.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from .emulated import ORDERS, Emulated
from .rows import EVERY_ROW


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--orders", default=ORDERS[0], help="of threads, separated by commas")
    parser.add_argument("--rows", default="", help="regular expression of row ids")
    parser.add_argument("--every", type=int, default=1, help="only every n-th of them")
    parser.add_argument("--shift", type=int, default=0, help="outputs off alignment, in elements")
    options = parser.parse_args()
    emulated = Emulated(options.library)
    rows = [row for row in EVERY_ROW if re.search(options.rows, row.id)][:: options.every]
    for row in rows:
        try:
            row.check(emulated, *options.orders.split(","), shift=options.shift)
        except AssertionError as error:
            print(f"{row.id}: differs from the reference {error}", flush=True)
            return 1
        except RuntimeError as error:
            print(f"{row.id}: {error}", flush=True)
            return 1
        print(f"{row.id}: ok", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
