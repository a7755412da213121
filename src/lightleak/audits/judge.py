"""The cheap half of an audit: from stored evidence to scores and verdict, without the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from lightleak import signals
from lightleak import statistics as st
from lightleak.audits import judge_controls
from lightleak.audits.gather_references import ASKED
from lightleak.audits.set_tests import Residual, SetTests, blind_features, crosses_folds
from lightleak.audits.settings import AuditSettings
from lightleak.audits.stored import Compared, Measured, compared, load, score
from lightleak.errors import UserError
from lightleak.evidence.readings import Floats
from lightleak.runs import Progress, Run, Silent, read_json, read_table, write_json, write_table
from lightleak.validity.verdict import (
    BLIND_PARTS,
    BlindFinding,
    ComparedFinding,
    Coverage,
    DifferenceFinding,
    DuplicateFinding,
    InferenceFinding,
    PowerFinding,
    Prevalence,
    PrimaryFinding,
    RateAtFpr,
    SideCoverage,
    SignalFinding,
    ValidityFinding,
    Verdict,
    counting_test,
    decide,
)

FALSE_POSITIVE_RATES = ("0.01", "0.05")
_CURVE = ("sizes", "p_median", "p_low", "p_high", "found")


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
            scores[name] = score(settings, measured, name)
            findings[name] = _finding(settings, measured, name, scores[name])
            advance(1)
        findings = _with_holm(findings)
        write_table(run.scores_file, _scores_table(settings, measured, scores))
        write_table(run.failures_file, _failures(run, settings, measured, scores))
        write_table(run.claims_file, _claims(settings, measured, scores[settings.primary]))
        write_table(run.curve_file, _curve(settings, measured, scores[settings.primary]))
        verdict = _verdict(run, settings, measured, scores, findings)
        write_json(run.verdict_file, verdict.model_dump(mode="json"))
        advance(1)
    return verdict


def _intact(run: Run) -> bool:
    """Whether every stored file can be read, so that an error while judging is our own."""
    needed = {run.manifest_file: "settings", run.evidence / "duplicates.json": "across"}
    try:
        for file in run.evidence.rglob("*.parquet"):
            read_table(file)
        read_json(run.evidence / "blind.json")
        return all(key in read_json(file) for file, key in needed.items())
    except UserError:
        return False


# -- statistics of one signal -----------------------------------------------------------------


def _finding(
    settings: AuditSettings, measured: Measured, name: str, scores: Floats
) -> SignalFinding:
    signal = signals.get(name)
    data = compared(measured, scores)
    unscorable = int((measured.audited & ~np.isfinite(scores)).sum())
    area = interval = p_value = None
    rates: dict[str, RateAtFpr | None] = dict.fromkeys(FALSE_POSITIVE_RATES)
    why = dict.fromkeys(FALSE_POSITIVE_RATES, "too few scored records")
    tests = SetTests(settings, name)
    estimate = tests.auc(data)
    if estimate is not None:
        s, y = data.scores, data.suspect
        area, interval = estimate.value, (estimate.low, estimate.high)
        p_value = tests.permutation(data)
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
                s[y],
                s[~y],
                data.folds[y],
                data.folds[~y],
                float(rate),
                member_groups=data.groups[y],
                nonmember_groups=data.groups[~y],
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


def _by_group(data: Compared) -> tuple[Floats, Floats]:
    """Scores of suspects and of controls, one a group: its mean."""
    means = []
    for side in (data.suspect, ~data.suspect):
        _, code, count = np.unique(data.groups[side], return_inverse=True, return_counts=True)
        means.append(np.bincount(code, weights=data.scores[side]) / count)
    return means[0], means[1]


def _in_every_fold(data: Compared) -> bool:
    return all(
        len(set(data.suspect[data.folds == k].tolist())) == 2 for k in set(data.folds.tolist())
    )


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
    scores: dict[str, Floats],
    findings: dict[str, SignalFinding],
) -> Verdict:
    primary, own = findings[settings.primary], scores[settings.primary]
    data = compared(measured, own)
    coverage = coverage_of(run, data)
    controls = judge_controls.control_scores(run, settings, measured)
    blind = SetTests(settings, settings.primary, blind_features(run, measured))
    tests = blind.given(
        *(values for values in controls.models.values() if controls.covers(values, data, settings))
    )
    residual = tests.residual(data)
    validity = validity_of(run, settings, data, residual)
    _, test, _ = counting_test(settings.design, validity, settings.cutoffs)
    found = judge_controls.find(blind, measured, own, controls, test)
    validity = validity.model_copy(update={"controls": found})
    decision = decide(
        design=settings.design,
        primary=primary,
        primary_p_adjusted=None if residual is None else residual.p_value,
        validity=validity,
        coverage=coverage,
        cutoffs=settings.cutoffs,
    )
    if decision.tier != "none" and not validity.differs:
        findings = {
            name: each.model_copy(
                update={"prevalence": _prevalence(settings, measured, name, scores[name])}
            )
            for name, each in findings.items()
        }
    return Verdict(
        verdict=decision.verdict,
        tier=decision.tier,
        reasons=list(decision.reasons),
        primary=PrimaryFinding(
            signal=settings.primary,
            auc=primary.auc,
            auc_ci95=primary.auc_ci95,
            p_value=primary.p_value,
            p_value_adjusted=None if residual is None else residual.p_value,
            test=decision.test,
            tests={"permutation": primary.p_value, **_other_tests(tests, data, residual)},
            robustness=None if residual is None else residual.robustness,
            n_suspect=int(data.suspect.sum()),
            n_control=int((~data.suspect).sum()),
        ),
        signals=findings,
        validity=validity,
        prevalence=findings[settings.primary].prevalence,
        dataset_inference=_inference(settings, measured, scores),
        compared=_compared_with(run, settings, measured),
        coverage=coverage,
        cutoffs=settings.cutoffs,
    )


def _other_tests(tests: SetTests, data: Compared, residual: Residual | None) -> dict[str, float]:
    """p-values of further tests of the primary signal's scores, by name."""
    if not data.enough():
        return {}
    return {
        "Mann–Whitney": tests.by_fold(data, lambda part: st.mann_whitney(*_by_group(part))),
        "Welch": tests.by_fold(data, lambda part: st.welch(*_by_group(part))),
        **({} if residual is None else residual.by_family),
    }


def _prevalence(
    settings: AuditSettings, measured: Measured, name: str, scores: Floats
) -> Prevalence | None:
    """What share of the suspects was used, by one signal.

    With known members, that is calibration records which the signal was not fitted on, an
    estimate; else a lower bound. None where folds were fitted apart and share no scale.
    """
    data = compared(measured, scores)
    if crosses_folds(settings, name) or not data.enough():
        return None
    y = data.suspect
    known = np.isfinite(scores) & (measured.side == "member")
    if settings.fitted(name) or not known.any():
        bound = st.prevalence_lower_bound(
            data.scores[y],
            data.scores[~y],
            suspect_groups=data.groups[y],
            control_groups=data.groups[~y],
        )
        return Prevalence(estimate=None, ci95=(bound, 1.0), method="lower bound")
    # Groups are told apart by side: copies in the calibration would have stopped the audit.
    groups = data.groups[y], np.char.add("member ", measured.groups[known]), data.groups[~y]
    share = st.prevalence(data.scores[y], scores[known], data.scores[~y], groups=groups)
    return Prevalence(estimate=share.value, ci95=(share.low, share.high), method="known members")


def _inference(
    settings: AuditSettings, measured: Measured, scores: dict[str, Floats]
) -> InferenceFinding | None:
    """Every signal that needs no fit, combined."""
    names = [name for name in scores if not settings.fitted(name)]
    if not names:
        return None
    rows = measured.audited
    suspect, groups = measured.side[rows] == "suspect", measured.groups[rows]
    if min(len(set(groups[suspect])), len(set(groups[~suspect]))) < st.FEWEST_GROUPS:
        return None
    found = st.dataset_inference(
        np.column_stack([scores[name][rows] for name in names]),
        suspect,
        groups=groups,
        seed=settings.seed,
    )
    return InferenceFinding(
        p_value=found.p_value,
        control_p_value=found.control_p_value,
        shuffled_p_value=found.shuffled_p_value,
        signals=names,
    )


def _compared_with(run: Run, settings: AuditSettings, measured: Measured) -> ComparedFinding | None:
    """What else was asked about the same records."""
    if not settings.across:
        return None
    asked = read_json(run.evidence / ASKED)
    trained_on = asked["trained on"]
    seen = np.isin(measured.ids, [key for ids in trained_on.values() for key in ids])
    return ComparedFinding(
        base=asked.get("base", settings.known_base()),
        references=len(trained_on),
        recipe=asked.get("recipe"),
        epoch=asked.get("epoch"),
        suspects_seen=int(seen[measured.side == "suspect"].sum()),
        controls_seen=int(seen[measured.side == "control"].sum()),
        records=int(measured.audited.sum()),
        shares=asked.get("shares", "not asked for"),
    )


def _curve(settings: AuditSettings, measured: Measured, scores: Floats) -> pa.Table:
    """How the p-value falls with the number of suspects, by the primary signal.

    Empty where folds were fitted apart and share no scale.
    """
    data = compared(measured, scores)
    if crosses_folds(settings, settings.primary) or not data.enough(10):
        return pa.table({name: pa.array([], pa.float64()) for name in _CURVE})
    curve = st.set_size_curve(
        data.scores,
        data.suspect,
        groups=data.groups,
        seed=settings.seed,
        alpha=settings.cutoffs.alpha,
    )
    return pa.table({name: getattr(curve, name) for name in _CURVE})


def coverage_of(run: Run, data: Compared) -> Coverage:
    unusable = read_table(run.evidence / "unusable.parquet")["id"].to_pylist()
    stored = read_table(run.evidence / "records.parquet", columns=["set"])["set"].to_pylist()
    bank = read_table(run.evidence / "bank.parquet")["id"].to_pylist()

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
    """By the effective number of groups, the smallest AUC found with 90 % probability.

    Where folds were crossed, each has its share of the groups, and twice their median p-value
    rejects when they do at half the level.
    """
    suspects, controls = data.effective_groups
    alpha = settings.cutoffs.alpha
    if crosses_folds(settings, settings.primary):
        suspects, controls = suspects // settings.folds, controls // settings.folds
        alpha /= 2
    if min(suspects, controls) < 2:
        return None
    smallest = st.minimum_detectable_auc(suspects, controls, alpha)
    return smallest if np.isfinite(smallest) else None


def validity_of(
    run: Run, settings: AuditSettings, data: Compared, residual: Residual | None
) -> ValidityFinding:
    blind = read_json(run.evidence / "blind.json")
    pairs = read_json(run.evidence / "duplicates.json")["across"]
    unread = run.evidence / "unread.json"
    parts = {name: BlindFinding(**blind[name]) for name in BLIND_PARTS if name in blind}
    # Runs of an earlier version had no trees.
    stronger = blind.get("stronger", blind.get("joint", {"auc": None, "auc_ci95": None}))
    return ValidityFinding(
        blind_auc=stronger["auc"],
        blind_auc_ci95=stronger["auc_ci95"],
        blind_p_value=blind.get("p_value"),
        effective_share=residual and residual.effective_share,
        blind=parts,
        unread_fields=read_json(unread)["fields"] if unread.is_file() else [],
        differences=[DifferenceFinding(**each) for each in blind.get("differences", [])],
        duplicates=len(pairs),
        duplicate_pairs=[DuplicateFinding(**pair) for pair in pairs],
        power=PowerFinding(
            min_detectable_auc=_detectable_auc(settings, data),
            suspect_groups=data.effective_groups[0],
            control_groups=data.effective_groups[1],
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


def _scores_table(
    settings: AuditSettings, measured: Measured, scores: dict[str, Floats]
) -> pa.Table:
    """id, set, fold, signal, score; calibration records only where a signal is not fitted."""
    columns: dict[str, list[Any]] = {n: [] for n in ("id", "set", "fold", "signal", "score")}
    for name, values in scores.items():
        shown = measured.audited if settings.fitted(name) else np.ones(len(values), bool)
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
    rows = [row for file in files for row in read_table(file).to_pylist()]
    for name in settings.signals:
        signal = signals.get(name)
        shown = measured.audited if settings.fitted(name) else np.ones(len(scores[name]), bool)
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
