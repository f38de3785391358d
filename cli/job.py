"""`python -m circuit.cli.job A ... + B ...`: see `circuit.cli.jobs`."""

from . import main

if __name__ == "__main__":
    main("jobs")
