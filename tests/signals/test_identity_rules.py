"""Who is recognised, and how a name ranks among its decoys: each rule equals it written out."""

import numpy as np
import pytest
from scipy import stats

from lightleak.signals.identity import (
    TOP,
    beyond_others,
    majority,
    reciprocal_ranks,
    recognised,
    share_at_least,
    standing_out,
    sub_samples,
    votes,
)

ME = 7


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([7, 7, 1, 2], True),
        ([7, 7, 1, 1], False),
        ([7, 1, 2, 3], False),
        ([1, 1, 1, 7], False),
        ([1, 1, 2, 2], False),
        ([7], True),
        ([1], False),
    ],
)
def test_only_the_unique_most_frequent_name_recognises(predicted, expected):
    assert recognised(np.array(predicted)[:, None], ME).tolist() == [expected]


def test_each_template_recognises_by_itself():
    predicted = np.array([[7, 1, 7], [7, 1, 1], [2, 7, 1]])
    assert recognised(predicted, ME).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [([7, 7, 1], True), ([7, 7, 1, 1], False), ([7, 7, 1, 2, 3], False), ([7], True)],
)
def test_a_majority_is_more_than_half_of_the_photos(predicted, expected):
    assert majority(np.array(predicted)[:, None], ME).tolist() == [expected]


def test_votes_count_the_photos_that_a_name_was_given():
    predicted = np.array([[7, 1], [7, 2], [3, 7]])
    assert votes(predicted, np.array([7, 2, 9])).tolist() == [[2, 1], [0, 1], [0, 0]]


class TestBeyondOthers:
    @staticmethod
    def naive(affinities, people, owners):
        """Name by name and photo by photo; the last picture is the blank one."""
        result = np.empty_like(affinities[..., :-1])
        for i, of_name in enumerate(affinities):
            for k, shown in enumerate(people):
                others = [of_name[..., -1]]
                for other in sorted(set(people) - {shown, owners[i]}):
                    others.append(of_name[..., :-1][..., people == other].mean(axis=-1))
                result[i, ..., k] = of_name[..., k] - np.mean(others, axis=0)
        return result

    @pytest.mark.parametrize("shape", [(9,), (9, 3)])
    def test_equals_plain_loops(self, shape):
        people = np.array([0, 0, 2, 2, 2, 1, 4])
        owners = np.array([-1, -1, 0, 1, 2, 4, 3, -1, 0])
        affinities = np.random.default_rng(0).normal(size=(*shape, len(people) + 1))
        np.testing.assert_allclose(
            beyond_others(affinities, people, owners), self.naive(affinities, people, owners)
        )

    def test_one_person_is_compared_with_the_blank_picture_alone(self):
        affinities = np.random.default_rng(0).normal(size=(4, 2, 4))
        found = beyond_others(affinities, np.array([0, 0, 0]), np.array([-1, -1, -1, 0]))
        np.testing.assert_allclose(found, affinities[..., :3] - affinities[..., 3:])


class TestRanks:
    @staticmethod
    def naive(affinities):
        """(names, photos): the first name is the true one; every name is ranked to the end."""
        names, photos, templates = affinities.shape
        result = np.zeros((names, photos))
        for k in range(photos):
            for j in range(templates):
                own, decoys = affinities[0, k, j], affinities[1:, k, j]
                ranks = [1 + int((decoys >= own).sum())]
                for i, value in enumerate(decoys):
                    before = (decoys > value).sum() + (decoys[:i] == value).sum()
                    ranks.append(1 + int(before) + int(own >= value))
                result[:, k] += [1 / rank if rank <= TOP else 0 for rank in ranks]
        return result / templates

    @staticmethod
    def ranked(affinities):
        """The same from the decoys that fit best alone, as they are stored."""
        decoys = affinities[1:].transpose(1, 2, 0)
        best = np.argsort(-decoys, axis=2, kind="stable")[..., :TOP]
        values = np.take_along_axis(decoys, best, 2)
        return reciprocal_ranks(values, best, affinities[0], decoys.shape[2])

    @pytest.mark.parametrize("decoys", [1, TOP - 1, TOP, TOP + 1, 150])
    @pytest.mark.parametrize("levels", [4, 60, None])
    def test_equal_a_full_ranking_with_and_without_ties(self, decoys, levels):
        rng = np.random.default_rng(decoys)
        shape = (1 + decoys, 5, 3)
        affinities = rng.normal(size=shape) if levels is None else rng.integers(levels, size=shape)
        affinities = affinities.astype(float)
        np.testing.assert_allclose(self.ranked(affinities), self.naive(affinities))

    def test_a_name_that_always_fits_best_has_one_and_the_rest_move_down(self):
        affinities = np.arange(40.0)[::-1, None, None] * np.ones((1, 2, 2))
        expected = [1 / rank if rank <= TOP else 0 for rank in range(1, 41)]
        np.testing.assert_allclose(self.ranked(affinities), np.c_[expected, expected])

    def test_p_values_of_names_like_their_decoys_are_uniform(self):
        rng = np.random.default_rng(1)
        found = []
        for _ in range(600):
            # Some names fit everything better than others do, which is no evidence.
            affinities = rng.normal(size=(40, 4, 3)) + rng.normal(size=(40, 1, 1))
            fits = affinities.mean(axis=(1, 2))
            found.append(share_at_least(self.ranked(affinities).mean(axis=1), fits))
        smoothed = np.array(found) - rng.uniform(size=len(found)) / 40
        assert stats.kstest(smoothed, "uniform").pvalue > 0.01

    def test_ties_never_make_a_p_value_too_small(self):
        rng = np.random.default_rng(2)
        found = []
        for _ in range(600):
            affinities = rng.integers(3, size=(20, 2, 2)).astype(float)
            fits = affinities.mean(axis=(1, 2))
            found.append(share_at_least(self.ranked(affinities).mean(axis=1), fits))
        for level in (0.05, 0.1, 0.25, 0.5):
            hits = int(np.sum(np.array(found) <= level))
            assert stats.binomtest(hits, len(found), level, "greater").pvalue > 0.01


def test_a_p_value_counts_the_decoys_that_do_as_well():
    ranks, ties = np.array([0.5, 0.6, 0.5, 0.5, 0.4]), np.array([1.0, 0.0, 2.0, 0.5, 9.0])
    assert share_at_least(ranks, ties) == 3 / 5
    assert share_at_least(np.full(5, 0.5), np.zeros(5)) == 1
    assert share_at_least(np.array([1.0, 0, 0, 0]), np.zeros(4)) == 1 / 4


def test_standing_out_is_in_deviations_of_the_decoys_and_none_where_they_agree():
    found = standing_out(np.array([4.0, 6.0]), np.array([2.0, 5.0]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(found, [2.0, 0.0])


def test_subsets_have_the_size_asked_for_and_are_drawn_alike_each_time():
    subsets = sub_samples(10, 3, 20, seed=5)
    assert subsets.shape == (10, 20)
    assert set(subsets.sum(axis=0).tolist()) == {3}
    assert len({tuple(subset) for subset in subsets.T.tolist()}) > 10
    again, other = (sub_samples(10, 3, 20, seed=seed) for seed in (5, 6))
    np.testing.assert_array_equal(subsets, again)
    assert not np.array_equal(subsets, other)
