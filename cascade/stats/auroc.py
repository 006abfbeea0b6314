"""The area under the ROC: how well a confidence separates agreeing tokens from others."""

from __future__ import annotations

import numpy as np

from cascade.core.arrays import Array


def auroc(confidence: Array, agrees: Array) -> float | None:
    """Return the area under the ROC of a confidence.

    The probability that a token on which the exit head agrees with the full model has a larger
    confidence than one on which it does not, ties counting half (Mann and Whitney 1947).

    Args:
        confidence: Any shape.
        agrees: The same shape.

    Returns:
        In [0, 1], 0.5 being chance; None where all tokens are of one kind.

    Example:
        >>> auroc(np.array([0.1, 0.4, 0.8]), np.array([False, True, True]))
        1.0
    """
    from scipy.stats import mannwhitneyu

    # In double precision: in fp32 the ranks' sum has too few digits for thousands of tokens.
    yes, no = (confidence[kind].ravel().astype(np.float64) for kind in (agrees, ~agrees))
    if not yes.size or not no.size:
        return None
    statistic = mannwhitneyu(yes, no, method="asymptotic").statistic
    return float(statistic / (yes.size * no.size))
