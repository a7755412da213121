"""What audits are asked to do; recorded whole in the manifest before anything is measured."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lightleak import signals, targets
from lightleak.errors import UserError
from lightleak.evidence.collect import BatchSize
from lightleak.targets import Target
from lightleak.validity import Cutoffs, Design, IdentityCutoffs

# The signal behind the verdict where none is named.
PRIMARY = {"generative": "loss", "dual-encoder": "cosine"}
# Decoys for each kind of name: a generative target must read every name with every photo.
DECOYS = {"dual-encoder": 1000, "generative": 99}
# Cut-offs that have an option of their own.
_CUTOFFS = {"alpha": "--alpha", "false_discovery_rate": "--fdr", "tau": "--tau"}
SPLIT_NEEDS = "Give --calibration-members and --calibration-nonmembers."


class TargetSettings(BaseModel):
    """What every audit takes.

    Attributes:
        target, adapter, base: folders or hub ids.
        batch_size: records at once; None bounds the tokens instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    adapter: str | None = None
    base: str | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = Field(None, ge=1)
    strict: bool = False
    allow_outside: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @classmethod
    def read(cls, **given: Any) -> Self:
        """Check what a user gave; a path is taken as its text.

        Raises:
            UserError: an option that does not exist or has a wrong value.
        """
        try:
            return cls(**{k: str(v) if isinstance(v, Path) else v for k, v in given.items()})
        except ValidationError as error:
            first = error.errors()[0]
            name, *inner = (str(part) for part in first["loc"] or ("",))
            where = f"--{name}".replace("_", "-")
            if name == "cutoffs":
                where = _CUTOFFS.get(" ".join(inner), f"--cutoff {' '.join(inner)}")
            message = str(first["msg"]).removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                message = "there is no such setting"
                message += f"; did you mean {close[0]}?" if close else ""
            raise UserError(message, where if first["loc"] else "") from error

    def load(self, target: str | None = None) -> Target:
        """Load the target, or another model in the same way but without the adapter."""
        own = target is None
        return targets.load(
            self.target if target is None else target,
            adapter=self.adapter if own else None,
            base=self.base if own else None,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )

    @property
    def size(self) -> BatchSize:
        """Batch limits."""
        return BatchSize() if self.batch_size is None else BatchSize(self.batch_size, 1 << 62)


class AuditSettings(TargetSettings):
    """All that a membership audit takes.

    Attributes:
        suspect, control: records.
        calibration_members, calibration_nonmembers: records of the published protocol `split`.
        bank: pairs that serve a dual encoder as negatives, the same for all records; None sets
            some of the controls aside for it, `bank_size` or a fifth of them.
        signals: names; none stands for all that fit the kind of target.
        primary: registered beforehand, it alone carries the verdict; empty takes `PRIMARY`.
        options: of signals, by signal.
        protocol: `crossfit` fits on other folds of suspects and controls; `split` fits on the
            calibration records.
        design: what the user declares about how suspects and controls came apart.
        folds: parts that fitted signals cross. Two lose least: the p-values of the folds share
            records and are combined by twice their median.
        evidence_limit: gigabytes of gradient slices to store at most; above it the slices are
            reduced to scores on the way and cannot be re-scored with another mask.
        drop_duplicates: leave out records that stand on both sides, instead of refusing.
    """

    suspect: str
    control: str
    calibration_members: str | None = None
    calibration_nonmembers: str | None = None
    bank: str | None = None
    bank_size: int = Field(256, ge=2)
    signals: tuple[str, ...] = ()
    primary: str = ""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    protocol: Literal["crossfit", "split"] = "crossfit"
    design: Design = "observational"
    folds: int = Field(2, ge=2, le=20)
    drop_duplicates: bool = False
    evidence_limit: float = Field(8.0, ge=0)
    cutoffs: Cutoffs = Cutoffs()

    @model_validator(mode="after")
    def _consistent(self) -> AuditSettings:
        named = (*self.signals, *([self.primary] if self.primary else []))
        for name in {*named, *self.options}:
            signals.get(name)
        if self.signals:
            object.__setattr__(self, "signals", tuple(dict.fromkeys(named)))
        calibration = (self.calibration_members, self.calibration_nonmembers)
        if self.protocol == "split" and None in calibration:
            raise ValueError(f"the protocol split needs calibration records. {SPLIT_NEEDS}")
        if self.protocol == "crossfit" and calibration != (None, None):
            raise ValueError("calibration records belong to --protocol split")
        return self

    def of_kind(self, kind: str) -> AuditSettings:
        """The same with nothing left open, for a kind of target.

        Raises:
            UserError: a signal that this kind of target gives no evidence for.
        """
        fitting = signals.names(kind)
        primary = self.primary or PRIMARY[kind]
        chosen = self.signals or fitting
        for name in (*chosen, primary, *self.options):
            if name not in fitting:
                raise UserError(
                    f"this signal is not for a {kind} target; there are {', '.join(fitting)}", name
                )
        names = tuple(dict.fromkeys((*chosen, primary)))
        return self.model_copy(update={"signals": names, "primary": primary})

    def needs(self) -> set[type]:
        """The kinds of evidence that the signals are made from."""
        return {signals.get(name).needs for name in self.signals}

    def options_of(self, name: str) -> dict[str, Any]:
        """The options given for a signal."""
        return self.options.get(name, {})


class IdentitySettings(TargetSettings):
    """All that an identity audit takes.

    Attributes:
        people: a folder that holds one folder of photos for each person.
        names: a CSV file with the columns person and name (and perhaps gender); else `names.csv`
            in the folder of people, else the folders' own names.
        controls, known: likewise people known not to be in the data, and known to be in it.
        control_target: another model, one that cannot have seen the people.
        decoys: "auto" draws names from lists, else a file of names.
        decoy_count: decoys for each kind of name; None takes `DECOYS`.
        candidates: among how many names a photo is given one, as published.
        templates: a file with one template a line; None takes the published ones.
        design: `randomised` where lots decided what the people are called in the data.
    """

    people: str
    names: str | None = None
    controls: str | None = None
    known: str | None = None
    control_target: str | None = None
    decoys: str = "auto"
    decoy_count: int | None = Field(None, ge=19, le=1_000_000)
    candidates: int = Field(1000, ge=2)
    templates: str | None = None
    design: Literal["randomised", "observational"] = "observational"
    cutoffs: IdentityCutoffs = IdentityCutoffs()
