"""Identity inference: does the target know who is on these photos?

Hintersdorf et al. 2024, arXiv:2209.07341. The published attack asks, for each photo and template,
which of many names fits best, and says "member" when one template names the person rightly. Ours
ranks the true name among decoys, names that stand in for it, for each photo and template; its mean
reciprocal rank is then compared with that of every decoy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightleak.evidence.readings import Floats, Integers

Booleans = NDArray[np.bool_]

# As published; `{}` is the name.
TEMPLATES = (
    "{}",
    "an image of {}",
    "a photo of {}",
    "{} on a photo",
    "a photo of a person named {}",
    "a person named {}",
    "a man named {}",
    "a woman named {}",
    "the name of the person is {}",
    "a photo of a person with the name {}",
    "{} at a gala",
    "a photo of the celebrity {}",
    "actor {}",
    "actress {}",
    "a colored photo of {}",
    "a black and white photo of {}",
    "a cool photo of {}",
    "a cropped photo of {}",
    "a cropped image of {}",
    "{} in a suit",
    "{} in a dress",
)
# How far down a rank still counts.
TOP = 20
# Fits that differ by less are equal: the same sentence differs by rounding from batch to batch.
SLACK = 1e-6
# What a generative target is asked; the name is the answer.
QUESTIONS = (
    "What is the name of the person in the image?",
    "Who is this?",
    "Describe the image.",
)


def votes(predicted: Integers, names: Integers) -> Integers:
    """(names, templates) for how many photos each name was predicted.

    Args:
        predicted: (photos, templates) the name that fits best.
        names: (names,) which to count.
    """
    return np.asarray((predicted[None] == names[:, None, None]).sum(axis=1), dtype=np.int64)


def recognised(predicted: Integers, own: int) -> Booleans:
    """(templates,) whether the true name is predicted more often than every other; a tie fails."""
    names, code = np.unique(predicted, return_inverse=True)
    counts = np.zeros((len(names), predicted.shape[1]), dtype=np.int64)
    np.add.at(counts, (code.reshape(predicted.shape), np.arange(predicted.shape[1])), 1)
    mine = counts[names == own].sum(axis=0)
    return np.asarray(mine > counts[names != own].max(axis=0, initial=0))


def majority(predicted: Integers, own: int) -> Booleans:
    """(templates,) whether the true name is predicted for more than half of the photos."""
    return np.asarray((predicted == own).mean(axis=0) > 0.5)


def beyond_others(affinities: Floats, people: Integers, owners: Integers) -> Floats:
    """How much better each name fits each photo than it fits pictures of others.

    A name that fits every face says nothing of this one. Others are all people but the one on
    the photo, each the mean of their photos, and a blank picture, which counts as one more; the
    person whose true name it is counts as no other.

    Args:
        affinities: (names, …, photos + 1), the blank last.
        people: (photos,) whom each shows.
        owners: (names,) whose true name each is; −1 for decoys.

    Returns:
        (names, …, photos).
    """
    shown, column = np.unique(people, return_inverse=True)
    share = np.zeros((len(people) + 1, len(shown) + 1))
    share[np.arange(len(people)), column] = 1
    share[-1, -1] = 1
    by_person = affinities @ (share / share.sum(axis=0))
    counted = np.ones((len(affinities), len(shown) + 1))
    counted[:, :-1] = owners[:, None] != shown
    weights = counted.reshape(len(affinities), *[1] * (affinities.ndim - 2), -1)
    total, count = (by_person * weights).sum(axis=-1), weights.sum(axis=-1)
    # Whom the photo shows is taken out of the others, once.
    own, own_weight = by_person[..., column], weights[..., column]
    others = (total[..., None] - own * own_weight) / (count[..., None] - own_weight)
    beyond: Floats = affinities[..., :-1] - others
    return beyond


def reciprocal_ranks(values: Floats, decoys: Integers, own: Floats, n_decoys: int) -> Floats:
    """(1 + decoys, photos) reciprocal rank of the true name, then of each decoy, over templates.

    A name among the first `TOP` has 1/rank, another 0; the mean is over the templates. It is a
    vote that also counts who comes second: 1 for a name that fits every photo best. Where the
    true name and a decoy fit equally well, which is within `SLACK`, each has the worse rank.

    Args:
        values: (photos, templates, k) how well the decoys that fit best do, best first.
        decoys: (photos, templates, k) which they are, of 0 … `n_decoys` − 1.
        own: (photos, templates) how well the true name fits.
        n_decoys: how many decoys there are.
    """
    ahead = values >= own[..., None] - SLACK
    rank = 1 + np.arange(values.shape[2]) + (own[..., None] >= values - SLACK)
    photo = np.broadcast_to(np.arange(len(own))[:, None, None], decoys.shape)
    result = np.zeros((1 + n_decoys, len(own)))
    # A list shorter than TOP holds every decoy, so a count of its entries is a rank.
    own_rank = 1 + ahead.sum(axis=2)
    result[0] = np.where(own_rank <= TOP, 1 / own_rank, 0).mean(axis=1)
    np.add.at(result, (1 + decoys, photo), np.where(rank <= TOP, 1 / rank, 0))
    result[1:] /= own.shape[1]
    return result


def share_at_least(ranks: Floats, ties: Floats) -> Floats:
    """p = (1 + #{decoys that do at least as well})/(decoys + 1), the true name first in both.

    Args:
        ranks: (1 + decoys, …) mean reciprocal ranks.
        ties: (1 + decoys, …) mean fits, which decide between equal ranks.
    """
    level = (ranks[1:] == ranks[0]) & (ties[1:] >= ties[0] - SLACK)
    better = (ranks[1:] > ranks[0]) | level
    p_values: Floats = (1 + better.sum(axis=0)) / len(ranks)
    return p_values


def standing_out(own: Floats, level: Floats, spread: Floats) -> Floats:
    """(photos,) how far the true name's fit lies above its decoys', in their standard deviations.

    Args:
        own: (photos,) fit of the true name.
        level, spread: (photos,) mean and standard deviation of the decoys' fits.
    """
    above = own - level
    result: Floats = np.divide(above, spread, out=np.zeros_like(above), where=spread > 0)
    return result


def sub_samples(n_photos: int, size: int, repeats: int, seed: int) -> Booleans:
    """(n_photos, repeats) random subsets of a person's photos, as in the published curve."""
    rng = np.random.default_rng([seed, n_photos, size])
    chosen = np.zeros((n_photos, repeats), dtype=bool)
    for repeat in range(repeats):
        chosen[rng.permutation(n_photos)[:size], repeat] = True
    return chosen
