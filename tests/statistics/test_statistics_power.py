"""What is promised to be detectable is detected, as often as promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightleak.statistics import minimum_detectable_auc, minimum_set_size


@pytest.mark.parametrize(("suspects", "controls"), [(60, 60), (40, 200)])
def test_the_promised_power_is_reached_in_simulation(suspects, controls):
    detectable = minimum_detectable_auc(suspects, controls, alpha=0.01, power=0.9)
    # Two normals of unit variance this far apart have just that AUC.
    shift = math.sqrt(2) * stats.norm.ppf(detectable)
    rng = np.random.default_rng(0)
    member = rng.normal(shift, 1, (2000, suspects))
    nonmember = rng.normal(0, 1, (2000, controls))
    found = stats.mannwhitneyu(member, nonmember, axis=1, alternative="greater").pvalue <= 0.01
    assert found.mean() == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize("ratio", [0.5, 1, 3])
def test_the_smallest_set_is_enough_and_one_less_is_not(ratio):
    size = minimum_set_size(0.6, controls_per_suspect=ratio, alpha=0.05, power=0.9)

    def detectable(suspects: int) -> float:
        return minimum_detectable_auc(suspects, math.ceil(suspects * ratio), 0.05, 0.9)

    assert detectable(size) <= 0.6 < detectable(size - 1)


def test_sets_too_small_for_any_effect_have_none():
    assert minimum_detectable_auc(2, 2) == math.inf
