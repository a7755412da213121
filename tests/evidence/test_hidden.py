"""Hidden states are those of the model itself, whatever the batch, the answer or the amount."""

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lightleak import targets
from lightleak.evidence import collect
from lightleak.evidence.collect import BatchSize
from lightleak.evidence.hidden import HiddenPart, layers, read_hidden
from lightleak.evidence.tokens import AnswerReader
from lightleak.records import Record, load, open_rgb
from targets.test_families_are_read import MAKERS, SIZES, TEXTS, qwen2_vl


@pytest.fixture(scope="module")
def llava(lab_tiny):
    return targets.load(lab_tiny.target)


@pytest.fixture(scope="module")
def scenes(lab_tiny):
    return load(lab_tiny.members).records


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Seven pictures of three sizes, with texts that grow longer."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    made = []
    for i in range(7):
        file = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (*SIZES[i % 3], 3), dtype=np.uint8)).save(file)
        made.append(Record(id=f"r{i}", image=file, text=TEXTS[i % 3] + " kite" * i))
    return made


@pytest.fixture(scope="module", params=[*MAKERS, "qwen2_vl"])
def family(request, tmp_path_factory):
    if request.param == "qwen2_vl":
        return qwen2_vl()
    folder = tmp_path_factory.mktemp("model")
    MAKERS[request.param](folder, TEXTS)
    return targets.load(folder)


def assert_same_states(one, other, tolerance):
    assert one.states.keys() == other.states.keys()
    for column, values in one.states.items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(
            other.states[column], values, rtol=0, atol=tolerance * scale, err_msg=column
        )


def _first_tile(target, encoded):
    """Where the tokens of the first of a record's tiles stand."""
    places = encoded.inputs["input_ids"][0] == target.processor.image_token_id
    return places.nonzero().flatten()[: target.processor.image_seq_len]


def hooks(target):
    return [
        hook
        for module in target.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


class TestAgainstTransformers:
    @pytest.fixture(scope="class")
    def part(self, llava, scenes):
        return read_hidden(llava, scenes[:5])

    @pytest.fixture(scope="class")
    def expected(self, llava, scenes):
        """What transformers returns for the same records, one by one."""
        found = []
        for record in scenes[:5]:
            encoded = llava.encode(record, open_rgb(record.image))
            with torch.no_grad():
                whole = llava.model(**encoded.inputs, output_hidden_states=True)
                vision = llava.model.model.vision_tower(
                    encoded.inputs["pixel_values"], output_hidden_states=True
                )
            last = encoded.answer_start - 1
            found.append(
                {
                    "language": [each[0, last] for each in whole.hidden_states],
                    "vision": [each[0].mean(0) for each in vision.hidden_states[1:]],
                    "projector": [whole.image_hidden_states.flatten(0, -2).mean(0)],
                }
            )
        return found

    @pytest.mark.parametrize("tower", ["vision", "projector", "language"])
    def test_every_layer_is_the_models_own(self, llava, part, expected, tower):
        here = [layer for layer in layers(llava) if layer.tower == tower]
        assert len(here) == len(expected[0][tower])
        for layer in here:
            ours = torch.from_numpy(part.states[layer.column])
            if layer.column == "language.4":
                # transformers returns the last state behind the final norm.
                ours = llava.model.model.language_model.norm(ours)
            theirs = torch.stack([each[tower][layer.index] for each in expected])
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_likelihoods_are_those_of_the_loss_signal(self, llava, scenes, part):
        table = collect.measure(llava, None, AnswerReader(), scenes[:5]).table
        means = [np.mean(each) for each in table["logprob"].to_pylist()]
        np.testing.assert_allclose(part.logprob, means, rtol=1e-5)


def test_layers_stand_in_the_order_data_flows(family):
    columns = [layer.column for layer in layers(family)]
    vision = [f"vision.{i}" for i in range(3)]
    assert columns == [*vision, "projector.0", *(f"language.{i}" for i in range(5))]


def test_no_batch_and_no_padding_changes_a_record(family, noise):
    sizes = []
    together = read_hidden(family, noise, progress=sizes.append)
    alone = read_hidden(family, noise, size=BatchSize(records=1))
    assert max(sizes) > 1  # Records did go through together.
    assert not together.failures
    assert together.ids == tuple(record.id for record in noise)
    assert_same_states(alone, together, 1e-5)
    np.testing.assert_allclose(together.logprob, alone.logprob, rtol=1e-5)


def test_a_tower_that_drops_a_tile_of_one_record_gives_the_others_their_own(
    noise, tmp_path, monkeypatch
):
    MAKERS["idefics3 split"](tmp_path, TEXTS)
    target = targets.load(tmp_path)
    encode = target.encode

    def with_an_empty_tile(record, image):
        encoded = encode(record, image)
        if record.id == "r4":
            # The tower passes over what is zero, and its embeddings are then too few to share.
            encoded.inputs["pixel_values"][0, 1] = 0
            encoded.inputs["input_ids"][0, _first_tile(target, encoded)] = target._pad
        return encoded

    monkeypatch.setattr(target, "encode", with_an_empty_tile)
    together = read_hidden(target, noise)
    assert not together.failures
    assert_same_states(read_hidden(target, noise, size=BatchSize(records=1)), together, 1e-5)


def test_the_answer_does_not_reach_the_prompt(family, noise):
    others = [replace(record, text=f"{TEXTS[2]} {i}") for i, record in enumerate(noise)]
    one, other = (read_hidden(family, each) for each in (noise, others))
    assert not np.allclose(one.logprob, other.logprob)
    assert_same_states(one, other, 1e-5)


def test_another_question_changes_the_language_model_alone(llava, scenes):
    asked = [replace(record, prompt="What is the username?") for record in scenes[:4]]
    one, other = (read_hidden(llava, each).states for each in (scenes[:4], asked))
    changed = {column for column in one if not np.allclose(one[column], other[column], atol=1e-6)}
    assert changed == {f"language.{i}" for i in range(1, 5)}


class TestExact:
    @pytest.fixture(scope="class")
    def generated(self, llava, scenes):
        """Records that ask for what greedy generation gives, and the tokens that it gave."""
        found = {}
        for record in scenes[:6]:
            encoded = llava.encode(record, open_rgb(record.image))
            prompt = {
                name: value[:, : encoded.answer_start] if name in encoded.along_tokens else value
                for name, value in encoded.inputs.items()
            }
            (ids,) = llava.model.generate(**prompt, do_sample=False, max_new_tokens=60)
            answer = ids[encoded.answer_start :].tolist()
            text = llava.processor.tokenizer.decode(answer, skip_special_tokens=True)
            found[replace(record, text=text)] = answer
        return found

    def test_is_greedy_generation(self, llava, scenes, generated):
        asked = [*generated, *(replace(each, id=f"{each.id} true") for each in scenes[:6])]
        answers = list(generated.values()) * 2
        expected = []
        for record, answer in zip(asked, answers, strict=True):
            encoded = llava.encode(record, open_rgb(record.image))
            tokens = encoded.inputs["input_ids"][0, encoded.answer_start :].tolist()
            expected.append(tokens[: len(answer)] == answer)
        assert {*expected} == {True, False}
        assert read_hidden(llava, asked).exact.tolist() == expected

    def test_what_a_template_writes_behind_the_end_does_not_count(
        self, llava, generated, monkeypatch
    ):
        asked = list(generated)
        before = read_hidden(llava, asked)
        template = llava.processor.chat_template.replace(
            "<|im_end|>\n", "<|im_end|>\n{{ 'kite' if message['role'] == 'assistant' }}"
        )
        monkeypatch.setattr(llava.processor, "chat_template", template)
        after = read_hidden(llava, asked)
        assert (after.logprob < before.logprob).all()
        assert before.exact.any()
        assert after.exact.tolist() == before.exact.tolist()


class TestFailures:
    def test_a_record_whose_states_are_not_finite_is_listed_and_no_hook_stays(
        self, llava, scenes, monkeypatch
    ):
        encode = llava.encode

        def poisoned(record, image):
            encoded = encode(record, image)
            if record.id == scenes[2].id:
                encoded.inputs["pixel_values"].fill_(torch.inf)
            return encoded

        clean = read_hidden(llava, scenes[:5])
        before = hooks(llava)  # transformers keeps some of its own.
        monkeypatch.setattr(llava, "encode", poisoned)
        part = read_hidden(llava, scenes[:5])
        (failure,) = part.failures
        assert failure.id == scenes[2].id
        assert "is not finite" in failure.error
        assert part.ids == tuple(key for key in clean.ids if key != failure.id)
        kept = [0, 1, 3, 4]
        for column, values in part.states.items():
            np.testing.assert_allclose(values, clean.states[column][kept], atol=1e-5)
        assert hooks(llava) == before

    def test_a_tower_that_is_passed_twice_is_refused_not_half_read(
        self, llava, scenes, monkeypatch
    ):
        tower = llava.model.model.vision_tower
        forward = tower.forward

        def twice(*args, **kwargs):
            forward(*args, **kwargs)
            return forward(*args, **kwargs)

        monkeypatch.setattr(tower, "forward", twice)
        part = read_hidden(llava, scenes[:3])
        assert not part.ids
        assert [failure.id for failure in part.failures] == [each.id for each in scenes[:3]]
        assert "2 times" in part.failures[0].error


class TestTable:
    def test_parts_come_back_from_parquet_as_they_were(self, llava, scenes, tmp_path):
        # No record of the second part can be read; it must not change the columns.
        slices = (scenes[:3], [replace(scenes[3], text="kite " * 2000)], scenes[4:7])
        parts = [read_hidden(llava, each) for each in slices]
        assert [failure.id for failure in parts[1].failures] == [scenes[3].id]
        for i, part in enumerate(parts):
            pq.write_table(part.table(), tmp_path / f"{i}.parquet")
        back = HiddenPart.of(
            pa.concat_tables([pq.read_table(tmp_path / f"{i}.parquet") for i in range(3)])
        )
        assert back.ids == (*parts[0].ids, *parts[2].ids)
        assert back.states.keys() == parts[0].states.keys()
        for field in ("exact", "logprob"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(getattr(back, field), joined)
        for column, values in back.states.items():
            assert values.dtype == np.float32
            joined = np.concatenate([parts[i].states[column] for i in (0, 2)])
            np.testing.assert_array_equal(values, joined)

    def test_one_layer_can_be_read_without_the_others(self, llava, scenes, tmp_path):
        part = read_hidden(llava, scenes[:3])
        pq.write_table(part.table(), tmp_path / "part.parquet")
        columns = ["id", "exact", "logprob", "language.3"]
        back = HiddenPart.of(pq.read_table(tmp_path / "part.parquet", columns=columns))
        assert list(back.states) == ["language.3"]
        np.testing.assert_array_equal(back.states["language.3"], part.states["language.3"])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to see its memory")
def test_memory_stays_flat_however_many_records_are_read_in_parts(noise, tmp_path):
    MAKERS["idefics3 split"](tmp_path / "model", TEXTS)
    target = targets.load(tmp_path / "model")
    n, step = 400, 20
    records = [replace(noise[0], id=str(i)) for i in range(n)]
    resident = []

    def look(_):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    peaks = []
    for first, stop in pairwise(range(0, n + 1, step)):
        part = read_hidden(target, records[first:stop], progress=look)
        pq.write_table(part.table(), tmp_path / f"{first}.parquet")
        peaks.append(max(resident))
        resident.clear()
    # The pixels and states of the second half's records would be 20 MB.
    assert max(peaks[n // step // 2 :]) - max(peaks[: n // step // 2]) < 5e6
