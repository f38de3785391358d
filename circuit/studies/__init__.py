"""The whole study as one Snakemake workflow; `circuit reproduce` starts it.

    scales.py            full, short, smoke: how many steps stand for 250 of the contract's
    jobs.py              one command of this program, what it reads and what it makes
    reference.py, ablation.py, cross_seed.py     the study's commands, from their reports' options
    study.py             all of them, by target; batches; the paths that the contract expects
    Snakefile            turns them into rules: Snakemake orders, runs, resumes and distributes
    workflow.py          Snakemake from outside: command line, dry run, events
    reproduce.py         the study's plan
    parts.py, parts.smk  any report whose trainings are a queue, as jobs of such a workflow
    claims.json          what the study claims; claims.py judges it

What selects and compares between commands are reports: `head_selection`, `write_path_selection`,
`optimizer_comparison` and `cross_seed_comparison`.
"""
