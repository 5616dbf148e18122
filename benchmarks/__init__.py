"""Measure what the plugin costs and what pinning gains: ``make bench``."""

MISSING = "{}: pip install -e . --group bench"
"""The message for a package that is not installed."""
