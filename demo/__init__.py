"""Agents on real engines behind the real gateway, the plugin on and off: ``make demo``."""
