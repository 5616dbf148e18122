"""Mutation sampling: how many small faults in the package its tests catch."""
