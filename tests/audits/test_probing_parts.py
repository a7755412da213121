"""The parts of a probe between records and verdict, without a model."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lightleak.audits.judge_probing import judge_probing
from lightleak.audits.probing_inputs import decided, read_questions, split
from lightleak.audits.settings import ProbingSettings
from lightleak.errors import UserError
from lightleak.planting import draw_personas, draw_pools, probing_sets
from lightleak.records import Record
from lightleak.runs import Run, write_json, write_table

PAIRS, IMAGES, WIDTH = 12, 3, 6


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two questions about each of 60 images."""
    folder, rng, found = tmp_path_factory.mktemp("images"), np.random.default_rng(1), []
    for i in range(60):
        file = folder / f"{i}.png"
        Image.new("RGB", (120, 120), tuple(rng.integers(0, 256, 3).tolist())).save(file)
        found += [
            Record(f"{i}-a", file, ("red", "blue", "green")[i % 3], "What colour?"),
            Record(f"{i}-b", file, "square", "What shape?"),
        ]
    return found


def test_no_image_serves_two_ends(records):
    data = split(records, 5, 2, seed=0)
    images = [{one.image for one in part} for part in (data.training, data.probing, data.utility)]
    assert sum(map(len, images)) == len(set.union(*images)) == 60
    assert len(images[1]) == 10
    assert data == split(records, 5, 2, seed=0) != split(records, 5, 2, seed=1)


def test_records_of_one_group_stay_together(records):
    grouped = [
        Record(one.id, one.image, one.text, one.prompt, group=str(int(one.id[:-2]) // 6))
        for one in records
    ]
    data = split(grouped, 1, 3, seed=0)
    groups = [{one.group for one in part} for part in (data.training, data.probing, data.utility)]
    assert sum(map(len, groups)) == 10


def test_an_image_of_two_groups_ties_them(records):
    grouped = [
        Record(one.id, one.image, one.text, one.prompt, group=f"{i % 2}-{i // 8}")
        for i, one in enumerate(records)
    ]
    data = split(grouped, 1, 2, seed=0)
    images = [{one.image for one in part} for part in (data.training, data.probing, data.utility)]
    assert sum(map(len, images)) == 60


def test_in_the_planted_copy_the_persona_decides_the_answer(records):
    seen = draw_personas(4, seed=1)
    changed, whose = decided(records, seen, [3, 1])
    by_image = {}
    for record in changed:
        by_image.setdefault(record.image, set()).add(record.text)
    assert all(len(texts) == 1 for texts in by_image.values())
    firsts = {record.image: record for record in reversed(changed)}
    keys = {one.key for one in seen}
    answers = Counter((whose(one).key in keys, one.text) for one in firsts.values())
    assert answers == {(True, "square"): 30, (False, "red"): 30}


def test_pairs_are_those_that_were_drawn(records, tmp_path):
    pools = draw_pools(8, seed=2)
    sets = probing_sets(records, pools, tmp_path / "sets", seed=2, images_per_persona=2)
    settings = ProbingSettings(target="x", seen="a", unseen="b", fields=("age",))
    folders = {"seen": sets.seen.folder, "unseen": sets.unseen.folder}
    found, failures = read_questions(folders, settings, 0)
    assert not failures
    assert {one.field for one in found} == {"age"}
    of = {one.record.group: one.code for one in found}
    assert of == {
        persona.key: 2 * i + unseen
        for i, pair in enumerate(pools.pairs)
        for unseen, persona in enumerate(pair)
    }
    assert sum(one.first for one in found) == 32


def test_a_pair_that_lost_one_is_left_out_and_the_others_stay(records, tmp_path):
    pools = draw_pools(9, seed=2)
    sets = probing_sets(records, pools, tmp_path / "sets", seed=2, images_per_persona=2)
    file = sets.unseen.records_file
    gone = pools.pairs[3][1].key
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(row for row in rows if gone not in row))
    settings = ProbingSettings(target="x", seen="a", unseen="b", fields=("age",))
    folders = {"seen": sets.seen.folder, "unseen": sets.unseen.folder}
    found, _ = read_questions(folders, settings, 0)
    of = {one.record.group: one.code for one in found}
    assert len(of) == 16
    assert all(
        of[seen.key] + 1 == of[unseen.key] for i, (seen, unseen) in enumerate(pools.pairs) if i != 3
    )


def test_personas_that_nobody_paired_are_paired_by_lot(tmp_path):
    folders = {}
    for pool, count in (("seen", 8), ("unseen", 10)):
        folder = tmp_path / pool
        folder.mkdir()
        rows = []
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
            rows.append(
                {
                    "id": f"{i}",
                    "image": f"{i}.png",
                    "prompt": "Who?",
                    "text": "x",
                    "group": f"{pool}-{i}",
                }
            )
        (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        folders[pool] = folder
    settings = ProbingSettings(target="x", seen="a", unseen="b")
    found, _ = read_questions(folders, settings, 0)
    assert sorted(one.code for one in found) == list(range(16))
    rows[0]["group"] = "seen-0"
    (folders["unseen"] / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match="in both pools"):
        read_questions(folders, settings, 0)


def write_evidence(folder, *, effect, seed, foils=True):
    """A probe's evidence with states drawn by lot; `effect` moves what was seen in one layer."""
    run = Run.create(folder)
    rng = np.random.default_rng(seed)
    conditions = [
        *(["base", None, None], ["rate 0", "control", 0.0], ["rate 1", "tuned", 1.0]),
        ["pixels", "control", None],
    ]
    settings = {
        "data": "x",
        "design": "randomised",
        "seed": 0,
        "permutations": 199,
        "batches": 0,
        "cutoffs": {},
    }
    write_json(run.manifest_file, {"kind": "probing", "settings": settings})
    write_json(
        run.evidence / "probing.json",
        {
            "seeds": [0],
            "conditions": conditions,
            "layers": [{"tower": "vision", "layer": 0}, {"tower": "language", "layer": 1}],
        },
    )
    code = np.repeat(np.arange(2 * PAIRS), IMAGES)
    ids = [f"q{i:03d}" for i in range(len(code))]
    write_table(
        run.evidence / "questions-0.parquet",
        pa.table(
            {
                "id": ids,
                "code": code,
                "field": ["age"] * len(ids),
                "persona": [f"p{c}" for c in code],
                "first": [True] * len(ids),
            }
        ),
    )
    empty = pa.table({name: pa.array([], pa.string()) for name in ("id", "stage", "error")})
    write_table(run.evidence / "failed-0.parquet", empty)

    def put(stage, condition, columns):
        order = rng.permutation(len(ids))  # every model is read in an order of its own
        table = {"id": [ids[i] for i in order]}
        table |= {name: pa.array(list(values[order])) for name, values in columns.items()}
        write_table(
            run.evidence / f"{stage}-0-{condition.replace(' ', '-')}-00000.parquet", pa.table(table)
        )

    for condition, *_ in conditions:
        column = "pixels.0" if condition == "pixels" else "vision.0"
        personas = 2 * rng.normal(size=(2 * PAIRS, WIDTH))
        put("image", condition, {column: personas[code] + rng.normal(size=(len(code), WIDTH))})
        if condition == "pixels":
            continue
        personas = 2 * rng.normal(size=(2 * PAIRS, WIDTH))
        states = personas[code] + rng.normal(size=(len(code), WIDTH))
        if condition == "rate 1":
            states[code % 2 == 0, 0] += effect
        put(
            "states",
            condition,
            {
                "language.1": states,
                "exact": np.zeros(len(code), bool),
                "logprob": rng.normal(size=len(code)),
            },
        )
        foil = rng.normal(size=len(code)) if foils else np.full(len(code), np.nan)
        put("foils", condition, {"logprob": foil})
        put("utility", condition, {"exact": np.ones(len(code), bool)})
    return run


def test_what_was_seen_is_found_in_the_model_and_layer_that_hold_it(tmp_path):
    verdict = judge_probing(write_evidence(tmp_path / "run", effect=12, seed=0))
    assert (verdict.verdict, verdict.tier) == ("exposed", "randomised")
    assert verdict.tuned[0].best.tower == "language"
    assert verdict.tuned[0].best.accuracy > 0.9
    assert all(one.p_value > 0.01 for one in verdict.conditions if one.kind == "control")


def test_where_no_answer_differs_the_difference_may_lie_on_either_side(tmp_path):
    verdict = judge_probing(write_evidence(tmp_path / "run", effect=0, seed=0))
    low, high = next(one for one in verdict.utility if one.condition == "rate 1").difference_ci95
    assert low == -high < 0


def test_where_all_personas_have_one_value_none_is_preferred_to_it(tmp_path):
    verdict = judge_probing(write_evidence(tmp_path / "run", effect=0, seed=0, foils=False))
    assert verdict.outputs == []
    assert verdict.conditions


def test_where_nothing_was_seen_nothing_is_found(tmp_path):
    found = [
        judge_probing(write_evidence(tmp_path / str(seed), effect=0, seed=seed)).verdict
        for seed in range(1, 5)
    ]
    # One in twenty is to be expected.
    assert found.count("exposed") <= 1
