"""Each signal of a dual encoder equals its formula, written out pair by pair in float64."""

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize

from lightleak import signals
from lightleak.evidence.readings import (
    ACROSS,
    AugmentedCosines,
    ContrastLoss,
    DropoutCosines,
    GradientNorms,
    GradientSlices,
    PairEmbeddings,
    slice_axes,
)
from lightleak.evidence.table import (
    augmented_cosines,
    contrast_loss,
    dropout_cosines,
    gradient_norms,
    gradient_slices,
    pair_embeddings,
)
from lightleak.signals import cross

OF_ONE_MODEL = [
    name for name in signals.names("dual-encoder") if signals.get(name).needs not in ACROSS
]
N = 96
MATRICES = {"one": (3, 2), "other": (2, 4)}
SIDE = np.array(["suspect", "control"] * (N // 2))
FOLDS = np.arange(N) // 2 % 2
FITS = cross("crossfit", 2, SIDE, FOLDS)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pairs(rng):
    """Unit embeddings, float32 as they are stored; every image leans towards its own text."""
    text = rng.normal(size=(N, 8))
    image = 0.8 * text + rng.normal(size=(N, 8))
    return PairEmbeddings(*(unit(each).astype(np.float32) for each in (image, text)))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(pairs):
    """Cosine of each pair, one product at a time."""
    both = zip(pairs.image.tolist(), pairs.text.tolist(), strict=True)
    return np.array([math.fsum(a * b for a, b in zip(*pair, strict=True)) for pair in both])


class TestFormulas:
    def test_cosine_is_summed_in_float64(self, pairs):
        found = signals.get("cosine").score(pairs)
        np.testing.assert_allclose(found, cosines(pairs), rtol=1e-12)

    def test_cosine_aug_adds_what_each_augmentation_costs(self, rng):
        plain, augmented = rng.normal(size=5), rng.normal(size=(5, 7))
        expected = [
            own + sum(own - other for other in others)
            for own, others in zip(plain, augmented, strict=True)
        ]
        found = signals.get("cosine_aug").score(AugmentedCosines(plain, augmented))
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    def test_contrast_loss_is_the_loss_turned_round(self):
        losses = ContrastLoss(np.array([0.5, 3.0, 0.0]))
        assert signals.get("contrast_loss").score(losses).tolist() == [-0.5, -3.0, 0.0]

    def test_dropout_is_the_unbiased_variance_turned_round(self, rng):
        passes = rng.normal(size=(5, 10))
        expected = [-sum((x - sum(row) / 10) ** 2 for x in row) / 9 for row in passes.tolist()]
        found = signals.get("dropout").score(DropoutCosines(passes))
        np.testing.assert_allclose(found, expected, rtol=1e-12)

    @pytest.mark.parametrize("spread", [0.0, 0.5])
    def test_weak_is_a_balanced_logistic_regression(self, pairs, spread):
        features = np.concatenate([pairs.image, pairs.text], axis=1).astype(np.float64)
        cosine = cosines(pairs)
        expected = np.empty(N)
        for k in range(2):
            here = np.equal(FOLDS, k)
            known = [i for i in range(N) if SIDE[i] == "control" and FOLDS[i] != k]
            least = np.mean(cosine[known]) + spread * np.std(cosine[known])
            bold = [
                i for i in range(N) if SIDE[i] == "suspect" and FOLDS[i] != k and cosine[i] >= least
            ]
            weights = logistic_regression(features[known], features[bold])
            expected[here] = features[here] @ weights[:-1] + weights[-1]
        found = signals.get("weak").score(pairs, FITS, {"spread": spread})
        np.testing.assert_allclose(found, expected, atol=2e-3)


def logistic_regression(negative, positive):
    """Weights and intercept: both classes count alike; ridge penalty 1/2 on the weights."""
    x = np.concatenate([negative, positive])
    y = np.repeat([-1.0, 1.0], [len(negative), len(positive)])
    share = len(y) / 2 / np.where(y > 0, len(positive), len(negative))

    def objective(w):
        margin = y * (x @ w[:-1] + w[-1])
        return w[:-1] @ w[:-1] / 2 + share @ np.logaddexp(0, -margin)

    return minimize(objective, np.zeros(x.shape[1] + 1), tol=1e-12).x


class TestDirection:
    """What a member looks like scores higher."""

    def test_an_image_closer_to_its_text(self):
        image = unit(np.array([[1.0, 0.1], [1.0, 1.0]]))
        close, far = signals.get("cosine").score(PairEmbeddings(image, np.eye(2)[[0, 0]]))
        assert close > far

    def test_a_pair_that_an_altered_image_harms_more(self):
        evidence = AugmentedCosines(np.array([0.5, 0.5]), np.array([[0.1, 0.2], [0.4, 0.5]]))
        harmed, unharmed = signals.get("cosine_aug").score(evidence)
        assert harmed > unharmed

    def test_a_pair_that_is_steadier_under_dropout(self):
        evidence = DropoutCosines(np.array([[0.5, 0.51, 0.5], [0.5, 0.9, 0.1]]))
        steady, shaken = signals.get("dropout").score(evidence)
        assert steady > shaken

    def test_a_pair_that_lies_where_pairs_stand_out(self, rng):
        # Half of the suspects are seen: aligned, and in a region of their own.
        seen = (SIDE == "suspect") & (np.arange(N) % 8 < 4)
        text = rng.normal(size=(N, 8)) + 2 * seen[:, None]
        image = rng.normal(size=(N, 8)) + np.where(seen[:, None], 3 * text, 0)
        scores = signals.get("weak").score(PairEmbeddings(unit(image), unit(text)), FITS)
        assert scores[seen].min() > scores[~seen].max()


class TestWithoutAScore:
    def test_attention_that_takes_no_dropout(self):
        scores = signals.get("dropout").score(DropoutCosines(np.zeros((3, 0))))
        assert np.isnan(scores).all()

    def test_too_few_pairs_that_stand_out(self, pairs):
        assert np.isnan(signals.get("weak").score(pairs, FITS, {"spread": 50.0})).all()

    @pytest.mark.parametrize("name", ["cosine", "cosine_aug", "dropout", "contrast_loss", "weak"])
    def test_a_pair_that_is_no_number_harms_no_other(self, rng, pairs, name):
        image, augmented, passes, losses = (
            pairs.image.copy(),
            rng.normal(size=(N, 7)),
            rng.normal(size=(N, 10)),
            rng.normal(size=N),
        )
        for each in (image, augmented, passes, losses):
            each[0] = np.nan
        broken = PairEmbeddings(image, pairs.text)
        evidence = {
            "cosine": broken,
            "cosine_aug": AugmentedCosines(broken.cosine, augmented),
            "dropout": DropoutCosines(passes),
            "contrast_loss": ContrastLoss(losses),
            "weak": broken,
        }[name]
        signal = signals.get(name)
        options = {"spread": 0.0} if name == "weak" else {}
        scores = signal.score(evidence, FITS if signal.fitted else (), options)
        assert np.flatnonzero(np.isnan(scores)).tolist() == [0]

    @pytest.mark.parametrize("name", ["cosine", "cosine_aug", "dropout", "contrast_loss", "weak"])
    def test_the_reason_speaks_of_pairs(self, name):
        # A dual encoder answers nothing: a reason about an answer's tokens would mislead.
        assert "answer" not in signals.get(name).unscorable


class TestWeakKeepsItsFoldsApart:
    def test_a_scored_pair_is_no_part_of_what_scores_it(self, pairs):
        image = pairs.image.copy()
        image[0] = pairs.text[0]  # A suspect of the first fold now stands out most of all.
        options = {"spread": 0.0}
        before = signals.get("weak").score(pairs, FITS, options)
        after = signals.get("weak").score(PairEmbeddings(image, pairs.text), FITS, options)
        first, second = (np.flatnonzero(np.equal(FOLDS, k)) for k in (0, 1))
        assert (after[first] != before[first]).tolist() == [True] + [False] * (len(first) - 1)
        assert (after[second] != before[second]).any()

    def test_in_a_split_only_the_calibration_counts(self, pairs):
        side = np.array(["member", "nonmember", "suspect", "control"] * (N // 4))
        fits = cross("split", 2, side, np.full(N, -1))
        image = pairs.image.copy()
        image[side == "suspect"] = pairs.text[side == "suspect"]
        options = {"spread": 0.0}
        before = signals.get("weak").score(pairs, fits, options)
        after = signals.get("weak").score(PairEmbeddings(image, pairs.text), fits, options)
        assert np.isnan(after[np.isin(side, ("member", "nonmember"))]).all()
        assert (after[side == "control"] == before[side == "control"]).all()
        assert (after[side == "suspect"] != before[side == "suspect"]).all()


class TestEverySignal:
    """The contract of all signals for dual encoders, from evidence as it is stored."""

    @pytest.fixture
    def table(self, rng, pairs):
        n_slices = sum(map(sum, MATRICES.values()))
        columns = {
            "image_embedding": pairs.image,
            "text_embedding": pairs.text,
            "augmented_cosines": rng.normal(size=(N, 7)),
            "dropout_cosines": rng.normal(size=(N, 10)),
            "matrix_norms": rng.random((N, len(MATRICES))),
            "slice_norms2": 1 + rng.random((N, n_slices)),
            "slice_dots": rng.normal(size=(N, 2 * n_slices)),
            "in_reference": np.stack([fit.members for fit in FITS], axis=1),
        }
        lists = {name: list(values) for name, values in columns.items()}
        return pa.table({**lists, "contrast_loss": rng.random(N)})

    @staticmethod
    def scores(name, tables, order):
        """Scores from a table in parts, whose rows are in that order."""
        whole = pa.concat_tables(tables)
        n_slices = sum(map(sum, MATRICES.values()))
        sizes = np.array([fit.members.sum() for fit in FITS])
        of_kind = {
            PairEmbeddings: pair_embeddings,
            AugmentedCosines: augmented_cosines,
            DropoutCosines: dropout_cosines,
            ContrastLoss: contrast_loss,
            GradientNorms: lambda table: gradient_norms(table, list(MATRICES)),
            GradientSlices: lambda _: gradient_slices(
                lambda: iter(tables),
                N,
                slice_axes(MATRICES),
                np.ones((2, n_slices)),
                sizes,
                lora=False,
            ),
        }
        signal = signals.get(name)
        fits = cross("crossfit", 2, SIDE[order], FOLDS[order])
        options = {"spread": 0.0} if name == "weak" else {}
        return signal.score(of_kind[signal.needs](whole), fits if signal.fitted else (), options)

    @pytest.mark.parametrize("name", OF_ONE_MODEL)
    def test_records_in_another_order_have_the_same_scores(self, rng, table, name):
        usual, order = np.arange(N), rng.permutation(N)
        expected = self.scores(name, [table], usual)
        assert np.isfinite(expected).all()
        assert len(set(expected.tolist())) > N / 2
        turned = self.scores(name, [table.take(order)], order)
        # `weak` is fitted in the embeddings' own float32, where sums depend on their order.
        np.testing.assert_allclose(turned, expected[order], atol=1e-5 if name == "weak" else 1e-9)

    @pytest.mark.parametrize("name", OF_ONE_MODEL)
    def test_evidence_in_parts_has_the_same_scores(self, table, name):
        usual = np.arange(N)
        parts = [table.slice(0, 7), table.slice(7, 30), table.slice(37)]
        np.testing.assert_array_equal(
            self.scores(name, parts, usual), self.scores(name, [table], usual)
        )
