"""The compiled kernels: their build (no torch needed) and, in :mod:`.raw`, the registered operators."""

from __future__ import annotations

from .build import TARGETS, BuildError, build, digest, manifest

__all__ = ["TARGETS", "BuildError", "build", "digest", "manifest"]
