# Stages by name: snakemake build, bench_mha, aggregate, figures.


localrules:
    build,
    aggregate,
    figures,
    all,


rule build:
    input:
        manifests(),


for experiment in config["experiments"]:

    rule:
        name:
            f"bench_{experiment}"
        input:
            measured_tables(experiment),
        localrule: True


rule aggregate:
    input:
        expand("results/tables/{experiment}.csv", experiment=tabled()),
        "results/floors.csv",


rule figures:
    input:
        expand("results/{figure}.{kind}", figure=FIGURES, kind=["pdf", "csv"]),
