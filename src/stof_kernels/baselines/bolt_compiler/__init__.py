"""Bolt's parts: templates and rules (which need no torch), the profiler, the patterns of a graph, the operators."""
