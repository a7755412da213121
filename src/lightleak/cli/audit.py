"""`lightleak audit`: was the target trained on the suspects?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lightleak.cli.config import Config
from lightleak.cli.console import Bars, errors, show
from lightleak.cli.gate import FailIf, JUnit, Sarif, finish, parse
from lightleak.cli.options import (
    AllowOutside,
    AllowPickle,
    Device,
    Dtype,
    Executor,
    RayAddress,
    Strict,
    TrustRemoteCode,
    Where,
    Workers,
)
from lightleak.errors import UserError


class Protocol(StrEnum):
    """How fitted signals are calibrated."""

    CROSSFIT = "crossfit"
    SPLIT = "split"


class Design(StrEnum):
    """How suspects and controls came apart."""

    RANDOMISED = "randomised"
    HELD_OUT = "held-out"
    OBSERVATIONAL = "observational"


def audit(
    target: Annotated[
        str,
        typer.Option(
            help="Model folder, adapter folder, hub id, or an endpoint http://host/v1#model, whose "
            "key is in LIGHTLEAK_API_KEY."
        ),
    ],
    suspect: Annotated[Path, typer.Option(help="Records that may have been trained on.")],
    control: Annotated[Path, typer.Option(help="Records of the same kind that were not.")],
    out: Annotated[Path, typer.Option(help="Run folder; the same command goes on in it.")],
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on the target.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="What the target was fine-tuned from: a negative control, and the base of an "
            "adapter given as target."
        ),
    ] = None,
    control_target: Annotated[
        str | None,
        typer.Option(help="Another model, which cannot have seen the suspects: likewise."),
    ] = None,
    negative_controls: Annotated[
        bool,
        typer.Option(help="Whether control models are run, and pairs with their texts shuffled."),
    ] = True,
    references: Annotated[
        Path | None,
        typer.Option(
            help="Models that lightleak references train made: lira, rmia, signature and, without "
            "a base, ratio compare the target with them."
        ),
    ] = None,
    reference_epoch: Annotated[
        int | None, typer.Option(help="Which of their kept epochs; else the last.")
    ] = None,
    signals: Annotated[
        str,
        typer.Option(
            help="Names, comma-separated; all stands for those that need no forwards of their own."
        ),
    ] = "all",
    primary: Annotated[
        str,
        typer.Option(
            help="The pre-registered signal behind the verdict; "
            "loss, or cosine for a dual encoder, unless named."
        ),
    ] = "",
    protocol: Annotated[
        Protocol, typer.Option(help="How fitted signals are calibrated.")
    ] = Protocol.CROSSFIT,
    calibration_members: Annotated[
        Path | None, typer.Option(help="Known members, for --protocol split.")
    ] = None,
    calibration_nonmembers: Annotated[
        Path | None, typer.Option(help="Known non-members, for --protocol split.")
    ] = None,
    bank: Annotated[
        Path | None,
        typer.Option(
            help="Pairs that are a dual encoder's negatives; else some controls are set aside."
        ),
    ] = None,
    design: Annotated[
        Design, typer.Option(help="How suspects and controls came apart; it is checked.")
    ] = Design.OBSERVATIONAL,
    documentation: Annotated[
        Path | None,
        typer.Option(help="A file that says how they came apart; its hash is kept."),
    ] = None,
    blind_field: Annotated[
        list[str] | None,
        typer.Option(
            help="Entry of the records' meta that could tell the sides apart (date, source …); "
            "repeatable."
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Parquet with id and embedding, to find near-duplicates by."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of a signal: SIGNAL.OPTION=VALUE; repeatable."),
    ] = None,
    cutoff: Annotated[
        list[str] | None,
        typer.Option("--cutoff", help="Cut-off of the verdict: NAME=VALUE; repeatable."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of the test that counts.")] = 0.01,
    folds: Annotated[int, typer.Option(help="Parts that fitted signals cross.")] = 2,
    seed: Annotated[int, typer.Option(help="Of folds, resampling and permutations.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[
        str, typer.Option(help="auto, or how many records go through at once.")
    ] = "auto",
    workers: Workers = 1,
    executor: Executor = Where.LOCAL,
    ray_address: RayAddress = None,
    show_images: Annotated[
        bool, typer.Option("--show-images", help="Show records' images in the report.")
    ] = False,
    drop_duplicates: Annotated[
        bool,
        typer.Option("--drop-duplicates", help="Leave out records that stand on both sides."),
    ] = False,
    strict: Strict = False,
    allow_outside: AllowOutside = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    fail_if: FailIf = None,
    junit: JUnit = None,
    sarif: Sarif = None,
    config: Config = None,
) -> None:
    """Was the target trained on the suspects?

    Example: lightleak audit --target ./model --suspect mine.jsonl --control others.jsonl --out run
    """
    given = locals()
    del config
    from lightleak.audits import membership
    from lightleak.report import report
    from lightleak.validity import Verdict

    gates = [parse(each, Verdict) for each in fail_if or ()]
    verdict = membership.audit(
        **settings_of(given), out=out, progress=Bars(), command=" ".join(sys.argv)
    )
    page = report(out, show_images=show_images)
    show(verdict, page)
    if verdict.coverage.failed:
        errors.print(
            f"{verdict.coverage.failed} record(s) failed; see the report or failures.parquet.",
            highlight=False,
        )
    finish(verdict, out, gates, junit, sarif)


# Options that say where results go, and no setting of the audit.
RESULTS = frozenset(("out", "show_images", "fail_if", "junit", "sarif"))


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of this command as settings of an audit."""
    from lightleak.signals import parse_options

    settings = {name: given[name] for name in given.keys() - RESULTS - {"config"}}
    size, alpha = settings["batch_size"], settings.pop("alpha")
    fields, options, cutoffs = (settings.pop(k) for k in ("blind_field", "set_", "cutoff"))
    return {
        **settings,
        "signals": _names(settings["signals"]),
        "protocol": settings["protocol"].value,
        "design": settings["design"].value,
        "executor": settings["executor"].value,
        "workers": settings["workers"] or None,
        "blind_fields": tuple(fields or ()),
        "options": parse_options(options or ()),
        "cutoffs": {"alpha": alpha, **_cutoffs(cutoffs or ())},
        "batch_size": None if size == "auto" else _whole(size),
    }


def _names(signals: str) -> tuple[str, ...]:
    """The signals named; none stands for all."""
    if signals == "all":
        return ()
    names = tuple(name.strip() for name in signals.split(",") if name.strip())
    if not names:
        raise UserError("no signal is named", "--signals", "Name some, comma-separated, or all.")
    return names


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UserError("expected auto or a whole number", f"--batch-size {value}") from error


def _cutoffs(assignments: list[str] | tuple[str, ...]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError as error:
            raise UserError("expected NAME=NUMBER", f"--cutoff {assignment}") from error
        if not equals:
            raise UserError("expected NAME=NUMBER", f"--cutoff {assignment}")
        if name.strip() == "alpha":
            raise UserError("the level has an option of its own", "--cutoff alpha", "Use --alpha.")
    return values
