"""The tiny trained run of the reports' tests, its trace, and the command line."""

from tiny_run import circuit, traced, traced_once, trained, trained_once

__all__ = ["circuit", "traced", "traced_once", "trained", "trained_once"]
