"""The program as a user runs it: verdicts of known truth, and one line for each mistake."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from lightleak import statistics as st
from lightleak.cli import main
from lightleak.runs import Run
from lightleak.validity import Verdict


@pytest.fixture
def lightleak(monkeypatch, capfd):
    """Run the program; returns its exit code, what it printed, and its errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightleak", *map(str, arguments)])
        try:
            main.run()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def one_line(lightleak):
    """Run the program wrongly; returns its single line, after checking that it is one."""

    def run(*arguments):
        code, _, errors = lightleak(*arguments)
        lines = [line for line in errors.splitlines() if ": done in" not in line]
        assert code == 2, errors
        assert len(lines) == 1, errors
        assert lines[0].startswith("lightleak: ")
        assert "Traceback" not in errors
        return lines[0]

    return run


@pytest.fixture
def arguments(lab_tiny, subset, tmp_path):
    """A small audit that works: 24 suspects, 24 controls, loss alone."""
    suspect = subset(lab_tiny.members, "suspect", 0, 24)
    control = subset(lab_tiny.nonmembers, "control", 0, 24)
    return {
        "--target": lab_tiny.target,
        "--suspect": suspect,
        "--control": control,
        "--out": tmp_path / "run",
        "--signals": "loss",
    }


def flat(arguments):
    return [part for pair in arguments.items() for part in pair]


def change(file, **changes):
    """Change fields of a records file's first row; a field set to None is removed."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] = {key: value for key, value in (rows[0] | changes).items() if value is not None}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class TestVerdicts:
    def test_trained_on_is_exposed_and_the_run_folder_is_whole(
        self, lab_tiny, subset, lightleak, tmp_path
    ):
        control = subset(lab_tiny.nonmembers, "control", 0, 80)
        run = tmp_path / "run"
        code, output, _ = lightleak(
            "audit", "--target", lab_tiny.target, "--suspect", lab_tiny.members,
            "--control", control, "--out", run, "--design", "randomised",
        )  # fmt: skip
        assert code == 0
        verdict = Verdict.read(run / "verdict.json")
        assert verdict.verdict == "exposed"
        assert verdict.tier == "randomised"
        assert "EXPOSED" in output
        assert str(run / "report.html") in output
        rows = pq.read_table(run / "scores.parquet").to_pylist()
        assert len(rows) == 160 * len(verdict.signals)
        assert all(row["score"] is not None for row in rows)
        manifest = Run(run).manifest()
        assert manifest["pre_registered_primary_signal"] == "loss"
        assert manifest["finished"] >= manifest["started"]
        assert {"weights", "processor", "suspect records", "control records"} <= set(
            manifest["hashes"]
        )

    def test_never_trained_on_is_not_exposed(self, lab_tiny, subset, lightleak, tmp_path):
        suspect = subset(lab_tiny.nonmembers, "suspect", 80, 160)
        control = subset(lab_tiny.nonmembers, "control", 0, 80)
        code, _, _ = lightleak(
            "audit", "--target", lab_tiny.target, "--suspect", suspect,
            "--control", control, "--out", tmp_path / "run",
        )  # fmt: skip
        assert code == 0
        # 80 records a side lack the power for "no evidence", and the verdict knows it.
        assert Verdict.read(tmp_path / "run" / "verdict.json").verdict == "inconclusive"

    def test_random_labels_on_non_members_are_exposed_at_most_five_times_in_a_hundred(
        self, lab_tiny, arguments, lightleak, subset, tmp_path
    ):
        arguments["--suspect"] = subset(lab_tiny.nonmembers, "others", 80, 160)
        arguments["--control"] = subset(lab_tiny.nonmembers, "control", 0, 80)
        lightleak("audit", *flat(arguments))
        run = Run(tmp_path / "run")
        scores = {
            f"{row['set']}/{row['id']}": row["score"]
            for row in pq.read_table(run.scores_file).to_pylist()
        }
        blind = pq.read_table(run.evidence / "blind.parquet").to_pydict()
        values = np.array([scores[key] for key in blind["id"]])
        features = np.array(blind["features"])
        exposed = {"permutation": 0, "residual": 0}
        for seed in range(100):
            suspect = np.random.default_rng(seed).permutation(len(values)) < len(values) // 2
            exposed["permutation"] += (
                st.permutation_test(values, suspect, seed=seed, permutations=999) <= 0.01
            )
            exposed["residual"] += (
                st.residual_test(values, suspect, features, seed=seed, folds=2).p_value <= 0.01
            )
        assert max(exposed.values()) <= 5, exposed

    def test_a_planted_shift_is_refused_and_named(self, lab_tiny, arguments, lightleak, tmp_path):
        lines = arguments["--control"].read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["text"] = f"This picture, taken quite recently, shows us {row['text'].upper()}"
        arguments["--control"].write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, output, _ = lightleak("audit", *flat(arguments))
        verdict = Verdict.read(tmp_path / "run" / "verdict.json")
        assert code == 0
        assert (verdict.verdict, verdict.tier) == ("inconclusive", "none")
        assert verdict.primary.auc > 0.9
        assert "told apart without the model" in verdict.reasons[0]
        assert "INCONCLUSIVE" in output

    def test_report_judges_again_without_the_model(
        self, arguments, lightleak, tmp_path, monkeypatch
    ):
        lightleak("audit", *flat(arguments))
        run = tmp_path / "run"
        before = json.loads((run / "verdict.json").read_text())
        for name in ("verdict.json", "scores.parquet", "report.html"):
            (run / name).unlink()
        monkeypatch.setattr("lightleak.targets.loading._load_model", None)
        code, _, _ = lightleak("report", run)
        assert code == 0
        assert json.loads((run / "verdict.json").read_text()) == before
        assert (run / "report.html").is_file()

    def test_options_come_from_a_file_and_the_command_line_wins(
        self, arguments, lightleak, tmp_path
    ):
        config = tmp_path / "audit.toml"
        config.write_text(
            'signals = ["loss", "mink"]\nset = ["mink.k=0.5"]\nalpha = 0.05\nseed = 3\n'
        )
        del arguments["--signals"]
        code, _, _ = lightleak("audit", *flat(arguments), "--config", config, "--seed", "4")
        settings = Run(tmp_path / "run").manifest()["settings"]
        assert code == 0
        assert settings["signals"] == ["loss", "mink"]
        assert settings["options"] == {"mink": {"k": 0.5}}
        assert settings["cutoffs"]["alpha"] == 0.05
        assert settings["seed"] == 4


class TestResuming:
    def test_other_records_in_the_same_folder_are_refused(self, arguments, lightleak, one_line):
        lightleak("audit", *flat(arguments))
        before = (arguments["--out"] / "manifest.json").read_bytes()
        change(arguments["--suspect"], text="something else")
        assert "another suspect records" in one_line("audit", *flat(arguments))
        assert (arguments["--out"] / "manifest.json").read_bytes() == before

    def test_a_decision_cannot_be_changed_after_the_result_was_seen(
        self, arguments, lightleak, one_line
    ):
        lightleak("audit", *flat(arguments))
        line = one_line("audit", *flat(arguments | {"--alpha": "0.2"}))
        assert "registered with another cutoffs" in line
        assert Run(arguments["--out"]).manifest()["settings"]["cutoffs"]["alpha"] == 0.01

    def test_lost_evidence_is_not_judged(self, arguments, lightleak, one_line, tmp_path):
        lightleak("audit", *flat(arguments))
        (tmp_path / "run" / "evidence" / "part-00000.parquet").unlink()
        assert "32 record(s) are missing" in one_line("report", tmp_path / "run")

    def test_a_damaged_part_is_measured_again(self, arguments, lightleak, one_line, tmp_path):
        lightleak("audit", *flat(arguments))
        run = tmp_path / "run"
        before = pq.read_table(run / "scores.parquet")
        part = run / "evidence" / "part-00000.parquet"
        part.write_bytes(part.read_bytes()[:50])
        assert "damaged" in one_line("report", run)
        code, _, _ = lightleak("audit", *flat(arguments))
        assert code == 0
        assert pq.read_table(run / "scores.parquet").equals(before)

    def test_what_a_kill_left_of_a_file_does_not_stand_in_the_way(self, arguments, lightleak):
        arguments["--out"].mkdir()
        (arguments["--out"] / ".manifest.json.12345").write_text("{")
        assert lightleak("audit", *flat(arguments))[0] == 0


class TestOneBadRecord:
    @pytest.mark.parametrize(
        ("changes", "stage", "reason"),
        [
            ({"image": "img/absent.png"}, "load", "absent.png"),
            ({"image": "../../etc/passwd"}, "load", "outside"),
            ({"text": "  "}, "load", "text"),
            ({"text": "a <image> of a kite"}, "encode", "special token"),
        ],
    )
    def test_is_listed_and_stops_nothing(
        self, arguments, lightleak, tmp_path, changes, stage, reason
    ):
        change(arguments["--suspect"], **changes)
        code, output, errors = lightleak("audit", *flat(arguments))
        assert code == 0, errors
        (failure,) = pq.read_table(tmp_path / "run" / "failures.parquet").to_pylist()
        assert failure["set"] == "suspect"
        assert failure["stage"] == stage
        assert reason in failure["error"]
        assert "48 given, 47 scored, 1 failed" in output
        coverage = Verdict.read(tmp_path / "run" / "verdict.json").coverage
        assert (coverage.suspect.failed, coverage.control.failed) == (1, 0)
        scored = {
            (row["set"], row["id"])
            for row in pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist()
        }
        assert (failure["set"], failure["id"]) not in scored

    def test_a_truncated_image_is_listed(self, arguments, lightleak, tmp_path):
        row = json.loads(arguments["--suspect"].read_text().splitlines()[0])
        image = tmp_path / row["image"]
        image.write_bytes(image.read_bytes()[:100])
        code, _, _ = lightleak("audit", *flat(arguments))
        (failure,) = pq.read_table(tmp_path / "run" / "failures.parquet").to_pylist()
        assert code == 0
        assert (failure["id"], failure["stage"]) == (row["id"], "image")

    def test_strict_stops_instead(self, arguments, one_line):
        change(arguments["--suspect"], text="")
        assert "text" in one_line("audit", *flat(arguments), "--strict")


class TestMistakes:
    def test_missing_records(self, arguments, one_line, tmp_path):
        arguments["--suspect"] = tmp_path / "none.jsonl"
        assert "none.jsonl" in one_line("audit", *flat(arguments))

    def test_a_duplicate_id_names_both_places(self, arguments, one_line):
        second = json.loads(arguments["--suspect"].read_text().splitlines()[1])["id"]
        change(arguments["--suspect"], id=second)
        assert second in one_line("audit", *flat(arguments))

    def test_an_unknown_column(self, arguments, one_line):
        change(arguments["--suspect"], txet="oops")
        assert "txet" in one_line("audit", *flat(arguments))

    def test_an_empty_target_folder(self, arguments, one_line, tmp_path):
        arguments["--target"] = tmp_path / "empty"
        arguments["--target"].mkdir()
        assert "safetensors" in one_line("audit", *flat(arguments))

    def test_a_damaged_checkpoint(self, arguments, one_line, tmp_path, lab_tiny):
        import shutil

        broken = tmp_path / "broken"
        shutil.copytree(lab_tiny.target, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        arguments["--target"] = broken
        assert str(broken) in one_line("audit", *flat(arguments))

    def test_a_checkpoint_with_missing_tensors(self, arguments, one_line, tmp_path, lab_tiny):
        import shutil

        import safetensors.torch

        broken = tmp_path / "broken"
        shutil.copytree(lab_tiny.target, broken)
        tensors = safetensors.torch.load_file(broken / "model.safetensors")
        tensors.pop(max(tensors, key=lambda name: tensors[name].numel()))
        metadata = {"format": "pt"}
        safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata=metadata)
        arguments["--target"] = broken
        assert "1 tensor(s) are missing" in one_line("audit", *flat(arguments))

    def test_half_an_adapter(self, arguments, one_line, tmp_path, lab_lora):
        import shutil

        import safetensors.torch

        half = tmp_path / "half"
        shutil.copytree(lab_lora.adapter, half)
        tensors = safetensors.torch.load_file(half / "adapter_model.safetensors")
        kept = dict(list(tensors.items())[::2])
        safetensors.torch.save_file(kept, half / "adapter_model.safetensors")
        given = {"--target": lab_lora.target, "--adapter": half}
        assert "does not fit" in one_line("audit", *flat(arguments | given))

    def test_an_adapter_never_fetches_the_base_that_it_names(
        self, arguments, one_line, tmp_path, lab_lora
    ):
        import shutil

        adapter = tmp_path / "adapter"
        shutil.copytree(lab_lora.adapter, adapter)
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "somebody/model"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        line = one_line("audit", *flat(arguments | {"--target": adapter}))
        assert "somebody/model" in line
        assert "--base" in line

    def test_a_pickled_adapter_beside_a_decoy(self, arguments, one_line, tmp_path, lab_lora):
        import shutil

        adapter = tmp_path / "adapter"
        shutil.copytree(lab_lora.adapter, adapter)
        (adapter / "adapter_model.safetensors").rename(adapter / "decoy.safetensors")
        (adapter / "adapter_model.bin").write_bytes(b"")
        given = {"--target": lab_lora.target, "--adapter": adapter}
        assert "pickled" in one_line("audit", *flat(arguments | given))

    def test_audited_records_that_calibrate_allow_no_answer(self, arguments, lightleak, tmp_path):
        arguments |= {
            "--protocol": "split",
            "--calibration-members": arguments["--suspect"],
            "--calibration-nonmembers": arguments["--control"],
        }
        code, _, _ = lightleak("audit", *flat(arguments))
        verdict = Verdict.read(tmp_path / "run" / "verdict.json")
        assert code == 0
        assert (verdict.verdict, verdict.validity.duplicates) == ("inconclusive", 48)
        assert "calibration" in verdict.validity.duplicate_pairs[0].kind

    def test_three_records_a_side_are_no_error(self, arguments, lightleak, subset, lab_tiny):
        arguments["--suspect"] = subset(lab_tiny.members, "three", 0, 3)
        arguments["--control"] = subset(lab_tiny.nonmembers, "others", 0, 3)
        code, _, errors = lightleak("audit", *flat(arguments | {"--signals": "all"}))
        assert code == 0, errors
        assert Verdict.read(arguments["--out"] / "verdict.json").verdict == "inconclusive"

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"--seed": "5000000000"}, "--seed"),
            ({"--signals": " , "}, "no signal is named"),
            ({"--cutoff": "alpha=0.2"}, "Use --alpha"),
            ({"--cutoff": "blind_refuse=nan"}, "--cutoff blind_refuse"),
            ({"--set": "mink.k=nan", "--signals": "mink"}, "not a number"),
            ({"--signals": "los"}, "Did you mean loss"),
            ({"--primary": "nothing"}, "nothing"),
            ({"--set": "mink.q=1"}, "no option 'q'"),
            ({"--dtype": "float8"}, "float8"),
            ({"--device": "cuda:7"}, "cuda:7"),
            ({"--folds": "1"}, "--folds"),
            ({"--batch-size": "none"}, "--batch-size none"),
            ({"--cutoff": "nothing=1"}, "nothing"),
            ({"--protocol": "split"}, "--calibration-members"),
            ({"--set": "gradaudit.matrices=lora", "--signals": "gradaudit"}, "no adapter"),
        ],
    )
    def test_a_wrong_option(self, arguments, one_line, given, said):
        assert said in one_line("audit", *flat(arguments | given))

    def test_a_wrong_configuration_file(self, arguments, one_line, tmp_path):
        config = tmp_path / "c.toml"
        config.write_text("sed = 1\n")
        assert "Did you mean seed" in one_line("audit", *flat(arguments), "--config", config)

    def test_a_folder_with_other_things_in_it(self, arguments, one_line, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.doc").write_text("")
        assert "thesis.doc" in one_line("audit", *flat(arguments))

    def test_the_same_records_on_both_sides_allow_no_answer(self, arguments, lightleak, tmp_path):
        arguments["--control"] = arguments["--suspect"]
        code, _, _ = lightleak("audit", *flat(arguments))
        verdict = Verdict.read(tmp_path / "run" / "verdict.json")
        assert code == 0
        assert (verdict.verdict, verdict.validity.duplicates) == ("inconclusive", 24)

    def test_a_report_of_no_run(self, one_line, tmp_path):
        assert "no run here" in one_line("report", tmp_path)

    def test_a_mistake_of_ours_is_a_traceback(self, arguments, lightleak, monkeypatch):
        def broken(*_, **__):
            raise ZeroDivisionError

        monkeypatch.setattr("lightleak.audits.membership.read_sides", broken)
        with pytest.raises(ZeroDivisionError):
            lightleak("audit", *flat(arguments))
