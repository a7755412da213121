"""Every kernel gives the row and column readings of the gradient that autograd would form."""

import time

import pytest
import torch

from lightleak.evidence.gradients import kernels
from lightleak.evidence.gradients.kernels import MaskedReference, SliceReadings, masked_cosine_sum

KERNELS = [kernels.batched, kernels.ghost, kernels.tiles]


def plain(inputs, grads, references):
    """The definition, one record and one reference at a time."""
    rows2, columns2, row_dots, column_dots = [], [], [], []
    for a, b in zip(inputs, grads, strict=True):
        gradient = b.T @ a
        rows2.append((gradient**2).sum(1))
        columns2.append((gradient**2).sum(0))
        row_dots.append(torch.stack([(gradient * r).sum(1) for r in references]))
        column_dots.append(torch.stack([(gradient * r).sum(0) for r in references]))
    return SliceReadings(*map(torch.stack, (rows2, columns2, row_dots, column_dots)))


def parts(readings):
    return (
        readings.row_norms2,
        readings.column_norms2,
        readings.row_dots,
        readings.column_dots,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "tokens", "inp", "out", "k"), [(3, 5, 7, 4, 2), (2, 40, 90, 70, 1)])
def test_readings_equal_the_definition(kernel, n, tokens, inp, out, k):
    torch.manual_seed(0)
    inputs = torch.randn(n, tokens, inp, dtype=torch.float64)
    grads = torch.randn(n, tokens, out, dtype=torch.float64)
    references = torch.randn(k, out, inp, dtype=torch.float64)
    for found, expected in zip(
        parts(kernel(inputs, grads, references)),
        parts(plain(inputs, grads, references)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_references_only_norms_are_read(kernel):
    inputs, grads = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    readings = kernel(inputs, grads, torch.zeros(0, 5, 4))
    assert readings.row_dots.shape == (2, 0, 5)
    torch.testing.assert_close(readings.row_norms2.sum(1), readings.column_norms2.sum(1))


def test_tiles_cut_across_many_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_TILE_ELEMENTS", 20)
    inputs, grads = torch.randn(2, 6, 10).double(), torch.randn(2, 6, 7).double()
    references = torch.randn(2, 7, 10).double()
    for found, expected in zip(
        parts(kernels.tiles(inputs, grads, references)),
        parts(plain(inputs, grads, references)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_the_kernel_is_chosen_by_shape():
    assert kernels.choose(tokens=500, inp=768, out=16) is kernels.batched
    assert kernels.choose(tokens=16, inp=768, out=768) is kernels.ghost
    assert kernels.choose(tokens=200, inp=768, out=768) is kernels.tiles


def test_masked_cosines_equal_the_whole_ones():
    torch.manual_seed(1)
    inputs, grads = torch.randn(3, 5, 6).double(), torch.randn(3, 5, 4).double()
    grads[:, :, 2] = 0  # A row of zeros has no cosine: it counts as 0.
    reference = torch.randn(4, 6).double()
    rows, columns = torch.tensor([0, 2]), torch.tensor([1, 3, 5])
    found = masked_cosine_sum(inputs, grads, MaskedReference.keep(reference, rows, columns))
    for i in range(3):
        gradient = grads[i].T @ inputs[i]
        cosine = torch.nn.functional.cosine_similarity
        expected = cosine(gradient[[0]], reference[[0]], dim=1).sum()
        expected += cosine(gradient[:, columns], reference[:, columns], dim=0).sum()
        torch.testing.assert_close(found[i], expected)


def test_masked_cosines_of_no_rows_and_of_a_vector():
    torch.manual_seed(2)
    inputs, grads = torch.randn(2, 5, 6).double(), torch.ones(2, 5, 1).double()
    reference, nothing = torch.randn(6).double(), torch.tensor([], dtype=torch.int64)
    whole = MaskedReference.keep(reference, torch.tensor([0]))
    expected = torch.nn.functional.cosine_similarity(inputs.sum(1), reference, dim=1)
    torch.testing.assert_close(masked_cosine_sum(inputs, grads, whole), expected)
    assert len(whole) == 1
    none = MaskedReference.keep(reference, nothing)
    assert masked_cosine_sum(inputs, grads, none).tolist() == [0, 0]


class TestChoosing:
    """Timing happens on accelerators only; what it does needs none."""

    @pytest.fixture(autouse=True)
    def nothing_chosen(self, monkeypatch):
        monkeypatch.setattr(kernels, "_chosen", {})

    @pytest.fixture
    def given(self):
        return torch.randn(2, 5, 7), torch.randn(2, 5, 4), torch.randn(1, 4, 7)

    def test_a_kernel_that_disagrees_or_fails_is_never_chosen(self, given):
        def wrong(inputs, grads, references):
            return kernels.tiles(inputs, 1.01 * grads, references)

        def failing(*_):
            raise RuntimeError("not on this device")

        candidates = {"wrong": wrong, "failing": failing}
        assert kernels.fastest(candidates, *given) is kernels.tiles
        assert list(kernels.choices().values()) == ["tiles"]

    def test_the_faster_one_is_chosen_and_shapes_alike_share_it(self, given, monkeypatch):
        def cheap(*_):
            return found

        def slow(*arguments):
            time.sleep(0.01)
            return original(*arguments)

        original, found = kernels.tiles, kernels.tiles(*given)
        monkeypatch.setattr(kernels, "tiles", slow)
        assert kernels.fastest({"cheap": cheap}, *given) is cheap
        kernels.fastest({"cheap": cheap}, given[0][:, :, :], given[1], given[2])
        assert list(kernels.choices().values()) == ["cheap"]

    def test_a_stored_choice_is_taken_without_timing(self, given):
        kernels.fastest({}, *given)
        (key,) = kernels.choices()
        kernels.prefer({key: "ghost"})
        assert kernels.fastest({"ghost": kernels.ghost}, *given) is kernels.ghost

    def test_half_precision_products_without_wider_sums_are_not_used(self):
        """bfloat16 inputs are read to float32's precision, not to bfloat16's."""
        torch.manual_seed(0)
        inputs, grads = (torch.randn(2, 20, size).bfloat16() for size in (300, 400))
        references = torch.randn(1, 400, 300)
        found = kernels.read(inputs, grads, references)
        assert found.row_norms2.dtype == torch.float32
        exact = plain(inputs.double(), grads.double(), references.double())
        for one, other in zip(parts(found), parts(exact), strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()
