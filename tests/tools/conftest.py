"""Loops and trackers of others as they are: collected in the environment of `make test-tools`."""

from __future__ import annotations

from importlib.util import find_spec

TOOLS = ("lightning", "tensorboard", "trackio")
collect_ignore_glob = [] if all(map(find_spec, TOOLS)) else ["test_*.py"]
