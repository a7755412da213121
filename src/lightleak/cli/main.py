"""The program `lightleak`: its commands and how it ends.

Exit codes: 0 finished · 1 internal error · 2 bad input or usage · 3 a --fail-if gate tripped ·
130 interrupted (run the same command again to go on).
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from lightleak import __version__
from lightleak.cli import (
    audit,
    compare,
    demo,
    doctor,
    identify,
    lab,
    plan,
    probe,
    references,
    report,
    signals,
    watermark,
)
from lightleak.cli.console import errors
from lightleak.errors import UserError

_INTERRUPTED = 130

app = typer.Typer(
    name="lightleak",
    help="Was a vision-language model trained on your images and texts? How sure may you be?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("audit")(audit.audit)
app.command("identify")(identify.identify)
app.command("probe")(probe.probe)
app.command("watermark")(watermark.watermark)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("signals")(signals.signals)
app.command("doctor")(doctor.doctor)
app.add_typer(references.app, name="references")
app.add_typer(lab.app, name="lab")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lightleak {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None:
    del version


def run() -> None:
    """Run the command line; a user's mistake is one line, ours a traceback."""
    # One thread a process: spinning threads on a busy machine are ten times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        app()
    except UserError as error:
        errors.print(f"lightleak: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # Typer has caught the key already.
            _interrupted()
        raise


def _interrupted() -> NoReturn:
    errors.print("lightleak: interrupted; the same command goes on where it stopped")
    sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    run()
