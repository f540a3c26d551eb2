"""Bolt (MLSys 2022): CUTLASS templates for a whole graph. Whole models are in ``models/bolt.py``."""

from __future__ import annotations

from .registry import absent_method

absent_method(
    "bolt",
    label="Bolt (reimpl.)",
    experiments=("mha",),
    reason="Bolt compiles whole models and has no attention of its own: its rows are those of end to end and of tuning cost",
    rank=63,
)
