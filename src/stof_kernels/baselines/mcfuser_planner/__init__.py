"""MCFuser (SC 2024), rebuilt from its published description: the planner, the code generator and the tuner.

    chain -> expressions -> program (the DAG) -> pruning -> model -> search -> codegen -> kernels -> tuning

Marks in the docstrings say where a rule comes from: [paper] a published description of the method, [inferred] our reading
where none is published, [ours] an addition that the method does not have. No code of the original was used. Importing the
package imports no torch; `kernels`, `tuning` and `operators` do.
"""
