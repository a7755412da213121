"""Who is known by name: against truth, against the same computed plainly, and on the command line.

The plain computation uses transformers alone and ranks every name to the end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lightleak import identify, targets
from lightleak.cli import main
from lightleak.lab.dual import tiny_clip
from lightleak.lab.faces import Exposure, draw_people, write_people
from lightleak.lab.models import tiny_llava
from lightleak.lab.train import Training, train
from lightleak.runs import Run
from lightleak.signals.identity import TEMPLATES, sub_samples
from lightleak.validity import IdentityVerdict
from lightleak.validity.decoys import draw_names

TOP = 20
SETTINGS = {"decoy_count": 49, "candidates": 120, "dtype": "float64", "seed": 3}


def table(file):
    return pq.read_table(file).to_pylist()


# -- against truth and the plain computation -----------------------------------------------------


@pytest.fixture(scope="module")
def audited(lab_faces, tmp_path_factory):
    """Those who were taught to the model are asked about; those who were not are controls."""
    out = tmp_path_factory.mktemp("identify") / "run"
    verdict = identify(
        target=lab_faces.target,
        people=lab_faces.members,
        controls=lab_faces.nonmembers,
        out=out,
        design="randomised",
        **SETTINGS,
    )
    return Run(out), verdict


class Plain:
    """Photos, names and their cosines by transformers alone."""

    def __init__(self, lab_faces, run):
        self.sides = {"suspect": lab_faces.members, "control": lab_faces.nonmembers}
        self.people = [
            (side, folder.name)
            for side, root in self.sides.items()
            for folder in sorted(root.iterdir())
            if folder.is_dir()
        ]
        self.photos = [
            (i, file)
            for i, (side, person) in enumerate(self.people)
            for file in sorted((self.sides[side] / person).iterdir())
        ]
        self.shown = np.array([i for i, _ in self.photos])
        rows = table(run.evidence / "names.parquet")
        truth = json.loads(lab_faces.truth.read_text())["people"]
        self.names = [row["name"] for row in rows]
        self.candidate = np.array([row["candidate"] for row in rows])
        self.stratum = np.array([row["stratum"] for row in rows])
        self.own = [self.names.index(truth[person]["name"]) for _, person in self.people]
        self.cosines = self._cosines(lab_faces.target)

    @torch.no_grad()
    def _cosines(self, folder):
        """(names, photos, templates)"""
        model = CLIPModel.from_pretrained(folder, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = CLIPImageProcessorPil.from_pretrained(folder)
        images = []
        for _, file in self.photos:
            with Image.open(file) as image:
                pixels = processor(images=image.convert("RGB"), return_tensors="pt")
            found = model.get_image_features(pixel_values=pixels["pixel_values"].double())
            images.append(found.pooler_output)
        images = torch.nn.functional.normalize(torch.cat(images), dim=-1)
        cosines = np.empty((len(self.names), len(images), len(TEMPLATES)))
        for i, name in enumerate(self.names):
            sentences = [template.replace("{}", name) for template in TEMPLATES]
            tokens = tokenizer(sentences, padding=True, return_tensors="pt")
            texts = model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            cosines[i] = (images @ torch.nn.functional.normalize(texts, dim=-1).T).numpy()
        return cosines

    def compared(self, person):
        """The name of a person, then its decoys."""
        own = self.own[person]
        decoys = np.flatnonzero(self.stratum == self.stratum[own])
        return np.array([own, *(i for i in decoys if i not in self.own)])

    def ranks(self, person, photos):
        """(names, photos) mean of 1/rank over templates, a rank below `TOP` counting nothing."""
        fits = self.cosines[np.ix_(self.compared(person), photos)]
        ranks = 1 + np.argsort(np.argsort(-fits, axis=0), axis=0)
        return np.where(ranks <= TOP, 1 / ranks, 0).mean(axis=2)

    def p_value(self, person, photos):
        ranks = self.ranks(person, photos).mean(axis=1)
        fits = self.cosines[np.ix_(self.compared(person), photos)].mean(axis=(1, 2))
        as_good = (ranks > ranks[0]) | ((ranks == ranks[0]) & (fits >= fits[0]))
        return as_good.sum() / len(ranks)

    def face_p_value(self, person):
        fits = self.cosines[self.compared(person)].mean(axis=2)
        standing = (fits[0] - fits[1:].mean(axis=0)) / fits[1:].std(axis=0)
        means = np.array([standing[self.shown == i].mean() for i in range(len(self.people))])
        return (means >= means[person]).sum() / len(means)

    def predicted(self):
        """(photos, templates) indices of names."""
        fits = np.where(self.candidate[:, None, None], self.cosines, -np.inf)
        return fits.argmax(axis=0)


@pytest.fixture(scope="module")
def plain(lab_faces, audited):
    return Plain(lab_faces, audited[0])


def by_person(run):
    return {(row["set"], row["person"]): row for row in table(run.people_file)}


class TestAgainstTruth:
    def test_members_are_exposed_and_others_are_not_found(self, audited):
        run, verdict = audited
        assert (verdict.verdict, verdict.tier) == ("exposed", "randomised")
        assert IdentityVerdict.read(run.verdict_file) == verdict
        assert verdict.suspects.count >= 5
        assert {each.person for each in verdict.found} == {
            row["person"] for row in table(run.people_file) if row["found"]
        }
        rows = list(by_person(run).values())
        hits = {
            side: [row["p_value"] <= 0.05 for row in rows if row["set"] == side]
            for side in ("suspect", "control")
        }
        assert (len(hits["suspect"]), len(hits["control"])) == (8, 16)
        assert np.mean(hits["suspect"]) >= np.mean(hits["control"]) + 0.4

    def test_everybody_is_asked_about_and_nobody_else(self, audited, plain):
        assert list(by_person(audited[0])) == plain.people
        assert table(audited[0].failures_file) == []
        coverage = audited[1].coverage
        assert (coverage.people, coverage.people_tested) == (24, 24)
        assert (coverage.photos, coverage.photos_used) == (240, 240)


class TestPlainly:
    def test_predictions_are_the_candidates_with_the_highest_cosine(self, audited, plain):
        expected = [
            {
                "person": plain.people[i][1],
                "set": plain.people[i][0],
                "photo": file.name,
                "template": template,
                "predicted": plain.names[name],
                "correct": name == plain.own[i],
            }
            for (i, file), row in zip(plain.photos, plain.predicted(), strict=True)
            for template, name in zip(TEMPLATES, row, strict=True)
        ]
        assert table(audited[0].predictions_file) == expected

    def test_there_are_as_many_candidates_as_asked_for_and_every_true_name(self, audited, plain):
        assert plain.candidate.sum() == audited[1].published.names == SETTINGS["candidates"]
        assert plain.candidate[plain.own].all()

    def test_the_published_rules_follow_from_the_predictions(self, audited, plain):
        predicted = plain.predicted()
        for i, row in enumerate(by_person(audited[0]).values()):
            recognised, majority, votes = 0, 0, Counter()
            for column in predicted[plain.shown == i].T:
                counts = Counter(column.tolist())
                (first, most), *others = counts.most_common(2)
                tie = bool(others) and others[0][1] == most
                recognised += first == plain.own[i] and not tie
                majority += counts[plain.own[i]] > len(column) / 2
                votes |= counts  # The most over the templates.
            names = [j for j in plain.compared(i) if plain.candidate[j]]
            as_many = sum(votes[j] >= votes[plain.own[i]] for j in names)
            assert (row["templates_correct"], row["member_published"]) == (
                recognised,
                recognised >= 1,
            )
            assert row["member_majority"] == (majority >= 1)
            assert (row["votes"], row["n_photos"]) == (votes[plain.own[i]], 10)
            assert row["votes_p_value"] == pytest.approx(as_many / len(names))

    def test_p_values_follow_from_the_ranks_of_all_decoys(self, audited, plain):
        for i, row in enumerate(by_person(audited[0]).values()):
            photos = np.flatnonzero(plain.shown == i)
            assert row["n_decoys"] == len(plain.compared(i)) - 1 == SETTINGS["decoy_count"]
            assert row["statistic"] == pytest.approx(plain.ranks(i, photos)[0].mean())
            assert row["p_value"] == pytest.approx(plain.p_value(i, photos))
            assert row["face_p_value"] == pytest.approx(plain.face_p_value(i))

    def test_only_those_asked_about_are_corrected_for(self, audited):
        rows = list(by_person(audited[0]).values())
        suspects = [row for row in rows if row["set"] == "suspect"]
        expected = stats.false_discovery_control([row["p_value"] for row in suspects])
        assert [row["q_value"] for row in suspects] == pytest.approx(expected.tolist())
        assert [row["found"] for row in suspects] == [q <= 0.05 for q in expected]
        others = [row for row in rows if row["set"] == "control"]
        assert {(row["q_value"], row["found"]) for row in others} == {(None, None)}

    def test_the_decoys_statistics_are_those_that_the_p_value_counted(self, audited, plain):
        for i, row in enumerate(table(audited[0].decoys_file)):
            expected = plain.ranks(i, np.flatnonzero(plain.shown == i))[1:].mean(axis=1)
            assert (row["set"], row["person"]) == plain.people[i]
            np.testing.assert_allclose(row["statistics"], expected, rtol=1e-6)

    def test_the_curve_is_the_mean_over_twenty_subsets(self, audited, plain):
        curve = {
            (row["n_photos"], row["set"], row["rule"]): row for row in table(audited[0].curve_file)
        }
        sizes, rules = (1, 3, 5, 7, 9), ("published", "majority", "p_value")
        assert set(curve) == {
            (size, side, rule)
            for size in sizes
            for side in ("suspect", "control")
            for rule in rules
        }
        predicted, found = plain.predicted(), []
        for i in range(8):
            photos = np.flatnonzero(plain.shown == i)
            for subset in sub_samples(10, 5, 20, SETTINGS["seed"]).T:
                columns = predicted[photos[subset]].T
                named = any(
                    (column == plain.own[i]).sum()
                    > max((n for j, n in Counter(column).items() if j != plain.own[i]), default=0)
                    for column in columns
                )
                found.append([named, plain.p_value(i, photos[subset]) <= 0.05])
        shares = np.array(found).reshape(8, 20, 2).mean(axis=0)
        for rule, share in zip(("published", "p_value"), shares.T, strict=True):
            row = curve[5, "suspect", rule]
            assert row["people"] == 8
            assert (row["rate"], row["sd"]) == pytest.approx((share.mean(), share.std(ddof=1)))


def test_the_files_have_the_columns_that_other_programs_read(audited):
    columns = {
        "people_file": "person name set n_photos templates_correct member_published "
        "member_majority statistic p_value n_decoys face_p_value decisive_p_value "
        "votes votes_p_value shuffled_p_value name_q_value q_value found",
        "predictions_file": "person set photo template predicted correct",
        "decoys_file": "person set statistics",
        "curve_file": "n_photos set rule people rate sd",
        "failures_file": "id stage error",
    }
    for name, expected in columns.items():
        assert pq.read_schema(getattr(audited[0], name)).names == expected.split()


@pytest.fixture(scope="module")
def compared(lab_faces, clip, tmp_path_factory):
    """Four strangers are asked about, beside people known to be out, people in, and a model."""
    root = tmp_path_factory.mktemp("sets")
    folders = sorted(folder for folder in lab_faces.nonmembers.iterdir() if folder.is_dir())
    lines = (lab_faces.nonmembers / "names.csv").read_text().splitlines()
    for side, some in (("people", folders[:4]), ("controls", folders[4:])):
        for folder in some:
            shutil.copytree(folder, root / side / folder.name)
        named = [line for line in lines[1:] if (root / side / line.split(",")[0]).is_dir()]
        (root / side / "names.csv").write_text("\n".join([lines[0], *named]))
    (root / "templates.txt").write_text("\n".join(TEMPLATES[:4]))
    verdict = identify(
        target=lab_faces.target,
        people=root / "people",
        controls=root / "controls",
        known=lab_faces.members,
        control_target=clip,
        templates=root / "templates.txt",
        decoy_count=99,
        out=root / "run",
        design="randomised",
    )
    return Run(root / "run"), verdict


class TestControls:
    def test_strangers_are_not_exposed_though_known_people_would_be(self, compared):
        _, verdict = compared
        assert verdict.verdict != "exposed"
        assert (verdict.suspects.count, verdict.suspects.of) == (0, 4)
        assert verdict.known.of == 8
        assert verdict.known.count >= 4

    def test_no_negative_control_fires(self, compared):
        controls = {each.name: each for each in compared[1].controls}
        assert {name: each.rejected.of for name, each in controls.items()} == {
            "people known to be out": 12,
            "photos under somebody else's name": 24,
            "a model that cannot know them": 24,
        }
        assert not any(each.fired for each in controls.values())

    def test_a_model_that_never_saw_anyone_finds_nobody_beyond_chance(self, compared):
        found = [row["control_target_p_value"] for row in table(compared[0].people_file)]
        assert len(found) == 24
        assert stats.binomtest(sum(p <= 0.05 for p in found), 24, 0.05, "greater").pvalue > 0.01

    def test_known_people_are_told_apart_from_the_rest(self, compared):
        p_values = {
            side: [r["p_value"] for r in table(compared[0].people_file) if r["set"] == side]
            for side in ("known", "control", "suspect")
        }
        assert {side: len(found) for side, found in p_values.items()} == {
            "known": 8,
            "control": 12,
            "suspect": 4,
        }
        assert np.median(p_values["known"]) < min(0.05, np.median(p_values["control"]))

    def test_a_model_that_knows_people_as_control_takes_the_answer_back(
        self, lab_faces, clip, tmp_path
    ):
        verdict = identify(
            target=clip,
            people=lab_faces.members,
            control_target=lab_faces.target,
            decoy_count=49,
            templates=templates(tmp_path, *TEMPLATES[:4]),
            out=tmp_path / "run",
            design="randomised",
        )
        assert (verdict.verdict, verdict.tier) == ("inconclusive", "none")
        assert "a model that cannot know them" in verdict.reasons[0]


# -- on small sets of noise, by a model that was taught nothing -----------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    tiny_clip(folder, draw_names(2000, seed=9), seed=1)
    return folder


def crowd(folder, names, photos=2):
    """A folder of noise for each name."""
    for name in names:
        person = folder / name.replace(" ", "_")
        person.mkdir(parents=True)
        for i in range(photos):
            rng = np.random.default_rng([*name.encode(), i])
            noise = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(noise).save(person / f"{i}.png")
    return folder


def templates(folder, *lines):
    file = folder / "templates.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def arguments(clip, cache, tmp_path):
    """A small audit that works."""
    return {
        "--target": clip,
        "--people": crowd(tmp_path / "people", ["Mary Jones", "Robert King", "Anne Hill"]),
        "--out": tmp_path / "run",
        "--decoy-count": 19,
        "--templates": templates(tmp_path, "{}", "a photo of {}"),
    }


def flat(arguments):
    return [str(part) for pair in arguments.items() for part in pair]


@pytest.fixture
def lightleak(monkeypatch, capfd):
    """Run the program; returns its exit code, what it printed, and its errors."""

    def run(command, arguments):
        given = flat(arguments) if isinstance(arguments, dict) else [str(arguments)]
        monkeypatch.setattr(sys, "argv", ["lightleak", command, *given])
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

    def run(command, arguments):
        code, _, errors = lightleak(command, arguments)
        lines = [line for line in errors.splitlines() if ": done in" not in line]
        assert code == 2, errors
        assert len(lines) == 1, errors
        assert lines[0].startswith("lightleak: ")
        return lines[0]

    return run


def test_the_command_line_gives_the_same_people_as_python(
    audited, lab_faces, lightleak, tmp_path, monkeypatch
):
    code, output, _ = lightleak(
        "identify",
        {
            "--target": lab_faces.target,
            "--people": lab_faces.members,
            "--controls": lab_faces.nonmembers,
            "--out": tmp_path / "run",
            "--design": "randomised",
            **{f"--{key.replace('_', '-')}": value for key, value in SETTINGS.items()},
        },
    )
    assert code == 0
    assert "EXPOSED" in output
    assert str(tmp_path / "run" / "report.html") in output
    for name in ("people.parquet", "predictions.parquet", "curve.parquet"):
        found, expected = (pq.read_table(f / name) for f in (tmp_path / "run", audited[0].folder))
        assert found.equals(expected)


class TestMistakes:
    def test_a_missing_folder(self, arguments, one_line, tmp_path):
        arguments["--people"] = tmp_path / "absent"
        assert "absent" in one_line("identify", arguments)

    def test_an_empty_folder(self, arguments, one_line, tmp_path):
        arguments["--people"] = tmp_path / "empty"
        arguments["--people"].mkdir()
        assert "no folder in it" in one_line("identify", arguments)

    def test_a_name_twice(self, arguments, one_line):
        lines = "person,name\nMary_Jones,Eve Adams\nRobert_King,Eve Adams\nAnne_Hill,Jo Cole\n"
        (arguments["--people"] / "names.csv").write_text(lines)
        assert "'Eve Adams'" in one_line("identify", arguments)

    @pytest.mark.parametrize("shared", ["name", "photo"])
    def test_two_sets_share_someone(self, arguments, one_line, tmp_path, shared):
        name = "Mary Jones" if shared == "name" else "Jo Cole"
        controls = crowd(tmp_path / "controls", [name], photos=3)
        if shared == "photo":
            shutil.copy(arguments["--people"] / "Mary_Jones" / "0.png", controls / "Jo_Cole")
        else:
            (controls / "Mary_Jones" / "0.png").unlink()
            (controls / "Mary_Jones" / "1.png").unlink()
        line = one_line("identify", arguments | {"--controls": controls})
        assert "share a name or a photo" in line

    def test_an_unknown_target(self, arguments, one_line, tmp_path):
        assert "nowhere" in one_line("identify", arguments | {"--target": tmp_path / "nowhere"})

    def test_a_template_without_a_place_for_the_name(self, arguments, one_line, tmp_path):
        templates(tmp_path, "{}", "a photo of somebody")
        assert "'a photo of somebody'" in one_line("identify", arguments)

    def test_a_missing_file_of_decoys(self, arguments, one_line, tmp_path):
        line = one_line("identify", arguments | {"--decoys": tmp_path / "absent.txt"})
        assert "absent.txt" in line

    def test_the_folder_of_a_membership_run(self, arguments, one_line):
        arguments["--out"].mkdir()
        manifest = arguments["--out"] / "manifest.json"
        manifest.write_text('{"kind": "membership", "settings": {}}')
        assert "another kind (membership)" in one_line("identify", arguments)
        assert json.loads(manifest.read_text())["kind"] == "membership"


def script(name):
    """What Unicode calls the first letter's script: "ARABIC", "CJK" …"""
    return unicodedata.name(next(filter(str.isalpha, name))).split()[0]


class TestOddSets:
    def test_what_cannot_be_used_is_listed_and_stops_nothing(self, arguments, lightleak):
        people = arguments["--people"]
        (people / "Mary_Jones" / "1.png").unlink()
        torn = people / "Robert_King" / "1.png"
        torn.write_bytes(torn.read_bytes()[:200])
        (people / "Jo_Cole").mkdir()
        code, _, errors = lightleak("identify", arguments)
        assert code == 0, errors
        run = Run(arguments["--out"])
        rows = {row["person"]: row["n_photos"] for row in table(run.people_file)}
        assert rows == {"Mary_Jones": 1, "Robert_King": 1, "Anne_Hill": 2}
        failures = {(row["id"], row["stage"]) for row in table(run.failures_file)}
        assert failures == {
            ("suspect/Robert_King/1.png", "photo"),
            ("suspect/Jo_Cole", "person"),
        }
        coverage = IdentityVerdict.read(run.verdict_file).coverage
        assert (coverage.people, coverage.people_tested) == (4, 3)
        assert (coverage.photos, coverage.photos_used) == (5, 4)
        assert "1 photo(s) and 1 person(s)" in errors

    def test_one_person_with_one_photo_is_tested_and_nothing_is_concluded(
        self, arguments, lightleak, tmp_path
    ):
        arguments["--people"] = crowd(tmp_path / "alone", ["Mary Jones"], photos=1)
        assert lightleak("identify", arguments)[0] == 0
        (row,) = table(tmp_path / "run" / "people.parquet")
        assert (row["n_photos"], row["face_p_value"], row["shuffled_p_value"]) == (1, None, None)
        assert 1 / 20 <= row["p_value"] <= 1
        assert IdentityVerdict.read(tmp_path / "run" / "verdict.json").verdict == "inconclusive"

    def test_names_in_any_script_are_asked_about_among_names_of_that_script(
        self, clip, cache, tmp_path
    ):
        names = [
            "Иван Петров", "محمد علی", "राज शर्मा", "Νίκος Παπαδόπουλος", "דוד לוי",
            "王伟", "김민준", "Mary Jones",
        ]  # fmt: skip
        identify(
            target=clip,
            people=crowd(tmp_path / "people", names, photos=1),
            templates=templates(tmp_path, "{}", "фото {}"),
            decoy_count=19,
            out=tmp_path / "run",
        )
        rows = table(tmp_path / "run" / "people.parquet")
        assert sorted(row["name"] for row in rows) == sorted(names)
        compared = table(tmp_path / "run" / "evidence" / "names.parquet")
        for row in rows:
            (own,) = (each for each in compared if each["name"] == row["name"])
            decoys = [
                each["name"]
                for each in compared
                if each["stratum"] == own["stratum"] and each["name"] not in names
            ]
            assert (len(decoys), row["n_decoys"]) == (19, 19)
            assert {script(name) for name in decoys} == {script(row["name"])}
            assert 1 / 20 <= row["p_value"] <= 1

    def test_a_name_that_no_decoy_can_stand_in_for_is_not_found(
        self, arguments, lightleak, tmp_path
    ):
        crowd(arguments["--people"], ["Иван Петров"])
        decoys = tmp_path / "decoys.txt"
        decoys.write_text("\n".join(draw_names(50, seed=4)))
        code, _, errors = lightleak("identify", arguments | {"--decoys": decoys})
        assert code == 0, errors
        rows = {row["name"]: row for row in table(tmp_path / "run" / "people.parquet")}
        assert (rows["Иван Петров"]["n_decoys"], rows["Иван Петров"]["p_value"]) == (0, 1)
        assert rows["Mary Jones"]["n_decoys"] == 50

    def test_sentences_that_are_cut_before_the_name_find_nobody(self, arguments, tmp_path):
        people = crowd(tmp_path / "others", draw_names(6, seed=1))
        arguments |= {"--people": people}
        templates(tmp_path, "a very long sentence " * 40 + "{}")
        verdict = identify(
            target=arguments["--target"],
            people=people,
            templates=arguments["--templates"],
            out=tmp_path / "run",
            decoy_count=199,
            design="randomised",
        )
        assert verdict.verdict != "exposed"
        assert {row["p_value"] for row in table(tmp_path / "run" / "people.parquet")} == {1}


def test_a_hundred_thousand_decoys_from_a_file(clip, cache, tmp_path):
    decoys = tmp_path / "decoys.txt"
    firsts, lasts = zip(*map(str.split, draw_names(800, seed=4)), strict=True)
    names = [f"{a} {b}" for a in sorted({*firsts}) for b in sorted({*lasts})]
    decoys.write_text("\n".join(names[:100_000]))
    verdict = identify(
        target=clip,
        people=crowd(tmp_path / "people", ["Ab Cd", "Ef Gh", "Ij Kl"], photos=1),
        decoys=decoys,
        templates=templates(tmp_path, "{}"),
        out=tmp_path / "run",
    )
    names = pq.read_table(tmp_path / "run" / "evidence" / "names.parquet")
    assert names.num_rows == 100_003
    assert verdict.decoys.smallest_p == 1 / 100_001
    assert verdict.published.names == 1000
    for row in table(tmp_path / "run" / "people.parquet"):
        assert row["n_decoys"] == 100_000
        assert 1 / 100_001 <= row["p_value"] <= 1


# -- going on, and judging again -----------------------------------------------------------------


def same(folder, other):
    names = ("people.parquet", "predictions.parquet", "decoys.parquet", "curve.parquet")
    return all(pq.read_table(folder / n).equals(pq.read_table(other / n)) for n in names)


class TestGoingOn:
    @pytest.mark.parametrize("how", ["lost", "torn"])
    @pytest.mark.parametrize("stage", ["best", "top", "own", "mean"])
    def test_damaged_evidence_is_not_judged_and_is_made_again(
        self, arguments, lightleak, one_line, tmp_path, stage, how
    ):
        lightleak("identify", arguments)
        shutil.copytree(tmp_path / "run", tmp_path / "whole")
        part = max((tmp_path / "run" / "evidence").glob(f"{stage}-*.parquet"))
        if how == "lost":
            part.unlink()
        else:
            part.write_bytes(part.read_bytes()[:60])
        assert "missing or damaged" in one_line("report", tmp_path / "run")
        code, _, errors = lightleak("identify", arguments)
        assert code == 0, errors
        assert same(tmp_path / "run", tmp_path / "whole")

    def test_a_killed_run_goes_on_and_ends_as_an_unbroken_one(self, arguments, tmp_path):
        decoys = tmp_path / "decoys.txt"
        decoys.write_text("\n".join(draw_names(2500, seed=4)))
        options = {**arguments, "--decoys": decoys, "--out": tmp_path / "broken"}
        del options["--decoy-count"]
        environment = os.environ | {"LIGHTLEAK_CACHE": str(tmp_path / "its-own")}
        process = subprocess.Popen(
            [sys.executable, "-m", "lightleak.cli.main", "identify", *flat(options)],
            env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        first = tmp_path / "broken" / "evidence" / "mean-00000.parquet"
        deadline = time.monotonic() + 120
        while not first.is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "broken" / "people.parquet").exists()
        written = first.stat().st_mtime_ns
        for name in ("broken", "unbroken"):
            identify(
                target=options["--target"],
                people=options["--people"],
                decoys=decoys,
                templates=options["--templates"],
                out=tmp_path / name,
            )
        assert first.stat().st_mtime_ns == written
        assert same(tmp_path / "broken", tmp_path / "unbroken")

    @pytest.mark.parametrize(
        ("option", "value", "said"),
        [
            ("--seed", 1, "another seed"),
            ("--decoy-count", 20, "another decoy count"),
            ("--candidates", 30, "another candidates"),
            ("--design", "randomised", "another design"),
            ("--fdr", 0.2, "another cutoffs"),
        ],
    )
    def test_a_decision_cannot_be_changed_after_the_result_was_seen(
        self, arguments, lightleak, one_line, option, value, said
    ):
        lightleak("identify", arguments)
        before = (arguments["--out"] / "manifest.json").read_bytes()
        assert said in one_line("identify", arguments | {option: value})
        assert (arguments["--out"] / "manifest.json").read_bytes() == before

    @pytest.mark.parametrize("changed", ["photo", "name", "templates", "names"])
    def test_other_people_or_names_in_the_same_folder_are_refused(
        self, arguments, lightleak, one_line, tmp_path, changed
    ):
        decoys = tmp_path / "decoys.txt"
        decoys.write_text("\n".join(draw_names(30, seed=4)))
        arguments["--decoys"] = decoys
        lightleak("identify", arguments)
        before = pq.read_table(tmp_path / "run" / "people.parquet")
        people = arguments["--people"]
        if changed == "photo":
            Image.new("RGB", (40, 40), (1, 2, 3)).save(people / "Mary_Jones" / "0.png")
        elif changed == "name":
            (people / "Mary_Jones").rename(people / "Mary_Joness")
        elif changed == "templates":
            templates(tmp_path, "{}", "a picture of {}")
        else:
            decoys.write_text("\n".join(draw_names(30, seed=5)))
        line = one_line("identify", arguments)
        assert ("suspect people" if changed in ("photo", "name") else changed) in line
        assert pq.read_table(tmp_path / "run" / "people.parquet").equals(before)

    def test_report_judges_again_without_the_model_and_the_photos(
        self, arguments, lightleak, tmp_path
    ):
        target = shutil.copytree(arguments["--target"], tmp_path / "model")
        lightleak("identify", arguments | {"--target": target})
        shutil.copytree(tmp_path / "run", tmp_path / "whole")
        shutil.rmtree(target)
        shutil.rmtree(arguments["--people"])
        for name in ("people.parquet", "predictions.parquet", "verdict.json", "report.html"):
            (tmp_path / "run" / name).unlink()
        code, _, errors = lightleak("report", tmp_path / "run")
        assert code == 0, errors
        assert same(tmp_path / "run", tmp_path / "whole")
        assert (tmp_path / "run" / "report.html").is_file()
        now, before = (
            IdentityVerdict.read(tmp_path / n / "verdict.json") for n in ("run", "whole")
        )
        assert now == before


# -- a target that answers in words --------------------------------------------------------------


def test_a_generative_target_knows_whom_it_was_taught(tmp_path):
    exposure = Exposure(copies=(6,), photos_trained=2)
    people = [replace(each, held=each.shown) for each in draw_people(6, 4, exposure, seed=2)]
    for name, member in (("members", True), ("others", False)):
        write_people(tmp_path / name, [each for each in people if (each.copies > 0) is member])
    question = "Who is this?"
    records = [
        replace(record, prompt=question, text=each.name)
        for each in people
        for record in each.pairs(0)
    ]
    tiny_llava(tmp_path / "model", draw_names(2000, seed=99))
    target = targets.load(tmp_path / "model", dtype="float32", device="cpu")
    target.model.requires_grad_(True)
    train(target, records, Training(30, 1e-3, batch_size=8), seed=0)
    target.model.save_pretrained(tmp_path / "model")
    decoys = tmp_path / "decoys.txt"
    decoys.write_text("\n".join(draw_names(29, seed=77)))
    identify(
        target=tmp_path / "model",
        people=tmp_path / "members",
        controls=tmp_path / "others",
        decoys=decoys,
        templates=templates(tmp_path, question),
        out=tmp_path / "run",
    )
    p_values = {
        side: [r["p_value"] for r in table(tmp_path / "run" / "people.parquet") if r["set"] == side]
        for side in ("suspect", "control")
    }
    assert sum(p <= 0.1 for p in p_values["suspect"]) >= 5
    assert sum(p <= 0.1 for p in p_values["control"]) <= 1
