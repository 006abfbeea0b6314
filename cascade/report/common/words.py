"""Text helpers for reports: lists, counts, ranges and whole percentages."""

from __future__ import annotations

from collections.abc import Sequence


def listed(names: Sequence[str], none: str = "") -> str:
    """Return names as an enumeration in a sentence.

    Args:
        names: The names.
        none: The text for an empty list.

    Example:
        >>> listed(["A", "B", "C"])
        'A, B and C'
    """
    if len(names) < 2:
        return "".join(names) or none
    return f"{', '.join(names[:-1])} and {names[-1]}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    Args:
        number: The number.
        noun: The noun in the singular; its plural ends with an s.

    Example:
        >>> counted(1, "layer"), counted(1024, "token")
        ('1 layer', '1,024 tokens')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def whole_percent(share: float | None) -> str:
    """Return a share in whole percent; a dash for None.

    Example:
        >>> whole_percent(-0.001)
        '0 %'
    """
    return "-" if share is None else f"{whole(share)} %"


def whole(share: float) -> str:
    """Return a share in whole percent without its sign, for ranges: `49 to 54`.

    Example:
        >>> whole(0.494)
        '49'
    """
    return f"{round(100 * share)}"  # an integer: 0, never -0


def number_ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs written as ranges.

    Example:
        >>> number_ranges([3, 4, 5, 8])
        '3-5, 8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
