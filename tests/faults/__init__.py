"""Faults with sessions in flight, each with three questions: did a turn fail that would not have
failed without the plugin, did a key go wrong, is anything left over?

The first is asked by playing the same fault with the plugin and without. Where the gateway routes
at random without a key, every failure must be the gateway's own.
"""
