"""Signals from changed copies and from sampled answers: each recomputed plainly, one at a time."""

import math
from dataclasses import replace
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
import torch

from lightleak import signals, targets
from lightleak.errors import UserError
from lightleak.evidence import collect, perturbed, sampled
from lightleak.evidence.collect import BatchSize
from lightleak.evidence.readings import (
    EXTRA,
    AugmentedDivergences,
    CorruptedEmbeddings,
    NeighbourLosses,
    Ragged,
    SampledAnswers,
)
from lightleak.evidence.table import (
    augmented_divergences,
    corrupted_embeddings,
    neighbour_losses,
    sampled_answers,
)
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab.corpora import scenes
from lightleak.lab.models import tiny_llava
from lightleak.records import Record, open_rgb

PERTURBED = {AugmentedDivergences, NeighbourLosses, CorruptedEmbeddings}


@pytest.fixture(scope="module")
def records():
    """Five scenes; one text is a single word."""
    made = [
        Record(id=f"suspect/{i}", image=scene.png(48), text=scene.caption())
        for i, scene in enumerate(scenes(5, seed=3))
    ]
    return [*made[:4], replace(made[4], text="kettle")]


@pytest.fixture(scope="module")
def target(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llava(folder, [record.text for record in records])
    return targets.load(folder, dtype="float64")


def measure(target, records, records_a_batch=32, needs=PERTURBED):
    size = BatchSize(records_a_batch)
    reader = perturbed.PerturbedReader(AnswerReader(), target, needs, size)
    measured = collect.measure(target, None, reader, records, size=size)
    assert not measured.failures
    return measured.table


@pytest.fixture(scope="module")
def table(target, records):
    return measure(target, records)


def probabilities(target, record):
    """(answer tokens, vocabulary), straight from the model's logits."""
    encoded = target.encode(record, open_rgb(record.image))
    with torch.no_grad():
        logits = target.model(**encoded.inputs).logits[0].double().numpy()
    logits = logits[encoded.answer_start - 1 : -1]
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    ids = encoded.inputs["input_ids"][0, encoded.answer_start :].numpy()
    return shifted / shifted.sum(1, keepdims=True), ids


def loss(target, record):
    p, ids = probabilities(target, record)
    return -np.mean([math.log(row[i]) for row, i in zip(p, ids, strict=True)])


def png(image):
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


class TestFormulas:
    def test_aug_kl(self, target, records, table):
        found = signals.get("aug_kl").score(augmented_divergences(table))
        for record, score in zip(records[:2], found, strict=False):
            p, _ = probabilities(target, record)
            each = []
            for k in range(EXTRA[AugmentedDivergences]):
                draw = perturbed.random(record, "augmentation", k)
                changed = perturbed.augment_image(open_rgb(record.image), draw)
                q, _ = probabilities(target, replace(record, image=png(changed)))
                each.append((p * np.log(p / q)).sum(1).mean())
            assert min(each) > 0
            assert score == pytest.approx(-np.mean(each), rel=1e-5)

    def test_neighbour(self, target, records, table):
        found = signals.get("neighbour").score(neighbour_losses(table))
        record = records[0]
        texts = perturbed.neighbours(record)
        assert len(texts) == EXTRA[NeighbourLosses]
        others = [loss(target, replace(record, text=text)) for text in texts]
        assert found[0] == pytest.approx(np.mean(others) - loss(target, record), rel=1e-5)

    def test_image_corruption(self, target, records, table):
        found = signals.get("image_corruption").score(corrupted_embeddings(table))
        record = records[0]
        image = open_rgb(record.image)
        draw = perturbed.random(record, "corruption", 0)

        def embedding(image):
            pixels = target.processor.image_processor(images=[image], return_tensors="pt")
            values = pixels["pixel_values"].to(target.dtype)
            with torch.no_grad():
                given = target.model.get_image_features(pixel_values=values).pooler_output
            return torch.cat(list(given)).reshape(-1, 128).mean(0).numpy()

        own = embedding(image)
        cosines = [
            own @ other / np.linalg.norm(own) / np.linalg.norm(other)
            for other in map(embedding, perturbed.corruptions(image, draw))
        ]
        assert len(cosines) + 1 == EXTRA[CorruptedEmbeddings]
        assert found[0] == pytest.approx(np.mean(cosines), rel=1e-5)
        assert np.isfinite(found).all()

    @pytest.mark.parametrize("score", ["fall", "level"])
    def test_temperature_set(self, score):
        truth = "a red kettle on a mat"
        low, high = ["A red kettle on the mat.", "a red pot"], ["", "on a mat"]
        # Pairs of words shared with the truth's five: 3 of 5 and 1 of 2; none, and 2 of 2.
        level = np.mean([2 * 3 / 10, 2 * 1 / 7])
        expected = level if score == "level" else level - np.mean([0, 2 * 2 / 7])
        answers = SampledAnswers([truth], (0.1, 1.6), [[low, high]])
        found = signals.get("temperature_set").score(answers, options={"score": score})
        assert found.tolist() == pytest.approx([expected])

    def test_similarity_by_the_longest_common_subsequence(self):
        first, second = (
            ["the", "cat", "sat", "on", "the", "mat"],
            ["on", "that", "mat", "the", "cat", "sat"],
        )
        longest = max(
            size
            for size in range(7)
            if {*combinations(first, size)} & {*combinations(second, size)}
        )
        answers = SampledAnswers([" ".join(first)], (0.1,), [[[" ".join(second)]]])
        options = {"score": "level", "similarity": "rougeL"}
        found = signals.get("temperature_set").score(answers, options=options)
        assert found.tolist() == pytest.approx([2 * longest / 12])

    def test_self_consistency(self):
        answers = SampledAnswers(
            ["not used"], (0.1, 1.6), [[["a b c", "a b d", "a b c"], ["x y", "x y", "z"]]]
        )
        signal = signals.get("self_consistency")
        assert signal.score(answers).tolist() == pytest.approx([np.mean([0.5, 1, 0.5])])
        hot = signal.score(answers, options={"temperature": 1.6})
        assert hot.tolist() == [1.0]  # Of the two answers with two words.

    def test_words_of_other_scripts_count(self):
        answers = SampledAnswers(["Über красный 猫が好き"], (0.1,), [[["über КРАСНЫЙ 猫が好き"]]])
        found = signals.get("temperature_set").score(answers, options={"score": "level"})
        assert found.tolist() == [1.0]


class TestDirection:
    """What a member looks like scores higher."""

    def test_steadier_under_changes(self):
        steady, shaken = signals.get("aug_kl").score(AugmentedDivergences(np.array([[0.1], [2.0]])))
        assert steady > shaken
        steady, shaken = signals.get("image_corruption").score(
            CorruptedEmbeddings(np.array([[0.9], [0.5]]))
        )
        assert steady > shaken

    def test_deeper_in_a_dip_of_the_loss(self):
        losses = NeighbourLosses(np.array([1.0, 1.0]), Ragged(np.array([3.0, 1.1]), np.arange(3)))
        deep, flat = signals.get("neighbour").score(losses)
        assert deep > flat

    def test_told_as_taught_until_it_is_hot(self):
        truth = "a red kettle"
        answers = SampledAnswers(
            [truth] * 2, (0.1, 1.6), [[[truth], ["no such thing"]], [["a kettle"], ["a cup"]]]
        )
        member, other = signals.get("temperature_set").score(answers)
        assert member > other


class TestWithoutAScore:
    def test_a_text_of_one_word_has_no_neighbour(self, table):
        found = signals.get("neighbour").score(neighbour_losses(table))
        assert np.isnan(found).tolist() == [False] * 4 + [True]

    def test_a_changed_image_that_could_not_be_read(self):
        found = np.array([[0.1, np.nan], [0.1, 0.2]])
        for name, evidence in (
            ("aug_kl", AugmentedDivergences(found)),
            ("image_corruption", CorruptedEmbeddings(found)),
        ):
            assert np.isnan(signals.get(name).score(evidence)).tolist() == [True, False]

    def test_a_truth_of_one_word_unless_single_words_are_compared(self):
        answers = SampledAnswers(["yes"], (0.1, 1.6), [[["yes"], ["no"]]])
        signal = signals.get("temperature_set")
        assert np.isnan(signal.score(answers)).all()
        assert signal.score(answers, options={"similarity": "rougeL"}).tolist() == [1.0]

    def test_answers_without_words_are_like_nothing_and_not_like_each_other(self):
        answers = SampledAnswers(["a kettle"], (0.1, 1.6), [[["", "…"], ["", ""]]])
        assert signals.get("temperature_set").score(answers).tolist() == [0.0]
        assert np.isnan(signals.get("self_consistency").score(answers)).all()


class TestEvidence:
    def test_no_batch_changes_a_number(self, target, records, table):
        alone = measure(target, records, 1)
        for column in ("augmented_divergences", "neighbour_losses", "corruption_cosines"):
            for a, b in zip(alone[column].to_pylist(), table[column].to_pylist(), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=column)

    def test_only_what_is_asked_for_is_made(self, target, records):
        few = measure(target, records[:1], needs={NeighbourLosses})
        assert "neighbour_losses" in few.column_names
        assert not {"augmented_divergences", "corruption_cosines"} & {*few.column_names}

    def test_a_neighbour_that_the_model_cannot_take_harms_no_record(self, target, records):
        # Doubling words makes it longer than the 512 tokens that the model reads.
        long = replace(records[0], text=" ".join(["kettle and lamp"] * 77))
        while True:
            try:
                target.encode(long, open_rgb(long.image))
                break
            except UserError:
                long = replace(long, text=long.text[: -len(" kettle and lamp")])
        found = neighbour_losses(measure(target, [long], needs={NeighbourLosses})).neighbours
        assert found.lengths.tolist() == [EXTRA[NeighbourLosses]]
        # Masks and doubled words; with words left out or exchanged it still fits.
        assert np.isnan(found.values).reshape(4, -1).all(1).tolist() == [True, False, True, False]

    def test_what_is_changed_belongs_to_the_record_and_differs_from_its_neighbours(self, records):
        first, same = (perturbed.neighbours(records[0]) for _ in range(2))
        other = perturbed.neighbours(replace(records[0], id="suspect/other"))
        assert first == same != other
        assert records[0].text not in first
        assert len({*first}) > 20

    def test_the_model_is_left_as_it_was(self, target, records):
        hooks = sum(len(module._forward_hooks) for module in target.model.modules())
        measure(target, records[:1], needs={CorruptedEmbeddings})
        assert hooks == sum(len(module._forward_hooks) for module in target.model.modules())

    def test_answers_depend_on_the_record_alone_and_come_from_the_model(
        self, target, records, monkeypatch
    ):
        monkeypatch.setattr(sampled, "ANSWER_TOKENS", 8)
        reader = sampled.SampledReader(AnswerReader(), target)
        tables = [
            collect.measure(target, None, reader, records, size=BatchSize(n)).table for n in (1, 5)
        ]
        assert tables[0]["answers"].equals(tables[1]["answers"])
        answers = sampled_answers(tables[0])
        assert answers.temperatures == sampled.TEMPERATURES
        assert answers.truth == [record.text for record in records]
        drawn = [answer for each in answers.answers for at in each for answer in at]
        assert len(drawn) == len(records) * EXTRA[SampledAnswers]
        assert len({*drawn}) > len(drawn) / 2

    def test_sampling_follows_the_models_own_distribution(self, target, records, monkeypatch):
        """First tokens at temperature 1, against softmax of the logits: a chi-squared test."""
        encoded = target.encode(records[0], open_rgb(records[0].image))
        p, _ = probabilities(target, records[0])
        temperature, n = 0.05, 600
        expected = p[0] ** (1 / temperature)
        expected /= expected.sum()
        monkeypatch.setattr(sampled, "ANSWER_TOKENS", 1)
        ids = []
        decode = target.processor.tokenizer.batch_decode
        monkeypatch.setattr(
            target.processor.tokenizer,
            "batch_decode",
            lambda found, **kept: [ids.extend(each[0] for each in found), decode(found, **kept)][1],
        )
        sampled.generate(target, encoded, [temperature] * n)
        counts = np.bincount(ids, minlength=len(expected))
        likely = expected * n > 5
        cells = np.append(counts[likely], counts[~likely].sum())
        shares = np.append(expected[likely], expected[~likely].sum()) * n
        assert likely.sum() > 3
        chi = ((cells - shares) ** 2 / shares).sum()
        assert chi < likely.sum() + 5 * math.sqrt(2 * likely.sum())
