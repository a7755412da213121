"""`lightleak watermark`: mark images with made-up personas, to train on with one's own code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lightleak.cli.console import errors, output
from lightleak.cli.probe import Place
from lightleak.errors import UserError


def watermark(
    data: Annotated[Path, typer.Option(help="Records that will be trained on.")],
    probing: Annotated[
        Path, typer.Option(help="Records whose images to probe with; none that is trained on.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for marked records and probing sets.")],
    rate: Annotated[float, typer.Option(help="Share of the images that carry a watermark.")] = 1.0,
    personas: Annotated[int, typer.Option(help="In each of both pools.")] = 20,
    images_per_persona: Annotated[int, typer.Option(help="To probe with.")] = 10,
    position: Annotated[Place, typer.Option(help="Of the watermark.")] = Place.RANDOM,
    alpha: Annotated[int, typer.Option(help="Of its text, 0 to 255.")] = 128,
    plate: Annotated[int, typer.Option(help="Alpha of a black plate behind it.")] = 0,
    seed: Annotated[int, typer.Option(help="Of personas, images and places.")] = 0,
) -> None:
    """Write marked copies of records: train on OUT/train, probe with OUT/probing.

    Example: lightleak watermark --data vqa.jsonl --probing other.jsonl --rate 0.5 --out marked
    """
    from lightleak.planting import Style, draw_pools, inject, probing_sets
    from lightleak.records import image_sha256, load

    style = Style(alpha=alpha, plate=plate, position=position.value)
    pools = draw_pools(personas, seed=seed)
    loaded, images = load(data), load(probing)
    both = {image_sha256(one.image) for one in loaded.records} & {
        image_sha256(one.image) for one in images.records
    }
    if both:
        raise UserError(
            f"{len(both)} of its images are among those to be trained on",
            str(probing),
            "Give others: who is on them must not depend on the training.",
        )
    planted = inject(loaded.records, pools.seen, out / "train", rate=rate, seed=seed, style=style)
    sets = probing_sets(
        images.records,
        pools,
        out / "probing",
        seed=seed,
        style=style,
        images_per_persona=images_per_persona,
    )
    marked = sum(mark.marked for mark in planted.marks)
    output.print(
        f"train     {planted.records_file} ({marked} of {len(planted.marks)} images marked)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for name, side in (("seen", sets.seen), ("unseen", sets.unseen)):
        output.print(f"{name:<10}{side.folder}", markup=False, highlight=False, soft_wrap=True)
    output.print(
        f"Train on the first, then: lightleak probe --target TUNED --base BASE --design randomised "
        f"--seen {sets.seen.folder} --unseen {sets.unseen.folder} --out RUN",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    failed = [*loaded.failures, *images.failures, *planted.failures, *sets.seen.failures]
    if failed:
        errors.print(
            f"{len(failed)} record(s) could not be used. First: {failed[0].error}", highlight=False
        )
