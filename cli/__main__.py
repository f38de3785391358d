"""`python -m circuit.cli`."""

from . import main

main()
