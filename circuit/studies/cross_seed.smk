"""The rules of the cross-seed study. Each stands for all seeds; attributions depend on which heads
and paths are selected."""

FIRST = STUDY.seeds[0]
LATER = STUDY.later(FIRST)
MATCH_SHARDS = [job for job in LATER if job.kind == cross_seed.QKAttribution.stem()]
WRITE_SHARDS = [job for job in LATER if job.kind == cross_seed.WriteAttribution.stem()]
MATCH, WRITE = [job for job in LATER if job.kind == "trace_merge"]


def pattern(job, wildcard="", spans=False):
    """Where a job of the first seed writes, for any seed and selection, and any part."""
    path = job.outputs[0].replace(FIRST.name, "seed_{seed}")
    unknown = "__".join(f"{role}_{UNKNOWN}" for role in cross_seed.CONTROLS)
    for address in (unknown, f"{UNKNOWN}_to_{UNKNOWN}"):
        path = path.replace(address, "{" + wildcard + "}")
    if spans:
        folder, span, name = path.rsplit("/", 2)
        path = f"{folder}/{{span}}/{name}"
    return path


def of_seed(kind, wildcards):
    return STUDY.of_seeds[kind, f"seed_{wildcards.seed}"]


def shard_patterns(jobs, wildcard):
    """One pattern for all parts, or all of them where they run in one process."""
    if STUDY.scale.batched:
        return [pattern(job, wildcard) for job in jobs]
    return [pattern(jobs[0], wildcard, spans=True)]


def matches(wildcards):
    return SEEDS[wildcards.seed].match_jobs(wildcards.heads)


def writes(wildcards):
    return SEEDS[wildcards.seed].write_jobs(wildcards.path)


def shards(jobs, wildcards):
    """The commands of the parts that a rule stands for."""
    parts = jobs[:-1]
    if not STUDY.scale.batched:
        parts = [job for job in parts if job.folder.endswith(f"/{wildcards.span}")]
    return command_line([job.argv for job in parts])


def selections(wildcards):
    return SEEDS[wildcards.seed].selections()


def attributions(wildcards):
    """The merged reports of every seed, once its heads and paths are selected."""
    found = []
    for name, seed in SEEDS.items():
        heads = cross_seed.match_address(checkpoints.select_heads.get(seed=name).output[0])
        path = cross_seed.write_address(checkpoints.select_write_paths.get(seed=name).output[0])
        found += [seed.match_jobs(heads)[-1].outputs[0], seed.write_jobs(path)[-1].outputs[0]]
    return found


def compare(reports):
    """The command that compares the seeds; a dry run has one word for all that is not known yet."""
    return command_line([cross_seed.comparison_job([*reports]).argv])


for job in FIRST.jobs():

    rule:
        name:
            job.kind
        input:
            lambda w, kind=job.kind: of_seed(kind, w).inputs,
        output:
            pattern(job),
        log:
            f"artifacts/logs/{job.kind}__seed_{{seed}}.log",
        params:
            command=lambda w, kind=job.kind: command_line([of_seed(kind, w).argv]),
            recipe=lambda w, kind=job.kind: of_seed(kind, w).recipe,
            version=__version__,
        threads: NEEDS[job.kind]["threads"]
        resources:
            **NEEDS[job.kind]["resources"],
        shell:
            RUN


checkpoint select_heads:
    input:
        lambda w: selections(w)[0].inputs,
    output:
        FIRST.selected_heads.replace(FIRST.name, "seed_{seed}"),
    log:
        "artifacts/logs/select_heads__seed_{seed}.log",
    params:
        command=lambda w: command_line([selections(w)[0].argv]),
        version=__version__,
    resources:
        **NEEDS["select_heads"]["resources"],
    shell:
        RUN


checkpoint select_write_paths:
    input:
        lambda w: selections(w)[1].inputs,
    output:
        FIRST.selected_paths.replace(FIRST.name, "seed_{seed}"),
    log:
        "artifacts/logs/select_write_paths__seed_{seed}.log",
    params:
        command=lambda w: command_line([selections(w)[1].argv]),
        version=__version__,
    resources:
        **NEEDS["select_write_paths"]["resources"],
    shell:
        RUN


rule match_shard:
    input:
        lambda w: matches(w)[0].inputs,
    output:
        shard_patterns(MATCH_SHARDS, "heads"),
    log:
        "artifacts/logs/match_shard__seed_{seed}_{heads}"
        + ("" if STUDY.scale.batched else "_{span}")
        + ".log",
    params:
        command=lambda w: shards(matches(w), w),
        version=__version__,
    threads: NEEDS[MATCH_SHARDS[0].kind]["threads"]
    resources:
        **NEEDS[MATCH_SHARDS[0].kind]["resources"],
    shell:
        RUN


rule match_merge:
    input:
        lambda w: matches(w)[-1].inputs,
    output:
        pattern(MATCH, "heads"),
    log:
        "artifacts/logs/match_merge__seed_{seed}_{heads}.log",
    params:
        command=lambda w: command_line([matches(w)[-1].argv]),
        version=__version__,
    resources:
        **NEEDS["trace_merge"]["resources"],
    shell:
        RUN


rule write_shard:
    input:
        lambda w: writes(w)[0].inputs,
    output:
        shard_patterns(WRITE_SHARDS, "path"),
    log:
        "artifacts/logs/write_shard__seed_{seed}_{path}"
        + ("" if STUDY.scale.batched else "_{span}")
        + ".log",
    params:
        command=lambda w: shards(writes(w), w),
        version=__version__,
    threads: NEEDS[WRITE_SHARDS[0].kind]["threads"]
    resources:
        **NEEDS[WRITE_SHARDS[0].kind]["resources"],
    shell:
        RUN


rule write_merge:
    input:
        lambda w: writes(w)[-1].inputs,
    output:
        pattern(WRITE, "path"),
    log:
        "artifacts/logs/write_merge__seed_{seed}_{path}.log",
    params:
        command=lambda w: command_line([writes(w)[-1].argv]),
        version=__version__,
    resources:
        **NEEDS["trace_merge"]["resources"],
    shell:
        RUN


rule compare_seeds:
    input:
        [path for seed in STUDY.seeds for path in (seed.selected_heads, seed.selected_paths)],
        attributions,
    output:
        STUDY.comparison.outputs,
    log:
        "artifacts/logs/compare_seeds.log",
    params:
        command=lambda w, input: compare(dict.fromkeys(input)),
        version=__version__,
    resources:
        **NEEDS["compare_seeds"]["resources"],
    shell:
        RUN
