"""What the plugin costs and what pinning gains, measured: ``make bench``."""
