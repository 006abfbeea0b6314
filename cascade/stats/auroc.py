"""Area under the ROC curve: how well a confidence separates agreeing tokens from others."""

from __future__ import annotations

import numpy as np

from cascade.core.arrays import Array


def auroc(confidence: Array, agrees: Array) -> float | None:
    """Return the area under the ROC curve of a confidence.

    It is the probability that a token on which the exit head agrees with the full model has a
    larger confidence than a token on which it does not. Ties count half (Mann and Whitney 1947).

    Args:
        confidence: Any shape.
        agrees: Whether head and full model agree, same shape.

    Returns:
        The area, in [0, 1] (chance: 0.5); None where all tokens agree or none does.

    Example:
        >>> auroc(np.array([0.1, 0.4, 0.8]), np.array([False, True, True]))
        1.0
    """
    from scipy.stats import mannwhitneyu

    # Double precision: in fp32 the sum of ranks loses digits with thousands of tokens.
    yes, no = (confidence[kind].ravel().astype(np.float64) for kind in (agrees, ~agrees))
    if not yes.size or not no.size:
        return None
    statistic = mannwhitneyu(yes, no, method="asymptotic").statistic
    return float(statistic / (yes.size * no.size))
