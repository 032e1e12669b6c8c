"""``python -m optkit``, and the ``optkit`` command: Ctrl-C is one line and exit code 130, whenever it comes."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130  # as in cli, which may not have been imported yet


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from optkit.cli import main as run

        exit_code = run()
    except KeyboardInterrupt:  # while the imports were still running
        print("error: interrupted", file=sys.stderr)
        exit_code = INTERRUPTED
    if exit_code == INTERRUPTED:
        # Everything has been cleaned up. The interpreter would go on to end with SIGINT instead of this exit code if
        # the interrupt hit code that torch had made from a string, and would answer another Ctrl-C with a traceback
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
