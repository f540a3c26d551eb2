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


# What the card needs at least for each attention cell, beside our time and the best exact other's.
rule tabulate_floors:
    input:
        tables=expand("results/tables/{experiment}.csv", experiment=FLOORS),
    output:
        report(
            "results/floors.csv",
            caption="../workflow/report/floors.rst",
            category="Tables",
            labels={"id": "floors", "title": "Floors of the attention cells"},
        ),
    log:
        "results/logs/aggregate/floors.log",
    localrule: True
    conda:
        "../envs/stof.yaml"
    params:
        rates={
            name: {
                key: config["gpus"].get(name, {}).get(key)
                for key in ("copy_tb_s", "matmul_tflops", "launch_us")
            }
            for name in TARGETS
        },
        code=digest_of(
            "tabulate_floors.py",
            ["figures/floors.py", "figures/cells.py", "benchmarking/measurement.py"],
        ),
    script:
        "../workflow/scripts/tabulate_floors.py"
