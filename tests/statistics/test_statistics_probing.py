"""Probing: quiet on personas that left no trace, loud on a trace that all of them share."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from lightleak.statistics import (
    Probed,
    clopper_pearson,
    draw_flips,
    probe,
    probing_test,
    published_probe,
)
from lightleak.statistics.probing import PENALTIES


def persona_codes(rng, pairs: int, images: int, *, unequal: bool = False):
    counts = rng.integers(1, 2 * images, 2 * pairs) if unequal else [images] * (2 * pairs)
    return np.repeat(np.arange(2 * pairs), counts)


def read_states(rng, persona, dimensions: int, *, personality: float, trace: float = 0.0):
    """Each persona looks its own way; seen ones, with even codes, share a direction besides."""
    looks = personality * rng.normal(size=(persona.max() + 1, dimensions))
    looks[::2, 0] += trace
    return looks[persona] + rng.normal(size=(persona.size, dimensions))


def run_of(seed, *, pairs=6, dimensions=12, personality=2.0, traces=(0.0,), unequal=False):
    """The probes of a fine-tuned model and of its base; one cell for each trace."""
    rng = np.random.default_rng(seed)
    persona = persona_codes(rng, pairs, 3, unequal=unequal)
    flips = draw_flips(pairs, 99, seed)

    def probed(trace):
        states = read_states(rng, persona, dimensions, personality=personality, trace=trace)
        return probe(states, persona, flips, folds=3, seed=seed)

    return [probed(trace) for trace in traces], [probed(0.0) for _ in traces]


def judged(tuned, base=None, *, resamples=200):
    return probing_test([tuned], base if base is None else [base], seed=0, resamples=resamples)


def assert_level(p_values):
    for level in (0.05, 0.2):
        allowed = stats.binom.ppf(0.999, len(p_values), level)
        assert sum(p_value <= level for p_value in p_values) <= allowed


@pytest.mark.parametrize(
    "nothing_seen", [{"personality": 5.0}, {"unequal": True}, {"dimensions": 60}]
)
def test_untrained_personas_are_claimed_no_more_often_than_the_level(nothing_seen):
    assert_level(
        [judged(*run_of(seed, **nothing_seen), resamples=2).p_value for seed in range(120)]
    )


def test_looking_at_many_layers_is_paid_for():
    rng = np.random.default_rng(8)
    layers = rng.random((150, 10, 100))
    p_values = [
        judged([Probed(layer, np.ones(20)) for layer in run], resamples=2).p_value for run in layers
    ]
    assert_level(p_values)
    assert np.mean(p_values) < 0.6


def test_the_published_design_finds_them_every_time():
    rng = np.random.default_rng(0)
    persona = persona_codes(rng, 20, 10)
    states = read_states(rng, persona, 64, personality=2.0)
    published = published_probe(states, persona % 2 == 0, seed=0)
    grouped = probe(states, persona, draw_flips(20, 10, 0), seed=0)
    assert published.low > 0.9
    assert grouped.accuracy[0] < published.low - 0.2


def test_a_shared_trace_is_found_in_the_layer_that_has_it():
    result = judged(*run_of(0, pairs=16, traces=(0.0, 20.0, 0.0)))
    clean, marked, also_clean = result.cells
    assert result.p_value == marked.p_value == 0.01
    assert min(clean.p_value, also_clean.p_value) > 0.1
    assert marked.delta.low > 0.2
    assert marked.delta.value == pytest.approx(marked.accuracy.value - marked.base_accuracy.value)
    assert marked.selectivity.value > 0.3
    assert marked.chance == pytest.approx(0.5, abs=0.1)


def test_marks_that_seen_personas_do_not_share_are_not_found():
    rng = np.random.default_rng(1)
    persona, flips = persona_codes(rng, 12, 4), draw_flips(12, 99, 0)
    base = read_states(rng, persona, 30, personality=1.0)
    marks = 5.0 * rng.normal(size=(12, 30))
    tuned = base + marks[persona // 2] * (1 - 2 * (persona % 2))[:, None]
    assert published_probe(tuned, persona % 2 == 0, seed=0).value > 0.9
    probes = [[probe(states, persona, flips, seed=0)] for states in (tuned, base)]
    assert judged(*probes).p_value > 0.05


def test_runs_together_find_what_one_does_not():
    runs = [run_of(seed, pairs=12, traces=(4.0,)) for seed in range(6)]
    alone = [judged(*run).p_value for run in runs]
    together = probing_test([run[0] for run in runs], [run[1] for run in runs], seed=0)
    assert np.median(alone) > 0.05
    assert together.p_value <= 0.02
    assert together.cells[0].delta.low > 0


@pytest.mark.parametrize("dimensions", [6, 90])
def test_it_is_ridge_regression_with_nested_choice_of_the_penalty(dimensions):
    rng = np.random.default_rng(2)
    pairs, folds, seed = 9, 4, 3
    persona = persona_codes(rng, pairs, 4, unequal=True)
    states = read_states(rng, persona, dimensions, personality=1.0, trace=1.0)
    flips = draw_flips(pairs, 12, 0)
    pair, fold = persona // 2, np.random.default_rng(seed).permutation(pairs) % folds

    def right(sides, held, penalty):
        """Share of each held persona's images that scikit-learn puts on its side."""
        fitted = ~np.isin(pair, held)
        weight = 1 / np.bincount(persona)[persona[fitted]]
        weight /= weight.sum()
        scaler = StandardScaler().fit(states[fitted], sample_weight=weight)
        scaled = scaler.transform(states)
        trace = (weight @ scaled[fitted] ** 2).sum()
        ridge = Ridge(alpha=penalty * trace / min(scaled[fitted].shape), tol=1e-12)
        ridge.fit(scaled[fitted], sides[fitted], sample_weight=weight)
        hits = ridge.predict(scaled) * sides > 0
        return np.array([[hits[persona == 2 * p + s].mean() for s in (0, 1)] for p in held])

    for row in (0, 12):
        sides = (flips[row][pair] * (1 - 2 * (persona % 2))).astype(float)
        expected = np.empty((pairs, 2))
        chosen = set()
        for one in range(folds):
            own = np.flatnonzero(fold == one)
            inner = []
            for penalty in PENALTIES:
                total = 0.0
                for other in set(range(folds)) - {one}:
                    both = np.flatnonzero(np.isin(fold, (one, other)))
                    total += right(sides, both, penalty)[fold[both] == other].sum()
                inner.append(round(total, 9))
            penalty = PENALTIES[int(np.argmax(inner))]
            chosen.add(penalty)
            expected[own] = right(sides, own, penalty)
        result = probe(states, persona, flips, folds=folds, seed=seed)
        assert result.accuracy[row] == pytest.approx(expected.mean(), abs=1e-8)
        if row == 0:
            assert result.by_persona == pytest.approx(expected.ravel(), abs=1e-8)


def test_all_labellings_of_four_pairs_are_those_of_exchanged_personas():
    rng = np.random.default_rng(4)
    persona = persona_codes(rng, 4, 5)
    states = [read_states(rng, persona, 8, personality=1.0, trace=t) for t in (2.0, 0.0)]
    flips = draw_flips(4, 15, 0)
    as_it_was = np.ones((1, 4))
    tuned, base = (probe(each, persona, flips, seed=0) for each in states)
    deltas = []
    for signs in product((1, -1), repeat=4):
        exchanged = persona ^ (np.array(signs)[persona // 2] < 0)
        one, other = (probe(each, exchanged, as_it_was, seed=0).accuracy[0] for each in states)
        deltas.append(one - other)
    assert tuned.accuracy - base.accuracy == pytest.approx(np.array(deltas))
    exact = np.mean(np.array(deltas) >= deltas[0] - 1e-9)
    assert judged([tuned], [base]).p_value == exact


def test_the_order_of_the_images_does_not_matter():
    rng = np.random.default_rng(5)
    persona = persona_codes(rng, 6, 4, unequal=True)
    states, flips = read_states(rng, persona, 40, personality=1.0), draw_flips(6, 20, 0)
    order = rng.permutation(persona.size)
    result = probe(states, persona, flips, seed=0)
    shuffled = probe(states[order], persona[order], flips, seed=0)
    assert shuffled.accuracy == pytest.approx(result.accuracy)
    assert shuffled.by_persona == pytest.approx(result.by_persona)


def test_layers_that_training_did_not_touch_or_that_never_vary_say_nothing():
    (marked,), (base,) = run_of(0, pairs=16, traces=(20.0,))
    persona = persona_codes(np.random.default_rng(0), 16, 3)
    constant = probe(np.full((96, 5), 0.1), persona, draw_flips(16, 99, 0), folds=4, seed=0)
    assert (constant.accuracy == 0.5).all()
    result = judged([marked, base, constant], [base, base, constant])
    assert result.p_value == result.cells[0].p_value <= 0.05
    assert [cell.p_value for cell in result.cells[1:]] == [1.0, 1.0]
    assert [cell.delta.value for cell in result.cells[1:]] == [0.0, 0.0]
    assert math.isinf(result.cells[1].detectable)


@pytest.mark.parametrize("cells", [1, 5])
def test_what_is_called_detectable_is_found_nine_times_in_ten(cells):
    rng = np.random.default_rng(6)
    found = []
    for _ in range(150):
        accuracy = rng.normal(0.5, 0.05, (cells, 1000))
        by_persona = np.full(40, 0.5)
        null = judged([Probed(row, by_persona) for row in accuracy], resamples=2)
        accuracy[0, 0] += null.cells[0].detectable
        shifted = judged([Probed(row, by_persona) for row in accuracy], resamples=2)
        found.append(shifted.cells[0].p_value <= 0.05)
    assert np.mean(found) == pytest.approx(0.9, abs=0.06)


def test_with_too_few_labellings_nothing_is_detectable():
    (tuned,), (base,) = run_of(0, pairs=4)
    assert math.isinf(judged([tuned], [base]).cells[0].detectable)


def test_the_interval_of_one_run_allows_for_fits_that_share_pairs():
    deltas = [judged(*run_of(seed, pairs=12)).cells[0].delta for seed in range(100)]
    assert np.mean([delta.low <= 0 <= delta.high for delta in deltas]) >= 0.9


def test_intervals_of_several_runs_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(7)
    covered = []
    for seed in range(200):
        shares = rng.beta(2, 1, (3, 40))
        runs = [[Probed(rng.random(20), share)] for share in shares]
        interval = probing_test(runs, seed=seed, resamples=300).cells[0].accuracy
        covered.append(interval.low <= 2 / 3 <= interval.high)
    assert np.mean(covered) >= 0.92


def test_a_probe_that_is_always_right_is_not_known_to_be():
    perfect = Probed(np.linspace(1, 0, 50), np.ones(40))
    estimate = judged([perfect]).cells[0].accuracy
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(clopper_pearson(20, 20).low)


def test_few_pairs_have_every_labelling_once_and_many_have_the_true_one_first():
    listed = draw_flips(5, 999, 0)
    assert len(listed) == len({tuple(row) for row in listed}) == 32
    drawn = draw_flips(20, 999, 0)
    assert drawn.shape == (1000, 20)
    assert (listed[0] == 1).all()
    assert (drawn[0] == 1).all()
    assert abs(drawn[1:].mean()) < 0.03


def test_what_cannot_be_probed_is_refused():
    flips, persona = draw_flips(4, 20, 0), np.repeat(np.arange(8), 2)
    states = np.ones((16, 3))
    with pytest.raises(ValueError, match="finite"):
        probe(np.full((16, 3), np.nan), persona, flips, seed=0)
    with pytest.raises(ValueError, match="each code"):
        probe(states, np.minimum(persona, 6), flips, seed=0)
    with pytest.raises(ValueError, match="first all"):
        probe(states, persona, -flips, seed=0)
    probed = probe(states, persona, flips, seed=0)
    with pytest.raises(ValueError, match="same"):
        probing_test([[probed], [probed, probed]], seed=0)
