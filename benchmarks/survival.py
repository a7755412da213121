"""Runs that are killed, again and again, and end as if nothing had happened.

    python benchmarks/survival.py            # twenty kills; about a quarter of an hour on two cores

An audit with gradients is started, and at random moments of its expensive half one process is ended
by SIGKILL: the driver, a worker process, a Ray actor, the driver of a Ray run. The same command is
then given again. Told of every run: whether its evidence and scores equal, bit by bit, those of an
unbroken run in one process; records missing or doubled; and finished parts that were made again. A
run gives up on a job whose process was killed three times; then, too, the command is given again.
Each victim replaces its own row of benchmarks/results/survival.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from lightleak import lab
from lightleak.runs import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "survival.json"
LOCAL = ("--workers", "2")
RAY = ("--workers", "2", "--executor", "ray")
VICTIMS = {
    "driver": (LOCAL, None),
    "worker process": (LOCAL, "spawn_main"),
    "driver, with Ray": (RAY, None),
    "Ray actor": (RAY, "ray::_Actor"),
}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5, help="of each victim")
    parser.add_argument("--records", type=int, default=320, help="on each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    given = parser.parse_args()
    before = read_json(RESULTS)["rows"] if RESULTS.is_file() else []
    rows = {row["victim"]: row for row in before}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        n = given.records
        made = lab.build("captions-lora", work / "lab", members=n, nonmembers=n, epochs=1)
        options = [
            *("--target", made.base, "--adapter", work / "lab" / "adapter"),
            *("--suspect", made.members, "--control", made.nonmembers),
        ]
        finish(options, work / "unbroken", ())
        for victim in given.victims:
            chance = random.Random(f"{given.seed} {victim}")
            row = survive(options, work / victim, victim, given.kills, chance)
            records = {"records": 2 * n}
            rows[victim] = row | records | compare(work / "unbroken", work / victim)
            print(rows[victim], flush=True)
    machine = {"processor": platform.machine(), "cores": os.cpu_count()}
    write_json(RESULTS, {"machine": machine, "rows": list(rows.values())})


def survive(
    options: list[Any], out: Path, victim: str, kills: int, chance: random.Random
) -> dict[str, Any]:
    """Kill the victim so many times while a run is being made, and finish the run.

    Returns:
        The victim, the kills, and how many finished parts were made again.
    """
    how, whom = VICTIMS[victim]
    driver = start(options, out, how)
    seen: dict[Path, tuple[int, int]] = {}
    remade = 0
    killed = given_up = 0
    while killed < kills:
        if driver.poll() is not None:
            if driver.returncode == 0:
                raise RuntimeError(f"the run ended before it could be killed: {out}")
            given_up += 1  # One job's process was killed three times: it says so, and goes on anew.
            driver = start(options, out, how)
        wait_for_more(out, driver, chance.randint(1, 4))
        time.sleep(chance.random())
        before = finished(out)
        remade += sum(before[file] != mark for file, mark in seen.items() if file in before)
        seen |= before
        if whom is None:
            os.killpg(driver.pid, signal.SIGSTOP)  # No file may appear between look and kill.
            seen |= finished(out)
            driver.kill()
            os.killpg(driver.pid, signal.SIGCONT)
            driver.wait()
            driver = start(options, out, how)
        elif found := processes(driver, whom):
            chance.choice(found).kill()
        else:
            continue
        killed += 1
    if driver.wait() != 0:
        given_up += 1
        finish(options, out, how)
    after = finished(out)
    remade += sum(after.get(file) != mark for file, mark in seen.items())
    row = {"victim": victim, "kills": kills, "given_up_and_begun_anew": given_up}
    return row | {"finished_parts_made_again": remade}


def compare(unbroken: Path, broken: Path) -> dict[str, Any]:
    """Whether two runs hold the same evidence and scores, and every record once."""
    tables = sorted(
        file.relative_to(unbroken)
        for pattern in ("scores.parquet", "evidence/**/part-*.parquet")
        for file in unbroken.glob(pattern)
    )
    equal = [pq.read_table(unbroken / t).equals(pq.read_table(broken / t)) for t in tables]
    expected = Counter(pq.read_table(unbroken / "evidence" / "records.parquet")["id"].to_pylist())
    found = Counter(
        key
        for file in (broken / "evidence").glob("part-*.parquet")
        for key in pq.read_table(file)["id"].to_pylist()
    )
    return {
        "tables": len(tables),
        "tables_equal": sum(equal),
        "records_missing": (expected - found).total(),
        "records_doubled": (found - expected).total(),
    }


def start(options: list[Any], out: Path, how: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Begin an audit, or go on with it, in a process group of its own."""
    command = (sys.executable, "-m", "lightleak.cli.main", "audit", "--no-negative-controls")
    return subprocess.Popen(
        [*command, *map(str, options), "--out", str(out), *how],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def finish(options: list[Any], out: Path, how: tuple[str, ...]) -> None:
    """Let an audit run to its end."""
    if start(options, out, how).wait() != 0:
        raise RuntimeError(f"the run did not end well: {out}")


def finished(out: Path) -> dict[Path, tuple[int, int]]:
    """Parts that are whole, by what tells whether they were written again."""
    found = {}
    for file in (out / "evidence").glob("*-*.parquet"):
        stat = file.stat()
        found[file] = (stat.st_ino, stat.st_mtime_ns)
    return found


def processes(driver: subprocess.Popen[bytes], called: str) -> list[psutil.Process]:
    """The processes below the driver whose command holds a word; none once it has ended."""
    while driver.poll() is None:
        found = []
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                if called in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        if found:
            return found
        time.sleep(0.05)
    return []


def wait_for_more(out: Path, driver: subprocess.Popen[bytes], count: int) -> None:
    """Wait until so many more files of evidence have been written, block sums included, or the
    driver has ended."""
    folder = out / "evidence"

    def written() -> int:
        newest = [f.stat().st_mtime_ns for f in folder.glob("reference-block-*")]
        return len(list(folder.glob("*-*.parquet"))) * 10 + len(set(newest))

    before = written() if folder.is_dir() else 0
    changes = 0
    while changes < count and driver.poll() is None:
        time.sleep(0.02)
        now = written() if folder.is_dir() else 0
        if now != before:
            before, changes = now, changes + 1


if __name__ == "__main__":
    main()
