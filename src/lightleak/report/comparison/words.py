"""What a comparison may say, and what stands in the way of saying it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightleak.report.comparison.contents import Audit
from lightleak.report.membership.words import GLOSSARY as OF_AN_AUDIT
from lightleak.report.membership.words import TIERS
from lightleak.report.words import VERDICTS, Check, Mark
from lightleak.validity import Verdict
from lightleak.validity.verdict import Range

GLOSSARY = {
    "Share used": "What part of the suspects the target was trained on. Where records are known "
    "that it was trained on, it is estimated, with a 95 % interval.",
    "At least": "A lower bound: where no such record is known, only how many it must be at least "
    "can be said (with 95 % confidence), and never that it was few.",
    **{word: OF_AN_AUDIT[word] for word in ("Signal", "AUC", "p-value", "Blind baseline")},
}

KEY = (
    "Blue: the signal named beforehand, which alone carries a verdict. Black: the others, shown so "
    "that none is chosen afterwards. Diamond and line: an estimate with its 95 % interval. Pale "
    "bar with an open end: only that it is at least so much."
)

CHANCE = (
    "Each p-value is that of one audit; of many audits some end in a small one by chance alone. "
    "Whether two audits differ is not tested here: where intervals overlap, take them as equal."
)


@dataclass(frozen=True)
class _Aspect:
    """Something that should be the same in all audits.

    Attributes:
        name: what it is called.
        of: an audit's own; None where its manifest does not tell.
        mark, then: how grave a difference is, and what follows from one.
        told: whether the value itself says something to a reader.
    """

    name: str
    of: Callable[[Audit], Any]
    mark: Mark
    then: str
    told: bool = False


def _recorded(*path: str) -> Callable[[Audit], Any]:
    """Reads a nested value of the manifest."""

    def of(audit: Audit) -> Any:
        value: Any = audit.manifest
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return of


def _calibration(audit: Audit) -> Any:
    """Hashes of all records that serve to measure by and are not audited."""
    return {
        key: value
        for key, value in audit.manifest["hashes"].items()
        if key.endswith(" records") and key not in ("suspect records", "control records")
    }


def _compared_with(audit: Audit) -> Any:
    """Of which kind and how many; not which, as bases differ with their targets."""
    found = audit.verdict.compared
    if found is None:
        return "none"
    own = found.model_dump(include={"references", "recipe", "epoch", "shares"})
    return own | {"base": found.base is not None}


_ASPECTS = (
    _Aspect(
        "suspects",
        _recorded("hashes", "suspect records"),
        "failed",
        "Shares and AUCs are about different records: that they differ need not be the targets' "
        "doing.",
    ),
    _Aspect(
        "controls",
        _recorded("hashes", "control records"),
        "failed",
        "Each is measured against other controls, and AUCs and shares move with them.",
    ),
    _Aspect(
        "primary signal",
        lambda audit: audit.verdict.primary.signal,
        "failed",
        "The verdicts rest on different measurements: compare a signal with itself in the figures, "
        "not one verdict with another.",
        told=True,
    ),
    _Aspect(
        "evidence tier",
        lambda audit: TIERS[audit.verdict.tier][0].lower(),
        "caution",
        "The same numbers carry less weight in a weaker tier, and none in tier none.",
        told=True,
    ),
    _Aspect(
        "way to the share",
        lambda audit: (
            audit.primary.prevalence.method if audit.primary.prevalence else "not estimated"
        ),
        "caution",
        "A lower bound lies below an estimate by its nature: it cannot show that less was used.",
        told=True,
    ),
    _Aspect(
        "protocol",
        _recorded("settings", "protocol"),
        "caution",
        "Signals that are fitted were fitted on other records.",
        told=True,
    ),
    _Aspect(
        "records to calibrate with",
        _calibration,
        "caution",
        "Estimates and fitted signals rest on them.",
    ),
    _Aspect(
        "other models compared with",
        _compared_with,
        "caution",
        "ratio, lira, rmia and signature are worth what they are compared with: another number of "
        "references, another recipe, or none, is another measurement.",
    ),
    _Aspect(
        "options of signals",
        _recorded("settings", "options"),
        "caution",
        "What goes by one name was not computed in one way.",
    ),
    _Aspect(
        "number format",
        _recorded("target", "dtype"),
        "caution",
        "Rounding alone moves scores a little.",
        told=True,
    ),
    _Aspect(
        "cut-offs",
        lambda audit: audit.verdict.cutoffs.model_dump(),
        "caution",
        "The same numbers may end in another verdict.",
    ),
    _Aspect(
        "version of lightleak",
        _recorded("versions", "lightleak"),
        "caution",
        "How something is measured may have changed between them.",
        told=True,
    ),
)


def obstacles(audits: Sequence[Audit]) -> list[Check]:
    """What is not the same in all audits, the gravest first."""
    checks = []
    for aspect in _ASPECTS:
        values = [aspect.of(audit) for audit in audits]
        if _alike(values):
            continue
        untold = [audit.label for audit, value in zip(audits, values, strict=True) if value is None]
        if untold:
            said = f"The manifest of {_listed(untold)} does not tell it, so it is not known."
            checks.append(Check(f"Perhaps not the same {aspect.name}", "not possible", said))
            continue
        kinds = [value for i, value in enumerate(values) if value not in values[:i]]
        sides = [
            _listed([a.label for a, value in zip(audits, values, strict=True) if value == kind])
            + (f" ({kind})" if aspect.told else "")
            for kind in kinds
        ]
        checks.append(
            Check(
                f"Not the same {aspect.name}",
                aspect.mark,
                f"{' against '.join(sides)}. {aspect.then}",
            )
        )
    return checks


def shared(audits: Sequence[Audit]) -> str:
    """What is the same in all of them."""
    return _listed([a.name for a in _ASPECTS if _alike([a.of(audit) for audit in audits])])


def _alike(values: Sequence[Any]) -> bool:
    return values[0] is not None and all(value == values[0] for value in values)


def found(audits: Sequence[Audit]) -> str:
    """The verdicts in one sentence each."""
    ends = [
        (name, [audit.label for audit in audits if audit.verdict.verdict == verdict])
        for verdict, name in VERDICTS.items()
    ]
    return " ".join(f"{name}: {_listed(labels)}." for name, labels in ends if labels)


def share(verdict: Verdict, signal: str) -> str:
    """The share of the suspects that was used, as far as it can be told, with its interval."""
    found = verdict.signals[signal].prevalence
    if found is None:
        return f"not estimated: {_unknown(verdict, signal)}"
    if found.ci95 == (0.0, 1.0):
        return "nothing can be told"
    low, high = map(whole, found.ci95)
    if found.estimate is None:
        return f"at least {low}"
    return f"{whole(found.estimate)}, {low} to {high}"


def whole(share: float) -> str:
    """0.4267 → "43 %": no interval of a share is narrow enough for more."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _unknown(verdict: Verdict, signal: str) -> str:
    if verdict.validity.differs:
        return "the sets differ by themselves"
    if verdict.tier == "none":
        return "a check forbids an answer"
    if verdict.signals[signal].auc is None:
        return "too few scores"
    return "folds fitted apart share no scale"


def auc(value: float | None, interval: Range | None) -> str:
    """An AUC with its interval."""
    if value is None or interval is None:
        return "not computed"
    return f"{value:.3f}, {interval[0]:.3f} to {interval[1]:.3f}"


def _listed(labels: Sequence[str]) -> str:
    if len(labels) < 2:
        return "".join(labels)
    return f"{', '.join(labels[:-1])} and {labels[-1]}"
