# One table per experiment over all configured GPUs: measured or recorded rows for each, never both.


rule aggregate_experiment:
    input:
        tables=lambda wildcards: tables_of(wildcards.experiment),
    output:
        "results/tables/{experiment}.csv",
    log:
        "results/logs/aggregate/{experiment}.log",
    wildcard_constraints:
        experiment=any_of(EXPERIMENTS),
    localrule: True
    conda:
        "../envs/stof.yaml"
    params:
        code=digest_of("aggregate_experiment.py", ["benchmarking/measurement.py"]),
    script:
        "../workflow/scripts/aggregate_experiment.py"
