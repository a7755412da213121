"""The model that a process works with: loaded once, kept for the next job, and told about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from lightleak.audits.settings import TargetSettings
from lightleak.errors import UserError
from lightleak.runs import Progress
from lightleak.runs.executors import Executor
from lightleak.runs.progress import Advance
from lightleak.targets import EndpointTarget, Target, base_of, find, without_adapter

Made = TypeVar("Made")


@dataclass(frozen=True)
class Model:
    """Which model, as it travels to the process that loads it.

    Attributes:
        settings: how models of this audit are loaded, and the target's name.
        other: another model, loaded in the same way but without the adapter.
    """

    settings: TargetSettings
    other: str | None = None

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.settings.target if self.other is None else self.other

    @property
    def _key(self) -> tuple[object, ...]:
        own = self.other is None
        s = self.settings
        adapter = (s.adapter, s.base) if own else ()
        return (self.name, adapter, s.dtype, s.device, s.trust_remote_code, s.allow_pickle)

    def load(self) -> Target:
        """The model; the one that this process holds already, if it is that.

        A process holds one model at a time. The base of an adapter that it holds is what is left
        when the adapter is taken off: no second copy is read.

        Raises:
            UserError: it cannot be loaded.
        """
        global _held
        if _held is not None and _held[0] == self._key:
            return _held[1]
        _made = None
        under = None if _held is None or _held[0] != Model(self.settings)._key else _held[1]
        _held = None
        target = None
        if self.other is not None and under is not None and under.has_adapter:
            s = self.settings
            base = base_of(s.target, s.adapter, s.base)
            if base is not None and find(base) == find(self.other):
                target = without_adapter(under, self.other)
        del under
        _held = self._key, target or self.settings.load(self.other)
        return _held[1]


# What this process holds: a model by its key, and what was last made of it.
_held: tuple[tuple[object, ...], Target] | None = None
_made: tuple[object, Any] | None = None


def release() -> None:
    """Hold no model any longer."""
    global _held, _made
    _held = _made = None


@contextmanager
def released() -> Iterator[None]:
    """Hold no model longer than this: its files may change before the next audit."""
    try:
        yield
    finally:
        release()


def made(key: object, make: Callable[[], Made]) -> Made:
    """What `make` made when last asked with this key; it is kept as long as the model is."""
    global _made
    if _made is None or _made[0] != key:
        _made = None
        _made = key, make()
    kept: Made = _made[1]
    return kept


@dataclass(frozen=True)
class Description:
    """What has to be known of a model where it is not loaded.

    Attributes:
        name: what the user called it.
        kind: generative or dual-encoder.
        dtype, device: what it computes in, and where.
        attention: which implementation of attention it runs.
        hashes: SHA-256 of weights, processor and adapter.
    """

    name: str
    kind: str
    dtype: str
    device: str
    attention: str
    hashes: Mapping[str, str]


def describe_other(
    own: Description, name: str, model: Model, progress: Progress, executor: Executor
) -> Description:
    """Load a model to compare the target with, and tell what it is.

    Raises:
        UserError: it cannot be loaded, is of another kind, or is the target.
    """
    with progress.stage(f"Loading the {name}", 1) as advance:
        (other,) = executor.map(describe, [model], advance)
    if other.kind != own.kind:
        raise UserError(
            f"the {name} is a {other.kind} model, and the target a {own.kind} one", model.name
        )
    if other.hashes == own.hashes:
        raise UserError(
            f"the {name} is the target itself: there is nothing to compare",
            model.name,
            "Give another model.",
        )
    return other


def describe(model: Model, advance: Advance) -> Description:
    """Load a model and tell what it is."""
    target = model.load()
    advance(1)
    if isinstance(target, EndpointTarget):
        what = ("precision unknown", "an endpoint", "unknown")
        return Description(target.name, target.kind, *what, target.hashes)
    return Description(
        target.name,
        target.kind,
        str(target.dtype),
        str(target.device),
        str(getattr(target.plain.config, "_attn_implementation", None)),
        dict(target.hashes),
    )
