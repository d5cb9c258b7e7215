"""`bench trust`: the user's consent to a project file, whose packages may then run."""

from __future__ import annotations

import argparse
import sys

from bench import plugins
from bench.errors import EXIT_DONE, UserError
from bench.ui import note, print_rows, print_text


def run_command(given: argparse.Namespace) -> int:
    """`bench trust`: show what a project file asks for, and allow it after asking."""
    file = given.file or plugins.project_file()
    if file is None:
        raise UserError(
            f"there is no {plugins.PROJECT_FILE} in this folder or above it: name the "
            "file that you trust"
        )
    project = plugins.read_project(file)
    print_text(
        f"{file.absolute()} allows these packages to run, and adds these configs and methods:"
    )
    print_rows([{"adds": kind, "value": value} for kind, value in plugins.described(project)])
    # Without a terminal nobody can confirm.
    if not given.yes and not (sys.stdin.isatty() and _confirmed()):
        note("nothing was allowed; `bench trust --yes` allows it")
        return EXIT_DONE
    plugins.trust(file)
    note(f"{file} is trusted until it changes; your consent is stored in {plugins.consents_file()}")
    return EXIT_DONE


def _confirmed() -> bool:
    return input("Do you trust this folder? [y/N] ").lower() == "y"
