"""Every kernel gives the row and column readings of the gradient that autograd would form."""

import pytest
import torch

from lightleak.evidence.gradients import kernels
from lightleak.evidence.gradients.capture import capture
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


class TestCapture:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 6), torch.nn.GELU(), torch.nn.Linear(6, 3)
        ).requires_grad_(False)

    def gradients(self, model, names, x, **kwargs):
        modules = {name: model.get_submodule(name) for name in names}
        found = {}

        def consume(name, inputs, grads):
            found[name] = grads.flatten(0, -2).T @ inputs.flatten(0, -2)

        with capture(modules, consume, x.device) as collector:
            loss = kwargs.get("run", model)(x).square().sum()
            torch.autograd.backward(loss)
            collector.flush()
        return found

    def expected(self, model, names, x, run=None):
        model.requires_grad_(True)
        (run or model)(x).square().sum().backward()
        result = {name: model.get_submodule(name).weight.grad.clone() for name in names}
        model.zero_grad()
        model.requires_grad_(False)
        return result

    def test_gives_the_weight_gradient_of_frozen_layers(self, model):
        x = torch.randn(4, 5)
        found = self.gradients(model, ["0", "2"], x)
        for name, gradient in self.expected(model, ["0", "2"], x).items():
            torch.testing.assert_close(found[name], gradient)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_layer_used_twice_is_one_gradient(self, model):
        layer = torch.nn.Linear(5, 5).requires_grad_(False)
        model = torch.nn.Sequential(layer, torch.nn.Tanh(), layer)
        x = torch.randn(4, 5)
        found = self.gradients(model, ["0"], x)
        torch.testing.assert_close(found["0"], self.expected(model, ["0"], x)["0"])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_holds_under_gradient_checkpointing(self, model, reentrant):
        from torch.utils.checkpoint import checkpoint

        x = torch.randn(4, 5, requires_grad=True)

        def run(value):
            return checkpoint(model, value, use_reentrant=reentrant)

        found = self.gradients(model, ["0", "2"], x, run=run)
        for name, gradient in self.expected(model, ["0", "2"], x, run=run).items():
            torch.testing.assert_close(found[name], gradient)

    def test_the_backward_pass_stops_at_the_first_selected_layer(self, model):
        needed = []
        model[2].register_forward_pre_hook(lambda _, given: needed.append(given[0].requires_grad))
        found = self.gradients(model, ["2"], torch.randn(4, 5))
        assert set(found) == {"2"}
        assert needed == [False]

    def test_restores_the_model_after_an_error(self, model):
        before = model(torch.ones(1, 5))
        with (
            pytest.raises(RuntimeError, match="mine"),
            capture({"0": model[0]}, lambda *_: None, torch.device("cpu")),
        ):
            raise RuntimeError("mine")
        assert "forward" not in vars(model[0])
        torch.testing.assert_close(model(torch.ones(1, 5)), before)
