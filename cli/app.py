"""The whole program as one Typer app, for what walks through it or runs several commands."""

from __future__ import annotations

from .program import program

app = program()
