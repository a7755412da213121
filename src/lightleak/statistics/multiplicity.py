"""Many tests at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightleak.statistics.arrays import Floats, score_array


def holm(p_values: npt.ArrayLike) -> Floats:
    """Holm-adjusted p-values, in the order given; shape (m,).

    Source: Holm (1979), Scand. J. Stat. 6:65.

    Raises:
        ValueError: no p-values, or NaN.
    """
    values = score_array(p_values, "p_values")
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    adjusted = np.empty(values.size)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
