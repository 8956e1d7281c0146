"""The command ``persistence``."""

from __future__ import annotations

import io
import os
import signal
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
    if sys.stdout is None:  # closed, by >&- say
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to stop
    # As Ctrl-C: what was done is told, and a terminal gets its cursor back.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        app(prog_name="persistence")
    except OSError as error:  # what the store raises is told by the command itself: this is the output's
        _give_up(sys.__stdout__, error)
    finally:
        _flush(sys.__stdout__)


def _flush(output: TextIO | None) -> None:
    if output is None or output.closed:
        return
    try:
        output.flush()
    except OSError as error:
        _give_up(output, error)


def _give_up(output: TextIO | None, error: OSError) -> None:
    """Forget what cannot be written, or Python would complain as it ends; tell it, unless nobody reads on."""
    if output is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    if not isinstance(error, BrokenPipeError):
        print(f"persistence: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
