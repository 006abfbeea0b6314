"""Building blocks of reports."""
