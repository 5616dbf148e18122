"""Servers of the shapes that have no place for the one line. They know nothing of the plugin.

Each is a program of one file, as its author left it.
"""
