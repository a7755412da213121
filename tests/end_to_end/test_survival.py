"""An audit loses a Ray actor, its driver and a worker process, and ends as an unbroken one.

benchmarks/survival.py does it twenty times, at random moments.
"""

import random

import psutil
import survival

from lightleak.audits.membership import audit
from lightleak.runs import read_json


def test_a_run_that_is_killed_three_times_ends_as_an_unbroken_one(lab_tiny, tmp_path):
    options = [
        *("--target", lab_tiny.target, "--signals", "loss,gradaudit", "--batch-size", 8),
        *("--suspect", lab_tiny.members, "--control", lab_tiny.nonmembers),
    ]
    chance = random.Random(0)
    out = tmp_path / "broken"
    driver = survival.start(options, out, survival.RAY)
    survival.wait_for_more(out, driver, 1)
    chance.choice(survival.processes(driver.pid, "ray::_Actor")).kill()
    survival.wait_for_more(out, driver, 1)
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    psutil.wait_procs(below, timeout=30)
    seen = survival.finished(out)
    driver = survival.start(options, out, survival.LOCAL)
    survival.wait_for_more(out, driver, 1)
    chance.choice(survival.processes(driver.pid, "spawn_main")).kill()
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
