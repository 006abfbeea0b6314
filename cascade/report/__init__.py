"""Terminal tables, figures and pages, all drawn from saved records.

Nothing is measured here: numbers are formatted, scaled to pixels, or rebinned for display.
"""
