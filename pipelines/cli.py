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
from functools import partial

import click

from pipelines import cli_about, cli_compress, cli_evaluate, cli_results, cli_score, cli_sweep, cli_train
from pipelines.cli_options import again
from pipelines.launcher import check_launcher, ignored_precision, launched
from pipelines.say_once import say_once
from vqgen import __version__
from vqgen.errors import Interrupted, VqgenError
from vqgen.interrupts import terminable

TRAINING = ("run", "train-codes", "train-prior")
SHARED = (*TRAINING, "encode", "sample", "evaluate", "compare", "score")
"""Commands whose work is shared by all processes of a launcher."""
FIRST_ALONE = ("reconstruct", "diagnose", "compress", "decompress")
"""Commands that compute, and that the first process of a launcher does by itself."""
RESUMABLE = (*TRAINING, "sweep", "encode", "sample")
"""Commands that go on where they were interrupted."""


class Commands(click.Group):
    """Lists the commands in the order in which they are used, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def run() -> None:
    """Run the command line and leave with its exit code."""
    code = call(sys.argv[1:])
    distributed = sys.modules.get("torch.distributed")
    if code == 0 and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()  # torch complains of one that is left on a GPU
    sys.exit(code)


def call(arguments: Sequence[str]) -> int:
    """The exit code of a command line; errors that the user can put right are one line on stderr.

    Under a launcher, what is not `SHARED` is done by the first process alone.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        check_launcher()
    except VqgenError as error:
        if first:
            _complain(f"Error: {error}")
        return error.exit_code
    if first and arguments and arguments[0] in TRAINING and (ignored := ignored_precision()):
        _complain(f"warning: {ignored}")
    if not arguments or arguments[0] in SHARED or launched() == 1:
        return _call(arguments)
    if not first:
        return 0
    if arguments[0] not in FIRST_ALONE:
        return _call(arguments)
    from pipelines.processes import alone

    _complain(f"vqgen {arguments[0]} works in one process: the first of {launched()} does it.")
    with alone():
        return _call(arguments)


def _call(arguments: Sequence[str]) -> int:
    try:
        with terminable():
            cli.main(list(arguments), prog_name="vqgen", standalone_mode=False, obj=list(arguments))
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        say_once(error.format_message(), error.show)
        return error.exit_code
    except VqgenError as error:
        say_once(str(error), partial(_complain, f"Error: {error}"), elsewhere=error.said_elsewhere)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        goes_on = bool(arguments) and (arguments[0] in RESUMABLE or "--train" in arguments)
        line = f"Interrupted. {again(arguments) if goes_on else ''}".rstrip()
        say_once(line, partial(click.echo, line, err=True), interrupted=True)
        return Interrupted.exit_code
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            cure = "Give a shorter one."
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            cure = "Free some space or choose another folder with --run."
        else:
            raise
        place = f" ({error.filename})" if error.filename else ""
        text = f"{error.strerror}{place}. {cure}"
        say_once(text, partial(_complain, f"Error: {text}"))
        return VqgenError.exit_code
    except (RuntimeError, MemoryError) as error:
        from vqgen.faults import fault_of_machine

        parameters = {parameter.name for parameter in cli.commands[arguments[0]].params}
        lowered = "--batch-size" if "batch_size" in parameters else "training.batch_size"
        fault = fault_of_machine(error, f"Lower {lowered} or make the model smaller.")
        if fault is None:
            raise
        say_once(str(fault), partial(_complain, f"Error: {fault}"))
        return fault.exit_code
    return 0


def _complain(text: str) -> None:
    """A line on stderr; names in it may come from a file that a stranger wrote."""
    from vqgen.parsing import printable

    click.echo(printable(text), err=True)


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
