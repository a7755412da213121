"""What an audit is asked to do; recorded whole in the manifest before anything is measured."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lightleak import signals
from lightleak.errors import UserError
from lightleak.validity import Cutoffs, Design

SPLIT_NEEDS = "Give --calibration-members and --calibration-nonmembers."


class AuditSettings(BaseModel):
    """All that a membership audit takes.

    Attributes:
        target, adapter, base: folders or hub ids.
        suspect, control: records.
        calibration_members, calibration_nonmembers: records of the published protocol `split`.
        signals: names; `primary`, registered beforehand, alone carries the verdict.
        options: of signals, by signal.
        protocol: `crossfit` fits on other folds of suspects and controls; `split` fits on the
            calibration records.
        design: what the user declares about how suspects and controls came apart.
        folds: parts that fitted signals cross. Two lose least: the p-values of the folds share
            records and are combined by twice their median.
        batch_size: records at once; None bounds the tokens instead.
        evidence_limit: gigabytes of gradient slices to store at most; above it the slices are
            reduced to scores on the way and cannot be re-scored with another mask.
        drop_duplicates: leave out records that stand on both sides, instead of refusing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    adapter: str | None = None
    base: str | None = None
    suspect: str
    control: str
    calibration_members: str | None = None
    calibration_nonmembers: str | None = None
    signals: tuple[str, ...] = ()
    primary: str = "loss"
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    protocol: Literal["crossfit", "split"] = "crossfit"
    design: Design = "observational"
    folds: int = Field(2, ge=2, le=20)
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = Field(None, ge=1)
    strict: bool = False
    allow_outside: bool = False
    drop_duplicates: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    evidence_limit: float = Field(8.0, ge=0)
    cutoffs: Cutoffs = Cutoffs()

    @staticmethod
    def read(**given: Any) -> AuditSettings:
        """Check what a user gave.

        Raises:
            UserError: an option that does not exist or has a wrong value.
        """
        try:
            return AuditSettings(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name, *inner = (str(part) for part in first["loc"] or ("",))
            where = f"--{name}".replace("_", "-")
            if name == "cutoffs":
                where = "--alpha" if inner == ["alpha"] else f"--cutoff {' '.join(inner)}"
            message = str(first["msg"]).removeprefix("Value error, ")
            raise UserError(message, where if first["loc"] else "") from error

    @model_validator(mode="after")
    def _consistent(self) -> AuditSettings:
        names = self.signals or signals.names()
        for name in {*names, self.primary, *self.options}:
            signals.get(name)
        if self.primary not in names:
            names = (*names, self.primary)
        object.__setattr__(self, "signals", tuple(dict.fromkeys(names)))
        calibration = (self.calibration_members, self.calibration_nonmembers)
        if self.protocol == "split" and None in calibration:
            raise ValueError(f"the protocol split needs calibration records. {SPLIT_NEEDS}")
        if self.protocol == "crossfit" and calibration != (None, None):
            raise ValueError("calibration records belong to --protocol split")
        return self

    def options_of(self, name: str) -> dict[str, Any]:
        """The options given for a signal."""
        return self.options.get(name, {})
