"""How often whole audits say `exposed`: of records never trained on, and of records trained on.

    python benchmarks/null_and_planted.py

One lab target (`captions-tiny`). Null: suspects and controls are two random draws of records that
the model never saw, so every `exposed` is false. Planted: suspects are random members. Each audit
is complete, from records files to verdict; results go to benchmarks/results/null_and_planted.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from lightleak import lab
from lightleak.audits.membership import audit
from lightleak.runs import write_json
from lightleak.statistics import clopper_pearson

RESULTS = Path(__file__).parent / "results" / "null_and_planted.json"


def audits(name: str, made: lab.LabTarget, work: Path, count: int, size: int) -> dict[str, object]:
    """Verdicts of `count` audits of `size` suspects and as many controls."""
    members, others = (
        file.read_text(encoding="utf-8").splitlines(keepends=True)
        for file in (made.members, made.nonmembers)
    )
    verdicts, p_values = [], []
    for i in range(count):
        rng = np.random.default_rng([i, name == "planted"])
        drawn = rng.permutation(len(others))
        suspects = others
        chosen = drawn[size : 2 * size]
        if name == "planted":
            suspects, chosen = members, rng.permutation(len(members))[:size]
        files = {}
        for side, rows, indices in (
            ("suspect", suspects, chosen),
            ("control", others, drawn[:size]),
        ):
            # Images are named relative to the file, so the file lies beside them.
            files[side] = made.truth.with_name(f"{name}-{side}.jsonl")
            files[side].write_text("".join(rows[j] for j in indices), encoding="utf-8")
        verdict = audit(
            target=made.target, **files, out=work / f"{name}-{i}", signals=("loss",), seed=i
        )
        verdicts.append(verdict.verdict)
        p_values.append(verdict.primary.p_value_adjusted)
        print(name, i, verdict.verdict, p_values[-1], flush=True)
    exposed = verdicts.count("exposed")
    share = clopper_pearson(exposed, count)
    return {
        "audits": count,
        "records a side": size,
        "verdicts": dict(Counter(verdicts)),
        "exposed": exposed,
        "exposed share, 95 % interval": [share.low, share.high],
        "adjusted p-values": p_values,
    }


def main() -> None:
    """Run both and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--null", type=int, default=100)
    parser.add_argument("--planted", type=int, default=20)
    parser.add_argument("--size", type=int, default=240)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = lab.build("captions-tiny", work / "lab")
        results = {
            "machine": f"{platform.machine()}, {platform.system()}, one thread",
            "recipe": json.loads(made.truth.read_text(encoding="utf-8"))["settings"],
            "null": audits("null", made, work, given.null, given.size),
            "planted": audits("planted", made, work, given.planted, given.size),
        }
    results["seconds"] = round(time.monotonic() - started)
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
