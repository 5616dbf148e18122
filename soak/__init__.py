"""Play many sessions through a session server while everything around it fails: ``make soak``."""
