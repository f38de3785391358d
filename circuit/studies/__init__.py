"""The whole study as one Snakemake workflow; `circuit reproduce` starts it.

    scales.py            full, short, smoke: how many steps stand for 250 of the contract's
    jobs.py              one command of this program, what it reads and what it makes
    reference.py, ablation.py, cross_seed.py     the study's commands, as the contract types them
    study.py             all of them, by target; batches; the paths that the contract expects
    Snakefile            turns them into rules: Snakemake orders, runs, resumes and distributes
    reproduce.py         the plan, the run, the summary; claims.py: what holds in it

Selections between commands (which head, which write path) are `selection.py` and `write_scan.py`;
the two comparison pages are `compare_ablation.py` and `compare_seeds.py`.
"""
