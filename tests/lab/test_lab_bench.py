"""The leaderboard: held to the truth, the audit's own numbers, and nothing done twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lightleak.cli.main import app
from lightleak.errors import UserError
from lightleak.lab import bench
from lightleak.runs import Run

_SMALL: dict[str, Any] = {"members": 24, "nonmembers": 48, "epochs": 12}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLEAK_CACHE", str(tmp_path / "cache"))


def test_a_row_says_what_the_audit_says_and_what_it_costs(tmp_path: Path) -> None:
    rows = bench(tmp_path, recipes=["captions-tiny"], seeds=[3], signals=["loss"], **_SMALL)
    (row,) = rows
    assert (row.recipe, row.seed, row.signal) == ("captions-tiny", 3, "loss")
    run = Run(tmp_path / "captions-tiny-3" / "TokenStatistics")
    found = json.loads(run.verdict_file.read_text())["signals"]["loss"]
    assert row.auc == pytest.approx(found["auc"])
    assert (row.auc_low, row.auc_high) == pytest.approx(tuple(found["auc_ci95"]))
    assert row.auc > 0.7
    assert row.set_size is not None
    assert 4 < row.set_size < 100
    assert row.tpr_at_1_percent is None  # 48 non-members cannot show 1 %.
    assert row.tpr_at_5_percent is not None
    assert row.seconds_per_record is not None
    assert 0 < row.seconds_per_record < 5


def test_finished_runs_are_taken_up_and_later_signals_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> dict[str, int]:
        return {
            str(file.relative_to(tmp_path)): file.stat().st_mtime_ns
            for file in tmp_path.glob("*/*/verdict.json")
        }

    both = {"recipes": ["captions-tiny"], "seeds": [0], **_SMALL}
    first = bench(tmp_path, signals=["loss"], **both)
    before = made()
    more = bench(tmp_path, signals=["loss", "mink", "grad_norm"], **both)
    after = made()
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"captions-tiny-0/GradientNorms/verdict.json"}
    assert first[0] in more
    assert {row.signal for row in more} == {"loss", "mink", "grad_norm"}
    with (tmp_path / "bench.csv").open(encoding="utf-8", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["signal"] for row in table] == [row.signal for row in more]
    stored = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["auc"] for row in stored] == [row.auc for row in more]


def test_each_recipe_is_measured_by_the_signals_of_its_kind(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            *("lab", "bench", "--out", str(tmp_path / "out"), "--seeds", "1"),
            *("--recipes", "captions-tiny,pairs-clip", "--signals", "loss,cosine"),
            *("--members", "20", "--nonmembers", "40", "--epochs", "4"),
        ],
    )
    assert done.exit_code == 0, done.output
    with (tmp_path / "out" / "bench.csv").open(encoding="utf-8", newline="") as stream:
        found = [(row["recipe"], row["signal"]) for row in csv.DictReader(stream)]
    assert found == [("captions-tiny", "loss"), ("pairs-clip", "cosine")]
    assert any(line.split()[:2] == ["pairs-clip", "cosine"] for line in done.output.splitlines())


def test_tuned_targets_are_audited_again_with_references_of_their_own_recipe(
    tmp_path: Path,
) -> None:
    rows = bench(
        tmp_path,
        recipes=["captions-lora"],
        seeds=[0],
        signals=["loss", "lira", "ratio"],
        references=4,
        **(_SMALL | {"epochs": 1}),
    )
    found = [(row.signal, row.references) for row in rows]
    assert sorted(found) == [("lira", 4), ("loss", 0), ("ratio", 0), ("ratio", 4)]
    assert all(row.auc is not None for row in rows)
    told = json.loads((tmp_path / "captions-lora-0" / "references" / "references.json").read_text())
    assert len(told["references"]) == 4
    assert told["recipe"]["epochs"] == 1
    assert told["recipe"]["learning_rate"] == 4e-3
    assert told["recipe"]["adapter"]["r"] == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": ["lira"], "recipes": ["captions-lora"]}, "lira: no target here"),
        ({"signals": ["ratio"], "recipes": ["captions-tiny"]}, "ratio: no target here"),
        ({"recipes": ["faces"]}, "people; see lightleak identify"),
        ({"recipes": ["captions"]}, "unknown recipe"),
        ({"signals": ["los"]}, "no such signal.*loss"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_built(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        bench(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
