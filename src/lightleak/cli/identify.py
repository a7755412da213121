"""`lightleak identify`: does the target know these people by name?"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lightleak.cli.config import Config
from lightleak.cli.console import Bars, errors, show_people
from lightleak.cli.gate import FailIf, JUnit, Sarif, finish, parse
from lightleak.cli.options import AllowOutside, AllowPickle, Device, Dtype, Strict, TrustRemoteCode


class Design(StrEnum):
    """How the people came by the names in the data."""

    RANDOMISED = "randomised"
    OBSERVATIONAL = "observational"


def identify(
    target: Annotated[str, typer.Option(help="Model folder, adapter folder or hub id.")],
    people: Annotated[Path, typer.Option(help="Folder with one folder of photos a person.")],
    out: Annotated[Path, typer.Option(help="Run folder; the same command goes on in it.")],
    names: Annotated[
        Path | None,
        typer.Option(help="CSV with person,name; else names.csv there, else the folders' names."),
    ] = None,
    controls: Annotated[
        Path | None,
        typer.Option(
            help="Likewise people known not to be in the data; to find one of m people takes "
            "20·m − 1 others."
        ),
    ] = None,
    known: Annotated[
        Path | None, typer.Option(help="Likewise people known to be in the data.")
    ] = None,
    control_target: Annotated[
        str | None, typer.Option(help="Another model, which cannot have seen the people.")
    ] = None,
    decoys: Annotated[
        str, typer.Option(help="auto, or a file with one name a line to compare with.")
    ] = "auto",
    decoy_count: Annotated[
        int | None,
        typer.Option(help="Decoys for each kind of name; 1000, or 99 for a generative target."),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(
            help="Names that a photo is given one of, in the published attack; never fewer than "
            "people."
        ),
    ] = 1000,
    templates: Annotated[
        Path | None,
        typer.Option(
            help="One template a line, {} for the name (a generative target: one question a "
            "line); else as published."
        ),
    ] = None,
    tau: Annotated[
        int, typer.Option(help="Templates that must recognise a person, as published.")
    ] = 1,
    fdr: Annotated[
        float, typer.Option(help="Expected share of people found wrongly among those found.")
    ] = 0.05,
    design: Annotated[
        Design, typer.Option(help="randomised where lots decided the names in the data.")
    ] = Design.OBSERVATIONAL,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on the target.")] = None,
    base: Annotated[str | None, typer.Option(help="Base of an adapter given as target.")] = None,
    seed: Annotated[int, typer.Option(help="Of decoys and subsets.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    strict: Strict = False,
    show_images: Annotated[
        bool, typer.Option("--show-images", help="Show faces in the report; else blurred.")
    ] = False,
    allow_outside: AllowOutside = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    fail_if: FailIf = None,
    junit: JUnit = None,
    sarif: Sarif = None,
    config: Config = None,
) -> None:
    """Does the target know these people by name?

    Example: lightleak identify --target ./clip --people people --out run
    """
    del config
    from lightleak.audits import identity
    from lightleak.report import report
    from lightleak.validity import IdentityVerdict

    gates = [parse(each, IdentityVerdict) for each in fail_if or ()]
    verdict = identity.identify(
        target=target,
        adapter=adapter,
        base=base,
        people=people,
        names=names,
        controls=controls,
        known=known,
        control_target=control_target,
        decoys=decoys,
        decoy_count=decoy_count,
        candidates=candidates,
        templates=templates,
        cutoffs={"tau": tau, "false_discovery_rate": fdr},
        design=design.value,
        seed=seed,
        device=device,
        dtype=dtype,
        strict=strict,
        allow_outside=allow_outside,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        out=out,
        progress=Bars(),
        command=" ".join(sys.argv),
    )
    page = report(out, show_images=show_images)
    show_people(verdict, page)
    lost = verdict.coverage.people - verdict.coverage.people_tested
    photos = verdict.coverage.photos - verdict.coverage.photos_used
    if lost or photos:
        errors.print(
            f"{photos} photo(s) and {lost} person(s) could not be used; see failures.parquet.",
            highlight=False,
        )
    finish(verdict, out, gates, junit, sarif)
