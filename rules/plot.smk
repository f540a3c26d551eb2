# One rule per figure, plot_fig9_10 for example, because each has a caption of its own.


for figure in FIGURES.values():

    rule:
        name:
            f"plot_{figure.id}"
        input:
            tables=[
                f"results/tables/{experiment}.csv" for experiment in figure.experiments
            ],
            sources=[
                path
                for experiment in figure.experiments
                for path in sources_of(experiment)
            ],
        output:
            pdf=report(
                f"results/{figure.id}.pdf",
                caption=f"../workflow/report/{figure.caption}",
                category="Tables" if figure.id.startswith("table") else "Figures",
                labels={"id": figure.id, "title": figure.title},
            ),
            table=f"results/{figure.id}.csv",
        log:
            f"results/logs/plot/{figure.id}.log",
        localrule: True
        conda:
            "../envs/stof.yaml"
        params:
            figure=figure.id,
            experiments=figure.experiments,
            targets=[
                (target.name, target.label, target.source)
                for target in TARGETS.values()
                if figure.experiments
            ],
            code=digest_of(
                "plot.py",
                ["figures", "masks", "baselines", "benchmarking/measurement.py"],
            ),
        script:
            "../workflow/scripts/plot.py"
