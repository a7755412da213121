"""An identity audit against encoding alone: 1,000 names, 21 templates, 40 people, 10 photos each.

    python benchmarks/identity_speed.py

The floor encodes every photo and every sentence once, in the same batches, and does nothing else.
The naive way, as it is written first, encodes the photos again for each name. Times are of one
process with one thread, taken in turns; the figure is the median of the ratios.
Writes benchmarks/results/identity_speed.json.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lightleak import lab, records, targets
from lightleak.audits.identity import identify
from lightleak.evidence.affinity import matcher
from lightleak.runs import write_json
from lightleak.signals.identity import TEMPLATES
from lightleak.validity.decoys import draw_names

RESULTS = Path(__file__).parent / "results" / "identity_speed.json"
# The naive way is timed on a part and scaled up.
NAIVE_NAMES, NAIVE_PHOTOS = 1, 20


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = lab.build("faces", work / "lab", seed=0)
        everyone = work / "lab" / "people"
        people = records.load_people(everyone, names=everyone / "names.csv").people
        photos = [photo for person in people for photo in person.photos]
        names = draw_names(1000 - len(people), seed=1)
        listed = work / "names.txt"
        listed.write_text("\n".join(names), encoding="utf-8")
        everyone_named = [*names, *(person.name for person in people)]
        target = targets.load(made.target)
        for repeat in range(given.repeats):
            # A cache of its own, so that nothing is read from an earlier run.
            with tempfile.TemporaryDirectory() as cache, _cache(cache):
                audit = _seconds(
                    lambda repeat=repeat: identify(
                        target=made.target,
                        people=everyone,
                        decoys=str(listed),
                        out=work / f"run-{repeat}",
                    )
                )
            floor = _seconds(lambda: _encode(target, photos, everyone_named))
            part = everyone_named[:NAIVE_NAMES], photos[:NAIVE_PHOTOS]
            naive = _seconds(lambda part=part: _naive(target, *part))
            naive *= len(everyone_named) / NAIVE_NAMES * len(photos) / NAIVE_PHOTOS
            rows.append({"audit": audit, "encoding alone": floor, "naive": naive})
            print(rows[-1], flush=True)
    ratios = [row["audit"] / row["encoding alone"] for row in rows]
    write_json(
        RESULTS,
        {
            "machine": f"{platform.machine()}, {platform.system()}, one thread",
            "names": len(everyone_named),
            "templates": len(TEMPLATES),
            "people": len(people),
            "photos": len(photos),
            "seconds": rows,
            "audit / encoding alone, median": statistics.median(ratios),
            "naive / audit, median": statistics.median(r["naive"] / r["audit"] for r in rows),
        },
    )
    print("audit / encoding alone:", statistics.median(ratios))


def _seconds(work: object) -> float:
    started = time.process_time()
    work()  # type: ignore[operator]
    return time.process_time() - started


def _cache(folder: str) -> object:
    from unittest.mock import patch

    return patch.dict("os.environ", {"LIGHTLEAK_CACHE": folder})


@torch.no_grad()
def _encode(target: targets.Target, photos: list[records.Photo], names: list[str]) -> None:
    fits = matcher(target, photos, TEMPLATES)
    texts = [template.replace("{}", name) for name in names for template in TEMPLATES]
    for start in range(0, len(texts), 256 * len(TEMPLATES)):
        fits._embed(texts[start : start + 256 * len(TEMPLATES)])


@torch.no_grad()
def _naive(target: targets.Target, names: list[str], photos: list[records.Photo]) -> None:
    for name in names:
        for template in TEMPLATES:
            text = target.embed_texts(target.tokens([template.replace("{}", name)])[0])
            for photo in photos:
                image = target.embed_images(target.pixels(records.open_rgb(photo.file)))
                (image @ text.T).item()


if __name__ == "__main__":
    main()
