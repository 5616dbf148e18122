"""Faults while sessions are in flight. Three promises hold: no turn fails that would not fail
without the plugin, every key is right, and nothing is left over.

For the first, each test plays the fault with the plugin and without it. Where the gateway routes
at random without a key, every failure must be the gateway's own.
"""
