"""Mutation sampling: how many of the small faults in the package its tests notice."""
