"""Terminal tables, figures and pages, all drawn from saved records.

This package measures nothing. It formats numbers, scales them to pixels and rebins them.
"""
