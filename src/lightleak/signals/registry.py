"""What a signal declares, and how one is found by name.

A signal is a function from evidence to one number a record, decorated where it is defined:

    @signal(needs=TokenStatistics, source="Yeom et al. 2018, arXiv:1709.01604")
    def loss(tokens: TokenStatistics) -> Floats:
        return tokens.logprob.mean()

Higher means more member-like, always; NaN means that the record cannot be scored. Options are the
function's keyword-only arguments. A signal that must be fitted takes the fits as second argument
and scores each record only by a fit that did not see it.
"""

from __future__ import annotations

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightleak.errors import UserError
from lightleak.evidence.readings import OF_KIND, Floats

_REGISTRY: dict[str, Signal] = {}


@dataclass(frozen=True)
class Fit:
    """One fold's view of the records: whom to fit on, whom to score.

    Attributes:
        members, nonmembers: (n,) which records calibrate; never scored by this fit in `crossfit`.
        scored: (n,) which records this fit scores.
    """

    members: NDArray[np.bool_]
    nonmembers: NDArray[np.bool_]
    scored: NDArray[np.bool_]

    def rows(self, chosen: Sequence[int]) -> Fit:
        """The same of some records."""
        index = list(chosen)
        return Fit(self.members[index], self.nonmembers[index], self.scored[index])


def cross(
    protocol: str, n_folds: int, side: NDArray[np.str_], folds: NDArray[np.int64]
) -> list[Fit]:
    """Whom each fold fits on and whom it scores.

    Args:
        protocol: `crossfit` fits on the suspects and controls of the other folds; `split` fits
            once on calibration records ("member" and "nonmember") and scores all the others.
        n_folds: how many folds cross.
        side: (n,) suspect, control, member or nonmember.
        folds: (n,) fold of each suspect and control.
    """
    if protocol == "split":
        audited = np.isin(side, ("suspect", "control"))
        return [Fit(side == "member", side == "nonmember", audited)]
    return [
        Fit((side == "suspect") & (folds != k), (side == "control") & (folds != k), folds == k)
        for k in range(n_folds)
    ]


@dataclass(frozen=True)
class Signal:
    """A signal as declared.

    Attributes:
        name: what users call it.
        function: from evidence (and fits) to (n,) scores.
        needs: the kind of evidence, where no option asks for another.
        source: the paper.
        fitted: whether it takes fits.
        unscorable: why a record may have no score.
        needs_with: the kind of evidence that options ask for.
    """

    name: str
    function: Callable[..., Floats]
    needs: type
    source: str
    fitted: bool
    unscorable: str
    needs_with: Callable[[Mapping[str, Any]], type] | None = None

    def evidence(self, options: Mapping[str, Any]) -> type:
        """The kind of evidence that it takes with these options."""
        return self.needs if self.needs_with is None else self.needs_with(options)

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """The keyword-only arguments, by name."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of what it says about itself."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def score(
        self, evidence: Any, fits: Sequence[Fit] = (), options: Mapping[str, Any] | None = None
    ) -> Floats:
        """Scores (n,) as float64; NaN where the record cannot be scored."""
        arguments = (evidence, fits) if self.fitted else (evidence,)
        scores = np.asarray(self.function(*arguments, **(options or {})), dtype=np.float64)
        return np.where(np.isfinite(scores), scores, np.nan)


def signal(
    *,
    needs: type,
    source: str,
    fitted: bool = False,
    unscorable: str = "the answer has no token",
    needs_with: Callable[[Mapping[str, Any]], type] | None = None,
) -> Callable[[Callable[..., Floats]], Callable[..., Floats]]:
    """Declare a function as a signal under its own name."""

    def declare(function: Callable[..., Floats]) -> Callable[..., Floats]:
        name = function.__name__
        _REGISTRY[name] = Signal(name, function, needs, source, fitted, unscorable, needs_with)
        return function

    return declare


def names(kind: str | None = None) -> tuple[str, ...]:
    """All signals, or those for one kind of target, in alphabetical order."""
    return tuple(
        sorted(
            name for name, each in _REGISTRY.items() if kind is None or each.needs in OF_KIND[kind]
        )
    )


def get(name: str) -> Signal:
    """The signal called `name`.

    Raises:
        UserError: there is none; the closest names are given.
    """
    if name not in _REGISTRY:
        raise UserError("no such signal", name, _did_you_mean(name, names()))
    return _REGISTRY[name]


def parse_options(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read `SIGNAL.OPTION=VALUE` assignments into options by signal, checked by their types.

    Raises:
        UserError: not of that form, an unknown signal or option, or a value of the wrong kind.
    """
    options: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        name, dot, option = key.strip().partition(".")
        if not (equals and dot):
            raise UserError("expected SIGNAL.OPTION=VALUE", f"--set {assignment}")
        known = get(name).options
        if option not in known:
            raise UserError(
                f"the signal {name} has no option {option!r}",
                f"--set {assignment}",
                _did_you_mean(option, known),
            )
        annotation = known[option].annotation
        options.setdefault(name, {})[option] = _convert(value.strip(), annotation, assignment)
    return options


def _convert(value: str, annotation: Any, assignment: str) -> Any:
    kinds = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    if type(None) in kinds and value.lower() in {"none", ""}:
        return None
    kind = next(each for each in kinds if each is not type(None))
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{value!r} is not one of {', '.join(choices)}", f"--set {assignment}")
        return value
    try:
        number = kind(value)
        if not math.isfinite(number):
            raise ValueError(value)
        return number
    except ValueError as error:
        raise UserError(
            f"{value!r} is not a number", f"--set {assignment}", f"Give a {kind.__name__}."
        ) from error


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"There are: {', '.join(known)}." if known else "It takes none."
