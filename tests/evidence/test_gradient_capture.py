"""Whatever uses a parameter, a batch's readings are those that autograd gives record by record."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightleak.evidence.gradients import GradientEngine, select
from lightleak.evidence.gradients.kernels import MaskedReference
from lightleak.evidence.gradients.rows import UnevenRows
from lightleak.evidence.readings import slice_axes
from lightleak.targets import Batch, Outputs


@dataclass(frozen=True)
class Losses(Outputs):
    """Losses alone."""

    given: torch.Tensor

    @property
    def losses(self):
        return self.given

    def vectors(self):
        return list(self.given)

    def detach(self):
        return Losses(self.given.detach())


@dataclass
class Toy:
    """What the engine asks of a target: a frozen model that takes inputs (n, …) to (n, …)."""

    model: nn.Module
    wide: torch.dtype = torch.float64
    dtype: torch.dtype = torch.float64
    has_adapter: bool = False

    def __post_init__(self):
        self.device = torch.device("cpu")
        self.parts = SimpleNamespace(text_blocks=(), vision_blocks=(), projector=())
        self.model.eval().requires_grad_(False)

    def outputs(self, batch):
        out = self.model(batch.inputs["x"])
        weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).reshape(out[0].shape)
        return Losses((weights * out).sin().flatten(1).sum(1))


def batch_of(x, chosen=slice(None)):
    part = x[chosen]
    ids = tuple(map(str, range(len(part))))
    return Batch({"x": part}, ids, ((0, 1),) * len(part), (), (1,) * len(part))


def one_by_one(target, x, names):
    """Whole gradients of each record, by plain autograd: a list of name → gradient."""
    parameters = dict(target.model.named_parameters())
    chosen = [parameters[name].requires_grad_(True) for name in names]
    found = []
    for i in range(len(x)):
        loss = target.outputs(batch_of(x, slice(i, i + 1))).losses.sum()
        gradients = torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
        found.append(dict(zip(names, gradients, strict=True)))
    target.model.requires_grad_(False)
    return found


def as_matrix(gradient):
    return gradient.flatten(1) if gradient.ndim > 1 else gradient.reshape(1, -1)


def expected(gradients, references, shapes):
    """Norms and dots of all slices, laid out as the engine does: (n, s) and (n, k, s)."""

    def slices(of):
        parts = []
        for name, shape in shapes.items():
            matrix = of(name)
            parts += [matrix.sum(-1), matrix.sum(-2)][: len(shape)]
        return torch.cat(parts, -1)

    norms = [slices(lambda name, g=g: as_matrix(g[name]) ** 2) for g in gradients]
    dots = [
        torch.stack(
            [
                slices(lambda name, g=g, j=j: as_matrix(g[name]) * as_matrix(references[name][j]))
                for j in range(2)
            ]
        )
        for g in gradients
    ]
    return torch.stack(norms), torch.stack(dots)


def check(model, x, *, dense=(), together=True):
    """Read, sum and score `everything`, and compare with plain autograd."""
    target = Toy(model.double())
    engine = GradientEngine(target, select(target, "everything"))
    shapes = engine.selection.shapes
    assert set(engine.selection.dense) == set(dense)
    gradients = one_by_one(target, x, list(shapes))
    torch.manual_seed(1)
    references = {
        name: torch.randn(2, *shape, dtype=torch.float64) for name, shape in shapes.items()
    }
    norms, dots = expected(gradients, references, shapes)
    batches = [batch_of(x, slice(i, i + 1)) for i in range(len(x))]
    for batch in batches:  # Teaches the engine how many rows a record takes.
        engine.read(batch, references)
    if together:
        batches = [batch_of(x)]
    found = [engine.read(batch, references) for batch in batches]
    tight = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([each.norms2 for each in found]), norms, **tight)
    torch.testing.assert_close(torch.cat([each.dots for each in found]), dots, **tight)
    assert slice_axes(shapes)[-1].stop == norms.shape[1]

    sums = {}
    for batch in batches:
        engine.add_gradients(batch, sums)
    for name in shapes:
        whole = sum(each[name] for each in gradients)
        torch.testing.assert_close(sums[name], whole.reshape(shapes[name]), **tight)

    kept, scores, count = {}, torch.zeros(len(x), dtype=torch.float64), 0
    for name in shapes:
        size = as_matrix(gradients[0][name]).shape
        rows = torch.arange(0, size[0], 2)
        columns = torch.arange(0, size[1], 3) if len(shapes[name]) == 2 else None
        kept[name] = MaskedReference.keep(references[name][0], rows, columns)
        count += len(kept[name])
        for i, each in enumerate(gradients):
            gradient, reference = as_matrix(each[name]), as_matrix(references[name][0])
            cosine = functional.cosine_similarity
            scores[i] += cosine(gradient[rows], reference[rows], dim=1, eps=1e-300).sum()
            if columns is not None:
                part = cosine(gradient[:, columns], reference[:, columns], dim=0, eps=1e-300)
                scores[i] += part.sum()
    score = torch.cat([engine.score(batch, kept) for batch in batches])
    torch.testing.assert_close(score, scores / count, **tight)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


class Rms(nn.Module):
    """A norm of no known class, whose weight is an offset from one."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(size))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


class Applied(nn.Module):
    """Some layers and a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, x):
        return self.function(x, **self.layers)


def images(n=3, channels=2, side=6):
    torch.manual_seed(0)
    return torch.randn(n, channels, side, side, dtype=torch.float64)


def vectors(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


def tokens(n=3, length=5, vocabulary=9):
    return torch.arange(n * length).reshape(n, length) * 5 % (vocabulary - 2)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), Rms(6)])
def test_linear_layers_with_biases_and_norms(norm):
    check(nn.Sequential(nn.Linear(5, 6), norm, nn.GELU(), nn.Linear(6, 4)), vectors(3, 7, 5))


def test_norms_of_heads():
    def heads(x, project, norm):
        return norm(project(x).unflatten(-1, (3, 4))).tanh()

    check(Applied(heads, project=nn.Linear(5, 12), norm=nn.LayerNorm(4)), vectors(3, 7, 5))


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(2, 5, 3, stride=3), nn.Conv2d(2, 5, (3, 2), stride=2, padding=(1, 0))],
)
def test_patches_of_an_image(convolution):
    def patches(x, convolution):
        return convolution(x).flatten(2).mT.tanh()

    check(Applied(patches, convolution=convolution), images())


def test_patches_in_three_dimensions_of_all_records_end_to_end():
    def patches(x, convolution, norm):
        return norm(convolution(x.flatten(0, 1)).flatten(1)).unflatten(0, (len(x), -1)).tanh()

    layers = {"convolution": nn.Conv3d(2, 5, (2, 3, 3), stride=(2, 3, 3)), "norm": Rms(5)}
    check(Applied(patches, **layers), vectors(3, 4, 2, 2, 3, 3))


def test_convolutions_that_are_no_products_of_patches_are_read_whole():
    model = Applied(lambda x, convolution: convolution(x), convolution=nn.Conv2d(2, 4, 2, groups=2))
    names = ("layers.convolution.weight", "layers.convolution.bias")
    check(model, images(), dense=names, together=False)


def test_embeddings_with_padding_and_positions():
    def embed(ids, words, places):
        return (words(ids) + places(torch.arange(ids.shape[1])[None])).tanh()

    words, places = nn.Embedding(9, 4, padding_idx=2), nn.Embedding(6, 4)
    check(Applied(embed, words=words, places=places), tokens())


def test_an_embedding_used_twice():
    check(Applied(lambda ids, e: (e(ids) * e(ids.flip(1))).tanh(), e=nn.Embedding(9, 4)), tokens())


def test_an_embedding_tied_to_the_head():
    model = Applied(
        lambda ids, embed, mix, head: head(mix(embed(ids)).tanh()).log_softmax(-1),
        embed=nn.Embedding(9, 4, padding_idx=2),
        mix=nn.Linear(4, 4),
        head=nn.Linear(4, 9, bias=False),
    )
    model.layers["head"].weight = model.layers["embed"].weight
    check(model, tokens())


def test_a_layer_used_twice_with_different_lengths():
    def twice(x, layer):
        return layer(layer(x).tanh()[:, 2:])

    check(Applied(twice, layer=nn.Linear(5, 5)), vectors(3, 7, 5))


def test_layers_whose_gradient_ends_before_the_tokens_do():
    """As padding does, and as images and prompts in a last layer; one record reaches further."""

    def some(x, first, last):
        shown = torch.zeros(3, 7, 1, dtype=x.dtype)
        shown[:, 2:4], shown[1, 4] = 1, 1
        return last(first(x).tanh()) * shown[: len(x)]

    model = Applied(some, first=nn.Linear(5, 6), last=nn.Linear(6, 4))
    x = vectors(3, 7, 5)
    target = Toy(model.double())
    engine = GradientEngine(target, select(target, "everything"))
    shapes = engine.selection.shapes
    found = engine.read(batch_of(x), {}).matrix_norms
    parameters = [p.requires_grad_(True) for p in model.parameters()]
    losses = target.outputs(batch_of(x)).losses
    for i, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        expected = torch.stack([gradient.norm() for gradient in gradients])
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-12)
    assert len(shapes) == 4


def test_a_layer_that_only_zeros_come_back_to():
    def nothing(x, first, last):
        return last(first(x)) * 0

    check(Applied(nothing, first=nn.Linear(5, 6), last=nn.Linear(6, 4)), vectors(2, 7, 5))


class TestAttention:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.last(self.attention(x, x, x, need_weights=False)[0]) * self.scale

    dense = (
        "scale",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    )

    def test_what_no_layer_shows_is_read_whole_one_record_at_a_time(self):
        check(self.Block(), vectors(2, 5, 4), dense=self.dense, together=False)

    def test_and_a_larger_batch_is_refused(self):
        target = Toy(self.Block().double())
        engine = GradientEngine(target, select(target, "everything"))
        assert engine.one_by_one
        with pytest.raises(UnevenRows):
            engine.read(batch_of(vectors(2, 5, 4)), {})


class PastItsLayer(nn.Module):
    """Uses an embedding as a head, and a layer turned round, by their weights alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.layer = nn.Linear(5, 5)
        self.plain = nn.Linear(5, 5)

    def forward(self, x):
        hidden = self.plain(self.layer(self.embedding(x))).tanh()
        turned = functional.linear(hidden, self.layer.weight.T)
        return functional.linear(turned, self.embedding.weight)


def test_a_weight_that_is_used_past_its_own_layer_is_found_and_read_whole():
    torch.manual_seed(0)
    target = Toy(PastItsLayer().double())
    x = torch.randint(6, (1, 4))
    captured = GradientEngine(target, select(target, "everything"))
    found = captured.unseen(batch_of(x))
    assert found == {"embedding.weight", "layer.weight"}
    engine = GradientEngine(target, captured.selection.whole(found))
    assert engine.one_by_one
    (gradients,) = one_by_one(target, x, list(engine.selection.shapes))
    sums = {}
    engine.add_gradients(batch_of(x), sums)
    for name, expected_gradient in gradients.items():
        torch.testing.assert_close(sums[name].reshape(expected_gradient.shape), expected_gradient)
    assert engine.unseen(batch_of(x)) == set()


def test_a_layer_may_be_called_by_keyword_and_its_output_changed_in_place():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return self.layer(input=x).mul_(2).tanh()

    torch.manual_seed(0)
    check(Inside(), torch.randn(3, 4, 5, dtype=torch.float64))


def test_the_model_is_restored_after_an_error():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    target = Toy(model.double())
    engine = GradientEngine(target, select(target, "everything"))
    model[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("mine")))
    with pytest.raises(RuntimeError, match="mine"):
        engine.read(batch_of(vectors(2, 3, 5)), {})
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_the_backward_pass_stops_at_the_first_selected_layer():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    target = Toy(model.double())
    selection = select(target, "everything").without({"0.weight", "0.bias", "1.bias"})
    needed = []
    model[1].register_forward_pre_hook(lambda _, given: needed.append(given[0].requires_grad))
    sums = {}
    GradientEngine(target, selection).add_gradients(batch_of(vectors(2, 3, 5)), sums)
    assert set(sums) == {"1.weight"}
    assert needed == [False]


def test_a_bfloat16_model_is_summed_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 20)).bfloat16()
    target = Toy(model, wide=torch.float32)
    engine = GradientEngine(target, select(target, "everything"))
    x = vectors(2, 60, 40).bfloat16()
    alone = [{}, {}]
    for i, sums in enumerate(alone):
        engine.add_gradients(batch_of(x, slice(i, i + 1)), sums)
    together = {}
    engine.add_gradients(batch_of(x), together)
    for name, total in together.items():
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, alone[0][name] + alone[1][name], rtol=1e-4, atol=1e-4)
    # Sums in bfloat16 would hold three digits.
    norms = engine.read(batch_of(x), {}).norms2
    assert norms.dtype == torch.float32
    rows = engine.selection.shapes["0.weight"][0]
    expected = torch.stack([sums["0.weight"].square().sum(1) for sums in alone])
    torch.testing.assert_close(norms[:, :rows], expected, rtol=1e-5, atol=1e-6)
