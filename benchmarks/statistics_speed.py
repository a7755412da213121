"""What the statistics cost at 10,000 suspects and 10,000 controls, beside the obvious way.

    python benchmarks/statistics_speed.py    # about three minutes

Processor seconds of one thread, medians of the repeats. The obvious way is the loop around a
library call that one writes first; where it would take minutes it is timed on a part of its
replicates and scaled, and the results say on how many.

Writes benchmarks/results/statistics_speed.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn
from scipy import stats
from sklearn import metrics
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.nonparametric import rank_compare_2indep
from statsmodels.stats.proportion import proportion_confint
from threadpoolctl import threadpool_limits

import lightleak.statistics as st
from lightleak.runs import write_json

RESULTS = Path(__file__).parent / "results" / "statistics_speed.json"
RECORDS, REPLICATES, CURVES = 10_000, 10_000, 2_000

RNG = np.random.default_rng(0)
MEMBER, NONMEMBER = RNG.normal(0.05, 1, RECORDS), RNG.normal(0, 1, RECORDS)
SCORES = np.concatenate([MEMBER, NONMEMBER])
IS_MEMBER = np.arange(2 * RECORDS) < RECORDS
GROUPS = np.arange(2 * RECORDS) // 4
P_VALUES = RNG.random(RECORDS)
SIGNALS = SCORES[:, None] + RNG.normal(0, 1, (2 * RECORDS, 6))
FEATURES = SCORES[:, None] + RNG.normal(0, 5, (2 * RECORDS, 40))


@dataclass(frozen=True)
class Case:
    """One statistic, and the obvious way to it; `loops` calls of the latter make one of ours."""

    name: str
    ours: Callable[[], object]
    naive: Callable[[], object] | None = None
    loops: int = 1


def _resampled() -> np.ndarray:
    drawn = RNG.integers(RECORDS, size=(2, RECORDS))
    return np.concatenate([MEMBER[drawn[0]], NONMEMBER[drawn[1]]])


def _conformal_claims() -> object:
    return st.benjamini_hochberg(st.conformal_p_values(MEMBER, NONMEMBER))


def _naive_claims() -> object:
    p_values = [(1 + np.sum(score <= NONMEMBER)) / (RECORDS + 1) for score in MEMBER]
    return multipletests(p_values, method="fdr_bh")


def _naive_tpr() -> object:
    fpr, tpr, _ = metrics.roc_curve(IS_MEMBER, SCORES)
    return proportion_confint(int(tpr[fpr <= 0.01].max() * RECORDS), RECORDS, method="beta")


CASES = (
    Case(
        "auc_delong",
        lambda: st.auc_delong(MEMBER, NONMEMBER),
        lambda: rank_compare_2indep(MEMBER, NONMEMBER),
    ),
    Case(
        "auc_bootstrap, 10,000 replicates",
        lambda: st.auc_bootstrap(MEMBER, NONMEMBER, seed=0, replicates=REPLICATES),
        lambda: metrics.roc_auc_score(IS_MEMBER, _resampled()),
        REPLICATES,
    ),
    Case(
        "roc_curve with band, 2,000 replicates",
        lambda: st.roc_curve(MEMBER, NONMEMBER, seed=0, replicates=CURVES),
        lambda: metrics.roc_curve(IS_MEMBER, _resampled()),
        CURVES,
    ),
    Case(
        "tpr_at_fpr over groups",
        lambda: st.tpr_at_fpr(
            MEMBER,
            NONMEMBER,
            0.01,
            member_groups=GROUPS[:RECORDS],
            nonmember_groups=GROUPS[RECORDS:],
        ),
        _naive_tpr,
    ),
    Case(
        "permutation_test, 10,000 permutations",
        lambda: st.permutation_test(SCORES, IS_MEMBER, seed=0, permutations=REPLICATES),
        lambda: metrics.roc_auc_score(RNG.permutation(IS_MEMBER), SCORES),
        REPLICATES,
    ),
    Case(
        "mann_whitney",
        lambda: st.mann_whitney(MEMBER, NONMEMBER),
        lambda: stats.mannwhitneyu(MEMBER, NONMEMBER, alternative="greater"),
    ),
    Case(
        "welch",
        lambda: st.welch(MEMBER, NONMEMBER),
        lambda: stats.ttest_ind(MEMBER, NONMEMBER, equal_var=False, alternative="greater"),
    ),
    Case("prevalence", lambda: st.prevalence(MEMBER[:5000], MEMBER[5000:], NONMEMBER)),
    Case("prevalence_lower_bound", lambda: st.prevalence_lower_bound(MEMBER, NONMEMBER)),
    Case("set_size_curve", lambda: st.set_size_curve(SCORES, IS_MEMBER, seed=0)),
    Case(
        "dataset_inference, 6 signals",
        lambda: st.dataset_inference(SIGNALS, IS_MEMBER, seed=0),
    ),
    Case(
        "residual_test, 40 features",
        lambda: st.residual_test(SCORES, IS_MEMBER, FEATURES, seed=0),
    ),
    Case("conformal_p_values, benjamini_hochberg", _conformal_claims, _naive_claims),
    Case("holm", lambda: st.holm(P_VALUES), lambda: multipletests(P_VALUES, method="holm")),
    Case("minimum_detectable_auc", lambda: st.minimum_detectable_auc(RECORDS, RECORDS)),
    Case("minimum_set_size", lambda: st.minimum_set_size(0.52)),
    Case("epsilon_lower_bound", lambda: st.epsilon_lower_bound(RECORDS, RECORDS, 5400, 1e-5)),
    Case("gaussian_mu_lower_bound", lambda: st.gaussian_mu_lower_bound(RECORDS, RECORDS, 5400)),
)


def measure(case: Case, repeats: int, part: int) -> dict[str, Any]:
    """Median seconds of both ways; at most `part` calls of a loop are timed."""
    ours = statistics.median(_seconds(case.ours) for _ in range(repeats))
    if case.naive is None:
        return {"seconds": ours}
    calls = min(part, case.loops)
    one = statistics.median(_seconds(case.naive, calls) / calls for _ in range(repeats))
    return {
        "seconds": ours,
        "naive seconds": one * case.loops,
        "naive calls timed": calls,
        "naive calls": case.loops,
        "naive / ours": one * case.loops / ours,
    }


def _seconds(work: Callable[[], object], calls: int = 1) -> float:
    started = time.process_time()
    for _ in range(calls):
        work()
    return time.process_time() - started


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", type=int, default=20, help="calls of a naive loop to time")
    given = parser.parse_args()
    rows = {}
    with threadpool_limits(1):
        for case in CASES:
            rows[case.name] = measure(case, given.repeats, given.part)
            print(case.name, rows[case.name], flush=True)
    total = sum(row["seconds"] for row in rows.values())
    write_json(
        RESULTS,
        {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
            "threads": 1,
            "members": RECORDS,
            "non-members": RECORDS,
            "repeats": given.repeats,
            "statistics": rows,
            "seconds, all together": total,
        },
    )
    print("all together:", total)


if __name__ == "__main__":
    main()
