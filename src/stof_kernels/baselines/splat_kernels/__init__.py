"""SPLAT's parts: the ACSR format, the tiles that cover it, and its three kernels. Importing this package imports no torch.

`acsr` is the format and its generators (NumPy), `build` reads it off any mask (torch), `tiling` places tiles (NumPy), `kernels`
holds R-SDDMM, R-softmax and R-SpMM (Triton), `attention` plans, tunes and launches them.

SPLAT: OOPSLA 2025, arXiv 2407.16847. Comments mark what follows the author's public code [C], the paper's abstract
[P] or our own inference [I].
"""
