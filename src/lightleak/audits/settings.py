"""What audits are asked to do; recorded whole in the manifest before anything is measured."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lightleak import signals, targets
from lightleak.errors import UserError
from lightleak.evidence.collect import BatchSize
from lightleak.evidence.readings import (
    ACROSS,
    EXTRA,
    OtherLosses,
    ReferenceLosses,
    SampledAnswers,
)
from lightleak.planting import FIELDS, Position, Style
from lightleak.runs.executors import Executor, executor
from lightleak.targets import Target
from lightleak.training import FineTuning, shape_of
from lightleak.validity import Cutoffs, Design, IdentityCutoffs, ProbingCutoffs

# The signal behind the verdict where none is named.
PRIMARY = {"generative": "loss", "dual-encoder": "cosine", "endpoint": "temperature_set"}
# Stands among signals for those that come from the pass itself.
ALL = "all"
# Decoys for each kind of name: a generative target must read every name with every photo.
DECOYS = {"dual-encoder": 1000, "generative": 99}
# Cut-offs that have an option of their own.
_CUTOFFS = {"alpha": "--alpha", "false_discovery_rate": "--fdr", "tau": "--tau"}
# With fewer pairs of personas no p-value could reach the level at which a control alarms.
FEWEST_PAIRS = 8
SPLIT_NEEDS = "Give --calibration-members and --calibration-nonmembers."


def no_control(name: str, model: str) -> UserError:
    """Why the target cannot be a control model of itself."""
    return UserError(
        f"the {name} is the target itself, so it shows nothing about what it was not trained on",
        model,
        "Give another model, or --no-negative-controls.",
    )


def _place(model: str) -> str | Path:
    """Where a model is."""
    return model if targets.is_address(model) else targets.find(model)


class TargetSettings(BaseModel):
    """What every audit takes.

    Attributes:
        target, adapter, base: folders or hub ids; a membership audit's target may be an endpoint.
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
            # An empty name is what an unset variable of a pipeline leaves.
            named = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
            named |= {k: targets.registered(v) for k, v in named.items() if callable(v)}
            unset = {k for k in ("adapter", "base", "control_target") if named.get(k) == ""}
            return cls(**{k: v for k, v in named.items() if k not in unset})
        except ValidationError as error:
            first = error.errors()[0]
            name, *inner = (str(part) for part in first["loc"] or ("",))
            where = f"--{name}".replace("_", "-")
            if name == "cutoffs":
                where = _CUTOFFS.get(" ".join(inner), f"--cutoff {' '.join(inner)}")
            message = str(first["msg"]).removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                known = Cutoffs.model_fields if inner else cls.model_fields
                close = difflib.get_close_matches(inner[0] if inner else name, known, n=1, cutoff=0)
                message = "there is no such setting"
                message += f"; did you mean {close[0]}?" if close else ""
            raise UserError(message, where if first["loc"] else "") from error

    def load(self, target: str | None = None) -> Target:
        """Load the target, or another model in the same way but without the adapter."""
        own = target is None
        if targets.is_address(target or self.target):
            return targets.connect(target or self.target)
        return targets.load(
            self.target if target is None else target,
            adapter=self.adapter if own else None,
            base=self.base if own else None,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )

    @model_validator(mode="after")
    def _answering(self) -> Self:
        if targets.is_address(self.target):
            if not isinstance(self, AuditSettings):
                raise ValueError("an endpoint only answers: audit takes one, nothing else does")
            if self.adapter is not None:
                raise ValueError("no adapter can be put on an endpoint")
            if self.base is not None:
                raise ValueError(
                    "the base of an endpoint is unknown; give another endpoint as --control-target"
                )
        return self

    @property
    def size(self) -> BatchSize:
        """Batch limits."""
        return BatchSize() if self.batch_size is None else BatchSize(self.batch_size, 1 << 62)


class SharedSettings(TargetSettings):
    """What every audit takes whose work can be shared among processes.

    Attributes:
        workers: processes at once; None takes one for each accelerator or core. More than one
            needs a program whose main part stands under `if __name__ == "__main__":`.
        executor: `local` for processes of this machine, `ray` for actors of Ray Core.
        ray_address: of a Ray cluster to join; None takes `RAY_ADDRESS`, or starts one here.
    """

    workers: int | None = Field(1, ge=1)
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None

    @model_validator(mode="after")
    def _addressed(self) -> Self:
        if self.ray_address is not None and self.executor != "ray":
            raise ValueError("an address of a Ray cluster belongs to --executor ray")
        return self

    def executor_of(self) -> AbstractContextManager[Executor]:
        """What does the jobs of the run."""
        spread = self.device in {"auto", "cuda"}
        alone = not spread and self.device != "cpu"  # One device is named.
        workers = 1 if alone and self.workers is None else self.workers
        return executor(self.executor, workers, address=self.ray_address, spread=spread)


class AuditSettings(SharedSettings):
    """All that a membership audit takes.

    Attributes:
        suspect, control: records.
        calibration_members, calibration_nonmembers: records of the published protocol `split`.
        bank: pairs that serve a dual encoder as negatives, the same for all records; None sets
            some of the controls aside for it, `bank_size` or a fifth of them.
        signals: names; `all`, or none, stands for all that fit the kind of target and come from
            the pass itself, without forwards of their own.
        primary: registered beforehand, it alone carries the verdict; empty takes `PRIMARY`.
        options: of signals, by signal; assignments like `mink.k=0.1` are read.
        protocol: `crossfit` fits on other folds of suspects and controls; `split` fits on the
            calibration records.
        design: what the user declares about how suspects and controls came apart.
        folds: parts that fitted signals cross. Two lose least: the p-values of the folds share
            records and are combined by twice their median.
        evidence_limit: gigabytes of gradient slices to store at most; above it the slices are
            reduced to scores on the way and cannot be re-scored with another mask.
        drop_duplicates: leave out records that stand on both sides, instead of refusing.
        control_target: another model, one that cannot have seen the suspects; the base that the
            target was fine-tuned from, where it is known, serves likewise.
        negative_controls: whether control models are run, and pairs with their texts shuffled.
        references: a folder of models trained by `lightleak references train`, which some signals
            compare the target with.
        reference_epoch: which of their kept epochs; None takes the last.
        blind_fields: entries of the records' `meta` that could tell the sides apart.
        embeddings: a Parquet file with id and embedding, to find near-duplicates by.
        documentation: a file that says how suspects and controls came apart; its hash is kept.
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
    control_target: str | None = None
    negative_controls: bool = True
    references: str | None = None
    reference_epoch: int | None = Field(None, ge=1)
    blind_fields: tuple[str, ...] = ()
    embeddings: str | None = None
    documentation: str | None = None
    cutoffs: Cutoffs = Cutoffs()

    @field_validator("options", mode="before")
    @classmethod
    def _read(cls, options: Any) -> Any:
        if isinstance(options, Mapping):
            if not all(isinstance(own, Mapping) for own in options.values()):
                raise ValueError('options of a signal look like {"mink": {"k": 0.1}}')
            options = [f"{name}.{key}={own[key]}" for name, own in options.items() for key in own]
        return signals.parse_options(options)

    @model_validator(mode="after")
    def _consistent(self) -> AuditSettings:
        named = (*self.signals, *([self.primary] if self.primary else []))
        for name in {*named, *self.options} - {ALL}:
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
            UserError: a signal that this kind of target gives no evidence for, or that compares
                with models which are not given.
        """
        fitting = signals.names(kind)
        primary = self.primary or PRIMARY[kind]
        apart = {*EXTRA, *self._lacking()}
        usual = tuple(n for n in fitting if signals.get(n).needs not in apart) or fitting
        given = self.signals or (ALL,)
        chosen = tuple(name for each in given for name in (usual if each == ALL else (each,)))
        for name in (*chosen, primary, *self.options):
            if name not in fitting:
                only = (
                    "an endpoint, which only answers" if kind == "endpoint" else f"a {kind} target"
                )
                raise UserError(
                    f"this signal is not for {only}; there are {', '.join(fitting)}", name
                )
            lacking = self._lacking().get(signals.get(name).needs)
            if lacking is not None:
                raise UserError("it compares the target with other models", name, lacking)
        names = tuple(dict.fromkeys((*chosen, primary)))
        return self.model_copy(update={"signals": names, "primary": primary})

    def _lacking(self) -> dict[type, str]:
        """What cannot be compared for want of another model, and what to give."""
        if self.references is not None:
            return {}
        make = "--references, a folder that lightleak references train makes"
        lacking: dict[type, str] = {ReferenceLosses: f"Give {make}."}
        if self.known_base() is None and self.control_target is None:
            lacking[OtherLosses] = f"Give --base, --control-target or {make}."
        return lacking

    def known_base(self) -> str | None:
        """What the target was trained from, as far as it is known."""
        if targets.is_address(self.target):
            return None
        return targets.base_of(self.target, self.adapter, self.base)

    def control_models(self) -> dict[str, str]:
        """Models that cannot have seen the suspects, by what they are called."""
        if not self.negative_controls:
            return {}
        named = {"base": self.known_base(), "control target": self.control_target}
        models: dict[str, str] = {}
        for name, model in named.items():
            if model is None:
                continue
            folder = _place(model)
            if self.adapter is None and folder == _place(self.target):
                raise no_control(name, model)
            if folder not in map(_place, models.values()):
                models[name] = model
        return models

    def only(self, names: Iterable[str]) -> AuditSettings:
        """The same for some of the signals."""
        return self.model_copy(update={"signals": tuple(dict.fromkeys(names))})

    @property
    def asks(self) -> bool:
        """Whether a signal is made of answers that have to be drawn."""
        return SampledAnswers in self.needs()

    @property
    def across(self) -> tuple[str, ...]:
        """The signals that compare models with each other."""
        return tuple(name for name in self.signals if signals.get(name).needs in ACROSS)

    def fitted(self, name: str) -> bool:
        """Whether a signal learns from who is a suspect here, and not from references."""
        chosen = signals.get(name)
        taught = chosen.needs in ACROSS and self.references is not None
        return chosen.fitted and not taught

    def needs(self) -> set[type]:
        """The kinds of evidence that the signals are made from."""
        asked = {signals.get(name).evidence(self.options_of(name)) for name in self.signals}
        return {part for each in asked for part in ACROSS.get(each, (each,))}

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


class TunedSettings(SharedSettings):
    """Settings of an audit that fine-tunes models itself.

    Attributes:
        method, vision, epochs, train_batch, learning_rate, weight_decay, warmup, rank: see
            `training.FineTuning`.
    """

    method: Literal["lora", "full"] = "lora"
    vision: bool = False
    epochs: int = Field(1, ge=1)
    train_batch: int = Field(12, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.01, ge=0, le=1)
    rank: int | None = Field(FineTuning.rank, ge=1)

    @property
    def fine_tuning(self) -> FineTuning:
        """How the models are fine-tuned."""
        return FineTuning(
            method=self.method,
            vision=self.vision,
            epochs=self.epochs,
            batch_size=self.train_batch,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            rank=self.rank or FineTuning.rank,
        )


class ProbingSettings(TunedSettings):
    """All that a probe takes.

    Attributes:
        data: records to fine-tune on and to take images to probe with from; None probes a model
            that somebody else fine-tuned.
        seen, unseen: for such a model, records whose images carry personas that were in its
            training, and personas that were not; the group of a record is its persona.
        rates: shares of the training images that carry a watermark, one model for each.
        seeds: how often the whole experiment is repeated, with other personas, places and order.
        personas: in each of both pools.
        images_per_persona: to probe with.
        fields: the questions that are asked, of `planting.FIELDS`.
        planted: fine-tune one more model in which seen personas decide the answer: a trace that
            the probe has to find.
        batches, sizes: how many mini-batches, of which sizes, gradients are compared over; no
            batches leave the gradients out.
        matrices: where gradients are read, as for GradAudit.
        permutations: labellings that the test draws.
        method, vision, epochs, train_batch, learning_rate, weight_decay, warmup, rank: of the
            fine-tuning; see `training.FineTuning`.
        position, alpha, plate: of the watermark; see `planting.Style`.
        design: of a probe of somebody else's model: `randomised` where lots decided who was seen.
    """

    data: str | None = None
    seen: str | None = None
    unseen: str | None = None
    rates: tuple[float, ...] = (0.0, 0.5, 1.0)
    seeds: int = Field(3, ge=1, le=100)
    personas: int = Field(20, ge=FEWEST_PAIRS, le=1000)
    images_per_persona: int = Field(10, ge=2)
    fields: tuple[str, ...] = FIELDS
    planted: bool = True
    batches: int = Field(100, ge=0)
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    matrices: str = "auto"
    permutations: int = Field(1000, ge=99)
    position: Position = "random"
    alpha: int = Field(128, ge=0, le=255)
    plate: int = Field(0, ge=0, le=255)
    design: Literal["randomised", "observational"] = "observational"
    cutoffs: ProbingCutoffs = ProbingCutoffs()

    @model_validator(mode="after")
    def _consistent(self) -> ProbingSettings:
        pools = (self.seen, self.unseen)
        if self.data is None and None in pools:
            raise ValueError(
                "give --data to fine-tune on, or --seen and --unseen of a model fine-tuned already"
            )
        if self.data is not None and pools != (None, None):
            raise ValueError("--seen and --unseen belong to a model fine-tuned already, not --data")
        if self.data is not None and self.adapter is not None:
            raise ValueError("an adapter is put on by the fine-tuning itself: merge the one given")
        if not any(self.rates) or any(not 0 <= rate <= 1 for rate in self.rates):
            raise ValueError("rates are shares from 0 to 1, one at least above 0")
        asked = sum(rate > 0 for rate in set(self.rates))
        if self.data is not None and 2 ** (1 - self.personas) * asked > self.cutoffs.alpha:
            raise ValueError(
                f"{self.personas} personas cannot reach the level with {asked} rates; use more"
            )
        for name in self.fields:
            if name not in FIELDS:
                raise ValueError(f"there is no field {name!r}; there are {', '.join(FIELDS)}")
        if not self.fields:
            raise ValueError("at least one field is asked for")
        if self.batches and (len(set(self.sizes)) < 2 or min(self.sizes) < 1):
            raise ValueError("sizes of batches: at least two different ones, from 1")
        object.__setattr__(self, "rates", tuple(sorted(set(self.rates))))
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))
        # In one order, so that the same questions make the same run.
        object.__setattr__(self, "fields", tuple(f for f in FIELDS if f in self.fields))
        return self

    @property
    def style(self) -> Style:
        """How the watermarks look."""
        return Style(alpha=self.alpha, position=self.position, plate=self.plate)


class ReferenceSettings(TunedSettings):
    """All that references are trained with; `target` is the base that each begins with.

    Attributes:
        suspect, control: the records of the audit; every reference learns a random half of them.
        train_on: instead, records of other people: no reference learns a suspect or control.
        count: how many references; two by two they share the records between them.
        like: an adapter whose shape the references' adapters take.
        keep: epochs that are kept; none stands for the last.
    """

    suspect: str | None = None
    control: str | None = None
    train_on: str | None = None
    count: int = Field(8, ge=1, le=256)
    like: str | None = None
    keep: tuple[int, ...] = ()
    rank: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> ReferenceSettings:
        sides = (self.suspect, self.control)
        if self.train_on is None and None in sides:
            raise ValueError(
                "give --suspect and --control to draw halves of, or --train-on for records of "
                "other people"
            )
        if self.train_on is not None and sides != (None, None):
            raise ValueError("--train-on stands instead of --suspect and --control")
        if self.like is not None and (self.method, self.vision, self.rank) != ("lora", False, None):
            raise ValueError("--like says what is trained: leave out --method, --vision and --rank")
        if any(not 1 <= epoch <= self.epochs for epoch in self.keep):
            raise ValueError(f"epochs to --keep are from 1 to {self.epochs}, which --epochs says")
        object.__setattr__(self, "keep", tuple(sorted({*self.keep})) or (self.epochs,))
        return self

    @property
    def fine_tuning(self) -> FineTuning:
        """How each reference is fine-tuned.

        Raises:
            UserError: the adapter of `like` cannot be read.
        """
        shape = None if self.like is None else shape_of(targets.find(self.like))
        return replace(super().fine_tuning, adapter=shape)
