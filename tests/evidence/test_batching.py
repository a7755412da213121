"""Any number of records fits in memory, and how they are batched changes nothing."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from lightleak import targets
from lightleak.errors import UserError
from lightleak.evidence import collect, memory
from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.tokens import AnswerReader
from lightleak.lab.models import tiny_llava
from lightleak.records import Record
from targets.test_families_are_read import TEXTS


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava(folder, TEXTS)
    return targets.load(folder)


@pytest.fixture(scope="module")
def engine(target):
    return GradientEngine(target, select(target, "last3"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Records of several lengths; the seventh has no image that can be opened."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    records = []
    for i in range(22):
        file = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
        records.append(Record(id=f"r{i}", image=file, text=TEXTS[i % 3] + " kite" * (i % 5)))
    (folder / "6.png").write_bytes(b"torn")
    return records


class TestWindows:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        monkeypatch.setattr(collect, "WINDOW", 5)

    def test_no_more_than_two_are_in_memory(self, target, engine, many, monkeypatch):
        made, most = [], 0
        encode = targets.GenerativeTarget.encode

        def counted(self, record, image):
            nonlocal most
            encoded = encode(self, record, image)
            made.append(weakref.ref(encoded))
            most = max(most, sum(each() is not None for each in made))
            return encoded

        monkeypatch.setattr(targets.GenerativeTarget, "encode", counted)
        collect.measure(target, engine, AnswerReader(), many)
        collect.sum_gradients(target, engine, many)
        assert len(made) == 2 * 21
        assert most <= 2 * 5

    def test_encoding_ahead_gives_the_same_in_the_same_order(self, target, many):
        here, ahead = (list(collect.windows(target, many, ahead=each)) for each in (False, True))
        assert [w.failures for w in here] == [w.failures for w in ahead]
        assert [f.id for w in ahead for f in w.failures] == ["r6"]
        for one, other in zip(here, ahead, strict=True):
            assert [each.id for each in one.records] == [each.id for each in other.records]
            for a, b in zip(one.records, other.records, strict=True):
                assert all(torch.equal(value, b.inputs[name]) for name, value in a.inputs.items())

    def test_an_error_while_encoding_ahead_reaches_the_caller(self, target, many, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(collect, "open_rgb", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(collect.windows(target, many, ahead=True))

    def test_a_windows_evidence_is_bit_for_bit_its_own(self, target, many):
        def measured(records):
            # A fresh engine has learned nothing from the windows before.
            engine = GradientEngine(target, select(target, "last3"))
            return collect.measure(target, engine, AnswerReader(), records)

        whole = measured(many)
        assert whole.table["id"].to_pylist() == [f"r{i}" for i in range(22) if i != 6]
        assert [failure.id for failure in whole.failures] == ["r6"]
        assert whole.table.slice(9).equals(measured(many[10:]).table)

    def test_sums_go_on_where_others_stopped(self, target, engine, many):
        whole, ids = collect.sum_gradients(target, engine, many)
        parts, first = collect.sum_gradients(target, engine, many[:8])
        same, rest = collect.sum_gradients(target, engine, many[8:], sums=parts)
        assert same is parts
        assert sorted(first + rest) == sorted(ids)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value)


def test_what_ran_out_of_memory_is_freed_before_it_is_tried_apart(target, many, monkeypatch):
    encoded = collect.encode(target, many[:4]).records
    held, sizes, freed = [], [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]() is None))

    def one(batch):
        sizes.append(len(batch))
        graph = torch.ones(8)
        held.append(weakref.ref(graph))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too large")

    assert not collect.run(target, [list(encoded)], one)
    assert sizes == [4, 2, 2]
    assert freed == [True]


class TestBatchSize:
    def of(self, monkeypatch, free, *arguments, **named):
        monkeypatch.setattr(memory, "available", lambda _: free)
        return memory.batch_size(*arguments, **named)

    def test_the_batches_fit_and_twice_as_many_would_not(self, target, engine, many, monkeypatch):
        free = 30_000_000
        size = self.of(monkeypatch, free, target, engine, many)
        assert 1 < size.tokens < collect.BatchSize().tokens
        encoded = collect.encode(target, many).records
        fits = max(collect.plan(encoded, size), key=len)
        assert len(fits) > 1
        assert memory.peak(target, engine, fits) < free
        assert memory.peak(target, engine, fits * 4) > free * 0.6

    def test_half_the_memory_gives_half_the_tokens(self, target, engine, many, monkeypatch):
        sizes = [
            self.of(monkeypatch, 60_000_000, target, engine, many, share=share).tokens
            for share in (1.0, 0.99, 0.5)
        ]
        assert sizes[0] == sizes[1] > sizes[2]

    def test_gradients_take_more_than_a_forward_pass(self, target, engine, many, monkeypatch):
        free = 20_000_000
        sizes = [self.of(monkeypatch, free, target, each, many).tokens for each in (engine, None)]
        assert sizes[0] < sizes[1]

    def test_much_memory_gives_what_a_core_is_busy_with(self, target, engine, many, monkeypatch):
        assert self.of(monkeypatch, 1 << 40, target, engine, many) == collect.BatchSize()

    def test_a_record_that_does_not_fit_is_refused_with_its_need(
        self, target, engine, many, monkeypatch
    ):
        with pytest.raises(UserError, match=r"one record needs 0\.0\d+ GB.*--dtype"):
            self.of(monkeypatch, 1_000_000, target, engine, many)

    def test_a_limit_of_the_control_group_counts(self, tmp_path):
        assert not list(memory.left_in_groups(tmp_path))
        (tmp_path / "memory.max").write_text("5000\n")
        (tmp_path / "memory.current").write_text("3000\n")
        (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 400\n")
        assert list(memory.left_in_groups(tmp_path)) == [2400]
        (tmp_path / "memory.max").write_text("max\n")
        assert not list(memory.left_in_groups(tmp_path))
