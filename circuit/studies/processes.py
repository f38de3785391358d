"""Processes that end with the one that started them.

`python -m circuit.studies.processes ...` is `snakemake ...` that does.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from contextlib import suppress
from typing import Any

from circuit.environment import end_with_parent


def charge_lone_jobs() -> None:
    """Make Snakemake keep to its cores.

    In 9.15.0 a job that is the only one ready takes no cores but gives them back when it ends, so
    that `--cores 1` soon runs three jobs (`JobScheduler.job_selector` returns before
    `update_available_resources`). Where the selection has charged nothing, it is charged here;
    versions that do it themselves are left as they are.
    """
    with suppress(ImportError, AttributeError):
        scheduler = importlib.import_module("snakemake.scheduling.job_scheduler").JobScheduler
        select, charge = scheduler.job_selector, scheduler.update_available_resources

        def job_selector(self: Any, jobs: Any) -> Any:
            free = self.resources["_cores"]
            selected = select(self, jobs)
            if selected and self.resources["_cores"] == free:
                charge(self, selected)
            return selected

        scheduler.job_selector = job_selector


if __name__ == "__main__":
    end_with_parent()
    charge_lone_jobs()
    sys.argv[0] = "snakemake"
    runpy.run_module("snakemake", run_name="__main__", alter_sys=True)
