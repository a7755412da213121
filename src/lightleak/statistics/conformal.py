"""Claims about single records: conformal p-values and false-discovery control."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightleak.statistics.arrays import Booleans, Floats, Labels, label_codes, score_array


def conformal_p_values(scores: npt.ArrayLike, control_scores: npt.ArrayLike) -> Floats:
    """p_i = (1 + #{controls ≥ s_i})/(n + 1), one for each score; ties count against.

    Valid when record i and the controls are exchangeable under the null: same signal, no fit on
    either.

    Source: Bates et al. (2023), Ann. Stat. 51:149.

    Raises:
        ValueError: no scores, no controls, or NaN.
    """
    values = score_array(scores, "scores")
    controls = np.sort(score_array(control_scores, "control_scores"))
    at_least = controls.size - np.searchsorted(controls, values, side="left")
    return np.asarray((1 + at_least) / (controls.size + 1), dtype=np.float64)


def conformal_p_values_within_folds(
    scores: npt.ArrayLike,
    folds: Labels,
    control_scores: npt.ArrayLike,
    control_folds: Labels,
) -> Floats:
    """Conformal p-values of a fitted signal: each score against the controls of its own fold.

    Only controls scored by the same fit are comparable; controls of other folds were scored by
    other fits, or shaped this one.

    Raises:
        ValueError: NaN, not one fold for each score, or a fold without controls.
    """
    values = score_array(scores, "scores")
    controls = score_array(control_scores, "control_scores")
    both = np.concatenate([np.asarray(folds), np.asarray(control_folds)])
    codes = label_codes(both, values.size + controls.size, "folds")
    own, of_controls = codes[: values.size], codes[values.size :]
    p_values = np.empty(values.size)
    for fold in np.unique(own):
        p_values[own == fold] = conformal_p_values(
            values[own == fold], controls[of_controls == fold]
        )
    return p_values


@dataclass(frozen=True)
class Discoveries:
    """Which records are claimed, and the level at which each would first be; vectors (m,)."""

    rejected: Booleans
    adjusted: Floats


def benjamini_hochberg(p_values: npt.ArrayLike, q: float = 0.05) -> Discoveries:
    """The records that may be claimed with at most a share `q` of false claims expected.

    Source: Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57:289.

    Raises:
        ValueError: no p-values, NaN, or one outside [0, 1].
    """
    adjusted = stats.false_discovery_control(score_array(p_values, "p_values"))
    return Discoveries(adjusted <= q, adjusted)


def smallest_resolvable(m_tests: int, n_controls: int, q: float = 0.05) -> int:
    """How many records must be discovered at once before any can be: ⌈m/(q(n + 1))⌉.

    The least conformal p-value is 1/(n + 1); k of them pass Benjamini–Hochberg when that is at
    most qk/m. A result above `m_tests` means that nothing can be claimed.
    """
    return math.ceil(m_tests / (q * (n_controls + 1)) - 1e-9)
