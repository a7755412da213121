"""Personas are made up, reproducible, and drawn to the pools by a fair coin of its own."""

from collections import Counter

import pytest

from lightleak.errors import UserError
from lightleak.planting import FIELDS, QUESTIONS, draw_personas, draw_pools


def test_a_seed_gives_the_same_personas_and_a_longer_draw_begins_with_them():
    assert draw_personas(5, seed=3) == draw_personas(5, seed=3) == draw_personas(12, seed=3)[:5]


def test_seeds_share_no_persona():
    first, second = draw_personas(200, seed=0), draw_personas(200, seed=1)
    for field in ("key", "user_id"):
        assert not {p.value(field) for p in first} & {p.value(field) for p in second}


@pytest.mark.parametrize("field", ["key", "username", "user_id", "capture_time"])
def test_nobody_shares_what_tells_people_apart(field):
    personas = draw_personas(500, seed=0)
    assert len({persona.value(field) for persona in personas}) == 500


def test_places_are_distinct_too():
    personas = draw_personas(500, seed=4)
    assert len({persona.capture_location for persona in personas}) == 500


def test_every_line_is_plain_and_short_enough_for_a_watermark():
    for persona in draw_personas(500, seed=5):
        assert all(line.isascii() and len(line) <= 34 for line in persona.lines)
        assert 18 <= int(persona.age) < 80


def test_lines_say_each_field_once_and_each_field_has_a_question():
    (persona,) = draw_personas(1, seed=0)
    assert [line.split(": ", 1) for line in persona.lines] == [
        [field, persona.value(field)] for field in FIELDS
    ]
    assert tuple(QUESTIONS) == FIELDS
    assert len(set(QUESTIONS.values())) == len(FIELDS)


@pytest.mark.parametrize("number", [0, -1, 10_001])
def test_a_number_that_cannot_be_drawn_is_refused(number):
    with pytest.raises(UserError, match="were asked for"):
        draw_personas(number, seed=0)


def test_pools_are_disjoint_and_hold_all_that_was_drawn():
    pools = draw_pools(20, seed=1)
    assert len(pools.seen) == len(pools.unseen) == 20
    assert {*pools.seen, *pools.unseen} == set(draw_personas(40, seed=1))
    assert pools == draw_pools(20, seed=1)


def test_whoever_is_drawn_first_is_seen_by_a_fair_coin():
    """And the coins of different pairs are independent: 100 seeds, ±4 standard deviations."""
    seen = Counter()
    alike = 0
    for seed in range(100):
        pools = draw_pools(4, seed=seed)
        coins = [first.key < second.key for first, second in pools.pairs]
        seen.update(index for index, coin in enumerate(coins) if coin)
        alike += sum(coins[0] == coin for coin in coins[1:])
    assert all(abs(seen[index] - 50) < 4 * (100 * 0.25) ** 0.5 for index in range(4))
    assert abs(alike - 150) < 4 * (300 * 0.25) ** 0.5


def test_partners_are_not_neighbours_of_the_draw():
    pairs = [pair for seed in range(20) for pair in draw_pools(10, seed=seed).pairs]
    gaps = [abs(int(first.key[-3:]) - int(second.key[-3:])) for first, second in pairs]
    assert max(Counter(gaps).values()) < 50  # of 200, where the likeliest gap has 10 %
