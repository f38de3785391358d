"""States, flat vectors, updates and their terms, path rules: what everything else is written over.

It knows torch, `circuit.errors` and `circuit.lazy`; no config, no task, no model, no file.
"""
