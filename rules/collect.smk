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
        sorted(
            {
                f"results/tables/{e}.csv"
                for figure in FIGURES.values()
                for e in figure.experiments
            }
        ),


rule figures:
    input:
        expand("results/{figure}.{kind}", figure=FIGURES, kind=["pdf", "csv"]),
