"""The ``vqgen`` command line: parse, call a stage, say what it made and what to do next.

Stages are imported inside the commands, so that ``vqgen --help`` answers without loading torch. Results go to
stdout, progress and errors to stderr. Exit codes: 0 done, 1 an unexpected failure, 2 something the user can put
right, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from pipelines import cli_about, cli_compress, cli_evaluate, cli_results, cli_score, cli_sweep, cli_train
from pipelines.cli_options import again
from vqgen import __version__
from vqgen.errors import Interrupted, VqgenError

SHARED = ("run", "train-codes", "train-prior")
"""Commands whose work is shared by all processes of a launcher."""
RESUMABLE = (*SHARED, "sweep")
"""Commands that go on where they were interrupted."""


class Commands(click.Group):
    """Lists the commands in the order in which they are used, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def run() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """The exit code of a command line; errors that the user can put right are one line on stderr.

    Under a launcher, what is not training is done by the first process alone.
    """
    if arguments and arguments[0] not in SHARED and os.environ.get("RANK", "0") != "0":
        return 0
    try:
        cli.main(list(arguments), prog_name="vqgen", standalone_mode=False, obj=list(arguments))
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VqgenError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"Interrupted. {again(arguments) if arguments[0] in RESUMABLE else ''}".rstrip(), err=True)
        return Interrupted.exit_code
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            cure = "Give a shorter one."
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            cure = "Free some space or choose another folder with --run."
        else:
            raise
        place = f" ({error.filename})" if error.filename else ""
        click.echo(f"Error: {error.strerror}{place}. {cure}", err=True)
        return VqgenError.exit_code
    return 0


@click.group(cls=Commands, epilog="Start with: vqgen run --config shapes", context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="vqgen")
def cli() -> None:
    """Turn images into discrete codes, learn a density over the codes, sample from it, and compare priors."""


for command in (
    cli_train.run_command,
    cli_train.train_codes_command,
    cli_train.encode_command,
    cli_train.train_prior_command,
    cli_sweep.sweep_command,
    cli_results.sample_command,
    cli_results.reconstruct_command,
    cli_evaluate.evaluate_command,
    cli_results.compare_command,
    cli_score.score_command,
    cli_results.diagnose_command,
    cli_compress.compress_command,
    cli_compress.decompress_command,
    cli_about.info_command,
    cli_about.priors_command,
    cli_about.presets_command,
):
    cli.add_command(command)
