from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/build.smk"
include: "rules/benchmark.smk"
include: "rules/aggregate.smk"
include: "rules/plot.smk"
include: "rules/collect.smk"


rule all:
    default_target: True
    input:
        rules.aggregate.input,
        rules.figures.input,
