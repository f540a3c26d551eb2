"""Fusion: the operators around attention, from a captured model to a tuned one."""
