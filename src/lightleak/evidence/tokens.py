"""What a generative target says of each answer token, and where it reads image and instruction."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import pyarrow as pa
import torch
from torch import Tensor, split
from torch.linalg import vecdot

from lightleak.evidence.collect import BatchSize, encode, plan, run
from lightleak.evidence.readings import FINITE_ORDERS, ORDERS, Floats
from lightleak.records import Record
from lightleak.targets import Answers, Batch, EncodedRecord, GenerativeTarget

# How VL-MIA has a model describe an image (Li et al. 2024, arXiv:2411.02902).
OWN_PROMPT = "Describe this image concisely."
OWN_TOKENS = 32
# What is kept of a slice of the tokens.
SHAPE = (
    *("gap", *(f"renyi_{order}" for order in ORDERS)),
    *(f"modified_{order}" for order in FINITE_ORDERS),
)
# Probabilities to work on at once: what a core's cache holds, or what keeps an accelerator busy.
_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 23}
# Below the logarithm of every number above zero.
_IMPOSSIBLE = -1e4


@dataclass(frozen=True)
class AnswerReader:
    """Token statistics of each record's answer, as evidence rows.

    Attributes:
        slices: whose distributions' shapes to keep beside: the `description` is the answer;
            `image` and `instruction` are there where the target hears its prompts.
        own: a target that hears its prompts, to keep the shapes for its own descriptions, too.
        size: batch limits for these.
    """

    slices: tuple[str, ...] = ()
    own: GenerativeTarget | None = None
    size: BatchSize | None = None

    def columns(self, numbers: pa.DataType) -> dict[str, pa.DataType]:
        """Names and types of what `rows` yields; `numbers` is a list of floats."""
        shapes = pa.struct(dict.fromkeys(SHAPE, numbers))
        own = ("own_description", "own_image", "own_instruction")
        return {
            "boundary_ambiguous": pa.bool_(),
            "zlib_bytes": pa.int64(),
            "logprob": numbers,
            "mean": numbers,
            "variance": numbers,
            **dict.fromkeys(self.slices, shapes),
            **({} if self.own is None else {"own": pa.string(), **dict.fromkeys(own, shapes)}),
        }

    def rows(
        self, records: Sequence[Record], encoded: Sequence[EncodedRecord], outputs: Answers
    ) -> list[dict[str, object]]:
        """One row a record of a batch."""
        own = {} if self.own is None else describe(self.own, records, self.size or BatchSize())
        return [
            {
                "boundary_ambiguous": each.boundary_ambiguous,
                "zlib_bytes": len(zlib.compress(record.text.encode())),
                **{name: said["description"][name] for name in ("logprob", "mean", "variance")},
                **{name: said[name] for name in self.slices},
                **own.get(record.id, {}),
            }
            for record, each, said in zip(records, encoded, slices(outputs), strict=True)
        ]


def describe(
    target: GenerativeTarget, records: Sequence[Record], size: BatchSize
) -> dict[str, dict[str, object]]:
    """What the target itself says of each image, and its statistics when that is fed back to it.

    A record that it cannot be asked about, or that it has nothing to say of, is left out.
    """
    asked = [replace(record, prompt=OWN_PROMPT, text="image") for record in records]
    prompts = encode(target, asked).records
    ids = dict(zip((p.id for p in prompts), target.generate(prompts, OWN_TOKENS), strict=True))
    decode = target.processor.tokenizer.decode
    told = [
        replace(record, text=text)
        for record in asked
        if (text := decode(ids.get(record.id, []), skip_special_tokens=True).strip())
    ]
    found: dict[str, dict[str, object]] = {}

    @torch.no_grad()
    def one(batch: Batch) -> None:
        # The template ends an answer even where it was cut off.
        lengths = [len(ids[key]) for key in batch.ids]
        for key, said in zip(batch.ids, slices(target.outputs(batch), lengths), strict=True):
            found[key] = {f"own_{name}": each for name, each in said.items()}

    run(target, plan(encode(target, told).records, size, rows=False), one)
    return {
        record.id: {"own": record.text, **found[record.id]} for record in told if record.id in found
    }


def slices(
    outputs: Answers, lengths: Iterable[int | None] = repeat(None)
) -> Iterator[dict[str, dict[str, Floats]]]:
    """Statistics of each record's tokens by slice; of its answer's first so many tokens."""
    answers = zip(outputs.log_probabilities, outputs.tokens, strict=True)
    for (said, tokens), prompt, length in zip(answers, outputs.prompts, lengths, strict=False):
        most = _AT_ONCE.get(said.device.type, _AT_ONCE["cuda"]) // said.shape[1] or 1
        yield {
            "description": _joined(split(said[:length], most), split(tokens[:length], most)),
            **{
                name: _joined(
                    heard.log_probabilities(most),
                    repeat(None) if heard.tokens is None else split(heard.tokens, most),
                )
                for name, heard in prompt.items()
            },
        }


def _joined(
    log_probabilities: Iterable[Tensor], tokens: Iterable[Tensor | None]
) -> dict[str, Floats]:
    parts = [statistics(*each) for each in zip(log_probabilities, tokens, strict=False)]
    together = torch.cat([torch.stack([*part.values()]) for part in parts], 1)
    return dict(zip(parts[0], together.cpu().numpy(), strict=True))


def statistics(log_probabilities: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
    """Reduce next-token log-probabilities to what the signals need, one number a token, in nats.

    Args:
        log_probabilities: (tokens, vocabulary), float32 or float64.
        tokens: (tokens,) the ids that came; None where nothing is predicted.

    Returns:
        `gap`: log p(1) − log p(2), the likeliest less the second.
        `renyi_α`: H_α = log(Σ p^α)/(1 − α), H_1 = −Σ p log p, H_∞ = −log p(1).
        `logprob`: ℓ = log p(y). `mean`: μ = Σ p log p. `variance`: Σ p log² p − μ² (Zhang et al.
        2025, arXiv:2404.02936, equation 3).
        `modified_α`: of (1 − p_y)·g(1 − p_y) + Σ_{j≠y} p_j·g(p_j), with g(u) = −log(1 − u) for
        α = 1, else (1 − (1 − u)^η)/η, η = |1 − α| (Li et al. 2024, arXiv:2411.02902).
        A probability of zero adds nothing to any sum.
    """
    p, finite = log_probabilities.exp(), log_probabilities.clamp_min(_IMPOSSIBLE)
    top, likeliest = log_probabilities.max(1, keepdim=True)
    second = log_probabilities.scatter(1, likeliest, -torch.inf).amax(1)
    mean = vecdot(p, finite)
    found = {
        "gap": top[:, 0] - second,
        "renyi_0.5": 2 * p.sqrt().sum(1).log(),
        "renyi_1": -mean,
        "renyi_2": -p.square().sum(1).log(),
        "renyi_inf": -top[:, 0],
    }
    if tokens is None:
        return found
    y = tokens[:, None]
    # 1 − p, for the likeliest token as the sum of the others: that does not cancel.
    rest = (1 - p).scatter_(1, likeliest, p.scatter(1, likeliest, 0).sum(1, keepdim=True))
    logprob, p_y, rest_y = (each.gather(1, y)[:, 0] for each in (log_probabilities, p, rest))
    # Σ p (log p − μ)² equals the difference of the two sums and does not cancel.
    variance = vecdot(p, finite.sub_(mean[:, None]).square_())
    others = p.scatter_(1, y, 0)
    squares = torch.square(others, out=finite)
    least = logprob[:, None].clamp_min(_IMPOSSIBLE)
    return found | {
        "logprob": logprob,
        "mean": mean,
        "variance": variance,
        # 1 − √(1 − u) = u / (1 + √(1 − u)) does not cancel either.
        "modified_0.5": 2
        * (rest_y.square() / (1 + p_y.sqrt()) + (squares / rest.sqrt().add_(1)).sum(1)),
        # Nothing else leaves less than p(y) over; what underflows did.
        "modified_1": -rest_y * logprob - vecdot(others, rest.log_().maximum(least)),
        "modified_2": rest_y.square() + squares.sum(1),
    }
