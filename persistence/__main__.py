"""The command ``persistence``."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

__all__ = ["main"]


def main() -> None:
    """Run the command; without the packages that it needs, tell how to install them."""
    try:
        from persistence.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "click", "rich"):
            raise
        message = f"the command needs the package {missing!r}: run  pip install 'agent-persistence[cli]'"
        print(message, file=sys.stderr)
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to stop
    try:
        app(prog_name="persistence")
    except OSError as error:  # what the store raises is told by the command itself: this is the output's
        print(f"persistence: {error}", file=sys.stderr)
        sys.exit(1)
    finally:
        _flush(sys.__stdout__)


def _flush(output: TextIO | None) -> None:
    """Write what is left; where nobody reads it any more, forget it, or Python would complain as it ends."""
    if output is None or output.closed:
        return
    try:
        output.flush()
    except OSError:  # nobody reads it, or the disk is full: `app` has told that
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


if __name__ == "__main__":
    main()
