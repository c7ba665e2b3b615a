"""The `fastvit` command. Each of its commands is a module of this package with a function `main(argv)`."""

from fastvit.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
