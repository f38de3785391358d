"""What TransformerLens 4 alone can run: collected in the environment of `make test-lens4`."""

from __future__ import annotations

from circuit.model.kinds import installed_kind

collect_ignore_glob = ["test_*.py"] if installed_kind() == "hooked_transformer" else []
