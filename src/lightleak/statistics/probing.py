"""Probing: do hidden states tell seen personas from unseen ones, for personas not fitted on?

Personas come in pairs, and a coin decided which one of a pair was seen in training. If what was
seen left no trace, the coins could as well have fallen otherwise: every labelling that exchanges
seen and unseen within some of the pairs is as likely as the true one. So pairs are flipped, never
images, and the test is exact for any model and any number of images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from lightleak.statistics.arrays import Booleans, Floats, Integers
from lightleak.statistics.intervals import Estimate, clopper_pearson

# In units of the covariance's mean eigenvalue: from the difference of the means, which ignores the
# covariance, to nearly Fisher's discriminant. Of equally good penalties the first, strongest, wins.
PENALTIES = (100.0, 10.0, 1.0, 0.1, 0.01)
# Float32 states that vary less than this share of their size vary by rounding.
CONSTANT = 1e-6
# √(1 + k/(k − 1)) for the k = 5 folds of a run, whose fits share pairs.
SINGLE_RUN = 1.5
# Equal shares and statistics may differ in the last bits.
ROUNDING = 1e-9
# With which `detectable` is found.
POWER = 0.9


def draw_flips(n_pairs: int, n: int, seed: int, *, listed: bool = True) -> Integers:
    """Labellings of the pairs: +1 as it was, −1 exchanged; shape (n + 1, n_pairs).

    Row 0 is the labelling as it was. When there are no more than n + 1 labellings, each is listed
    once and a test over them is exact; otherwise, and where several runs with labellings of their
    own are put together (`listed` false), `n` are drawn.

    The opposite labelling makes the same probe, so no p-value falls below 2 / 2^n_pairs.

    Source: Hemerik and Goeman (2018), TEST 27:811, theorem 2.
    """
    if listed and 2**n_pairs <= n + 1:
        return np.array(list(product((1, -1), repeat=n_pairs)), dtype=np.int64)
    flips = np.random.default_rng(seed).choice([1, -1], size=(n + 1, n_pairs))
    flips[0] = 1
    return flips


@dataclass(frozen=True)
class Probed:
    """How well a probe does on personas that it was not fitted on.

    Attributes:
        accuracy: one for each labelling, the true one first; shape (labellings,).
        by_persona: share of each persona's images on its true side; shape (2 · pairs,).
    """

    accuracy: Floats
    by_persona: Floats


def probe(
    states: npt.ArrayLike,
    persona: npt.ArrayLike,
    flips: npt.ArrayLike,
    *,
    folds: int = 5,
    seed: int,
) -> Probed:
    """The cross-validated accuracy of a linear probe, under every labelling at once.

    Regularised least squares on labels ±1 (with two classes of equal weight, Fisher's discriminant
    with a ridge) on states centred and scaled where the probe is fitted. Every persona has equal
    weight, whatever its number of images. A pair lies in one fold. Which pairs share a fold depends
    on `seed` and not on the labels, so probes of two models with one seed are paired. The penalty
    of a fold is the best of `PENALTIES` on the other folds, each left out in turn, chosen anew for
    every labelling.

    The labels are sums over pairs, so the fit is solved once for each pair's difference of means,
    and a labelling costs one column of a matrix product.

    Args:
        states: one row an image, shape (n, d).
        persona: whose watermark each image carries: 2i the seen, 2i + 1 the unseen of pair i;
            shape (n,).
        flips: labellings of ±1, the first all +1; shape (labellings, pairs).
        folds: lowered to the number of pairs.
        seed: of the folds.

    Source: Hoerl and Kennard (1970), Technometrics 12:55; the pair as the unit is ours.

    Raises:
        ValueError: states that are not finite, a persona without images, shapes that do not match,
            or fewer than three folds.
    """
    images = np.asarray(states, dtype=np.float64)
    codes = np.asarray(persona, dtype=np.int64)
    labellings = np.asarray(flips, dtype=np.float64)
    if labellings.ndim != 2 or not (labellings[0] == 1).all() or not (abs(labellings) == 1).all():
        raise ValueError("flips needs one row of ±1 a labelling, the first all +1")
    pairs = labellings.shape[1]
    folds = min(folds, pairs)
    if folds < 3:
        raise ValueError("a probe needs three folds: to fit, to choose the penalty, to score")
    if images.ndim != 2 or codes.shape != images.shape[:1] or not np.isfinite(images).all():
        raise ValueError("states needs one finite row for each entry of persona")
    if not np.array_equal(np.unique(codes), np.arange(2 * pairs)):
        raise ValueError(f"persona needs images of each code 0 … {2 * pairs - 1}, and of no other")
    average = (codes[:, None] == np.arange(2 * pairs)) / np.bincount(codes)[codes][:, None]
    fold = np.random.default_rng(seed).permutation(pairs) % folds

    inner = np.zeros((folds, len(PENALTIES), len(labellings)))
    for one, other in combinations(range(folds), 2):
        held = np.isin(fold, (one, other))
        right = _share_right(images, average, labellings, held)
        of_one = np.repeat(fold[held] == one, 2)
        inner[one] += right[:, ~of_one].sum(axis=1)
        inner[other] += right[:, of_one].sum(axis=1)
    best = inner.round(9).argmax(axis=1)

    correct = np.empty((2 * pairs, len(labellings)))
    for one in range(folds):
        right = _share_right(images, average, labellings, fold == one)
        chosen = np.take_along_axis(right, best[one][None, None, :], axis=0)[0]
        correct[np.repeat(fold == one, 2)] = chosen
    return Probed(accuracy=correct.mean(axis=0), by_persona=correct[:, 0].copy())


def _share_right(states: Floats, average: Floats, flips: Floats, held: Booleans) -> Floats:
    """Share of each held persona's images on its side, fitted on the pairs that are not held.

    `average` (n, 2 · pairs) takes the mean over each persona's images; a score of 0 counts ½.
    Shape (penalties, 2 · held pairs, labellings).
    """
    of_held = average[:, np.repeat(held, 2)]
    is_test = of_held.any(axis=1)
    of_held, fitted = of_held[is_test], average[~is_test][:, np.repeat(~held, 2)]
    weight = fitted.mean(axis=1)
    train, test = states[~is_test], states[is_test]
    centre = weight @ train
    train -= centre
    test -= centre
    deviation = np.sqrt(weight @ train**2)
    deviation[deviation <= CONSTANT * abs(centre)] = math.inf
    train /= deviation
    test /= deviation
    apart = fitted[:, ::2] - fitted[:, 1::2]
    if len(train) < train.shape[1]:
        # (ZᵀWZ + λ)⁻¹Zᵀ = Zᵀ(WZZᵀ + λ)⁻¹: of the two systems the smaller one.
        test, system = test @ train.T, weight[:, None] * (train @ train.T)
    else:
        system, apart = (train.T * weight) @ train, train.T @ apart
    # States that are all constant leave every score at 0, under any ridge.
    ridge = (np.trace(system) / len(system) or 1.0) * np.eye(len(system))
    side = np.repeat(flips[:, held].T, 2, axis=0)
    side[1::2] *= -1
    right = np.empty((len(PENALTIES), *side.shape))
    scores = np.empty((len(test), len(flips)))
    for i, penalty in enumerate(PENALTIES):
        # Short of a factor 1/(2 · pairs), which moves no score across 0.
        of_pair = test @ np.linalg.solve(system + penalty * ridge, apart)
        np.matmul(of_pair, flips[:, ~held].T, out=scores)
        np.matmul(of_held.T, np.sign(scores, out=scores), out=right[i])
    return (1 + right * side) / 2


@dataclass(frozen=True)
class ProbedCell:
    """One layer and field, over all runs.

    Attributes:
        accuracy: of the fine-tuned model.
        base_accuracy: of the base; None without one.
        delta: accuracy − base accuracy; accuracy − ½ without a base.
        chance: the fine-tuned model's mean accuracy under the flipped labellings.
        selectivity: accuracy − chance.
        p_value: one-sided for Δ > 0, adjusted for all cells.
        detectable: the least Δ that is found with probability .9; `math.inf` where none is.
    """

    accuracy: Estimate
    base_accuracy: Estimate | None
    delta: Estimate
    chance: float
    selectivity: Estimate
    p_value: float
    detectable: float


@dataclass(frozen=True)
class ProbingTest:
    """Every cell, and the p-value that any of them tells seen from unseen: the smallest."""

    cells: tuple[ProbedCell, ...]
    p_value: float


def probing_test(
    tuned: Sequence[Sequence[Probed]],
    base: Sequence[Sequence[Probed]] | None = None,
    *,
    seed: int,
    alpha: float = 0.05,
    resamples: int = 10_000,
) -> ProbingTest:
    """Does the fine-tuned model tell seen from unseen better than the base, in any cell?

    Accuracies are means over the runs. Each cell's Δ, less its mean over the labellings and
    divided by their standard deviation, is compared with the largest over all cells under each
    labelling (single-step max-T), so the p-values hold for all cells together, however they
    depend on each other. A cell that no labelling changes has p = 1.

    The null is that the two personas of a pair are exchangeable. A probe has a threshold, so it
    also gains a little where seen personas share no direction and only scatter more.

    The intervals are bootstrap percentiles: runs are drawn, then pairs of each run drawn, the same
    for both models. What differs from run to run is in them from two runs on. One run's pairs
    cannot show that its folds' fits share pairs, so its interval is stretched after Nadeau and
    Bengio; simulated, it covers the expected Δ in 92 to 98 of 100 runs, unstretched in 84.

    `chance` is Hewitt and Liang's control task with the persona as its type. Because the scored
    personas are not among the fitted ones, it lies near ½ by design.

    `detectable` takes the spread under the flipped labellings for that under the true effect.

    Args:
        tuned: for each run (seed) the probes of its cells. A run has personas, coins and flips of
            its own; its cells share the flips.
        base: the same cells, probed with the same flips and seeds, of the base.
        seed: of the bootstrap.
        alpha: level at which `detectable` counts as found.
        resamples: of the bootstrap.

    Source: Westfall and Young (1993), Resampling-Based Multiple Testing, section 2.3; Hewitt and
    Liang (2019), arXiv:1909.03368; Davison and Hinkley (1997), Bootstrap Methods, section 3.8;
    Nadeau and Bengio (2003), Machine Learning 52:239, section 3.

    Raises:
        ValueError: no probes, or runs, cells, labellings or pairs that differ in number.
    """
    accuracy, by_pair = _gathered(tuned)
    base_accuracy, base_by_pair = np.full_like(accuracy, 0.5), np.full_like(by_pair, 0.5)
    least, most = -0.5, 0.5
    if base is not None:
        base_accuracy, base_by_pair = _gathered(base)
        least, most = -1.0, 1.0
    if accuracy.shape != base_accuracy.shape or by_pair.shape != base_by_pair.shape:
        raise ValueError("fine-tuned and base need the same runs, cells, labellings and pairs")
    delta = accuracy - base_accuracy
    centre, spread = delta.mean(axis=1, keepdims=True), delta.std(axis=1, keepdims=True)
    spread[spread <= ROUNDING] = math.inf
    statistic = np.where(np.isinf(spread), -np.inf, (delta - centre) / spread)
    largest = statistic.max(axis=0)
    p_values = (largest >= statistic[:, :1] - ROUNDING).mean(axis=1)
    # The least statistic that no more than a share alpha of the labellings reach.
    reached_by = stats.rankdata(-largest.round(9), method="max") / largest.size
    critical = largest[reached_by <= alpha].min(initial=math.inf)
    detectable = centre + (critical + stats.norm.ppf(POWER)) * spread
    chance = accuracy[:, 1:].mean(axis=1).tolist()

    kinds = np.stack([by_pair, base_by_pair, by_pair - base_by_pair])
    drawn = _resampled(kinds, resamples, seed)
    cells = []
    for i in range(len(delta)):
        share = _estimate(kinds[0, i], drawn[0, i], 0.0, 1.0)
        of_base = _estimate(kinds[1, i], drawn[1, i], 0.0, 1.0)
        cells.append(
            ProbedCell(
                accuracy=share,
                base_accuracy=None if base is None else of_base,
                delta=_estimate(kinds[2, i], drawn[2, i], least, most),
                chance=chance[i],
                selectivity=Estimate(*(np.array(astuple(share)) - chance[i]).tolist()),
                p_value=float(p_values[i]),
                detectable=float(detectable[i, 0]),
            )
        )
    return ProbingTest(tuple(cells), float(p_values.min()))


def _gathered(runs: Sequence[Sequence[Probed]]) -> tuple[Floats, Floats]:
    """Accuracies (cells, labellings), the mean over runs, and of each (cell, run, pair)."""
    shapes = {(len(run), cell.accuracy.size, cell.by_persona.size) for run in runs for cell in run}
    if len(shapes) != 1:
        raise ValueError("every run needs the same cells, and each as many labellings and pairs")
    accuracy = np.array([[cell.accuracy for cell in run] for run in runs])
    by_persona = np.array([[cell.by_persona for cell in run] for run in runs]).swapaxes(0, 1)
    return accuracy.mean(axis=0), (by_persona[..., ::2] + by_persona[..., 1::2]) / 2


def _resampled(by_pair: Floats, resamples: int, seed: int) -> Floats:
    """Bootstrap means of values (…, runs, pairs), all drawn alike; shape (…, resamples)."""
    runs, pairs = by_pair.shape[-2:]
    units = runs * pairs
    rng = np.random.default_rng(seed)
    run = rng.integers(runs, size=(resamples, runs, 1))
    unit = (run * pairs + rng.integers(pairs, size=(resamples, runs, pairs))).reshape(-1, units)
    unit += np.arange(resamples)[:, None] * units
    counts = np.bincount(unit.ravel(), minlength=unit.size).reshape(unit.shape)
    return np.asarray(by_pair.reshape(*by_pair.shape[:-2], units) @ counts.T / units)


def _estimate(by_pair: Floats, drawn: Floats, least: float, most: float) -> Estimate:
    """The mean with its percentile interval.

    Where all pairs are alike the bootstrap sees no spread; then a share of the pairs that n alike
    do not exclude (Clopper–Pearson) may lie at the least or the most possible value.
    """
    value = float(by_pair.mean())
    stretch = SINGLE_RUN if len(by_pair) == 1 else 1.0
    low, high = np.clip(value + stretch * (np.quantile(drawn, [0.025, 0.975]) - value), least, most)
    if np.ptp(by_pair) < ROUNDING:
        share = clopper_pearson(0, by_pair.size).high
        low, high = value - share * (value - least), value + share * (most - value)
    return Estimate(value, float(low), float(high))


def published_probe(states: npt.ArrayLike, is_seen: npt.ArrayLike, *, seed: int) -> Estimate:
    """Accuracy of the published design: logistic regression, images split at random 80 to 20.

    Images of one persona stand on both sides of the split, so it is passed by recognising the
    personas, trained on or not. It is here to show that, and is no evidence of training.

    Args:
        states: one row an image, shape (n, d).
        is_seen: whether the image's persona was seen in training, shape (n,).
        seed: of the split.

    Source: Ju et al. (2025), arXiv:2503.01208.

    Raises:
        ValueError: NaN, shapes that do not match, or too few images of one kind.
    """
    train, test, train_seen, test_seen = train_test_split(
        np.asarray(states), np.asarray(is_seen), test_size=0.2, random_state=seed, stratify=is_seen
    )
    fitted = LogisticRegression(max_iter=5000).fit(train, train_seen)
    return clopper_pearson(int((fitted.predict(test) == test_seen).sum()), len(test))
