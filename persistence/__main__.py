"""The command ``persistence``."""

from __future__ import annotations

import io
import sys

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
    app(prog_name="persistence")


if __name__ == "__main__":
    main()
