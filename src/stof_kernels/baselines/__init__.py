"""Baselines: every competitor, one module each, behind one registry. Importing this package imports no torch."""

from .registry import (
    MethodSpec,
    Prepared,
    Problem,
    Tensors,
    Unsupported,
    absent_method,
    all_methods,
    get,
    method,
    methods_for,
)

__all__ = [
    "MethodSpec",
    "Prepared",
    "Problem",
    "Tensors",
    "Unsupported",
    "absent_method",
    "all_methods",
    "get",
    "method",
    "methods_for",
]
