"""The two tests that can carry a verdict, as every comparison of an audit uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lightleak import statistics as st
from lightleak.audits.settings import AuditSettings
from lightleak.audits.stored import Compared, Measured
from lightleak.evidence.readings import Floats
from lightleak.runs import Run, read_table


def crosses_folds(settings: AuditSettings, name: str) -> bool:
    """Whether a signal's scores in one fold depend on the labels of the others.

    Then folds share what they learnt, and a test that pools them as if they were independent
    rejects too often: for two folds the pooled variance is up to twice what it seems to be.
    Each fold alone, given the others, is exact; the folds' p-values are combined by a rule that
    holds under any dependence.
    """
    return settings.fitted(name) and settings.protocol == "crossfit"


@dataclass(frozen=True)
class Residual:
    """The residual test, with what it was made of.

    Attributes:
        p_value: the largest over the families of models.
        p_value_below: the same for suspects that score lower.
        by_family: p-values, "residual, linear".
        robustness: how much an unseen difference would have to explain; see `statistics`.
        effective_share: what the controls are worth once weighted to resemble the suspects.
    """

    p_value: float
    p_value_below: float
    robustness: float
    by_family: dict[str, float]
    effective_share: float


@dataclass(frozen=True)
class SetTests:
    """Tests of the scores of one signal.

    Attributes:
        settings: the audit's.
        signal: whose scores are compared.
        features: (n, d) what is known of each row without the target, for the residual test; None
            where it is not.
    """

    settings: AuditSettings
    signal: str
    features: Floats | None = None

    def auc(self, data: Compared) -> st.Estimate | None:
        """The AUC with its interval; None where there is nothing to compare or to rank."""
        if not data.enough() or np.ptp(data.scores) == 0:
            return None
        y = data.suspect
        sides = data.scores[y], data.scores[~y]
        own, others = data.groups[y], data.groups[~y]
        if crosses_folds(self.settings, self.signal):
            folds = data.folds[y], data.folds[~y]
            return st.auc_across_folds(*sides, *folds, member_groups=own, nonmember_groups=others)
        return st.auc_delong(*sides, member_groups=own, nonmember_groups=others)

    def permutation(self, data: Compared) -> float:
        """By dealing the labels anew over the unit of assignment."""
        return self.by_fold(
            data,
            lambda part: st.permutation_test(
                part.scores, part.suspect, groups=part.groups, seed=self.settings.seed
            ),
        )

    def residual(self, data: Compared) -> Residual | None:
        """By what remains once the features are accounted for; None where that cannot be told."""
        features, fewest = self.features, self.settings.cutoffs.fewest_records
        parts = self._parts(data)
        if features is None or not data.enough(fewest) or not all(p.enough() for p in parts):
            return None
        found = [
            st.residual_test(
                part.scores,
                part.suspect,
                features[part.rows],
                groups=part.groups,
                seed=self.settings.seed,
            )
            for part in parts
        ]

        def combined(p_values: list[float]) -> float:
            return max(
                st.SMALLEST_P, st.combine_splits(p_values) if len(found) > 1 else p_values[0]
            )

        return Residual(
            combined([each.p_value for each in found]),
            combined([each.p_value_below for each in found]),
            min(each.robustness for each in found),
            {
                f"residual, {name}": combined([each.p_by_family[name] for each in found])
                for name in found[0].p_by_family
            },
            float(np.mean([each.effective_share for each in found])),
        )

    def given(self, *columns: Floats) -> SetTests:
        """The same with further features, (n,) each; what is missing is said by a column more."""
        if self.features is None:
            return self
        parts = [self.features]
        for column in columns:
            known = np.isfinite(column)
            parts.append(np.where(known, column, np.median(column[known]))[:, None])
            if not known.all():
                parts.append(known[:, None].astype(np.float64))
        return replace(self, features=np.hstack(parts))

    def by_fold(self, data: Compared, test: Callable[[Compared], float]) -> float:
        """The p-value of a test on all records, or fold by fold where the folds were crossed."""
        parts = self._parts(data)
        if len(parts) == 1:
            return test(data)
        return st.combine_splits([test(part) if part.enough() else 1.0 for part in parts])

    def _parts(self, data: Compared) -> list[Compared]:
        """All records, or each fold by itself where the folds were crossed."""
        if not crosses_folds(self.settings, self.signal):
            return [data]
        return [data.where(data.folds == k) for k in range(self.settings.folds)]


def blind_features(run: Run, measured: Measured) -> Floats | None:
    """(n, d) what is visible without the model, row by row; None where the sets were too small.

    Rows of records that are not audited hold zeros, which no test reads.
    """
    stored = read_table(run.evidence / "blind.parquet")
    values = np.array(stored["features"].to_pylist(), dtype=np.float64).reshape(stored.num_rows, -1)
    if not values.shape[1]:
        return None
    row = {key: i for i, key in enumerate(stored["id"].to_pylist())}
    features = np.zeros((len(measured.ids), values.shape[1]))
    for place, key in enumerate(measured.ids):
        if key in row:
            features[place] = values[row[key]]
    return features
