"""`gradaudit` and `loss` equal a naive implementation, through the whole audit."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import naive_gradaudit as naive
from lightleak import records, signals, targets
from lightleak.audits import set_tests, stored
from lightleak.audits.membership import audit
from lightleak.audits.settings import AuditSettings
from lightleak.evidence.readings import EXTRA, OtherLosses, ReferenceLosses
from lightleak.runs import Run

PROMPT = "What is there?"
MASKS = [
    ("fixed_tau", -2.0, 0.9),  # Keeps every slice.
    ("fixed_tau", 0.02, 0.9),
    ("tau_or_topq", 0.1, 0.9),
    ("tau_or_topq", 0.9, 0.9),
    ("tau_or_topq_union", 0.1, 0.9),
    ("adaptive_keep", 0.3, 0.9),
    ("quantile_topk", 0.1, 0.8),
]
SIDES = {"member": 10, "nonmember": 8, "suspect": 7, "control": 6}


@pytest.fixture
def sides(lab_lora, subset, tmp_path):
    """Four small records files of a lab target, all with a prompt of their own."""
    files, start = {}, 0
    for side, count in SIDES.items():
        source = lab_lora.members if side in {"member", "suspect"} else lab_lora.nonmembers
        file = subset(source, side, start, start + count)
        rows = [json.loads(line) | {"prompt": PROMPT} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[side] = file
        start += count
    return files


def naive_records(file):
    return [
        (Image.open(file.parent / row["image"]).convert("RGB"), row["prompt"], row["text"])
        for row in map(json.loads, file.read_text().splitlines())
    ]


def found_scores(run, name):
    rows = pq.read_table(Run(run).scores_file).to_pylist()
    return {
        side: [r["score"] for r in rows if r["signal"] == name and r["set"] == side]
        for side in SIDES
    }


def with_options(run, **options):
    """Scores from the same evidence with other options of gradaudit: probes, suspects first."""
    given = Run(run).manifest()["settings"]
    given["options"]["gradaudit"].update(options)
    settings = AuditSettings.read(**given)
    measured = stored.load(Run(run))
    scores = stored.score(settings, measured, "gradaudit")
    return scores[measured.audited]


@pytest.mark.parametrize(
    ("matrices", "adapter", "dtype"),
    [
        ("last3", False, "float64"),
        ("all", False, "float64"),
        ("lora", True, "float64"),
        ("lora_last3", True, "float64"),
        ("all", True, "float64"),
        ("last3", False, "float32"),
        ("lora", True, "float32"),
    ],
)
def test_split_equals_the_published_protocol(lab_lora, sides, tmp_path, matrices, adapter, dtype):
    adapter_folder = lab_lora.adapter if adapter else None
    run = tmp_path / "run"
    audit(
        target=lab_lora.target,
        adapter=adapter_folder,
        suspect=sides["suspect"],
        control=sides["control"],
        calibration_members=sides["member"],
        calibration_nonmembers=sides["nonmember"],
        out=run,
        protocol="split",
        signals=("loss", "gradaudit"),
        options={"gradaudit": {"matrices": matrices}},
        dtype=dtype,
    )
    # Cosines of slices that all but vanish are noise in float32, the same noise in both ways.
    model, processor = naive.load(lab_lora.target, adapter_folder, getattr(torch, dtype))
    names = naive.selected(model, matrices)
    gradients = {
        side: naive.gradients(model, processor, names, naive_records(file))
        for side, file in sides.items()
    }
    probes = gradients["suspect"] + gradients["control"]
    cosines = naive.published_cosines(gradients["member"], gradients["nonmember"], probes)
    for mask, tau, q in MASKS:
        expected = naive.published_scores(cosines, mask, tau, q)
        found = with_options(run, mask=mask, tau=tau, q=q)
        tolerance = {"rtol": 1e-6}
        if dtype == "float32":
            # Rounding may take a slice across the mask's threshold; without one, none can cross.
            tolerance = {"rtol": 0, "atol": 1e-5 if tau < -1 else 1e-3}
        np.testing.assert_allclose(found, expected, err_msg=mask, **tolerance)
    losses = [
        -naive.loss_of(model, *naive.inputs_and_labels(processor, model.dtype, *record)).item()
        for side in sides
        for record in naive_records(sides[side])
    ]
    found = found_scores(run, "loss")
    np.testing.assert_allclose(
        [s for side in SIDES for s in found[side]],
        losses,
        rtol=1e-9 if dtype == "float64" else 1e-5,
    )


def test_crossfit_equals_leaving_each_suspect_out(lab_lora, sides, tmp_path):
    run = tmp_path / "run"
    audit(
        target=lab_lora.target,
        suspect=sides["suspect"],
        control=sides["control"],
        out=run,
        signals=("gradaudit",),
        primary="gradaudit",
        options={"gradaudit": {"matrices": "last3"}},
        dtype="float64",
    )
    rows = [
        r for r in pq.read_table(Run(run).scores_file).to_pylist() if r["signal"] == "gradaudit"
    ]
    model, processor = naive.load(lab_lora.target)
    names = naive.selected(model, "last3")
    everyone = naive_records(sides["suspect"]) + naive_records(sides["control"])
    gradients = naive.gradients(model, processor, names, everyone)
    suspect = [row["set"] == "suspect" for row in rows]
    folds = [row["fold"] for row in rows]
    expected = naive.crossed_scores(gradients, suspect, folds, "tau_or_topq", 0.1, 0.9)
    np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=1e-6)


def test_slices_reduced_on_the_way_give_the_same_scores(lab_lora, sides, tmp_path):
    common = {
        "target": lab_lora.target,
        "suspect": sides["suspect"],
        "control": sides["control"],
        "signals": ("gradaudit",),
        "primary": "gradaudit",
    }
    audit(**common, out=tmp_path / "whole")
    audit(**common, out=tmp_path / "reduced", evidence_limit=0)
    kept = pq.read_table(tmp_path / "reduced" / "evidence" / "part-00000.parquet")
    assert kept["slice_dots"].combine_chunks().values.null_count == 0
    assert len(kept["slice_dots"].combine_chunks().values) == 0
    whole, reduced = (found_scores(tmp_path / n, "gradaudit") for n in ("whole", "reduced"))
    for side in ("suspect", "control"):
        np.testing.assert_allclose(reduced[side], whole[side], atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_batch_of_one_equals_batch_of_sixteen_in_any_order(lab_lora, sides, tmp_path, adapter):
    scores = {}
    for name, size, turn in (("one", 1, False), ("sixteen", 16, False), ("turned", 16, True)):
        files = {}
        for side in ("suspect", "control"):
            lines = sides[side].read_text().splitlines(keepends=True)
            file = sides[side].with_name(f"{name}-{side}.jsonl")
            file.write_text("".join(lines[::-1] if turn else lines))
            files[side] = file
        run = tmp_path / name
        audit(
            target=lab_lora.target,
            adapter=lab_lora.adapter if adapter else None,
            **files,
            out=run,
            batch_size=size,
            # Folds follow the order of the records; a fixed calibration takes them out of it.
            protocol="split",
            calibration_members=sides["member"],
            calibration_nonmembers=sides["nonmember"],
        )
        rows = pq.read_table(Run(run).scores_file).to_pylist()
        scores[name] = {(r["signal"], r["set"], r["id"]): r["score"] for r in rows}
    # The base of an adapter is there to compare with.
    apart = {*EXTRA, ReferenceLosses, *([] if adapter else [OtherLosses])}
    usual = {name for name in signals.names("generative") if signals.get(name).needs not in apart}
    assert {key[0] for key in scores["one"]} == usual
    for other in ("sixteen", "turned"):
        assert scores[other].keys() == scores["one"].keys()
        for key, value in scores["one"].items():
            if value is None:  # These are not fitted on so few.
                assert key[0] in {"quantile", "signature"}
                assert scores[other][key] is None
            else:
                assert scores[other][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_the_api_and_the_command_line_give_the_same_numbers(lab_lora, sides, tmp_path):
    from typer.testing import CliRunner

    from lightleak.cli.main import app

    audit(
        target=lab_lora.target,
        suspect=sides["suspect"],
        control=sides["control"],
        out=tmp_path / "api",
        options=["mink.k=0.4"],
    )
    arguments = ["audit", "--target", str(lab_lora.target), "--set", "mink.k=0.4"]
    arguments += ["--suspect", str(sides["suspect"]), "--control", str(sides["control"])]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cli")])
    assert result.exit_code == 0, result.output
    one, other = (pq.read_table(tmp_path / n / "scores.parquet") for n in ("api", "cli"))
    assert one.equals(other)


def test_evidence_names_matrices_that_no_gradient_reaches(lab_lora, sides, tmp_path):
    run = tmp_path / "run"
    audit(target=lab_lora.target, suspect=sides["suspect"], control=sides["control"], out=run)
    described = json.loads((run / "evidence" / "gradients.json").read_text())
    # This LLaVA takes its image features one block before the last.
    assert all("encoder.layers.2." in name for name in described["without_gradient"])
    assert len(described["without_gradient"]) == 6
    assert not set(described["without_gradient"]) & set(described["matrices"])


def test_a_target_is_left_as_it_was(lab_lora, sides):
    from lightleak.evidence import collect
    from lightleak.evidence.gradients import GradientEngine, select
    from lightleak.evidence.tokens import AnswerReader

    target = targets.load(lab_lora.target)
    before = {n: p.clone() for n, p in target.model.named_parameters()}
    engine = GradientEngine(target, select(target, "all"))
    collect.measure(target, engine, AnswerReader(), records.load(sides["suspect"]).records)
    for name, parameter in target.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert all("forward" not in vars(module) for module in target.model.modules())


def test_settings_of_a_run_are_read_back(tmp_path):
    given = {"target": "t", "suspect": "s", "control": "c", "options": {"mink": {"k": 0.1}}}
    settings = AuditSettings.read(**given)
    assert AuditSettings.read(**json.loads(settings.model_dump_json())) == settings
    assert set_tests.crosses_folds(settings, "gradaudit")
    assert not set_tests.crosses_folds(settings, "loss")
