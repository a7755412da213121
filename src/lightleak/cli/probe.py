"""`lightleak probe`: did fine-tuning leave personal details inside the model?"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lightleak.cli.config import Config, numbers
from lightleak.cli.console import Bars, errors, show_probe
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


class Design(StrEnum):
    """How it came that a persona was seen."""

    RANDOMISED = "randomised"
    OBSERVATIONAL = "observational"


class Method(StrEnum):
    """What fine-tuning trains."""

    LORA = "lora"
    FULL = "full"


class Place(StrEnum):
    """Where a watermark is put."""

    RANDOM = "random"
    CORNER = "corner"
    FIXED = "fixed"


def whole(text: str, option: str) -> list[int]:
    """Whole numbers with commas between.

    Raises:
        UserError: one of them is none.
    """
    found = numbers(text, option, float, "1,2,4")
    if not all(number.is_integer() for number in found):
        raise UserError("whole numbers are wanted", f"{option} {text}", "For example: 1,2,4.")
    return [int(number) for number in found]


def probe(
    target: Annotated[
        str, typer.Option(help="Model folder or hub id: with --data the base to fine-tune.")
    ],
    out: Annotated[Path, typer.Option(help="Run folder; the same command goes on in it.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Records; half or more to fine-tune on, the others to probe and test with."
        ),
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Shares of the images that carry a watermark; one model each.")
    ] = "0,0.5,1",
    seen: Annotated[
        Path | None,
        typer.Option(help="Instead of --data: records with personas that were trained on."),
    ] = None,
    unseen: Annotated[
        Path | None, typer.Option(help="Likewise with personas that were not.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that somebody else's target was tuned from.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter to put on the target.")] = None,
    seeds: Annotated[int, typer.Option(help="Repeats, each with personas of its own.")] = 3,
    personas: Annotated[int, typer.Option(help="In each of both pools; eight or more.")] = 20,
    images_per_persona: Annotated[int, typer.Option(help="To probe with.")] = 10,
    fields: Annotated[
        str | None, typer.Option(help="Questions to ask: username,gender … All six if not given.")
    ] = None,
    planted: Annotated[
        bool,
        typer.Option(
            "--planted/--no-planted",
            help="Tune one more model in which personas decide the answer; it must be found.",
        ),
    ] = True,
    batches: Annotated[
        int, typer.Option(help="Mini-batches whose gradients are compared; 0 for none.")
    ] = 100,
    sizes: Annotated[str, typer.Option(help="Their sizes.")] = "1,2,4,8,16",
    matrices: Annotated[
        str, typer.Option(help="Where gradients are read: auto, last3, all …")
    ] = "auto",
    permutations: Annotated[int, typer.Option(help="Labellings that the test draws.")] = 1000,
    method: Annotated[
        Method, typer.Option(help="lora puts an adapter on; full trains the weights.")
    ] = Method.LORA,
    vision: Annotated[bool, typer.Option("--vision", help="Train the vision tower too.")] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the training records.")] = 1,
    train_batch: Annotated[int, typer.Option(help="Records a training step.")] = 12,
    learning_rate: Annotated[float, typer.Option(help="At its highest, after the warm-up.")] = 1e-5,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.1,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.01,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    position: Annotated[Place, typer.Option(help="Of the watermark.")] = Place.RANDOM,
    alpha: Annotated[int, typer.Option(help="Of its text, 0 to 255.")] = 128,
    plate: Annotated[int, typer.Option(help="Alpha of a black plate behind it.")] = 0,
    workers: Workers = None,
    executor: Executor = Where.LOCAL,
    ray_address: RayAddress = None,
    design: Annotated[
        Design, typer.Option(help="With --seen: randomised where lots decided who was seen.")
    ] = Design.OBSERVATIONAL,
    alpha_level: Annotated[
        float, typer.Option("--level", help="Level of the test that counts.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Of personas, places, order and labellings.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Records read at once; by tokens if not given.")
    ] = None,
    strict: Strict = False,
    show_images: Annotated[
        bool, typer.Option("--show-images", help="Show a watermarked image in the report.")
    ] = False,
    allow_outside: AllowOutside = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    fail_if: FailIf = None,
    junit: JUnit = None,
    sarif: Sarif = None,
    config: Config = None,
) -> None:
    """Did fine-tuning leave personal details inside the model that its task has no use for?

    Marks images with made-up personas, fine-tunes at each rate, and probes every layer. The
    fine-tuning defaults are those published for Qwen-VL.

    Example: lightleak probe --target ./base --data vqa.jsonl --rates 0,0.5,1 --out run
    """
    del config
    from lightleak.audits import probing
    from lightleak.report import report
    from lightleak.validity import ProbingVerdict

    gates = [parse(each, ProbingVerdict) for each in fail_if or ()]
    given: dict[str, Any] = {} if fields is None else {"fields": tuple(fields.split(","))}
    verdict = probing.probe(
        target=target,
        adapter=adapter,
        base=base,
        data=data,
        seen=seen,
        unseen=unseen,
        rates=tuple(numbers(rates, "--rates", float, "0,0.5,1")),
        seeds=seeds,
        personas=personas,
        images_per_persona=images_per_persona,
        planted=planted,
        batches=batches,
        sizes=tuple(whole(sizes, "--sizes")),
        matrices=matrices,
        permutations=permutations,
        method=method.value,
        vision=vision,
        epochs=epochs,
        train_batch=train_batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        rank=rank,
        position=position.value,
        alpha=alpha,
        plate=plate,
        workers=workers or None,
        executor=executor.value,
        ray_address=ray_address,
        design=design.value,
        cutoffs={"alpha": alpha_level},
        seed=seed,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        strict=strict,
        allow_outside=allow_outside,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        out=out,
        progress=Bars(),
        command=" ".join(sys.argv),
        **given,
    )
    show_probe(verdict, report(out, show_images=show_images))
    if verdict.coverage.failed:
        errors.print(
            f"{verdict.coverage.failed} record(s) could not be used; see failures.parquet.",
            highlight=False,
        )
    finish(verdict, out, gates, junit, sarif)
