"""What the plugin costs and what pinning gains, measured: ``make bench``."""

MISSING = "{}: pip install -e . --group bench"
"""What to say of a package that is not there."""
