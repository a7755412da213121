"""Epsilon from one run: the published numbers, never more than the truth, never undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from lightleak.statistics.epsilon import (
    epsilon_lower_bound,
    epsilon_of_gaussian,
    gaussian_mu_lower_bound,
)

GUESSES = st.integers(1, 80).flatmap(
    lambda r: st.tuples(st.integers(r, 200), st.just(r), st.integers(0, r))
)


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "epsilon", "mu", "epsilon_of_mu"),
    [
        (1000, 600, 600, 1e-5, 5.2704, 2.0835, 10.515),
        (1000, 200, 150, 1e-5, 0.8200, 0.3395, 1.297),
        (1000, 1000, 600, 0.0, 0.2975, 0.1638, 0.584),
        (200, 40, 36, 0.0, 1.2986, 0.5462, 2.200),
        (100, 100, 100, 0.0, 3.4930, 1.7032, 8.216),
    ],
)
def test_the_published_procedures_numbers(m, r, v, delta, epsilon, mu, epsilon_of_mu):
    assert epsilon_lower_bound(m, r, v, delta) == pytest.approx(epsilon, abs=5e-5)
    bound = gaussian_mu_lower_bound(m, r, v)
    assert bound == pytest.approx(mu, abs=5e-5)
    assert epsilon_of_gaussian(bound, 1e-5) == pytest.approx(epsilon_of_mu, abs=5e-4)


@settings(deadline=None)
@given(GUESSES, st.floats(1e-8, 0.05), st.sampled_from([0.9, 0.95, 0.99]))
def test_the_bound_is_where_the_p_value_of_the_guesses_is_the_level(guesses, delta, confidence):
    m, r, v = guesses

    def p_value(epsilon: float) -> float:
        counts = stats.binom(r, 1 / (1 + math.exp(-epsilon)))
        between = [(counts.cdf(v - 1) - counts.cdf(v - i - 1)) / i for i in range(1, v + 1)]
        return min(1.0, counts.sf(v - 1) + 2 * m * delta * max(between, default=0.0))

    bound = epsilon_lower_bound(m, r, v, delta, confidence)
    assert p_value(bound + 1e-6) > 1 - confidence
    assert bound == 0 or p_value(bound - 1e-6) < 1 - confidence


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_overstated_no_more_often_than_the_level(epsilon):
    # The model that leaks most for its ε: every canary is told, truly with probability q.
    right = np.arange(301)
    chances = stats.binom.pmf(right, 300, 1 / (1 + math.exp(-epsilon)))
    bounds = np.array([epsilon_lower_bound(300, 300, int(v)) for v in right])
    assert 0.02 < chances[bounds > epsilon].sum() <= 0.05
    assert chances @ bounds > 0.5 * epsilon


def test_a_gaussian_mechanism_is_not_overstated_by_the_gaussian_bound():
    mu, m, r = 1.0, 400, 100
    rng = np.random.default_rng(0)
    over, bounds = 0, {}
    for _ in range(400):
        # Each canary's score is shifted by μ if it is in; the r most extreme are guessed.
        included = rng.random(m) < 0.5
        score = rng.normal(size=m) + mu * included - mu / 2
        guessed = np.argsort(-abs(score))[:r]
        v = int(((score > 0) == included)[guessed].sum())
        bounds[v] = bounds.get(v) or gaussian_mu_lower_bound(m, r, v)
        over += bounds[v] > mu
    assert over / 400 <= 0.07
    assert np.median(list(bounds.values())) > 0.3


@settings(max_examples=40, deadline=None)
@given(GUESSES)
def test_one_more_right_guess_or_more_assurance_never_works_the_wrong_way(guesses):
    m, r, v = guesses
    for bound in (gaussian_mu_lower_bound, lambda *each: epsilon_lower_bound(*each[:3], 1e-4)):
        assert bound(m, r, v) <= bound(m, r, min(v + 1, r)) + 1e-8
    assert gaussian_mu_lower_bound(m, r, v, 0.99) <= gaussian_mu_lower_bound(m, r, v, 0.9)


@pytest.mark.parametrize(("mu", "delta"), [(0.3, 1e-5), (2.0, 1e-3), (8.0, 1e-6)])
def test_epsilon_of_a_gaussian_leaves_delta_outside(mu, delta):
    epsilon = epsilon_of_gaussian(mu, delta)

    def excess(x: float) -> float:
        return max(0.0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))

    start = epsilon / mu + mu / 2
    assert integrate.quad(excess, start, start + 12)[0] == pytest.approx(delta, rel=1e-6)


def test_ends_of_the_scale():
    assert epsilon_lower_bound(100, 50, 0) == gaussian_mu_lower_bound(100, 50, 0) == 0
    assert epsilon_lower_bound(100, 50, 25) == gaussian_mu_lower_bound(100, 50, 25) == 0
    assert epsilon_of_gaussian(0.0, 0.0) == epsilon_of_gaussian(1e-6, 1e-5) == 0
    assert epsilon_of_gaussian(1.0, 0.0) == math.inf
    # Mean and deviation of the loss are μ²/2 and μ.
    assert epsilon_of_gaussian(200.0, 0.5) == pytest.approx(20_000, abs=1)


def test_a_hundred_thousand_canaries_all_told_are_bounded():
    everything = 100_000, 100_000, 100_000
    exact = math.log(0.05**1e-5 / (1 - 0.05**1e-5))
    assert epsilon_lower_bound(*everything) == pytest.approx(exact)
    assert epsilon_lower_bound(*everything, 1e-9) == pytest.approx(exact, abs=0.1)
    assert 2 < gaussian_mu_lower_bound(*everything) < 10


@pytest.mark.parametrize(
    "arguments", [(10, 11, 5), (10, 5, 6), (10, 0, 0), (10, 5, -1), (10, 5, 5, 1), (10, 5, 5, 0, 1)]
)
def test_impossible_guesses_are_refused(arguments):
    with pytest.raises(ValueError):
        epsilon_lower_bound(*arguments)


def test_impossible_mechanisms_are_refused():
    for mu, delta in ((-1.0, 0.1), (math.inf, 0.1), (1.0, 1.0)):
        with pytest.raises(ValueError, match="mu"):
            epsilon_of_gaussian(mu, delta)
