"""The `fastvit` command, a file for each of its commands that is more than a call."""

from fastvit.cli.commands import main

__all__ = ["main"]
