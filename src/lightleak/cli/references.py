"""`lightleak references`: models that the auditor trains, so that membership is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightleak.cli.config import Config
from lightleak.cli.console import Bars, output
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
from lightleak.cli.plan import duration, size
from lightleak.cli.probe import Method, whole

if TYPE_CHECKING:
    from lightleak.audits.reference_training import Estimate

app = typer.Typer(help="Models that you fine-tune yourself, so that membership is known.")


@app.callback()
def _references() -> None:
    """Keep `train` a subcommand though it is the only one."""


@app.command("train")
def train(
    base: Annotated[
        str, typer.Option(help="What the target was fine-tuned from: model folder or hub id.")
    ],
    out: Annotated[Path, typer.Option(help="Their folder; the same command goes on in it.")],
    suspect: Annotated[
        Path | None, typer.Option(help="The audit's suspects; half of them in each reference.")
    ] = None,
    control: Annotated[Path | None, typer.Option(help="The audit's controls, likewise.")] = None,
    train_on: Annotated[
        Path | None,
        typer.Option(help="Instead: records of other people, if the suspects may not be used."),
    ] = None,
    count: Annotated[
        int, typer.Option(help="References; even, so that each record is in half of them.")
    ] = 8,
    like: Annotated[
        str | None, typer.Option(help="Adapter whose shape theirs take: the target's own.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="lora puts an adapter on; full trains the weights.")
    ] = Method.LORA,
    vision: Annotated[bool, typer.Option("--vision", help="Train the vision tower too.")] = False,
    rank: Annotated[int | None, typer.Option(help="Of the adapter. [16]")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over its half.")] = 1,
    keep: Annotated[
        str | None, typer.Option(help="Epochs to keep: 3,6,9. The last if not given.")
    ] = None,
    train_batch: Annotated[int, typer.Option(help="Records a training step.")] = 12,
    learning_rate: Annotated[float, typer.Option(help="At its highest, after the warm-up.")] = 1e-5,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.1,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.01,
    workers: Workers = None,
    executor: Executor = Where.LOCAL,
    ray_address: RayAddress = None,
    seed: Annotated[int, typer.Option(help="Of halves, order and adapters.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what it takes, and leave nothing behind.")
    ] = False,
    strict: Strict = False,
    allow_outside: AllowOutside = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    config: Config = None,
) -> None:
    """Fine-tune the base several times, each time on a random half of suspects and controls.

    Give the recipe that the target was trained by, as far as it is known.

    Example: lightleak references train --base ./base --suspect mine.jsonl --control others.jsonl
    --count 8 --epochs 3 --learning-rate 1e-4 --out refs
    """
    del config
    from lightleak.audits import reference_training

    given: dict[str, Any] = {
        "base": base,
        "suspect": suspect,
        "control": control,
        "train_on": train_on,
        "count": count,
        "like": like,
        "method": method.value,
        "vision": vision,
        "rank": rank,
        "epochs": epochs,
        "keep": () if keep is None else tuple(whole(keep, "--keep")),
        "train_batch": train_batch,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "workers": workers or None,
        "executor": executor.value,
        "ray_address": ray_address,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "strict": strict,
        "allow_outside": allow_outside,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
        "progress": Bars(),
    }
    if dry_run:
        show(reference_training.estimate_references(**given))
        return
    found = reference_training.train_references(**given, out=out, estimated=show)
    _say(f"{len(found)} references in {out}; {out / 'references.json'} says who is in which.")


def show(estimate: Estimate) -> None:
    """Print what training takes."""
    count, epochs, pace = estimate.references, estimate.epochs, estimate.pace
    where = f"{estimate.device}, {estimate.dtype}"
    processes = f"{estimate.workers} processes" if estimate.workers > 1 else "one process"
    _say(
        f"To train: {count} reference{'s' * (count > 1)} on about {estimate.records:,} records "
        f"each, {epochs} epoch{'s' * (epochs > 1)}, in {processes} on {where}."
    )
    _say(
        f"Time: {duration(estimate.seconds)}, by a few steps that took "
        f"{pace.training_seconds:.2g} s a record. Starting processes and writing come on top."
    )
    _say(
        f"Disk: {size(estimate.kept_bytes)} to keep, {size(pace.kept_bytes)} an epoch; "
        f"{size(estimate.scratch_bytes)} more meanwhile."
    )


def _say(text: str) -> None:
    output.print(text, markup=False, highlight=False, soft_wrap=True)
