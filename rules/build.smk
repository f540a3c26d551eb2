# The compiled extension, once per architecture that is measured.


rule build_extension:
    output:
        "results/build/{arch}-{digest}.json",
    log:
        "results/logs/build/{arch}-{digest}.log",
    wildcard_constraints:
        arch=any_of(
            target.arch for target in MEASURED.values() if target.arch in BUILDABLE
        ),
        digest="[0-9a-f]+",
    conda:
        "../envs/stof.yaml"
    threads: ALL_CORES
    params:
        code=digest_of("build_extension.py", ["kernels/build.py"]),
    script:
        "../workflow/scripts/build_extension.py"
