"""The `fastvit` command, a file for each of its commands that is more than a call."""

from fastvit.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
