"""Benchmarking: the only timer, the only row type, the experiments and the jobs that measure them. Imports no torch."""
