"""The tiny trained run of the reports' tests, and its trace."""

from tiny_run import traced, traced_once, trained, trained_once

__all__ = ["traced", "traced_once", "trained", "trained_once"]
