"""Gradients of mini-batches are those that training would take, and are compared as said."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import ImageDraw

from lightleak import records, targets
from lightleak.errors import UserError
from lightleak.evidence.augment import augment_image, augment_text
from lightleak.evidence.collect import BatchSize, encode
from lightleak.evidence.dynamics import (
    Cosines,
    batch_gradients,
    compare,
    draw_batches,
    layer_of,
)
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.records import open_rgb

SIZES = (1, 2, 4)


def png(image):
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def marked(record):
    image = open_rgb(record.image)
    ImageDraw.Draw(image).text((2, 2), "username: kim", fill=(0, 0, 0))
    return replace(record, image=png(image))


@pytest.fixture(scope="module")
def lab(lab_tiny):
    """A tiny LLaVA in double precision, its engine, and 32 records in all variants."""
    target = targets.load(lab_tiny.target)
    target.model.double()
    engine = GradientEngine(target, select(target, "all"))
    originals = records.load(lab_tiny.nonmembers).records[:32]
    rng = np.random.default_rng(0)
    variants = {
        "original": originals,
        "watermarked": [marked(record) for record in originals],
        "text-augmented": [augment_text(record, rng) for record in originals],
        "image-augmented": [
            replace(record, image=png(augment_image(open_rgb(record.image), rng)))
            for record in originals
        ],
    }
    return target, engine, variants


@pytest.fixture(scope="module")
def measured(lab):
    return batch_gradients(*lab, sizes=SIZES, batches=3, seed=0)


def by_autograd(target, some, names):
    """The gradient of the mean loss of a batch, one vector a parameter."""
    parameters = dict(target.model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    try:
        encoded = encode(target, some)
        assert not encoded.failures
        loss = target.outputs(target.collate(encoded.records)).losses.mean()
        found = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
    finally:
        for name in names:
            parameters[name].requires_grad_(False)
    return {n: g.flatten() for n, g in zip(names, found, strict=True) if g is not None}


def cosine(first, second, names):
    a, b = (torch.cat([side[n] for n in names]) for side in (first, second))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("comparison", ["watermarked", "text-augmented", "image-augmented"])
def test_cosines_are_those_of_the_gradient_of_the_batch_loss(lab, measured, comparison):
    target, engine, variants = lab
    names = tuple(engine.selection.shapes)
    draw = next(draw_batches(32, 4, 3, 0))
    found = {
        (row["batch_size"], row["layer"]): row["cosine"]
        for row in measured.table.to_pylist()
        if row["batch"] == 0 and row["comparison"] == comparison
    }
    for size in (1, 4):
        first, second = (
            by_autograd(target, [variants[side][i] for i in draw.batch[:size]], names)
            for side in ("original", comparison)
        )
        assert found[size, "all"] == pytest.approx(cosine(first, second, first), rel=1e-6)
        for layer in {layer_of(target.parts, name) for name in first}:
            inside = [name for name in first if layer_of(target.parts, name) == layer]
            expected = cosine(first, second, inside)
            assert found[size, layer] == pytest.approx(expected, rel=1e-6)


def test_the_same_batch_again_is_the_upper_floor_and_another_batch_the_lower(measured):
    cosines = Cosines.of(measured.table)
    values = dict(zip(cosines.comparisons, np.moveaxis(cosines.values, 2, 0), strict=True))
    assert np.nanmin(values["original"]) >= 1 - 1e-6
    assert np.nanmax(values["other batch"]) < 1 - 1e-3
    # The whole is ruled by the language model, which hardly minds; the image's own layers do.
    vision = cosines.layers.index("vision.0")
    for comparison in ("watermarked", "image-augmented"):
        assert values[comparison][..., vision].max() < 1 - 1e-5
    assert values["text-augmented"][..., cosines.layers.index("all")].max() < 1 - 1e-3


def test_a_batch_reads_the_same_however_it_grew_and_went_through_the_model(lab, measured):
    alone = batch_gradients(*lab, sizes=[4], batches=1, seed=0, size=BatchSize(records=3))
    table = measured.table.to_pylist()
    grown = [row for row in table if row["batch_size"] == 4 and row["batch"] == 0]
    for row, other in zip(grown, alone.table.to_pylist(), strict=True):
        assert {k: row[k] for k in ("batch", "records", "comparison", "layer")} == {
            k: other[k] for k in ("batch", "records", "comparison", "layer")
        }
        for number in ("dot", "norm2", "variant_norm2"):
            assert row[number] == pytest.approx(other[number], rel=1e-8, abs=1e-12)


def test_a_draw_measured_by_itself_is_the_one_measured_among_all(lab, measured):
    last = list(draw_batches(32, 4, 3, 0))[-1]
    expected = measured.table.filter(pc.field("batch") == 2)
    assert compare(*lab, last, sizes=SIZES).table.equals(expected)


def test_a_record_that_fails_in_one_variant_leaves_them_all_and_is_named(lab):
    target, engine, variants = lab
    draw = next(draw_batches(32, 4, 1, 0))
    broken = list(variants["watermarked"])
    second, first = draw.batch[1], draw.batch[0]
    broken[second] = replace(broken[second], image=b"no image")
    found = compare(target, engine, variants | {"watermarked": broken}, draw, sizes=SIZES)
    (failure,) = found.failures
    assert failure.id == variants["original"][second].id
    assert failure.error.startswith("as watermarked: ")
    left = {row["batch_size"]: row["records"] for row in found.table.to_pylist()}
    assert left == {1: 1, 2: 1, 4: 3}
    # What is left is what would be without the record from the start.
    ones, twos = ([r for r in found.table.to_pylist() if r["batch_size"] == n] for n in (1, 2))
    assert [r["cosine"] for r in ones] == [r["cosine"] for r in twos]
    broken[first] = broken[second]
    with pytest.raises(UserError, match="'watermarked'"):
        compare(target, engine, variants | {"watermarked": broken}, draw, sizes=SIZES)


def test_an_empty_batch_has_no_cosine(lab):
    target, engine, variants = lab
    draw = next(draw_batches(32, 4, 1, 0))
    broken = list(variants["original"])
    broken[draw.batch[0]] = replace(broken[draw.batch[0]], image=b"no image")
    found = compare(target, engine, variants | {"original": broken}, draw, sizes=(1, 2))
    assert set(found.table["batch_size"].to_pylist()) == {2}


def test_batches_share_no_record_while_there_are_enough_and_never_with_their_other():
    draws = list(draw_batches(70, 16, 4, seed=0))
    assert len({i for draw in draws for i in draw.batch}) == 64
    again = list(draw_batches(70, 16, 50, seed=0))
    assert [draw.number for draw in again] == list(range(50))
    used = np.bincount([i for draw in again for i in draw.batch], minlength=70)
    assert used.min() >= 8
    for draw in again:
        assert len({*draw.batch, *draw.other}) == 32
    with pytest.raises(UserError, match="no two batches of 16"):
        next(draw_batches(31, 16, 4, seed=0))


def test_layers_are_named_by_where_a_parameter_lies(lab):
    parts = lab[0].parts
    names = {
        f"{parts.text_blocks[0]}.mlp.weight": "language.1",
        f"{parts.text_blocks[1]}.q.lora_A.default.weight": "language.2",
        f"{parts.vision_blocks[0]}.k.weight": "vision.0",
        f"{parts.projector[0]}.linear_1.weight": "projector",
        f"{parts.text_blocks[1]}0.weight": "rest",
        "lm_head.weight": "rest",
    }
    assert {name: layer_of(parts, name) for name in names} == names


def test_an_adapters_gradient_is_told_apart_by_layer(lab_lora):
    target = targets.load(lab_lora.target, adapter=lab_lora.adapter)
    engine = GradientEngine(target, select(target, "lora"))
    originals = records.load(lab_lora.nonmembers).records[:16]
    variants = {"original": originals, "watermarked": [marked(each) for each in originals]}
    found = Cosines.of(
        batch_gradients(target, engine, variants, batches=1, seed=0, sizes=[1, 2]).table
    )
    assert found.values.shape == (1, 2, 3, len(found.layers))
    assert {"language.1", "all"} <= set(found.layers)
    assert "rest" not in found.layers
