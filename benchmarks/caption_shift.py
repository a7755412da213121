"""Records that nobody trained on, captioned by two hands: what peers say of them, and the verdict.

    python benchmarks/caption_shift.py

The published COCO benchmark of this field pairs human captions of members with machine captions of
non-members. Here the lab's target (`captions-tiny`) was trained on scenes captioned in one style.
Suspects and controls are other scenes, none of which any model has seen; the suspects' captions are
of that style, the controls' of another. Whatever a score tells apart here, it is not training. The
same suspects are then audited against controls of their own style, and so are true members.

Writes benchmarks/results/caption_shift.json and docs/images/caption-shift.png.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightleak import lab
from lightleak.audits.membership import audit
from lightleak.lab import corpora
from lightleak.lab.models import IMAGE_SIDE
from lightleak.runs import write_json
from lightleak.validity import Verdict

RESULTS = Path(__file__).parent / "results" / "caption_shift.json"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "caption-shift.png"
SIDE = 300
TITLES = {
    "shifted": "Never trained on;\ncontrols captioned in another style",
    "alike": "Never trained on;\ncontrols captioned in the same style",
    "members": "Trained on;\ncontrols captioned in the same style",
}
COLOURS = {"exposed": "#98291c", "no_evidence": "#1f5a7a", "inconclusive": "#7a5600"}


def scenes(folder: Path, name: str, drawn: Sequence[corpora.Scene], style: corpora.Style) -> Path:
    """A records file of scenes that no model has seen."""
    rows = []
    for number, scene in enumerate(drawn):
        image = folder / f"{name}-{number}.png"
        image.write_bytes(scene.png(IMAGE_SIDE))
        rows.append({"id": f"{name}-{number}", "image": image.name, "text": scene.caption(style)})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def figure(verdicts: dict[str, Verdict]) -> None:
    """AUC of every signal and of the blind classifier, and the verdict, for each comparison."""
    sheet = Figure(figsize=(10.5, 4.3), layout="constrained")
    panels = sheet.subplots(1, len(verdicts), sharey=True)
    for axes, (name, verdict) in zip(panels, verdicts.items(), strict=True):
        rows: list[tuple[str, float, Any, bool]] = [
            (signal, each.auc, each.auc_ci95, False)
            for signal, each in sorted(verdict.signals.items(), key=lambda item: item[0] != "loss")
            if each.auc is not None
        ]
        blind = verdict.validity.blind_auc
        assert blind is not None
        rows.append(("no model at all", blind, verdict.validity.blind_auc_ci95, True))
        for place, (_, auc, (low, high), is_blind) in enumerate(reversed(rows)):
            colour = "#1c2430" if is_blind else "#0b5c94"
            axes.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
            axes.plot([auc], [place], "s" if is_blind else "o", color=colour, ms=6, clip_on=False)
        axes.axvline(0.5, color="#6b7280", lw=1, ls=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        axes.set_xlim(0.2, 1)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_title(TITLES[name], fontsize=10, loc="left")
        axes.set_xlabel("AUC, 95 % interval")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.text(
            0.0,
            -0.24,
            f"lightleak: {verdict.verdict.replace('_', ' ')}",
            transform=axes.transAxes,
            color=COLOURS[verdict.verdict],
            fontsize=13,
            fontweight="bold",
            va="top",
        )
    sheet.savefig(FIGURE, dpi=140)


def main() -> None:
    """Run the three audits, write what they said, and draw it."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        made = lab.build("captions-tiny", work / "lab", members=900, nonmembers=2)
        drawn = corpora.scenes(3 * SIDE, seed=2**23)
        files = {
            "suspects": scenes(work, "suspects", drawn[:SIDE], "sentence"),
            "other style": scenes(work, "other", drawn[SIDE : 2 * SIDE], "list"),
            "same style": scenes(work, "same", drawn[2 * SIDE :], "sentence"),
            "members": made.members.with_name("some.jsonl"),
        }
        members = made.members.read_text(encoding="utf-8").splitlines(keepends=True)
        files["members"].write_text("".join(members[:SIDE]), encoding="utf-8")
        verdicts = {
            key: audit(
                target=made.target,
                suspect=files[suspect],
                control=files[control],
                out=work / key,
            )
            for key, suspect, control in (
                ("shifted", "suspects", "other style"),
                ("alike", "suspects", "same style"),
                ("members", "members", "same style"),
            )
        }
    figure(verdicts)
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(
        RESULTS,
        {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, "
            f"Python {platform.python_version()}, one thread",
            "records a side": SIDE,
            "audits": {
                key: {
                    "verdict": each.verdict,
                    "reasons": each.reasons,
                    "blind AUC": each.validity.blind_auc,
                    "Mann–Whitney, unchecked": each.primary.tests["Mann–Whitney"],
                    "signals": {
                        signal: {"auc": found.auc, "ci95": found.auc_ci95}
                        for signal, found in each.signals.items()
                    },
                }
                for key, each in verdicts.items()
            },
        },
    )


if __name__ == "__main__":
    main()
