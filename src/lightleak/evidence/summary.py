"""One model's evidence in a few numbers a record: what is compared across models."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from lightleak.evidence.readings import Floats, Ragged
from lightleak.evidence.table import contrast_loss, gradient_norms, token_statistics

# What an adapter writes around the name of a matrix, and the number of its layer.
_AROUND = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)|\.default(?=\.)|(?<=\.)\d+\.")


def losses(table: pa.Table) -> Floats:
    """(n,) mean log-likelihood of each record, in nats; of pairs, minus the contrastive loss."""
    if "logprob" in table.column_names:
        return token_statistics(table).logprob.mean()
    return -contrast_loss(table).losses.astype(np.float64)


def summary(table: pa.Table, matrices: Sequence[str]) -> dict[str, Floats]:
    """Readings (n,) by name, of one model; higher is what one expects of a trained record.

    `loss`; of generative targets also the mean of the lowest fifth of the log-likelihoods ℓ_t, of
    z_t = (ℓ_t − μ_t)/σ_t likewise and in all, the mean of μ_t, and minus how much ℓ_t and z_t vary
    over the answer; and −log ‖gradient‖ by kind of matrix, over all layers.

    Args:
        table: evidence of the model, n rows.
        matrices: where its gradient was read.
    """
    readings = {"loss": losses(table)}
    if "logprob" in table.column_names:
        tokens = token_statistics(table)
        standardised = tokens.standardised()
        readings |= {
            "lowest": tokens.logprob.mean_of_lowest(0.2),
            "steadiness": -_spread(tokens.logprob),
            "standardised": standardised.mean(),
            "lowest standardised": standardised.mean_of_lowest(0.2),
            "steadiness standardised": -_spread(standardised),
            "expected": tokens.mean.mean(),
        }
    kinds = np.array([_AROUND.sub("", name) for name in matrices])
    squares = gradient_norms(table, matrices).norms.astype(np.float64) ** 2
    with np.errstate(divide="ignore"):
        for kind in dict.fromkeys(kinds.tolist()):
            readings[f"gradient {kind}"] = -0.5 * np.log(squares[:, kinds == kind].sum(axis=1))
    return readings


def _spread(values: Ragged) -> Floats:
    """(n,) standard deviation within each record."""
    squares = values.map(np.square).mean() - values.mean() ** 2
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))
