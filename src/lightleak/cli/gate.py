"""`--fail-if`: conditions on the verdict that end the program with exit code 3.

    exposed
    primary.auc > 0.6 and tier in (randomised, held_out)
    not prevalence.ci95[1] < 0.05 or signals.loss.tpr_at_fpr["0.01"].tpr > 0.1

Names are those of verdict.json. Python's parser gives the tree and nothing of it is ever run:
only what this file names is understood.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from lightleak.cli.console import errors
from lightleak.errors import UserError
from lightleak.runs import Run, make_folder, replacing, write_json
from lightleak.validity.verdict import BaseVerdict

TRIPPED = 3

FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        help="End with exit code 3 where this holds of verdict.json: "
        "exposed, 'primary.auc > 0.6'; repeatable.",
        metavar="EXPR",
    ),
]
JUnit = Annotated[
    Path | None,
    typer.Option("--junit", help="Write verdict, checks and gates as JUnit XML.", metavar="FILE"),
]
Sarif = Annotated[
    Path | None,
    typer.Option("--sarif", help="Write the verdict as SARIF 2.1.0.", metavar="FILE"),
]

# None where it cannot be computed.
Truth = bool | None
Condition = Callable[[Mapping[str, Any]], Truth]

_OPERATORS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, choices: value in choices,
    ast.NotIn: lambda value, choices: value not in choices,
}


@dataclass(frozen=True)
class Place:
    """A place in verdict.json, and the type of what stands there."""

    name: str
    steps: tuple[str | int, ...]
    annotation: Any

    @property
    def kind(self) -> str:
        """What it can be compared with."""
        if self.annotation is str or get_origin(self.annotation) is Literal:
            return "a word"
        kinds = {int: "a number", float: "a number", bool: "yes or no"}
        return kinds.get(self.annotation, "no single value")

    def read(self, content: Any) -> Any:
        """What stands there; None where nothing does."""
        for step in self.steps:
            try:
                content = content[step]
            except (KeyError, IndexError, TypeError):
                return None
        return content


@dataclass(frozen=True)
class Gate:
    """A condition on a verdict, as given and as understood, and the places that it reads."""

    text: str
    condition: Condition
    places: tuple[Place, ...]

    def trips(self, verdict: BaseVerdict) -> str | None:
        """Why the gate trips, in one line; None when it does not.

        It also trips where a null leaves open whether the condition holds (Kleene's logic of
        three values): what cannot be computed is no pass.
        """
        content = verdict.model_dump(mode="json")
        holds = self.condition(content)
        if holds is False:
            return None
        read = ", ".join(f"{each.name} is {_shown(each.read(content))}" for each in self.places)
        return read if holds else f"{read}; what cannot be computed does not pass"


def parse(expression: str, verdict_class: type[BaseVerdict]) -> Gate:
    """Understand a condition before there is a verdict.

    Args:
        expression: as after `--fail-if`.
        verdict_class: what the audit will end in; its fields are the names.

    Raises:
        UserError: it is no condition, an unknown name, or a word or number where none can stand.
    """
    parser = _Parser(expression, verdict_class)
    try:
        condition = parser.condition(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise parser.error(f"it cannot be read ({getattr(error, 'msg', error)})") from error
    return Gate(expression, condition, tuple(parser.places.values()))


def finish(
    verdict: BaseVerdict,
    run: str | Path,
    fail_if: Iterable[Gate],
    junit: Path | None,
    sarif: Path | None,
) -> None:
    """Write what other programs read of a judged run.

    Raises:
        UserError: a file cannot be written.
        typer.Exit: a gate trips: exit code 3, after one line for each that does.
    """
    from lightleak.report import formats

    opened = Run.open(run)
    gates = {gate.text: gate.trips(verdict) for gate in fail_if}
    written = [file for file in (junit, sarif) if file is not None]
    for file in written:
        if file.resolve().is_relative_to(opened.folder.resolve()):
            raise UserError("the run folder holds the run and nothing else", str(file))
        make_folder(file.parent)
    if len({file.resolve() for file in written}) < len(written):
        raise UserError("--junit and --sarif are one file", str(junit), "Give two.")
    if junit is not None:
        with replacing(junit) as stream:
            stream.write(formats.junit(verdict, opened, gates).encode())
    if sarif is not None:
        write_json(sarif, formats.sarif(verdict, opened))
    tripped = {text: reason for text, reason in gates.items() if reason is not None}
    for text, reason in tripped.items():
        errors.print(
            f"lightleak: --fail-if {text}: tripped, {reason}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if tripped:
        raise typer.Exit(TRIPPED)


class _Parser:
    """From the tree of one expression to its condition."""

    def __init__(self, text: str, verdict_class: type[BaseVerdict]) -> None:
        self.text = text
        self.verdict_class = verdict_class
        self.places: dict[str, Place] = {}

    def error(self, what: str, what_to_do: str = "") -> UserError:
        return UserError(what, f"--fail-if {self.text}", what_to_do)

    def condition(self, node: ast.expr) -> Condition:
        match node:
            case ast.BoolOp(op=op, values=values):
                return _settled(isinstance(op, ast.Or), [self.condition(each) for each in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner = self.condition(operand)
                return lambda content: None if (holds := inner(content)) is None else not holds
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = zip([left, *others], ops, others, strict=False)
                return _settled(False, [self.comparison(*each) for each in sides])
            case ast.Name(id=word) if word not in self.verdict_class.model_fields:
                return self.comparison(ast.Name("verdict"), ast.Eq(), node)
        place = self.place(node)
        if place.kind != "yes or no":
            raise self.error(f"{place.name} is {place.kind} and no condition", "Compare it.")
        return place.read

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
        if type(op) not in _OPERATORS:
            raise self.not_understood()
        compare, among = _OPERATORS[type(op)], isinstance(op, ast.In | ast.NotIn)
        choices = right.elts if among and isinstance(right, ast.Tuple) else [right]
        operands = [self.operand(each) for each in (left, *choices)]
        named = next((each for each in operands if isinstance(each, Place)), None)
        if named is None:
            raise self.unknown(str(operands[0]), self.verdict_class.model_fields)
        for each in operands:
            self.check(named, each)
        if named.kind == "a word" and not isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn):
            raise self.error(f"{named.name} is a word, which is neither above nor below another")

        def holds(content: Mapping[str, Any]) -> Truth:
            first, *others = (
                each.read(content) if isinstance(each, Place) else each for each in operands
            )
            if first is None or None in others:
                return None
            return compare(first, others if among else others[0])

        return holds

    def operand(self, node: ast.expr) -> Place | str | float:
        match node:
            case ast.Constant(value=int() | float() | str() as value) if type(value) is not bool:
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Name(id=word) if word not in self.verdict_class.model_fields:
                return word
        return self.place(node)

    def check(self, named: Place, other: Place | str | float) -> None:
        """That both can be compared at all."""
        if named.kind == "no single value":
            raise self.error(f"{named.name} is {named.kind}", "Name a part of it.")
        if isinstance(other, Place):
            name, kind = other.name, other.kind
        else:
            name, kind = str(other), "a word" if isinstance(other, str) else "a number"
        if kind != named.kind:
            raise self.error(f"{named.name} is {named.kind}, and {name} is {kind}")
        choices = get_args(named.annotation)
        if isinstance(other, str) and choices and other not in choices:
            raise self.unknown(other, choices)

    def place(self, node: ast.expr) -> Place:
        name, steps = ast.unparse(node), self.steps(node)
        annotation: Any = self.verdict_class
        for step in steps:
            part = _part(annotation, step)
            if part is None:
                raise self.unknown(step, getattr(annotation, "model_fields", ()))
            annotation = part
        if steps[0] == "signals" and len(steps) > 1:
            # The class says that signals have names; which ones, the registry does.
            from lightleak.signals import names

            if steps[1] not in names():
                raise self.unknown(steps[1], names())
        return self.places.setdefault(name, Place(name, tuple(steps), annotation))

    def steps(self, node: ast.expr) -> list[str | int]:
        match node:
            case ast.Name(id=name):
                return [name]
            case ast.Attribute(value=whole, attr=name):
                return [*self.steps(whole), name]
            case ast.Subscript(value=whole, slice=ast.Constant(value=str() | int() as step)):
                return [*self.steps(whole), step]
        raise self.not_understood()

    def not_understood(self) -> UserError:
        return self.error(
            "only names of verdict.json, numbers, words, comparisons, and, or, not, in and "
            "parentheses are understood"
        )

    def unknown(self, name: str | int, known: Collection[str]) -> UserError:
        close = difflib.get_close_matches(str(name), known, n=1)
        there_are = f"There are: {', '.join(known)}." if known else "It has no such part."
        return self.error(
            f"{name!r} is unknown", f"Did you mean {close[0]}?" if close else there_are
        )


def _part(whole: Any, step: str | int) -> Any:
    """The type of a part, whether or not it may be null; None where there is no such part."""
    kind, inside = get_origin(whole), get_args(whole)
    found = None
    if isinstance(whole, type) and issubclass(whole, BaseModel) and step in whole.model_fields:
        found = whole.model_fields[str(step)].annotation
    elif kind is dict and isinstance(step, str):
        found = inside[1]
    elif kind is list and isinstance(step, int):
        found = inside[0]
    elif kind is tuple and step in range(len(inside)):
        found = inside[int(step)]
    if get_origin(found) in (Union, UnionType):
        found, *_ = (each for each in get_args(found) if each is not NoneType)
    return found


def _settled(decisive: bool, parts: Sequence[Condition]) -> Condition:
    """`or` where true decides, `and` where false does; open where only a null stands against it."""

    def holds(content: Mapping[str, Any]) -> Truth:
        found = [part(content) for part in parts]
        if decisive in found:
            return decisive
        return None if None in found else not decisive

    return holds


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
