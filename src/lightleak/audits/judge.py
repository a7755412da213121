"""The cheap half of an audit: from stored evidence to scores and verdict, without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightleak import signals
from lightleak import statistics as st
from lightleak.audits.settings import AuditSettings
from lightleak.errors import UserError
from lightleak.evidence.readings import (
    AugmentedCosines,
    ContrastLoss,
    DropoutCosines,
    Floats,
    GradientNorms,
    GradientSlices,
    PairEmbeddings,
    TokenStatistics,
    slice_axes,
)
from lightleak.evidence.table import (
    SLICE_COLUMNS,
    augmented_cosines,
    contrast_loss,
    dropout_cosines,
    gradient_norms,
    gradient_slices,
    pair_embeddings,
    token_statistics,
)
from lightleak.runs import Progress, Run, Silent, read_json, write_json, write_table
from lightleak.signals import cross
from lightleak.validity.verdict import (
    BlindFinding,
    Coverage,
    DifferenceFinding,
    DuplicateFinding,
    PowerFinding,
    PrimaryFinding,
    RateAtFpr,
    SideCoverage,
    SignalFinding,
    ValidityFinding,
    Verdict,
    decide,
)

FALSE_POSITIVE_RATES = ("0.01", "0.05")
# The residual test leans on a normal approximation, which is not to be believed further out.
SMALLEST_P = 1e-6
_SLICES = (*SLICE_COLUMNS, "in_reference")


@dataclass(frozen=True)
class Measured:
    """The evidence of a run and the records it is about, row by row.

    Attributes:
        table: evidence without the slices, n rows.
        ids: (n,) "suspect/a1"; side, folds: (n,); groups: (n,), copies share one.
        slice_parts: yields the parts with their slices.
    """

    table: pa.Table
    ids: list[str]
    side: NDArray[np.str_]
    folds: NDArray[np.int64]
    groups: NDArray[np.str_]
    slice_parts: Callable[[], Iterator[pa.Table]]

    @property
    def audited(self) -> NDArray[np.bool_]:
        """Suspects and controls, not calibration records."""
        return np.isin(self.side, ("suspect", "control"))


def judge(run: Run, progress: Progress | None = None) -> Verdict:
    """Score, test and decide, from what is stored; writes scores, failures and verdict.

    Raises:
        UserError: the run has no complete evidence yet.
    """
    try:
        return _judge(run, progress or Silent())
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, AttributeError) as error:
        if _intact(run):
            raise
        raise UserError(
            f"what it stores is damaged ({str(error).partition(chr(10))[0]})",
            str(run.folder),
            "Delete the damaged file and run the same audit again.",
        ) from error


def _judge(run: Run, progress: Progress) -> Verdict:
    settings = AuditSettings.read(**run.manifest()["settings"])
    measured = load(run)
    scores: dict[str, Floats] = {}
    findings: dict[str, SignalFinding] = {}
    with progress.stage("Scoring and testing", len(settings.signals) + 1) as advance:
        for name in settings.signals:
            scores[name] = score(run, settings, measured, name)
            findings[name] = _finding(settings, measured, name, scores[name])
            advance(1)
        findings = _with_holm(findings)
        write_table(run.scores_file, _scores_table(measured, scores))
        write_table(run.failures_file, _failures(run, settings, measured, scores))
        write_table(run.claims_file, _claims(settings, measured, scores[settings.primary]))
        verdict = _verdict(run, settings, measured, scores[settings.primary], findings)
        write_json(run.verdict_file, verdict.model_dump(mode="json"))
        advance(1)
    return verdict


def _intact(run: Run) -> bool:
    """Whether every stored file can be read, so that an error while judging is our own."""
    needed = {run.manifest_file: "settings", run.evidence / "duplicates.json": "across"}
    try:
        for file in run.evidence.glob("*.parquet"):
            pq.read_table(file)
        read_json(run.evidence / "blind.json")
        return all(key in read_json(file) for file, key in needed.items())
    except (pa.ArrowInvalid, OSError, UserError):
        return False


def load(run: Run) -> Measured:
    """Evidence and records of a run, side by side."""
    about = pq.read_table(run.evidence / "records.parquet").to_pydict()
    failed = {
        key
        for file in run.evidence.glob("failed-*.parquet")
        for key in pq.read_table(file)["id"].to_pylist()
    }
    place = {key: i for i, key in enumerate(about["id"])}
    files = sorted(run.evidence.glob("part-*.parquet"))
    if not files:
        raise UserError("it holds no evidence yet", str(run.folder), "Run the same audit again.")
    columns = [n for n in pq.read_schema(files[0]).names if n not in _SLICES]
    table = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    ids = table["id"].to_pylist()
    missing = set(place) - set(ids) - failed
    if missing:
        raise UserError(
            f"its evidence is not complete: {len(missing)} record(s) are missing",
            str(run.folder),
            "Run the same audit again: it goes on where it was.",
        )
    rows = [place[key] for key in ids]

    def slice_parts() -> Iterator[pa.Table]:
        for file in files:
            yield pq.read_table(file, columns=list(_SLICES))

    return Measured(
        table,
        ids,
        np.array([about["set"][i] for i in rows]),
        np.array([about["fold"][i] for i in rows]),
        np.array([about["group"][i] or "" for i in rows]),
        slice_parts,
    )


def score(run: Run, settings: AuditSettings, measured: Measured, name: str) -> Floats:
    """(n,) scores of one signal; NaN where a record cannot be scored or only calibrates."""
    stored = sorted(run.evidence.glob(f"scored-{name}-*.parquet"))
    if stored:
        # The evidence was too large to keep: it was reduced to scores on the way.
        table = pa.concat_tables([pq.read_table(file) for file in stored]).to_pydict()
        by_id = dict(zip(table["id"], table["score"], strict=True))
        return np.array([by_id.get(key, np.nan) for key in measured.ids], dtype=np.float64)
    signal = signals.get(name)
    fits = cross(settings.protocol, settings.folds, measured.side, measured.folds)
    return signal.score(_evidence(run, measured, signal.needs), fits, settings.options_of(name))


_FROM_TABLE: dict[type, Callable[[pa.Table], Any]] = {
    TokenStatistics: token_statistics,
    PairEmbeddings: pair_embeddings,
    AugmentedCosines: augmented_cosines,
    DropoutCosines: dropout_cosines,
    ContrastLoss: contrast_loss,
}


def _evidence(run: Run, measured: Measured, needs: type) -> Any:
    if needs in _FROM_TABLE:
        return _FROM_TABLE[needs](measured.table)
    described = read_json(run.evidence / "gradients.json")
    matrices = {name: tuple(shape) for name, shape in described["matrices"].items()}
    if needs is GradientNorms:
        return gradient_norms(measured.table, list(matrices))
    if needs is GradientSlices:
        norms2 = pq.read_table(run.evidence / "reference-norms.parquet")["norms2"].to_pylist()
        return gradient_slices(
            measured.slice_parts,
            len(measured.ids),
            slice_axes(matrices),
            np.array(norms2),
            np.array(described["reference_sizes"]),
            lora=described["strategy"].startswith("lora"),
        )
    raise TypeError(f"no evidence of kind {needs.__name__}")


# -- statistics of one signal -----------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Scored suspects and controls, as the statistics take them."""

    scores: Floats
    suspect: NDArray[np.bool_]
    folds: NDArray[np.int64]
    groups: NDArray[np.str_]
    rows: NDArray[np.int64]

    def enough(self, fewest: int = 2) -> bool:
        """Whether both sides have so many groups, so that there is something to compare."""
        return min(self.n_groups) >= fewest

    @property
    def n_groups(self) -> tuple[int, int]:
        """Groups among the suspects and among the controls."""
        return len(set(self.groups[self.suspect])), len(set(self.groups[~self.suspect]))


def compared(measured: Measured, scores: Floats) -> Compared:
    """The audited records that have a score."""
    rows = np.flatnonzero(measured.audited & np.isfinite(scores))
    return Compared(
        scores[rows],
        measured.side[rows] == "suspect",
        measured.folds[rows],
        measured.groups[rows],
        rows,
    )


def crosses_folds(settings: AuditSettings, name: str) -> bool:
    """Whether a signal's scores in one fold depend on the labels of the others.

    Then folds share what they learnt, and a test that pools them as if they were independent
    rejects too often: for two folds the pooled variance is up to twice what it seems to be.
    Each fold alone, given the others, is exact; the folds' p-values are combined by a rule that
    holds under any dependence.
    """
    return signals.get(name).fitted and settings.protocol == "crossfit"


def _finding(
    settings: AuditSettings, measured: Measured, name: str, scores: Floats
) -> SignalFinding:
    signal = signals.get(name)
    data = compared(measured, scores)
    if len(set(data.scores.tolist())) < 2:
        data = compared(measured, np.full(len(scores), np.nan))  # Nothing to rank.
    unscorable = int((measured.audited & ~np.isfinite(scores)).sum())
    area = interval = p_value = None
    rates: dict[str, RateAtFpr | None] = dict.fromkeys(FALSE_POSITIVE_RATES)
    why = dict.fromkeys(FALSE_POSITIVE_RATES, "too few scored records")
    if data.enough():
        s, y = data.scores, data.suspect
        if crosses_folds(settings, name):
            estimate = st.auc_across_folds(
                s[y],
                s[~y],
                data.folds[y],
                data.folds[~y],
                member_groups=data.groups[y],
                nonmember_groups=data.groups[~y],
            )
        else:
            estimate = st.auc_delong(
                s[y], s[~y], member_groups=data.groups[y], nonmember_groups=data.groups[~y]
            )
        area, interval = estimate.value, (estimate.low, estimate.high)
        p_value = by_fold(
            settings,
            name,
            data,
            lambda part: st.permutation_test(
                part.scores, part.suspect, groups=part.groups, seed=settings.seed
            ),
        )
        no_threshold = ""
        if crosses_folds(settings, name):
            # A threshold of one fold's fit accuses another rate of controls under another's.
            no_threshold = "folds fitted apart share no threshold"
        elif not _in_every_fold(data):
            no_threshold = "a fold holds only one side"
        if no_threshold:
            why = dict.fromkeys(FALSE_POSITIVE_RATES, no_threshold)
        for rate in () if no_threshold else FALSE_POSITIVE_RATES:
            point = st.tpr_at_fpr_across_folds(
                s[y], s[~y], data.folds[y], data.folds[~y], float(rate)
            )
            if isinstance(point, st.Unresolvable):
                why[rate] = point.reason
            else:
                del why[rate]
                rates[rate] = RateAtFpr(
                    tpr=point.tpr.value,
                    ci95=(point.tpr.low, point.tpr.high),
                    fpr_ci95=(point.fpr.low, point.fpr.high),
                )
    return SignalFinding(
        auc=area,
        auc_ci95=interval,
        tpr_at_fpr=rates,
        tpr_at_fpr_reason=why,
        p_value=p_value,
        p_value_holm=None,
        orientation=_orientation(interval),
        n_unscorable=unscorable,
        source=signal.source,
        options=settings.options_of(name),
    )


def _in_every_fold(data: Compared) -> bool:
    return all(
        len(set(data.suspect[data.folds == k].tolist())) == 2 for k in set(data.folds.tolist())
    )


def by_fold(
    settings: AuditSettings, name: str, data: Compared, test: Callable[[Compared], float]
) -> float:
    """The p-value of a test, on all records, or fold by fold where the folds were crossed."""
    if not crosses_folds(settings, name):
        return test(data)
    values = []
    for k in range(settings.folds):
        here = data.folds == k
        part = Compared(
            data.scores[here],
            data.suspect[here],
            data.folds[here],
            data.groups[here],
            data.rows[here],
        )
        values.append(test(part) if part.enough() else 1.0)
    return st.combine_splits(values)


def _orientation(interval: tuple[float, float] | None) -> str:
    if interval is not None and interval[1] < 0.5:
        return "below .5: a leak in the other direction or a sign error; not flipped"
    return "higher = more member-like"


def _with_holm(findings: dict[str, SignalFinding]) -> dict[str, SignalFinding]:
    tested = {name: each.p_value for name, each in findings.items() if each.p_value is not None}
    adjusted = st.holm(list(tested.values())).tolist() if tested else []
    by_name = dict(zip(tested, adjusted, strict=True))
    return {
        name: each.model_copy(update={"p_value_holm": by_name.get(name)})
        for name, each in findings.items()
    }


# -- the verdict ------------------------------------------------------------------------------


def _verdict(
    run: Run,
    settings: AuditSettings,
    measured: Measured,
    scores: Floats,
    findings: dict[str, SignalFinding],
) -> Verdict:
    primary = findings[settings.primary]
    data = compared(measured, scores)
    n_suspect, n_control = int(data.suspect.sum()), int((~data.suspect).sum())
    coverage = _coverage(run, data)
    validity = _validity(run, settings, data)
    adjusted = _adjusted_p(run, settings, measured, data)
    decision = decide(
        design=settings.design,
        primary=primary,
        primary_p_adjusted=adjusted,
        validity=validity,
        coverage=coverage,
        cutoffs=settings.cutoffs,
    )
    return Verdict(
        verdict=decision.verdict,
        tier=decision.tier,
        reasons=list(decision.reasons),
        primary=PrimaryFinding(
            signal=settings.primary,
            auc=primary.auc,
            auc_ci95=primary.auc_ci95,
            p_value=primary.p_value,
            p_value_adjusted=adjusted,
            test=decision.test,
            n_suspect=n_suspect,
            n_control=n_control,
        ),
        signals=findings,
        validity=validity,
        prevalence=None,
        coverage=coverage,
        cutoffs=settings.cutoffs,
    )


def _adjusted_p(
    run: Run, settings: AuditSettings, measured: Measured, data: Compared
) -> float | None:
    """The residual test of the primary signal, given what is visible without the model."""
    blind = pq.read_table(run.evidence / "blind.parquet")
    row = {key: i for i, key in enumerate(blind["id"].to_pylist())}
    features = np.array(blind["features"].to_pylist(), dtype=np.float64).reshape(len(row), -1)
    if not data.enough(settings.cutoffs.fewest_records) or not features.shape[1]:
        return None

    def test(part: Compared) -> float:
        of_part = features[[row[measured.ids[i]] for i in part.rows]]
        return st.residual_test(
            part.scores, part.suspect, of_part, groups=part.groups, seed=settings.seed
        ).p_value

    return max(SMALLEST_P, by_fold(settings, settings.primary, data, test))


def _coverage(run: Run, data: Compared) -> Coverage:
    unusable = pq.read_table(run.evidence / "unusable.parquet")["id"].to_pylist()
    stored = pq.read_table(run.evidence / "records.parquet", columns=["set"])["set"].to_pylist()
    bank = pq.read_table(run.evidence / "bank.parquet")["id"].to_pylist()

    def of_side(side: str, is_suspect: bool) -> SideCoverage:
        attempted = stored.count(side) + sum(key.startswith(f"{side}/") for key in unusable)
        scored = int((data.suspect == is_suspect).sum())
        return SideCoverage(attempted=attempted, scored=scored, failed=attempted - scored)

    suspect, control = of_side("suspect", True), of_side("control", False)
    return Coverage(
        attempted=suspect.attempted + control.attempted,
        scored=suspect.scored + control.scored,
        failed=suspect.failed + control.failed,
        suspect=suspect,
        control=control,
        set_aside=sum(key.startswith("control/") for key in bank),
    )


def _detectable_auc(settings: AuditSettings, data: Compared) -> float | None:
    """The smallest AUC found with 90 % probability, by the number of groups.

    Where folds were crossed, each has its share of the groups, and twice their median p-value
    rejects when they do at half the level.
    """
    suspects, controls, alpha = *data.n_groups, settings.cutoffs.alpha
    if crosses_folds(settings, settings.primary):
        suspects, controls = suspects // settings.folds, controls // settings.folds
        alpha /= 2
    if min(suspects, controls) < 2:
        return None
    smallest = st.minimum_detectable_auc(suspects, controls, alpha)
    return smallest if np.isfinite(smallest) else None


def _validity(run: Run, settings: AuditSettings, data: Compared) -> ValidityFinding:
    blind = read_json(run.evidence / "blind.json")
    pairs = read_json(run.evidence / "duplicates.json")["across"]
    joint = blind.get("joint", {"auc": None, "auc_ci95": None})
    return ValidityFinding(
        blind_auc=joint["auc"],
        blind_auc_ci95=joint["auc_ci95"],
        blind={
            part: BlindFinding(**blind[part])
            for part in ("text", "image", "joint")
            if part in blind
        },
        differences=[DifferenceFinding(**each) for each in blind.get("differences", [])],
        duplicates=len(pairs),
        duplicate_pairs=[DuplicateFinding(**pair) for pair in pairs],
        power=PowerFinding(
            min_detectable_auc=_detectable_auc(settings, data),
            suspect_groups=data.n_groups[0],
            control_groups=data.n_groups[1],
        ),
        controls=[],
    )


def _claims(settings: AuditSettings, measured: Measured, scores: Floats) -> pa.Table:
    """What may be said of single suspects by the primary signal: id, score, p_value, q_value.

    A suspect's p-value is its conformal rank among the controls (those of its own fold where the
    scores of folds come from different fits), and its q-value that of Benjamini and Hochberg.
    """
    data = compared(measured, scores)
    y = data.suspect
    p_values: Floats = np.zeros(0)
    if data.enough():
        p_values = (
            st.conformal_p_values_within_folds(
                data.scores[y], data.folds[y], data.scores[~y], data.folds[~y]
            )
            if crosses_folds(settings, settings.primary)
            else st.conformal_p_values(data.scores[y], data.scores[~y])
        )
    order = np.argsort(p_values, kind="stable")
    adjusted = st.benjamini_hochberg(p_values).adjusted if len(p_values) else p_values
    return pa.table(
        {
            "id": pa.array([_own_id(measured.ids[data.rows[y][i]]) for i in order], pa.string()),
            "score": pa.array(data.scores[y][order], pa.float64()),
            "p_value": pa.array(p_values[order], pa.float64()),
            "q_value": pa.array(adjusted[order], pa.float64()),
        }
    )


# -- what is written --------------------------------------------------------------------------


def _scores_table(measured: Measured, scores: dict[str, Floats]) -> pa.Table:
    """id, set, fold, signal, score; calibration records only where a signal is not fitted."""
    columns: dict[str, list[Any]] = {n: [] for n in ("id", "set", "fold", "signal", "score")}
    for name, values in scores.items():
        shown = measured.audited if signals.get(name).fitted else np.ones(len(values), bool)
        for i in np.flatnonzero(shown):
            columns["id"].append(_own_id(measured.ids[i]))
            columns["set"].append(str(measured.side[i]))
            columns["fold"].append(int(measured.folds[i]))
            columns["signal"].append(name)
            columns["score"].append(float(values[i]) if np.isfinite(values[i]) else None)
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("set", pa.string()),
            ("fold", pa.int64()),
            ("signal", pa.string()),
            ("score", pa.float64()),
        ]
    )
    return pa.table(columns, schema=schema)


def _failures(
    run: Run, settings: AuditSettings, measured: Measured, scores: dict[str, Floats]
) -> pa.Table:
    """Every record that failed anywhere, once a stage: set, id, stage, error."""
    files = [run.evidence / "unusable.parquet", *sorted(run.evidence.glob("failed-*.parquet"))]
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    for name in settings.signals:
        signal = signals.get(name)
        shown = measured.audited if signal.fitted else np.ones(len(scores[name]), bool)
        rows += [
            {"id": measured.ids[i], "stage": f"signal {name}", "error": signal.unscorable}
            for i in np.flatnonzero(shown & ~np.isfinite(scores[name]))
        ]
    return pa.table(
        {
            "id": pa.array([_own_id(row["id"]) for row in rows], pa.string()),
            "set": pa.array([row["id"].partition("/")[0] for row in rows], pa.string()),
            "stage": pa.array([row["stage"] for row in rows], pa.string()),
            "error": pa.array([row["error"] for row in rows], pa.string()),
        }
    )


def _own_id(key: str) -> str:
    """The user's id of a record, without the side that made it unique."""
    return key.partition("/")[2]
