"""Servers without the plugin, whose structure leaves no place to add the one line.

Each is an unchanged program in one file.
"""
