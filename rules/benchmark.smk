# One measuring job per GPU, experiment and method: a crash costs one file, and a new method measures only itself.


rule bench:
    input:
        extension=extension_of,
        shared=shared_run,
    output:
        csv="results/measured/{gpu}/{experiment}/{method}.csv",
        provenance="results/measured/{gpu}/{experiment}/{method}.provenance.json",
    log:
        "results/logs/bench/{gpu}/{experiment}/{method}.log",
    wildcard_constraints:
        gpu=any_of(MEASURED),
        experiment=any_of(config["experiments"]),
        method=any_of({spec.id for spec in all_methods("")}),
    conda:
        "../envs/stof.yaml"
    # All cores and the GPU: nothing else runs beside a measurement. On a CPU it uses the whole machine whatever --cores says,
    # because the machine is what is measured, not how the workflow was started.
    threads: ALL_CORES
    resources:
        gpu=lambda wildcards: int(MEASURED[wildcards.gpu].device == "cuda"),
        gpu_model=gpu_model,
    params:
        # Not an output, so that it survives a kill and the job resumes.
        journal="results/journal/{gpu}/{experiment}/{method}.jsonl",
        device=lambda wildcards: MEASURED[wildcards.gpu].device,
        settings=lambda wildcards: checks.job_settings(
            config,
            wildcards.experiment,
            MEASURED[wildcards.gpu].device,
            wildcards.method,
        ),
        code=lambda wildcards: digest_of(
            "bench.py",
            EXPERIMENTS[wildcards.experiment].depends_of(
                spec_of(wildcards), MEASURED[wildcards.gpu].device
            ),
        ),
    script:
        "../workflow/scripts/bench.py"
