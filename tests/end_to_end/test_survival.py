"""An audit loses processes and files, and ends as an unbroken one or says why not.

benchmarks/survival.py kills twenty times, at random moments.
"""

import random
import shutil

import pyarrow.parquet as pq
import pytest
import survival

from lightleak.audits import models
from lightleak.audits.judge import judge
from lightleak.audits.membership import audit
from lightleak.errors import UserError
from lightleak.runs import Run, Silent, read_json
from lightleak.runs.folder import alone


def test_a_run_that_is_killed_three_times_ends_as_an_unbroken_one(lab_tiny, tmp_path):
    options = [
        *("--target", lab_tiny.target, "--signals", "loss,gradaudit", "--batch-size", 8),
        *("--suspect", lab_tiny.members, "--control", lab_tiny.nonmembers),
    ]
    chance = random.Random(0)
    out = tmp_path / "broken"
    driver = survival.start(options, out, survival.RAY)
    survival.wait_for_more(out, driver, 1)
    chance.choice(survival.processes(driver, "ray::_Actor")).kill()
    survival.wait_for_more(out, driver, 1)
    driver.kill()
    driver.wait()
    seen = survival.finished(out)
    driver = survival.start(options, out, survival.LOCAL)
    survival.wait_for_more(out, driver, 1)
    chance.choice(survival.processes(driver, "spawn_main")).kill()
    assert driver.wait() == 0
    assert seen.items() <= survival.finished(out).items()
    unbroken = tmp_path / "unbroken"
    audit(
        target=lab_tiny.target,
        suspect=lab_tiny.members,
        control=lab_tiny.nonmembers,
        out=unbroken,
        signals=("loss", "gradaudit"),
        batch_size=8,
        negative_controls=False,
    )
    found = survival.compare(unbroken, out)
    assert found["tables"] == found["tables_equal"] == 9
    assert found["records_missing"] == found["records_doubled"] == 0
    assert read_json(out / "verdict.json") == read_json(unbroken / "verdict.json")


@pytest.fixture(scope="module")
def reduced(lab_lora, tmp_path_factory):
    """An audit whose slices are not kept, and what it was asked."""
    asked = {
        "target": lab_lora.target,
        "adapter": lab_lora.adapter,
        "suspect": lab_lora.members,
        "control": lab_lora.nonmembers,
        "signals": ("loss", "gradaudit"),
        "evidence_limit": 0,
        "negative_controls": False,
    }
    run = tmp_path_factory.mktemp("reduced") / "run"
    audit(**asked, out=run)
    return run, asked


def turn_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: shutil.copy(e / "part-00001.parquet", e / "part-00002.parquet"),
        lambda e: (e / "cosines-00001.parquet").unlink(),
        lambda e: turn_a_bit(e / "failed-00000.parquet"),
        lambda e: [turn_a_bit(e / "reference.safetensors"), (e / "part-00000.parquet").unlink()],
        lambda e: [
            (e / "scored-gradaudit-01-00000.parquet").unlink(),
            (e / "scored.json").unlink(),
        ],
    ],
    ids=["another part's", "sums lost", "one bit turned", "another reference", "killed scoring"],
)
def test_what_is_lost_or_damaged_is_made_again_as_it_was(reduced, tmp_path, damage):
    whole, asked = reduced
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run / "evidence")
    audit(**asked, out=run)
    scores = [pq.read_table(each / "scores.parquet") for each in (whole, run)]
    assert scores[0].equals(scores[1])


def test_a_file_of_scores_that_is_lost_is_told_before_anything_is_judged(reduced, tmp_path):
    shutil.copytree(reduced[0], tmp_path / "run")
    (tmp_path / "run" / "evidence" / "scored-gradaudit-01-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"not every record is scored.*Run the same audit again"):
        judge(Run(tmp_path / "run"))


def test_slices_that_were_reduced_for_one_mask_serve_no_other(reduced, tmp_path):
    whole, asked = reduced
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "verdict.json").unlink()
    with pytest.raises(UserError, match="reduced for another mask"):
        audit(**asked, out=tmp_path / "run", options={"gradaudit": {"q": 0.5}})


def test_a_model_is_not_held_past_an_audit_that_was_broken_off(reduced, tmp_path):
    class Broken(Silent):
        def stage(self, name, total):
            if name == "Measuring":
                raise KeyboardInterrupt
            return super().stage(name, total)

    with pytest.raises(KeyboardInterrupt):
        audit(**reduced[1], out=tmp_path / "run", progress=Broken())
    assert models._held is None


def test_two_audits_do_not_work_in_one_folder(reduced):
    run, asked = reduced
    with alone(run), pytest.raises(UserError, match="another process is at work in it"):
        audit(**asked, out=run)
