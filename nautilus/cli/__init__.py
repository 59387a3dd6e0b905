"""The command line, the top rung: it may use everything, and nothing uses it."""

from nautilus.cli.command import main

__all__ = ["main"]
