"""Results that show themselves: as a data frame, as a plot, and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cascade.core.printable import printable
from cascade.core.provenance import Provenance
from cascade.core.schema import known

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from cascade.core.arrays import Array

#: The module that shows results. It is found by name, on first use: imports point downwards, and
#: reports lie above every result.
_SHOWN_BY = "cascade.report.displays"


class Displayed:
    """A result with `to_dataframe()`, `plot()`, a report in notebooks and a readable `repr`."""

    __slots__ = ()

    def to_dataframe(self, table: str | None = None) -> DataFrame:
        """Return a table of the result, one row per layer, operating point or the like.

        Intervals become two columns, `low` and `high`. Needs pandas, which is not installed with
        this package.

        Args:
            table: Which table. Default: the main one; an unknown name raises an error that lists
                the names.

        Raises:
            UsageError: There is no such table, or pandas is not installed.
        """
        shown: DataFrame = import_module(_SHOWN_BY).dataframe_of(*self._to_show(), table)
        return shown

    def plot(self, figure: str | None = None) -> Axes | Array:
        """Draw a figure of the result with pyplot, which a notebook shows below the cell.

        Args:
            figure: Which figure. Default: the main one; an unknown name raises an error that lists
                the names.

        Returns:
            The axes, or an array of axes for a figure with several panels.

        Raises:
            UsageError: There is no such figure, or nothing to draw in it.
        """
        drawn: Axes | Array = import_module(_SHOWN_BY).axes_of(*self._to_show(), figure)
        return drawn

    def _repr_html_(self) -> str:
        """Return the report with its tables and figures, for a notebook."""
        html: str = import_module(_SHOWN_BY).html_of(*self._to_show())
        return html

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(self._in_one_line())}>"

    def _to_show(self) -> tuple[Any, Mapping[str, Array]]:
        """Return the record to show, and the arrays next to it, if there are any."""
        return self, {}

    def _in_one_line(self) -> str:
        """Return the origin and the outcome of the result in one line."""
        raise NotImplementedError


def origin_of(provenance: Provenance) -> str:
    """Return model, corpus and number of tokens, for one line.

    Args:
        provenance: The provenance of the record.
    """
    model, corpus = provenance.model, provenance.corpus
    name = known(model.name) or known(model.family) or "a model"
    return f"{name} on {corpus.name}, {corpus.tokens:,} tokens"
