"""Folds: disjoint parts, so that whatever is fitted never scores what it was fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightleak.errors import UserError


def assign_folds(
    is_member: NDArray[np.bool_],
    groups: Sequence[str | None],
    n_folds: int,
    seed: int,
) -> NDArray[np.int64]:
    """Divide records into folds of balanced size with both sides in each.

    Every group lies in one fold; a record without a group stands alone. Groups are placed one
    by one, each into the fold that holds the fewest records of the group's side (of both,
    weighted by their shares, when it has both): first groups with both sides, so that no fold
    is left without one, then the others; of each kind the largest first and equal ones in
    random order. Without groups a side's counts differ by at most one between folds. The sides
    are treated alike: exchanging members and non-members leaves the folds as they are.

    Args:
        is_member: for each record whether it is on the member (suspect) side; shape (n,).
        groups: for each record its group or None; length n.
        n_folds: at least 2.
        seed: decides the random order; the same seed gives the same folds.

    Returns:
        For each record its fold, 0 … n_folds − 1; shape (n,).

    Raises:
        UserError: fewer than two folds, or a side has too few groups to be in every fold.
    """
    if n_folds < 2:
        raise UserError(f"{n_folds} folds are too few", what_to_do="Use at least 2.")
    unit_of_record = _units(groups)
    sizes = np.zeros((unit_of_record.max(initial=-1) + 1, 2))  # unit × side
    np.add.at(sizes, (unit_of_record, np.asarray(is_member, dtype=np.int64)), 1)
    for side, name in ((1, "member (suspect)"), (0, "non-member (control)")):
        n_units = np.count_nonzero(sizes[:, side])
        if n_units < n_folds:
            raise UserError(
                f"the {name} side has {n_units} groups for {n_folds} folds",
                what_to_do="Use fewer folds or more groups.",
            )
    return _place_units(sizes, n_folds, seed)[unit_of_record]


def _units(groups: Sequence[str | None]) -> NDArray[np.int64]:
    """Number what must stay together, by first appearance; shape (n,)."""
    numbers: dict[object, int] = {}
    keys = (index if group is None else group for index, group in enumerate(groups))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _place_units(sizes: NDArray[np.float64], n_folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each unit, from its records on either side (units × 2)."""
    random = np.random.default_rng(seed)
    one_sided = (sizes == 0).any(axis=1)
    order = np.lexsort((random.random(len(sizes)), -sizes.sum(axis=1), one_sided))
    weights = sizes / sizes.sum(axis=0) ** 2
    counts = np.zeros((n_folds, 2))
    folds = np.empty(len(sizes), dtype=np.int64)
    for unit in order:
        # The growth of Σ over folds and sides of (share of the side in the fold)², but for a
        # constant; then the smaller fold.
        growth = counts[:, 0] * weights[unit, 0] + counts[:, 1] * weights[unit, 1]
        fold = np.lexsort((counts.sum(axis=1), growth))[0]
        counts[fold] += sizes[unit]
        folds[unit] = fold
    return folds
