"""`python -m circuit.cli`."""

from .program import main

main()
