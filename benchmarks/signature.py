"""The gradient signature against published signals, without references and with them.

    python benchmarks/signature.py --cache FOLDER --seeds 3 4 5 6 7

Per seed: 400 members and 400 non-members drawn at random among scenes, a small LLaVA trained on
other scenes (the base), and from it a target and references for each recipe. What is trained and
read is kept in the cache, whole or not at all, so a run that was stopped goes on where it was, and
a cached seed is evaluated without a model. Results go to benchmarks/results/signature.json, a
figure to docs/research/signature.png, and tables between the marks in docs/research/signature.md.
Settings were chosen on seed 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pages import put, table
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightleak.runs import write_json
from lightleak.statistics import (
    Unresolvable,
    auc,
    combine_splits,
    minimum_set_size,
    permutation_test,
    tpr_at_fpr,
    tpr_at_fpr_across_folds,
)

Floats = NDArray[np.floating]
Booleans = NDArray[np.bool_]
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "signature.json"
PAGE = HERE.parent / "docs" / "research" / "signature.md"
FIGURE = PAGE.with_suffix(".png")

SIDE = 400
LONGEST = 48
POINTS = ("base", "middle", "end")
RIDGE = 0.1
FOLDS = 5
FROM_FOLDS, FROM_REFERENCES = 0.1, 0.01


@dataclass(frozen=True)
class Recipe:
    """How a model is tuned from the base; `number` keeps the seeds of recipes apart."""

    number: int
    epochs: int
    rate: float
    batch: int
    rank: int | None = None


RECIPES = {
    "lora": Recipe(0, epochs=5, rate=6e-3, batch=8, rank=16),
    "full": Recipe(1, epochs=4, rate=2e-3, batch=16),
    "inner": Recipe(3, epochs=9, rate=4e-3, batch=8, rank=16),
    # What an auditor guesses who does not know how the target was tuned.
    "short": Recipe(2, epochs=2, rate=1e-3, batch=16),
    "short lora": Recipe(4, epochs=2, rate=3e-3, batch=8, rank=16),
}
TARGETS = ("full", "lora", "inner")
WRONG = {"full": "short", "lora": "short lora"}
MARKS = {"full": "o", "lora": "^", "inner": "x"}
INNER = r"language_model.*_proj|multi_modal_projector\.linear_\d"
ADAPTED = {"lora": rf".*({INNER}|lm_head)", "inner": rf".*({INNER})"}
ADAPTED["short lora"] = ADAPTED["lora"]


def halves(seed: int, which: int, pairs: int, side: int) -> Booleans:
    """(2 pairs, n) random halves, each followed by what it leaves."""
    rng = np.random.default_rng([seed, which])
    seen = []
    for _ in range(pairs):
        half = np.isin(np.arange(2 * side), rng.permutation(2 * side)[:side])
        seen += [half, ~half]
    return np.array(seen)


def save(path: Path, **arrays: Any) -> None:
    """Write the arrays whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, **arrays)
    part.replace(path)


# -- collect: models and readings -------------------------------------------------------------


class Collection:
    """One seed's records, base, models and readings."""

    def __init__(self, folder: Path, seed: int, side: int) -> None:
        from lightleak import targets
        from lightleak.evidence.collect import encode
        from lightleak.evidence.gradients import GradientEngine
        from lightleak.evidence.gradients.select import select
        from lightleak.lab import corpora
        from lightleak.lab.models import IMAGE_SIDE
        from lightleak.records import Record

        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        records = [
            Record(f"scene-{i:05d}", scene.png(IMAGE_SIDE), scene.caption(), prompt="")
            for i, scene in enumerate(corpora.scenes(5 * side, seed=seed))
        ]
        self.records, public = records[: 2 * side], records[2 * side : 4 * side]
        drawn = np.random.default_rng([seed, 1]).permutation(2 * side)[:side]
        self.member = np.isin(np.arange(2 * side), drawn)
        self.seen = {False: halves(seed, 7, 4, side), True: halves(seed, 8, 2, side)}
        if not (folder / "base" / "done").exists():
            texts = {record.text for record in self.records}
            _make_base(folder / "base", [r for r in public if r.text not in texts], seed)
        if not (folder / "pool.npz").exists():
            sizes = [len(zlib.compress(record.text.encode())) for record in self.records]
            seen = {"seen": self.seen[False], "seenshort": self.seen[True]}
            save(folder / "pool.npz", member=self.member, zlib=np.array(sizes), **seen)
        self.target = targets.load(folder / "base", device="cpu", dtype="float32")
        self.base = {k: v.clone() for k, v in self.target.model.named_parameters()}
        self.encoded = encode(self.target, self.records).records
        selection = select(self.target, "everything")
        self.engine = GradientEngine(self.target, selection.without(set(selection.dense)))

    def trained_on(self, recipe: str, role: str) -> Booleans:
        """(n,) which records a model is trained on."""
        if role == "target":
            return self.member
        return self.seen[recipe in WRONG.values()][int(role.removeprefix("ref"))]

    def weights(self, recipe: str, role: str) -> dict[str, Any]:
        """θ − θ_base by name; of an adapter its factors, as `A:` and (scaled) `B:` and the name."""
        import torch

        from lightleak.lab.train import Training, train

        path = self.folder / f"{recipe}-{role}.weights.npz"
        if path.exists():
            return {k: torch.from_numpy(v) for k, v in np.load(path).items()}
        chosen, how = self.trained_on(recipe, role), RECIPES[recipe]
        own = 500 if role == "target" else int(role.removeprefix("ref"))
        seed = self.seed * 1000 + 100 * how.number + own
        self.go(0.0, {})
        model = copy.deepcopy(self.target.model)
        if how.rank is None:
            model.requires_grad_(True)
        else:
            from peft import LoraConfig, get_peft_model

            layers = ADAPTED[recipe]
            config = LoraConfig(r=how.rank, lora_alpha=2 * how.rank, target_modules=layers)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = get_peft_model(model, config)
        records = [r for r, is_in in zip(self.records, chosen, strict=True) if is_in]
        training = Training(how.epochs, how.rate, how.batch)
        train(replace(self.target, model=model), records, training, seed=seed)
        found = {}
        if how.rank is None:
            found = {k: v.detach() - self.base[k] for k, v in model.named_parameters()}
        for name, module in model.named_modules():
            if "default" in getattr(module, "lora_A", {}):
                weight = name.removeprefix("base_model.model.") + ".weight"
                found[f"A:{weight}"] = module.lora_A["default"].weight.detach()
                found[f"B:{weight}"] = module.lora_B["default"].weight.detach() * 2
        save(path, **{k: v.numpy() for k, v in found.items()})
        return found

    def go(self, way: float, change: dict[str, Any]) -> None:
        """Put the model at θ_base + way · Δ."""
        import torch

        with torch.no_grad():
            for name, parameter in self.target.model.named_parameters():
                moved = way * change[name] if name in change else 0.0
                parameter.copy_(self.base[name] + moved)

    def collect(self, recipe: str, roles: Sequence[str]) -> None:
        """Train a recipe's models and read every record at the base, half way and at the end."""
        weights = {role: self.weights(recipe, role) for role in roles}
        path = self.folder / f"{recipe}.base.npz"
        known = list(np.load(path)["models"]) if path.exists() else []
        if set(roles) - set(known):
            self.go(0.0, {})
            save(path, models=np.array(roles), **self.read(recipe, list(weights.values())))
        for role, own in weights.items():
            for point, way in (("middle", 0.5), ("end", 1.0)):
                path = self.folder / f"{recipe}-{role}.{point}.npz"
                if not path.exists():
                    self.go(way, _change(own))
                    names = np.array(list(self.engine.selection.shapes))
                    save(path, matrices=names, **self.read(recipe, [own]))
                    print(self.seed, recipe, role, point, flush=True)

    def read(self, recipe: str, models: list[dict[str, Any]]) -> dict[str, Floats]:
        """Token statistics, gradient norms, ⟨g, Δ⟩ of each model, and kernels by group of matrices.

        With an adapter the kernels are of its own gradients g Aᵀ, one kernel a model.
        """
        import torch

        from lightleak.evidence.collect import BatchSize, plan
        from lightleak.evidence.gradients.forms import Products

        changes = [_change(each) for each in models]
        adapted = RECIPES[recipe].rank is not None
        shapes, n, k = self.engine.selection.shapes, len(self.encoded), len(models)
        place = {name: j for j, name in enumerate(shapes)}
        row = {record.id: i for i, record in enumerate(self.encoded)}
        norms = np.zeros((n, len(shapes)), np.float32)
        dots = np.zeros((n, k, len(shapes)), np.float32)
        tokens = np.full((3, n, LONGEST), np.nan, np.float32)
        kept: dict[tuple[str, int], Any] = {}

        def keep(name: str, model: int, rows: list[int], values: Any) -> None:
            if (name, model) not in kept:
                kept[name, model] = torch.zeros(n, values[0].numel(), dtype=torch.bfloat16)
            kept[name, model][rows] = values.flatten(1).bfloat16()

        for chosen in plan(self.encoded, BatchSize()):
            batch = self.target.collate(chosen)
            rows = [row[each] for each in batch.ids]

            def consume(name: str, gradients: Any, rows: list[int] = rows) -> None:
                shape, j = shapes[name], place[name]
                moved = [(q, c[name]) for q, c in enumerate(changes) if name in c]
                whole = _dense(gradients, shape)
                norms[rows, j] = whole.flatten(1).norm(dim=1).numpy()
                for q, change in moved:
                    dots[rows, q, j] = (whole.flatten(1) @ change.flatten()).numpy()
                if not moved or _group(name, adapted) is None or len(shape) < 2:
                    return
                if not adapted:
                    keep(name, 0, rows, whole)
                elif isinstance(gradients, Products):
                    for q, each in enumerate(models):
                        low = gradients.inputs @ each[f"A:{name}"].T
                        keep(name, q, rows, gradients.grads.mT @ low)

            outputs = self.engine.step(batch, consume)
            said = zip(rows, outputs.log_probabilities, outputs.tokens, strict=True)
            for i, log_probabilities, answer in said:
                p = log_probabilities.exp()
                mean = (p * log_probabilities).sum(-1)
                variance = (p * (log_probabilities - mean[:, None]).square()).sum(-1)
                own = log_probabilities.gather(1, answer[:, None])[:, 0]
                found = torch.stack([own, mean, variance])[:, :LONGEST]
                tokens[:, i, : found.shape[1]] = found.numpy()
        kernels: dict[str, Any] = {}
        for (name, model), values in kept.items():
            key = f"K:{_group(name, adapted)}"
            kernels.setdefault(key, np.zeros((k, n, n), np.float32))
            kernels[key][model] += (values @ values.T).float().numpy()
        if not adapted:
            kernels = {key: value[0] for key, value in kernels.items()}
        return {"norm": norms, "dots": dots, "tokens": tokens, **kernels}


def _make_base(folder: Path, public: list[Any], seed: int) -> None:
    from lightleak import targets
    from lightleak.lab.models import CHAT_TEMPLATE, tiny_llava
    from lightleak.lab.train import Training, train

    tiny_llava(folder, [record.text for record in public], text_layers=2, seed=seed)
    base = targets.load(folder, device="cpu", dtype="float32")
    # Role names, spelt letter by letter by so small a tokenizer, were a third of each record.
    short = CHAT_TEMPLATE.replace("{{ message['role'] }}\n", "").replace("assistant\n", "")
    base.processor.chat_template = short
    base.model.requires_grad_(True)
    train(base, public, Training(6, 2e-3), seed=seed)
    with targets.quiet():
        base.model.save_pretrained(folder)
        base.processor.save_pretrained(folder)
    (folder / "done").touch()


def _change(weights: dict[str, Any]) -> dict[str, Any]:
    """Δ by name, from what `Collection.weights` returns."""
    plain = {name: value for name, value in weights.items() if name[:2] not in ("A:", "B:")}
    factors = {name[2:]: value for name, value in weights.items() if name.startswith("B:")}
    return plain | {name: b @ weights[f"A:{name}"] for name, b in factors.items()}


def _dense(gradients: Any, shape: tuple[int, ...]) -> Any:
    """(n, *shape) gradients of the records of a batch."""
    import torch

    if hasattr(gradients, "ids"):
        pairs = zip(gradients.ids, gradients.values, strict=True)
        return torch.stack([torch.zeros(shape).index_add_(0, ids, v) for ids, v in pairs])
    return gradients.grads.mT @ gradients.inputs


def _group(name: str, adapted: bool) -> str | None:
    """Which kernel a matrix adds to, if any; inner layers only where an adapter sits on them."""
    if "lm_head" in name:
        return "head"
    if "embed_tokens" in name:
        return "embed"
    return "text" if adapted and "language_model" in name else None


# -- evaluate: readings, signals, results -----------------------------------------------------

PARTS = {
    "head": "lm_head",
    "embed": "embed_tokens",
    "attention": "self_attn",
    "mlp": ".mlp.",
    "projector": "projector",
    "vision": "vision",
}
IN_KERNEL = {"head": ("head",), "embed": ("embed",), "text": ("attention", "mlp")}


def part_of(name: str) -> str:
    """The first part of the model, from its ends inwards, that a parameter belongs to."""
    order = ("vision", "embed", "head", "projector", "attention", "mlp")
    return next((part for part in order if PARTS[part] in name), "other")


def readings(
    folder: Path, recipe: str, role: str, rows: NDArray[np.int64] | None = None
) -> dict[str, Floats]:
    """All readings at one model, by name, of all records or of an audit of some `rows` only."""
    audited = np.arange(len(_load(folder, "pool")["member"])) if rows is None else rows
    parts = np.array([part_of(each) for each in _load(folder, f"{recipe}-{role}.end")["matrices"]])
    found: dict[str, Floats] = {}
    at: dict[str, dict[str, Floats]] = {}
    for point in POINTS:
        z = _load(folder, f"{recipe}.base" if point == "base" else f"{recipe}-{role}.{point}")
        model = list(z["models"]).index(role) if point == "base" else 0
        against, norms2 = -z["dots"][audited, model].astype(float), z["norm"][audited] ** 2.0
        tokens = z["tokens"][:, audited]
        at[point] = token_readings(tokens)
        for part in ("all", *PARTS):
            own = np.ones(len(parts), bool) if part == "all" else parts == part
            at[point][f"norm {part}"] = -0.5 * np.log(norms2[:, own].sum(1) + 1e-20)
            along = against[:, own].sum(1)
            if along.any() and part not in ("projector", "vision"):
                found[f"{point} along {part}"] = along
                found[f"{point} cosine {part}"] = along / np.sqrt(norms2[:, own].sum(1) + 1e-20)
        kernels = {
            part: (gram if gram.ndim == 2 else gram[model])[np.ix_(audited, audited)]
            for part in IN_KERNEL
            if (gram := z.get(f"K:{part}")) is not None
        }
        sets = [(part,) for part in kernels]
        sets += [two for two in (("head", "embed"), ("head", "text")) if set(two) <= set(kernels)]
        for chosen in sets:
            own = np.isin(parts, [part for each in chosen for part in IN_KERNEL[each]])
            gram = sum(kernels[each] for each in chosen)
            if not against[:, own].any():
                continue
            for key, values in shares(gram, against[:, own].sum(1)).items():
                found[f"{point} {key} {'+'.join(chosen)}"] = values
    for point in POINTS:
        for key, values in at[point].items():
            found[f"{point} {key}"] = values
            if point != "base":
                found[f"{point} - base {key}"] = values - at["base"][key]
    found["length"] = np.log((~np.isnan(tokens[0])).sum(1))
    return found


def token_readings(tokens: Floats) -> dict[str, Floats]:
    """Summaries of log-probability, mean and variance of each answer token, (3, n, tokens)."""
    logprob, mean, variance = tokens.astype(float)
    z = (logprob - mean) / np.sqrt(np.maximum(variance, 1e-12))
    return {
        "loss": np.nanmean(logprob, 1),
        "mink": lowest(logprob),
        "minkpp": lowest(z),
        "mean": np.nanmean(mean, 1),
        "z": np.nanmean(z, 1),
        "spread": np.nanstd(logprob, 1),
    }


def lowest(values: Floats, share: float = 0.2) -> Floats:
    """(n,) mean of each row's lowest numbers; NaN where a row has ended."""
    ordered, lengths = np.sort(values, 1), (~np.isnan(values)).sum(1)
    counts = np.maximum(1, (share * lengths).astype(int))
    return np.array([each[:count].mean() for each, count in zip(ordered, counts, strict=True)])


def shares(gram: Floats, against: Floats) -> dict[str, Floats]:
    """How much of each record's gradient is in Δ, over its standard error, and that error's log.

    Ridge regression of Δ on all records' gradients, drawn towards the mean share. No label enters.
    """
    n, scale = len(gram), np.trace(gram) / len(gram)
    inverse = np.linalg.inv(gram.astype(float) / scale + RIDGE * (np.eye(n) - 1 / n))
    found, variance = inverse @ against / scale, np.diag(inverse)
    return {"share": found, "t": found / np.sqrt(variance), "error": np.log(variance)}


def from_folds(values: Floats, member: Booleans, folds: int, seed: int) -> tuple[Floats, Floats]:
    """Cross-fitted log-odds and the fold of each record."""
    scores, fold = np.zeros(len(member)), np.zeros(len(member), int)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for i, (known, left) in enumerate(split.split(values, member)):
        learnt = _learn(values[known], member[known], FROM_FOLDS)
        scores[left], fold[left] = learnt.decision_function(values[left]), i
    return scores, fold


def from_references(own: Floats, references: Floats, seen: Booleans) -> Floats:
    """Log-odds learnt on references (k, n, d), each in turn the pretended target."""
    own, references = _standard(own), _standard(references)
    features = []
    for i in range(len(seen)):
        others = np.arange(len(seen)) != i
        features.append(_compared(references[i], references[others], seen[others]))
    learnt = _learn(np.concatenate(features), np.concatenate(list(seen)), FROM_REFERENCES)
    return np.asarray(learnt.decision_function(_compared(own, references, seen)))


def _standard(values: Floats) -> Floats:
    return (values - values.mean(-2, keepdims=True)) / (values.std(-2, keepdims=True) + 1e-9)


def _compared(own: Floats, references: Floats, seen: Booleans) -> Floats:
    inside, without = _mean(references, seen), _mean(references, ~seen)
    return np.hstack([own, own - without, inside - without])


def _mean(references: Floats, chosen: Booleans) -> Floats:
    total = np.where(chosen[:, :, None], references, 0.0).sum(0)
    return np.asarray(total / np.maximum(chosen.sum(0), 1)[:, None])


def _learn(values: Floats, labels: Booleans, strength: float) -> Any:
    model = LogisticRegression(C=strength, max_iter=3000)
    return make_pipeline(StandardScaler(), model).fit(values, labels)


def lira(loss: Floats, references: Floats, seen: Booleans) -> dict[str, Floats]:
    """Online and offline, variances pooled over all records."""
    own, others = (each - np.log1p(-np.exp(np.minimum(each, -1e-6))) for each in (loss, references))
    inside, without = (_mean(others[:, :, None], each)[:, 0] for each in (seen, ~seen))
    n = len(loss)
    spread_in = ((others - inside)[seen] ** 2).sum() / max(1, seen.sum() - n)
    spread_out = ((others - without)[~seen] ** 2).sum() / max(1, (~seen).sum() - n)
    online = (own - without) ** 2 / (2 * spread_out) - (own - inside) ** 2 / (2 * spread_in)
    return {"lira online": online, "lira offline": own - without}


def rmia(loss: Floats, references: Floats, controls: Booleans) -> Floats:
    """Share of controls beaten by a factor of two; ties are broken by the ratio itself."""
    ratio = np.exp(loss) / np.exp(references).mean(0)
    beaten = (ratio[:, None] >= 2 * ratio[controls]).mean(1)
    return np.asarray(beaten + 1e-6 * np.log(ratio))


def complete(folder: Path, recipe: str, roles: Sequence[str]) -> bool:
    """Whether the cache holds every reading of these models."""
    names = [f"{recipe}-{role}.{point}" for role in roles for point in POINTS[1:]]
    if not all((folder / f"{name}.npz").exists() for name in (f"{recipe}.base", *names)):
        return False
    return set(roles) <= set(_load(folder, f"{recipe}.base")["models"])


def signals(folder: Path, recipe: str, seed: int) -> dict[str, tuple[Floats, Floats | None]]:
    """Scores of every signal for one target, with folds where it was fitted on them."""
    pool = _load(folder, "pool")
    member = pool["member"]
    own = readings(folder, recipe, "target")
    found: dict[str, tuple[Floats, Floats | None]] = {
        "loss": (own["end loss"], None),
        "zlib": (
            own["end loss"] * np.exp(own["length"]) / pool["zlib"],
            None,
        ),
        "mink": (own["end mink"], None),
        "minkpp": (own["end minkpp"], None),
        "grad_norm": (own["end norm all"], None),
        "ratio": (own["end - base loss"], None),
        "share alone": (_best_share(own), None),
    }
    held = np.array(list(own.values())).T
    with_shares = _columns(own, (" share ", " t ", " error "))
    with_base = _columns(own, ("base", "middle", " along ", " cosine ")) | with_shares
    choices = {
        "signature, no reference": with_shares | True,
        "signature without shares": ~with_shares,
        "signature without a base": ~with_base,
    }
    for name, columns in choices.items():
        found[name] = from_folds(held[:, columns], member, FOLDS, seed)
    found["signature, no reference, 2 folds"] = from_folds(held, member, 2, seed)
    wrong = WRONG.get(recipe)
    for label, other, count in (("8", recipe, 8), ("4", recipe, 4), ("4 wrong", wrong, 4)):
        if other is None or not complete(folder, other, [f"ref{i}" for i in range(count)]):
            continue
        seen = pool["seenshort" if other in WRONG.values() else "seen"][:count]
        models = [readings(folder, other, f"ref{i}") for i in range(count)]
        names = [name for name in own if name in models[0]]
        table = np.array([[each[name] for name in names] for each in (own, *models)])
        table = table.transpose(0, 2, 1)
        losses = np.array([each["end loss"] for each in models])
        for name, scores in lira(own["end loss"], losses, seen).items():
            found[f"{name}, {label} references"] = (scores, None)
        found[f"rmia, {label} references"] = (rmia(own["end loss"], losses, ~member), None)
        scores = from_references(table[0], table[1:], seen)
        found[f"signature, {label} references"] = (scores, None)
    return found


def _best_share(own: dict[str, Floats]) -> Floats:
    sets = [f"middle share {chosen}" for chosen in ("head+embed", "head+text", "text")]
    return next(own[name] for name in sets if name in own)


def _columns(own: dict[str, Floats], words: Sequence[str]) -> Booleans:
    """Which readings have one of these in their names."""
    return np.array([any(word in name for word in words) for name in own])


def measures(scores: Floats, folds: Floats | None, member: Booleans) -> dict[str, float]:
    """AUC, TPR at 1 and 5 % FPR with the FPR that was realised, and the set that is enough."""
    inside, outside = scores[member], scores[~member]
    value = auc(inside, outside)
    found = {"AUC": value}
    for rate in (0.01, 0.05):
        if folds is None:
            point: Any = tpr_at_fpr(inside, outside, rate)
        else:
            point = tpr_at_fpr_across_folds(inside, outside, folds[member], folds[~member], rate)
        known = not isinstance(point, Unresolvable)
        found[f"TPR at {rate:.0%}"] = point.tpr.value if known else math.nan
        found[f"FPR at {rate:.0%}"] = point.fpr.value if known else math.nan
    found["set size"] = minimum_set_size(value, alpha=0.01, power=0.9) if value > 0.5 else math.inf
    return found


def audited_in_part(folder: Path, recipe: str, seed: int) -> dict[str, dict[str, float]]:
    """Audits of a part of the members: the rest of the training set is nobody's to explain."""
    member = _load(folder, "pool")["member"]
    drawn = np.random.default_rng([seed, 2]).permutation(np.flatnonzero(member))
    found = {}
    for label, count in (("half", len(drawn) // 2), ("a quarter", len(drawn) // 4)):
        rows = np.sort(np.append(drawn[:count], np.flatnonzero(~member)))
        own = readings(folder, recipe, "target", rows)
        held, inside = np.array(list(own.values())).T, member[rows]
        scores, folds = from_folds(held, inside, FOLDS, seed)
        found[f"loss, {label} of the members audited"] = measures(own["end loss"], None, inside)
        found[f"signature, {label} of the members audited"] = measures(scores, folds, inside)
    return found


def null_audits(
    folder: Path,
    recipe: str,
    scored: dict[str, tuple[Floats, Floats | None]],
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Audits of records that the target never saw, half of them called suspects by lot.

    With references nothing is fitted on those lots, so ten times as many audits cost little.
    """
    others = np.flatnonzero(~_load(folder, "pool")["member"])
    held = np.array(list(readings(folder, recipe, "target", others).values())).T
    found = []
    for audit in range(10 * count):
        rng = np.random.default_rng([audit, 3, seed, RECIPES[recipe].number])
        suspect = np.isin(np.arange(len(others)), rng.permutation(len(others))[: len(others) // 2])
        sets: dict[str, tuple[Floats, Floats | None]] = {}
        if audit < count:
            sets["no reference"] = from_folds(held, suspect, FOLDS, audit)
        for case in ("8 references", "4 wrong references"):
            if f"signature, {case}" in scored:
                sets[case] = scored[f"signature, {case}"][0][others], None
        for case, (values, folds) in sets.items():
            # What one fold's scores learnt is the labels of the others: each is tested alone.
            parts = [np.ones(len(values), bool)]
            if folds is not None:
                parts = [folds == fold for fold in np.unique(folds)]
            p_values = [
                permutation_test(values[part], suspect[part], seed=audit, permutations=999)
                for part in parts
            ]
            p = combine_splits(p_values) if len(parts) > 1 else p_values[0]
            found.append({"case": case, "p": p, **measures(values, folds, suspect)})
    return found


_FILES: dict[Path, dict[str, Any]] = {}


def _load(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.npz"
    if path not in _FILES:
        with np.load(path, allow_pickle=False) as z:
            _FILES[path] = {key: z[key] for key in z.files}
    return _FILES[path]


def interval(rows: Sequence[dict[str, Any]], measure: str) -> dict[str, Any]:
    """Mean over seeds, each the mean of its targets, with its 95 % interval (Student's t)."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row[measure])
    values = [float(np.mean(each)) for each in by_seed.values()]
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "seeds": n}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "plus or minus": half, "seeds": n}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over targets, by recipe and over all, for each signal."""
    found: dict[str, Any] = {}
    for recipe in (*TARGETS, "all"):
        mine = [row for row in rows if recipe in (row["recipe"], "all")]
        found[recipe] = {
            name: {
                measure: interval([row for row in mine if row["signal"] == name], measure)
                for measure in ("AUC", "TPR at 1%", "TPR at 5%", "FPR at 1%", "set size")
            }
            for name in dict.fromkeys(row["signal"] for row in mine)
        }
    return found


def draw(rows: list[dict[str, Any]]) -> None:
    """One dot a target: TPR at 1 % FPR of each signal, and the mean as a bar."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["signal"] for row in rows))
    figure, axes = plt.subplots(figsize=(7.5, 0.32 * len(names) + 1))
    for y, name in enumerate(reversed(names)):
        values = [(row["TPR at 1%"], row["recipe"]) for row in rows if row["signal"] == name]
        colour = "#9fc5a8" if "signature" in name else "#c9ccd1"
        axes.barh(y, np.mean([value for value, _ in values]), color=colour)
        for value, recipe in values:
            axes.plot(value, y, MARKS[recipe], color="#222222", ms=3.5)
    axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    axes.set_xlabel("TPR at 1 % FPR (● full, ▲ lora, ✕ inner; bar: mean)")
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150)


PUBLISHED = ("loss", "zlib", "mink", "minkpp", "grad_norm")
# What was asked of a case: its signature over the best published signal, and over these.
ASKED = {
    "no reference": (2, None, ()),
    "8 references": (6, 1.2, ("lira online", "lira offline", "rmia")),
    "4 wrong references": (3, 1.7, ("lira online", "lira offline", "rmia")),
}


def tell(results: dict[str, Any]) -> list[str]:
    """The results as tables in Markdown."""
    summary, rows = results["summary"], results["targets"]
    head = ("signal", "seeds", "AUC", "TPR at 1 % FPR", "TPR at 5 % FPR", "set size")
    lines = table(
        head,
        [
            [
                name,
                str(each["AUC"]["seeds"]),
                told(each["AUC"], 3),
                *(told(each[f"TPR at {rate}"], 2) for rate in ("1%", "5%")),
                told(each["set size"], 0),
            ]
            for name, each in summary["all"].items()
        ],
    )
    names = [name for name in summary["all"] if "audited" not in name]
    by_recipe = [
        [name, *(told(summary[recipe].get(name, {}).get("TPR at 1%"), 2) for recipe in TARGETS)]
        for name in names
    ]
    lines += ["", "By recipe, TPR at 1 % FPR:", "", *table(("signal", *TARGETS), by_recipe)]
    head = ("case", "audits", "p ≤ .01", "p ≤ .05", "FPR realised at 1 %", "“TPR” at 1 %")
    keys = ("p at most 0.01", "p at most 0.05", "realised FPR at 1%", "TPR at 1%")
    nulls = [
        [case, str(each["audits"]), *(f"{each[key]:.3f}" for key in keys)]
        for case, each in results["null audits"].items()
    ]
    lines += ["", "False alarms, where none of those called suspects was trained on:", ""]
    lines += table(head, nulls)
    head = ("signature", "targets", "TPR at 1 % FPR", "÷ best published (asked)")
    against = [[case, *compared(rows, case, *asked)] for case, asked in ASKED.items()]
    lines += ["", "Against what was asked, with 95 % intervals over seeds:", ""]
    lines += table((*head, "÷ better of LiRA and RMIA (asked)"), against)
    return lines


def compared(
    rows: list[dict[str, Any]],
    case: str,
    published: float,
    beside: float | None,
    others: Sequence[str],
) -> list[str]:
    """Targets, TPR, and its ratios to the best published signal and to the best with references."""
    name = f"signature, {case}"
    targets = {(row["seed"], row["recipe"]) for row in rows if row["signal"] == name}
    own = [row for row in rows if (row["seed"], row["recipe"]) in targets]

    def over(names: Sequence[str], asked: float) -> str:
        mean = {n: np.mean([r["TPR at 1%"] for r in own if r["signal"] == n]) for n in names}
        best = max(names, key=lambda n: mean[n])
        middle, low, high = ratio(own, name, best)
        best_one = best.partition(",")[0]
        return f"{middle:.1f} × {best_one}'s {mean[best]:.3f}, {low:.1f} to {high:.1f} ({asked:g})"

    tpr = told(interval([row for row in own if row["signal"] == name], "TPR at 1%"), 3)
    with_them = [f"{each}, {case}" for each in others]
    return [
        str(len(targets)),
        tpr,
        over(PUBLISHED, published),
        "–" if beside is None else over(with_them, beside),
    ]


def ratio(rows: list[dict[str, Any]], one: str, other: str) -> tuple[float, float, float]:
    """Of mean TPRs, and an interval of its mean over seeds on the logarithmic scale."""

    def mean(name: str, seed: int | None = None) -> float:
        chosen = [r for r in rows if r["signal"] == name and seed in (None, r["seed"])]
        return float(np.mean([r["TPR at 1%"] for r in chosen]))

    logs = [math.log(mean(one, seed) / mean(other, seed)) for seed in {r["seed"] for r in rows}]
    half = stats.t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / math.sqrt(len(logs))
    middle = float(np.mean(logs))
    return mean(one) / mean(other), math.exp(middle - half), math.exp(middle + half)


def told(found: dict[str, Any] | None, digits: int) -> str:
    """A mean with its interval."""
    if found is None:
        return "–"
    spread = found.get("plus or minus")
    return f"{found['mean']:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def main() -> None:
    """Collect what is missing, evaluate, write results and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--side", type=int, default=SIDE, help="members, and non-members")
    parser.add_argument("--references", type=int, default=8, help="of the right recipe, 0 to 8")
    parser.add_argument("--nulls", type=int, default=20, help="null audits a target")
    parser.add_argument("--evaluate-only", action="store_true", help="take what the cache holds")
    parser.add_argument("--quick", action="store_true", help="little of everything; writes nothing")
    given = parser.parse_args()
    if given.quick:
        given.cache, given.seeds, given.nulls = given.cache / "quick", given.seeds[:1], 2
        given.side, given.references = 128, 2
    rows, nulls = [], []
    for seed in given.seeds:
        folder = given.cache / f"seed-{seed:03d}"
        if not given.evaluate_only:
            collection = Collection(folder, seed, given.side)
            for recipe in TARGETS:
                roles = [f"ref{i}" for i in range(given.references)]
                collection.collect(recipe, ["target", *roles])
                if roles and recipe in WRONG:
                    collection.collect(WRONG[recipe], [f"ref{i}" for i in range(4)])
        for recipe in TARGETS:
            if not complete(folder, recipe, ["target"]):
                continue
            member = _load(folder, "pool")["member"]
            scored = signals(folder, recipe, seed)
            measured = {name: measures(*each, member) for name, each in scored.items()}
            measured |= audited_in_part(folder, recipe, seed)
            for name, each in measured.items():
                rows.append({"seed": seed, "recipe": recipe, "signal": name, **each})
                print(seed, recipe, f"{name:44s} {each['TPR at 1%']:.3f}", flush=True)
            for each in null_audits(folder, recipe, scored, given.nulls, seed):
                nulls.append({"seed": seed, "recipe": recipe, **each})
        _FILES.clear()
    false_alarms = {
        case: {
            "audits": len(mine),
            "p at most 0.01": float(np.mean([each["p"] <= 0.01 for each in mine])),
            "p at most 0.05": float(np.mean([each["p"] <= 0.05 for each in mine])),
            "realised FPR at 1%": float(np.mean([each["FPR at 1%"] for each in mine])),
            "TPR at 1%": float(np.mean([each["TPR at 1%"] for each in mine])),
        }
        for case in dict.fromkeys(each["case"] for each in nulls)
        for mine in [[each for each in nulls if each["case"] == case]]
    }
    results = {
        "seeds": sorted(given.seeds),
        "recipes": {name: vars(recipe) for name, recipe in RECIPES.items()},
        "summary": summarise(rows),
        "null audits": false_alarms,
        "targets": rows,
    }
    if given.quick:
        print(json.dumps(results["summary"]["all"], indent=1)[:2000])
        return
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results)
    draw(rows)
    put(PAGE, "benchmarks/signature.py", tell(results))


if __name__ == "__main__":
    main()
