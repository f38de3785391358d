"""`python -m circuit.cli`."""

from .app import main

main()
