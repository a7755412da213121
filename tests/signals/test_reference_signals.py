"""Signals that compare models, held to plain recomputations and to records of known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from lightleak import signals
from lightleak.evidence.readings import ModelReadings, OtherLosses, ReferenceLosses
from lightleak.signals import cross
from lightleak.statistics import auc

N = 400


def world(seed, *, references=8, effect=1.0, kind=ModelReadings, base=True, noise=4):
    """Records of differing difficulty; training raises the first reading, and lowers the second.

    Half of the records are suspects, all of them trained on; each reference saw a random half,
    each second one the other half of that.
    """
    rng = np.random.default_rng(seed)
    difficulty = 2 + rng.gamma(4.0, 0.5, N)
    suspect = rng.permutation(N) < N // 2

    def readings(trained):
        loss = -difficulty + effect * 0.5 * trained + 0.2 * rng.standard_normal(N)
        gradient = difficulty - effect * 0.5 * trained + 0.2 * rng.standard_normal(N)
        return np.column_stack([loss, gradient, rng.standard_normal((N, noise))])

    seen = []
    for _ in range(references // 2):
        half = rng.permutation(N) < N // 2
        seen += [half, ~half]
    others = [readings(each) for each in seen]
    own, start = readings(suspect), readings(np.zeros(N, bool))
    names = ("loss", *(f"reading {i}" for i in range(own.shape[1] - 1)))
    return kind(
        names,
        own,
        start if base else None,
        np.stack(others) if others else np.zeros((0, *own.shape)),
        np.stack(seen) if seen else np.zeros((0, N), bool),
        ~suspect,
    )


def fits(models):
    side = np.where(models.control, "control", "suspect")
    return cross("crossfit", 2, side, np.random.default_rng(0).integers(0, 2, N))


def scores(name, models, **options):
    return signals.get(name).score(models, fits(models), options)


def area(values, models):
    return auc(values[~models.control], values[models.control])


def test_ratio_subtracts_the_base_and_without_one_the_references_that_did_not_see_the_record():
    models = world(0, kind=OtherLosses)
    np.testing.assert_allclose(scores("ratio", models), models.own[:, 0] - models.base[:, 0])
    alone = world(0, kind=OtherLosses, base=False)
    expected = [
        alone.own[i, 0]
        - np.mean([r[i, 0] for r, s in zip(alone.references, alone.seen, strict=True) if not s[i]])
        for i in range(N)
    ]
    np.testing.assert_allclose(scores("ratio", alone), expected)


@pytest.mark.parametrize("references", [0, 8])
def test_rmia_counts_the_controls_whose_ratio_is_gamma_times_smaller(references):
    models = world(1, kind=OtherLosses, references=references)
    ratios = []
    for i in range(N):
        inside = [
            np.exp(r[i, 0]) for r, s in zip(models.references, models.seen, strict=True) if s[i]
        ]
        outside = [
            np.exp(r[i, 0]) for r, s in zip(models.references, models.seen, strict=True) if not s[i]
        ]
        if inside:
            average = (np.mean(inside) + np.mean(outside)) / 2
        else:
            average = (1.3 * np.exp(models.base[i, 0]) + 0.7) / 2
        ratios.append(np.exp(models.own[i, 0]) / average)
    controls = [ratios[j] for j in range(N) if models.control[j]]
    expected = [np.mean([x / z >= 1.1 for z in controls]) for x in ratios]
    found = scores("rmia", models, gamma=1.1)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    # No ties are left, and none of them was turned round.
    assert np.array_equal(np.argsort(found), np.argsort(ratios))


def test_lira_is_the_likelihood_ratio_of_two_normals_with_pooled_spreads():
    models = world(2, kind=ReferenceLosses)
    own, *others = (np.log(p / (1 - p)) for p in np.exp([models.loss, *models.reference_losses]))
    means, spreads = {}, {}
    for side in (True, False):
        chosen = [np.array(others)[models.seen[:, i] == side, i] for i in range(N)]
        means[side] = np.array([each.mean() for each in chosen])
        spreads[side] = np.sqrt(sum(((c - c.mean()) ** 2).sum() for c in chosen) / (3 * N))
    expected = norm.logpdf(own, means[True], spreads[True])
    expected -= norm.logpdf(own, means[False], spreads[False])
    found = scores("lira", models)
    np.testing.assert_allclose(found, expected)
    offline = (own - means[False]) / spreads[False]
    np.testing.assert_allclose(scores("lira", models, mode="offline"), offline)
    assert area(found, models) > area(models.loss, models) + 0.1


def test_a_signature_learnt_from_references_uses_no_label_of_the_target():
    models = world(3)
    turned = ModelReadings(**{**vars(models), "control": ~models.control})
    np.testing.assert_array_equal(scores("signature", models), scores("signature", turned))
    assert area(scores("signature", models), models) > area(
        scores("lira", world(3, kind=ReferenceLosses)), models
    )


def test_a_signature_without_references_is_fitted_on_other_folds():
    models = world(4, references=0)
    mine = scores("signature", models)
    assert area(mine, models) > area(models.loss, models) + 0.05
    # Another label of one record moves scores of the other fold alone.
    turned = models.control.copy()
    turned[0] = ~turned[0]
    own = next(fit.scored for fit in fits(models) if fit.scored[0])
    moved = scores("signature", ModelReadings(**{**vars(models), "control": turned}))
    np.testing.assert_array_equal(moved[own], mine[own])
    assert (moved[~own] != mine[~own]).all()


@pytest.mark.parametrize("references", [0, 4, 8])
def test_a_signature_finds_nothing_where_there_is_nothing(references):
    areas = []
    for seed in range(20):
        models = world(100 + seed, effect=0.0, references=references)
        areas.append(area(scores("signature", models), models))
    # The spread of an AUC of 200 + 200 without effect is .029.
    assert abs(np.mean(areas) - 0.5) < 4 * 0.029 / np.sqrt(20)


@pytest.mark.parametrize("name", ["rmia", "lira"])
def test_records_that_no_reference_saw_are_not_set_apart_by_another_formula(name):
    kind = OtherLosses if name == "rmia" else ReferenceLosses
    areas = []
    for seed in range(20):
        models = world(200 + seed, effect=0.0, kind=kind)
        models.seen[:, models.control] = False
        found = scores(name, models)
        assert np.isfinite(found).all()
        areas.append(area(found, models))
    # A suspect is compared with four references, a control with eight; neither is known better.
    assert abs(np.mean(areas) - 0.5) < 4 * 0.029 / np.sqrt(20)


@pytest.mark.parametrize("references", [0, 4])
def test_a_model_without_readings_leaves_no_score_and_does_not_fail(references):
    models = world(6, references=references)
    models.own[:] = np.nan
    assert np.isnan(scores("signature", models)).all()


def test_a_record_that_some_model_could_not_read_has_no_score():
    models = world(5)
    models.references[2, 7] = np.nan
    models.own[9] = np.nan
    for name, kind in {
        "lira": ReferenceLosses,
        "rmia": OtherLosses,
        "signature": ModelReadings,
    }.items():
        found = scores(name, kind(**vars(models)))
        assert np.isnan(found[9])
        assert np.isfinite(np.delete(found, [7, 9])).all()
