"""Shares: K and b are autograd's own, and tell who is in what fine-tuning changed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import lightleak
from lightleak import lab, targets
from lightleak.audits.gather_shares import FOLDER, gather_shares, multiply, read_shares
from lightleak.audits.models import Model, release
from lightleak.audits.passes import Plan, begin
from lightleak.audits.settings import AuditSettings
from lightleak.audits.sides import read_sides
from lightleak.audits.stored import _across
from lightleak.audits.stored import load as load_evidence
from lightleak.evidence.collect import BatchSize
from lightleak.evidence.readings import ModelReadings
from lightleak.evidence.shares import POINTS, Kernel, shares
from lightleak.lab.models import tiny_llava
from lightleak.records import open_rgb
from lightleak.runs import Run, Silent
from lightleak.runs.executors import executor
from lightleak.statistics import auc

SIDE, SHARD = 5, 3
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
INNER = "model.language_model.layers.1.self_attn.q_proj.weight"
WORDS = ("share", "error", "certain", "along")


@pytest.fixture(autouse=True)
def _released():
    yield
    release()


def write_records(folder, count=SIDE):
    """Noise with a few words, and among the controls one record that the model refuses."""
    rng = np.random.default_rng(0)
    for side in ("suspect", "control"):
        rows = []
        for i in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{side}-{i}.png")
            words = rng.choice(["red", "green", "blue", "no"], 1 + i % 3)
            refused = side == "control" and i == 1
            text = "<image>" if refused else " ".join(words)
            rows.append({"id": str(i), "image": f"{side}-{i}.png", "text": text})
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def moved(base, out, seed):
    """A model a little away from its base in all that it is made of."""
    target = targets.load(base, dtype="float64")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in target.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 0.02 * noise
    target.model.save_pretrained(out)
    target.processor.save_pretrained(out)
    return {"target": out, "base": base}


def adapted(base, out, seed, layers):
    target = targets.load(base, dtype="float64")
    model = get_peft_model(target.model, LoraConfig(r=2, lora_alpha=6, target_modules=layers))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    return {"target": base, "adapter": out}


CASES = ["full", "full, tied", "inner adapter", "adapter", "head, tied"]


@pytest.fixture(scope="module", params=CASES)
def given(request, tmp_path_factory):
    """A base, a target and a reference in float64, with their records and groups of matrices."""
    folder = tmp_path_factory.mktemp("given")
    base = folder / "base"
    tiny_llava(base, ["red green blue no"] * 3, seed=3)
    if "tied" in request.param:
        target = targets.load(base)
        target.model.config.tie_word_embeddings = True
        target.model.config.text_config.tie_word_embeddings = True
        target.model.tie_weights()
        target.model.save_pretrained(base)
    write_records(folder)
    if request.param.startswith("full"):
        made = [moved(base, folder / name, seed) for seed, name in enumerate(("own", "other"))]
        groups = {"embedding": EMBEDDING}
        if "tied" not in request.param:
            groups["head"] = HEAD
    else:
        groups = {"inner": INNER, "head": HEAD}
        if request.param != "adapter":
            groups.pop("head" if "inner" in request.param else "inner")
        layers = "|".join(rf".*{name.removesuffix('.weight')}" for name in groups.values())
        made = [
            adapted(base, folder / name, seed, layers) for seed, name in enumerate(("own", "other"))
        ]
    return folder, base, made, groups


@dataclass
class Notes(Silent):
    """What a user is told."""

    told: list[str] = field(default_factory=list)

    def note(self, text):
        self.told.append(text)


class Stopping:
    """Does jobs in this process, and is interrupted where all gradients are written."""

    workers, share = 1, 1.0

    def map(self, perform, jobs, advance=lambda _: None):
        if perform is multiply:
            raise KeyboardInterrupt
        return [perform(job, advance) for job in jobs]


def settings_of(folder, made, **more):
    given = {"signals": ("signature",), "primary": "signature", "dtype": "float64", **made, **more}
    sides = {side: folder / f"{side}.jsonl" for side in ("suspect", "control")}
    return AuditSettings.read(**sides, **given)


def gathered(out, folder, made, *, size=4, by=None, **more):
    """The run after its shares were gathered, and what was told on the way."""
    settings, run, notes = settings_of(folder, made[0], **more), Run.create(out), Notes()
    sides = read_sides(settings, Silent())
    others = {f"reference-{i:02d}": Model(settings_of(folder, m)) for i, m in enumerate(made[1:])}
    with executor() as here:
        of = begin(run.evidence, settings, sides, Silent(), here)
        Plan(BatchSize(size), SHARD, 1, False, (), (), (), {}, {}).store(run.evidence)
        gather_shares(run, of, others, sides, notes, by or here)
    return run, notes.told


def stored(run, point, model="target"):
    file = run.evidence / FOLDER / f"{point}-{model}.safetensors"
    with safetensors.safe_open(file, "np") as content:
        about = json.loads(content.metadata()["of"])
    kernel = Kernel(tuple(about["groups"]), **safetensors.numpy.load_file(file))
    return kernel, about["ids"]


def naive(folder, base, made, groups, way):
    """K, b and ‖Δ‖² of each group from whole gradients, with the weights set by hand.

    Of an adapter in its own coordinates, with g Aᵀ for g and, times its scaling, B for Δ.
    """
    target = targets.load(base, dtype="float64")
    model, inner, changed = target.model, {}, {}
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    if tied and HEAD in groups.values():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    under = {name: each.detach().clone() for name, each in model.named_parameters()}
    if "adapter" in made:
        weights = safetensors.numpy.load_file(made["adapter"] / "adapter_model.safetensors")
        delta = {}
        for group, name in groups.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            a, b = (torch.from_numpy(weights[f"{key}{x}.weight"]).double() for x in "AB")
            delta[name], inner[group], changed[group] = 3 * b @ a, 3 * a, b
    else:
        own = dict(targets.load(made["target"], dtype="float64").model.named_parameters())
        delta = {name: own[name].detach() - under[name] for name in under}
        changed = {group: delta[name] for group, name in groups.items()}
    with torch.no_grad():
        for name, change in delta.items():
            model.get_parameter(name).copy_(under[name] + way * change)
    chosen = [model.get_parameter(name).requires_grad_(True) for name in groups.values()]
    ids, rows = [], {group: [] for group in groups}
    for record in read_sides(settings_of(folder, made), Silent()).records:
        if record.text == "<image>":
            continue
        batch = target.collate([target.encode(record, open_rgb(record.image))])
        gradients = torch.autograd.grad(target.outputs(batch).losses.sum(), chosen)
        ids.append(record.id)
        for group, gradient in zip(groups, gradients, strict=True):
            own = gradient @ inner[group].T if inner else gradient
            rows[group].append(own.flatten())
    found = {}
    for group in groups:
        g, d = torch.stack(rows[group]).numpy(), changed[group].flatten().numpy()
        found[group] = g @ g.T, -g @ d, d @ d
    return ids, found


def test_k_and_b_are_those_of_autograds_own_gradients(given, tmp_path):
    folder, base, made, groups = given
    run, told = gathered(tmp_path / "run", folder, made)
    assert told == []
    readings = read_shares(run)
    for own, model in zip(made, ("target", "reference-00"), strict=True):
        solved = sorted({key.split(maxsplit=1)[1] for key in readings[model]})
        kernel, _ = stored(run, "end", model)
        sets = [*kernel.groups, "+".join(kernel.groups)] if len(groups) > 1 else kernel.groups
        assert solved == sorted(f"{one} {point}" for one in sets for point in POINTS)
        assert set(kernel.groups) == set(groups)
        for point, way in POINTS.items():
            kernel, told_of = stored(run, point, model)
            ids, expected = naive(folder, base, own, groups, way)
            # The record that has no gradient is in none of them.
            assert told_of == ids
            assert "control/1" not in ids
            for i, group in enumerate(kernel.groups):
                gram, against, square = expected[group]
                np.testing.assert_allclose(kernel.gram[i], gram, rtol=1e-6, atol=1e-6 * gram.max())
                scale = 1e-6 * abs(against).max()
                np.testing.assert_allclose(kernel.against[i], against, rtol=1e-6, atol=scale)
                np.testing.assert_allclose(kernel.square[i], square, rtol=1e-6)
    # Of the reference at its end, all groups together.
    gram, against, square = (sum(each) for each in zip(*expected.values(), strict=True))
    every = "+".join(kernel.groups)
    mean, n = np.trace(gram) / len(ids), len(ids)
    inverse = np.linalg.inv(gram / mean + 0.1 * (np.eye(n) - 1 / n))
    expected, error = inverse @ against / mean, np.sqrt(np.diag(inverse))
    stated = readings["reference-00"]
    found = {w: [stated[f"{w} {every} end"][key] for key in ids] for w in WORDS}
    np.testing.assert_allclose(found["share"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["error"], np.log(error), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["certain"], expected / error, rtol=1e-4)
    along = against / np.sqrt(np.diag(gram) * square)
    np.testing.assert_allclose(found["along"], along, rtol=1e-4)


@pytest.mark.parametrize("given", ["full", "inner adapter"], indirect=True)
def test_batches_change_nothing(given, tmp_path):
    folder, _, made, _ = given
    alone, together = (
        stored(gathered(tmp_path / str(size), folder, made[:1], size=size)[0], "middle")[0]
        for size in (1, 4)
    )
    scale = 1e-9 * together.gram.max()
    np.testing.assert_allclose(alone.gram, together.gram, rtol=1e-9, atol=scale)
    np.testing.assert_allclose(alone.against, together.against, rtol=1e-9, atol=scale)


@pytest.mark.parametrize("given", ["full"], indirect=True)
def test_a_broken_run_ends_in_the_same_bits(given, tmp_path):
    folder, _, made, _ = given
    whole, _ = gathered(tmp_path / "whole", folder, made)
    with pytest.raises(KeyboardInterrupt):
        gathered(tmp_path / "broken", folder, made, by=Stopping())
    one, another, *_ = sorted((tmp_path / "broken/evidence" / FOLDER).glob("gradients-*"))
    one.unlink()
    another.write_bytes(another.read_bytes()[:-8])
    broken, _ = gathered(tmp_path / "broken", folder, made)
    left = [sorted((run.evidence / FOLDER).iterdir()) for run in (whole, broken)]
    models = ("reference-00", "target")
    results = [f"{point}-{model}.safetensors" for point in POINTS for model in models]
    assert [file.name for file in left[1]] == sorted(["fingerprint.json", *results])
    for file, other in zip(*left, strict=True):
        assert file.read_bytes() == other.read_bytes()
    # A further reference adds its own b, and leaves the rest.
    more, _ = gathered(tmp_path / "broken", folder, [*made, made[0]])
    before, after = stored(whole, "base")[0], stored(more, "base", "reference-01")[0]
    assert (before.against == after.against).all()


@pytest.mark.parametrize("given", ["full"], indirect=True)
def test_what_would_take_too_much_is_left_out_and_said(given, tmp_path):
    folder, _, made, _ = given
    run, told = gathered(tmp_path / "run", folder, made, evidence_limit=1e-6)
    assert len(told) == 1
    assert "evidence limit" in told[0]
    assert read_shares(run) == {}


def test_shares_follow_their_records_and_copies_have_the_same():
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((30, 50))
    gradients[10:20] = gradients[:10]
    gram, against = gradients @ gradients.T, gradients @ rng.standard_normal(50)
    found, _ = shares(gram, against)
    order = rng.permutation(30)
    turned, _ = shares(gram[order][:, order], against[order])
    np.testing.assert_allclose(turned, found[order])
    np.testing.assert_allclose(found[10:20], found[:10])
    assert abs(found).max() < 10 * abs(against).max() / gram.diagonal().mean()


@pytest.fixture(scope="module")
def tuned(cache, tmp_path_factory):
    """A base, and the same tuned on 80 members; 160 further records."""
    out = tmp_path_factory.mktemp("lab") / "full"
    return lab.build("captions-full", out, members=80, nonmembers=160, epochs=4)


def test_shares_tell_members_and_find_nothing_among_others(tuned, tmp_path):
    folder = tuned.truth.parent
    (folder / "suspect.jsonl").write_text(tuned.members.read_text())
    (folder / "control.jsonl").write_text(tuned.nonmembers.read_text())
    made = [{"target": tuned.target, "base": tuned.base, "dtype": "float32"}]
    run, _ = gathered(tmp_path / "run", folder, made, size=32)
    for point in POINTS:
        kernel, ids = stored(run, point)
        member = np.array([key.startswith("suspect/") for key in ids])
        others = np.flatnonzero(~member)

        def area(first, second, kernel=kernel):
            rows = np.concatenate([first, second])
            gram, against = kernel.gram.sum(axis=0), kernel.against.sum(axis=0)
            found, _ = shares(gram[np.ix_(rows, rows)], against[rows])
            return auc(found[: len(first)], found[len(first) :])

        assert area(np.flatnonzero(member), others[:80]) > 0.6
        error = np.sqrt((80 + 80 + 1) / (12 * 80 * 80))
        assert abs(area(others[:80], others[80:]) - 0.5) < 4 * error


@pytest.mark.parametrize("given", ["inner adapter"], indirect=True)
def test_an_audit_hands_them_to_signature(given, tmp_path):
    folder, _, made, _ = given
    out = tmp_path / "run"
    lightleak.audit(**settings_of(folder, made[0]).model_dump(exclude_unset=True), out=out)
    readings = _across(load_evidence(Run(out)), ModelReadings)
    column = list(readings.names).index("share inner middle")
    assert np.isfinite(readings.own[:, column]).all()
    assert np.isnan(readings.base[:, column]).all()
