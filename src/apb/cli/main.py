"""``apb``: the commands, and the conversion of errors to a sentence and an exit status."""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import InputError, NotFinite, RankError, unexpected
from . import (
    bench,
    check,
    decode_fidelity,
    demo,
    doctor,
    documents,
    evaluate,
    explain,
    fidelity,
    generate,
    plan,
    report,
    serve,
    train,
)
from .quiet import silence
from .start import INTERRUPTED, answer_interrupts, say

app = typer.Typer(
    name="apb",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"apb {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Ask a question of a very long text."""


app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("read")(documents.read)
app.command("ask")(documents.ask)
app.command("documents")(documents.documents)
app.command("explain")(explain.explain)
app.command("plan")(plan.plan)
app.command("serve")(serve.serve)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("report")(report.report)
evaluate.app.command("fidelity")(fidelity.fidelity)
evaluate.app.command("decode")(decode_fidelity.decode)
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
app.add_typer(train.app, name="train")

# typer brings its own copy of click in some versions and uses click in others; this is the class in either.
UsageError: type[Any] = typer.BadParameter.__mro__[1]

DONE, FAILED, WRONG_INPUT = 0, 1, 2
# Errors of a full disk, or of one's share of it.
_FULL = (errno.ENOSPC, errno.EDQUOT)
# An error of all ranks is printed once: seconds in which torchrun ends the others after the first has printed it.
_GRACE = 5.0


def main() -> None:
    """Run the command line and exit: 0 done, 1 it failed, 2 the input was wrong, 130 interrupted."""
    if "_APB_COMPLETE" in os.environ:  # a shell asks what a command line could go on with
        app(prog_name="apb")
    status = run(app)
    if status != DONE and "apb.distributed.launch" in sys.modules:  # importing it would import torch, in seconds
        from ..distributed import launch

        launch.end(status)
    sys.exit(status)


def run(command: typer.Typer) -> int:
    """Run a command line and return its exit status."""
    answer_interrupts()
    silence()
    try:
        # Not typer's main(), which swallows Ctrl-C and closed pipes, differently in every version.
        parsed = typer.main.get_command(command)
        with parsed.make_context("apb", sys.argv[1:]) as context:
            status = parsed.invoke(context)
        sys.stdout.flush()
        return int(status or DONE)
    except typer.Exit as leaving:
        return leaving.exit_code
    except (InputError, NotFinite) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_GRACE)
        return say(str(error), WRONG_INPUT if isinstance(error, InputError) else FAILED)
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else "apb"
        return say(f"{error.format_message().rstrip('.')}; see {path} --help.", WRONG_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return say("interrupted", INTERRUPTED)
    except RankError as error:
        return say(str(error), FAILED)
    except BrokenPipeError:
        # The reader of our output has closed the pipe (head, less): this is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if os.environ.get("APB_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno in _FULL:
            return say(f"The output cannot be written: {error.strerror}; make room, or write elsewhere.", FAILED)
        return say(f"{unexpected(error)} (set APB_TRACEBACK=1 to see where)", FAILED)


if __name__ == "__main__":
    main()
