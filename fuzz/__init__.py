"""Inputs that a fuzzer makes up, against the laws of the key, the matcher and the config."""
