"""`fastvit benchmark`: time fastvit and its alternatives."""

from fastvit.benchmarks.command import main

__all__ = ["main"]
