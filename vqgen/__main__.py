"""Entry of the ``vqgen`` command: makes sure the project's own packages answer, then hands over.

The project is three top-level packages, two of them with plain names, so a folder ``priors`` or
``pipelines`` that comes first on the module path would be picked up instead. That is looked for before
anything is imported.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from vqgen.errors import Interrupted
from vqgen.interrupts import terminable


def main() -> None:
    """Run the command line; exit code 2 where another folder hides one of the project's packages."""
    try:
        with terminable():
            _main()
    except KeyboardInterrupt:  # before there was a command
        sys.exit(Interrupted.exit_code)


def _main() -> None:
    home = Path(__file__).resolve().parent.parent
    for package in ("priors", "pipelines"):
        spec = find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if not places or Path(places[0]).resolve() != home / package:
            found = (places or [spec.origin if spec and spec.origin else "nowhere"])[0]
            print(
                f"vqgen: its package '{package}' should be in {home}, but '{package}' is found at {found}. "
                f"Start from another folder, rename that one, or use the command 'vqgen' instead of 'python -m vqgen'.",
                file=sys.stderr,
            )
            sys.exit(2)
    from pipelines.cli import run

    run()


if __name__ == "__main__":
    main()
