"""GradAudit's steps 4 to 6, from slices of known gradients."""

import numpy as np
import pytest

from lightleak import signals
from lightleak.evidence.readings import GradientSlices, SliceBlock, slice_axes
from lightleak.signals import cross
from lightleak.signals.gradaudit import keep

GAPS = np.array([0.05, 0.30, -0.2, 0.11, 0.02, 0.0, 0.09, 0.12, -0.1, 0.01])


@pytest.mark.parametrize(
    ("strategy", "tau", "q", "kept"),
    [
        ("fixed_tau", 0.1, 0.9, {1, 3, 7}),
        ("fixed_tau", 0.5, 0.9, set()),
        ("tau_or_topq", 0.1, 0.9, {1, 3, 7}),
        ("tau_or_topq", 0.5, 0.9, {1}),
        ("tau_or_topq_union", 0.115, 0.7, {1, 3, 7}),
        ("adaptive_keep", 0.1, 0.9, {1, 3, 7}),
        ("adaptive_keep", 0.29, 0.9, {1, 7}),
        ("quantile_topk", 0.1, 0.8, {1, 7}),
    ],
)
def test_each_published_mask(strategy, tau, q, kept):
    assert set(np.flatnonzero(keep(GAPS, strategy, tau, q))) == kept


def test_quantile_topk_falls_back_to_the_sixteen_largest():
    flat = np.zeros(40)
    flat[:3] = -1.0
    kept = keep(flat, "quantile_topk", 0.1, 0.8)
    assert kept.sum() == 16
    assert not kept[:3].any()


class Gradients:
    """Random gradients of one 4 × 3 matrix, and their slices against crossed references."""

    def __init__(self, n=24, seed=0):
        rng = np.random.default_rng(seed)
        self.whole = rng.normal(size=(n, 4, 3)) + 0.3
        self.side = np.array(["suspect", "control"] * (n // 2))
        self.folds = np.arange(n) // 2 % 2
        self.inside = np.stack(
            [(self.side == "suspect") & (self.folds != k) for k in range(2)], axis=1
        )
        self.references = np.stack([self.whole[self.inside[:, k]].mean(0) for k in range(2)])

    @staticmethod
    def both(values):
        """Row sums then column sums, as slices are laid out."""
        return np.concatenate([values.sum(-1), values.sum(-2)], axis=-1)

    def slices(self, pieces=1):
        axes = slice_axes({"w": (4, 3)})
        rows = np.array_split(np.arange(len(self.whole)), pieces)

        def blocks():
            for chosen in rows:
                gradients = self.whole[chosen]
                yield SliceBlock(
                    chosen,
                    self.both(gradients**2),
                    self.both(gradients[:, None] * self.references),
                    self.inside[chosen],
                )

        return GradientSlices(
            len(self.whole),
            axes,
            self.both(self.references**2),
            self.inside.sum(0),
            blocks,
            lora=False,
        )

    def cosine(self, i, reference):
        g = self.whole[i]
        rows = (
            (g * reference).sum(1) / np.linalg.norm(g, axis=1) / np.linalg.norm(reference, axis=1)
        )
        columns = (g * reference).sum(0) / np.linalg.norm(g, axis=0)
        return np.concatenate([rows, columns / np.linalg.norm(reference, axis=0)])

    def expected(self, leave_one_out):
        """Crossed GradAudit from whole gradients, member by member."""
        scores = np.empty(len(self.whole))
        for k in range(2):
            means = {}
            for side in ("suspect", "control"):
                cosines = []
                for i in np.flatnonzero((self.side == side) & (self.folds != k)):
                    reference = self.references[k]
                    if leave_one_out and self.inside[i, k]:
                        others = self.inside[:, k].copy()
                        others[i] = False
                        reference = self.whole[others].mean(0)
                    cosines.append(self.cosine(i, reference))
                means[side] = np.mean(cosines, axis=0)
            gap = means["suspect"] - means["control"]
            kept = np.concatenate(
                [keep(gap[:4], "tau_or_topq", 0.1, 0.9), keep(gap[4:], "tau_or_topq", 0.1, 0.9)]
            )
            for i in np.flatnonzero(self.folds == k):
                scores[i] = self.cosine(i, self.references[k])[kept].mean()
        return scores


@pytest.mark.parametrize("self_inclusion", ["leave_one_out", "published"])
def test_crossed_scores_equal_a_plain_computation(self_inclusion):
    gradients = Gradients()
    fits = cross("crossfit", 2, gradients.side, gradients.folds)
    found = signals.get("gradaudit").score(
        gradients.slices(), fits, {"self_inclusion": self_inclusion}
    )
    np.testing.assert_allclose(found, gradients.expected(self_inclusion == "leave_one_out"))


def test_crossing_leaves_one_out_unless_told():
    gradients = Gradients()
    fits = cross("crossfit", 2, gradients.side, gradients.folds)
    found = signals.get("gradaudit").score(gradients.slices(), fits)
    np.testing.assert_allclose(found, gradients.expected(leave_one_out=True))
    assert not np.allclose(found, gradients.expected(leave_one_out=False))


def test_scores_do_not_depend_on_how_evidence_was_cut():
    gradients = Gradients()
    fits = cross("crossfit", 2, gradients.side, gradients.folds)
    whole = signals.get("gradaudit").score(gradients.slices(), fits)
    np.testing.assert_allclose(signals.get("gradaudit").score(gradients.slices(7), fits), whole)


def test_a_zero_slice_has_cosine_zero():
    gradients = Gradients()
    gradients.whole[3] = 0
    fits = cross("crossfit", 2, gradients.side, gradients.folds)
    assert signals.get("gradaudit").score(gradients.slices(), fits)[3] == 0


def test_a_mask_that_keeps_nothing_leaves_no_score():
    gradients = Gradients()
    fits = cross("crossfit", 2, gradients.side, gradients.folds)
    options = {"mask": "fixed_tau", "tau": 5.0}
    assert np.isnan(signals.get("gradaudit").score(gradients.slices(), fits, options)).all()


def test_a_split_scores_only_what_is_audited():
    side = np.array(["member", "nonmember", "suspect", "control"])
    (fit,) = cross("split", 2, side, np.full(4, -1))
    assert fit.scored.tolist() == [False, False, True, True]
    assert fit.members.tolist() == [True, False, False, False]
