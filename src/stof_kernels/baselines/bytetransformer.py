"""ByteTransformer (IPDPS 2023, arXiv 2210.03052): dense attention of BERT's encoder layer, fused to 1024 tokens.

Rebuilt in CUDA C++ (csrc/bytetransformer) from its published design: WMMA kernels with scores in shared memory for short
sequences, two grouped GEMMs with the softmax split between epilogue and prologue for long ones, cuBLAS and a softmax kernel
for the rest; fp16 sums throughout. Every score is computed, and a mask of ones and zeros, one per sequence, lowers the
removed ones by 10000. Lifted, and nothing else: the dispatch is the A100's on every GPU, and the persistent grid takes the
device's number of multiprocessors instead of 108. Padding removal is off, as it must be with any mask of two dimensions.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import native
from .registry import Prepared, Problem, Tensors, Unsupported, method

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Tokens of the long path, in steps of 8. Slabs end at 352: the unfused path fills the gap.
LONG_FIRST, LONG_LAST = 385, 1024
_MAX_HEADS = 32  # a warp a head in the unfused softmax
_MAX_PAIRS = 1024  # a thread a pair of heads * head_dim in the split
_MAX_SOFTMAX_BYTES = 64 * 1024  # of shared memory, above 1024 keys


@dataclass(frozen=True)
class Launch:
    """Which path runs attention; of a short kernel also the query rows, threads and bytes of shared memory of a block."""

    path: str
    slab: int = 0
    threads: int = 0
    shared_bytes: int = 0

    def __str__(self) -> str:
        if not self.slab:
            return {"long": "long path, grouped GEMMs", "unfused": "unfused path, cuBLAS"}[self.path]
        return (
            f"{self.path}: {self.slab} query rows, {self.threads} threads, {self.shared_bytes} bytes of shared memory"
        )


def launch_of(seq_len: int, heads: int, head_dim: int, dtype: str = "float16") -> Launch:
    """ByteTransformer's dispatch by length, with the gates of its GPUs lifted. `Unsupported` where no path takes the problem.

    A block of the short kernels holds ``slab`` queries, then keys or values, with rows padded by 8 halves, and the scores.
    """
    if dtype not in ("float16", "float32"):
        raise Unsupported(f"ByteTransformer runs float16, and float32 without fusion, not {dtype}")
    rows = -(-seq_len // 16) * 16
    half = dtype == "float16"
    if half and ((head_dim == 64 and seq_len <= 80) or (head_dim == 16 and seq_len <= 48)):
        return _short("short kernel A", rows, rows, head_dim)
    if half and head_dim == 64 and seq_len <= 352:
        slab = 64 if rows in (112, 128) else 48 if rows <= 160 else 32 if rows <= 256 else 16
        return _short("short kernel B", rows, slab, head_dim)
    if head_dim % 2 or heads * head_dim > 2 * _MAX_PAIRS:
        raise Unsupported(
            f"heads * head_dim is {heads} * {head_dim}, its split runs a thread per pair, at most {_MAX_PAIRS}"
        )
    if half and head_dim == 64 and LONG_FIRST <= seq_len <= LONG_LAST and seq_len % 8 == 0:
        return Launch("long")
    if heads > _MAX_HEADS:
        raise Unsupported(f"{heads} heads, its unfused softmax runs a warp per head, at most {_MAX_HEADS}")
    if seq_len > LONG_LAST and 4 * heads * seq_len > _MAX_SOFTMAX_BYTES:
        raise Unsupported(
            f"{seq_len} tokens: the fused paths end at {LONG_LAST}, and the unfused softmax would keep 4 * heads * tokens = "
            f"{4 * heads * seq_len} bytes in shared memory, at most {_MAX_SOFTMAX_BYTES}"
        )
    return Launch("unfused")


def _short(path: str, rows: int, slab: int, head_dim: int) -> Launch:
    warps = slab // 16 * max(rows, head_dim) // 16
    return Launch(path, slab, 32 * warps, 2 * ((slab + rows) * (head_dim + 8) + slab * (rows + 8)))


def prefix_lengths(keep: Tensor) -> Tensor | None:
    """Tokens of each sequence if the mask is padding that ByteTransformer can remove, else None; keep is bool (B, S, S).

    It counts the ones of row 0 and packs that many tokens, without reading the mask again: right only if every row keeps just
    that prefix. The int32 lengths are (B,).
    """
    import torch

    lengths = keep[:, 0].sum(-1, dtype=torch.int32)
    prefix = torch.arange(keep.shape[-1], device=keep.device) < lengths[:, None, None]
    return lengths if bool((keep == prefix).all()) else None


def removes_padding(keep: Tensor) -> bool:
    """Whether the original would have packed these sequences: more than two, some of them padded."""
    lengths = prefix_lengths(keep)
    return keep.shape[0] > 2 and lengths is not None and bool((lengths < keep.shape[-1]).any())


def pack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, S, D) each -> (B, S, 3 * H * D), what the layer's QKV product writes."""
    import torch

    batch, heads, tokens, dim = q.shape
    return torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4).reshape(batch, tokens, 3 * heads * dim).contiguous()


@contextmanager
def half_sums() -> Iterator[None]:
    """cuBLAS with fp16 as compute type, as ByteTransformer calls it."""
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = True
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = before


class Attention:
    """Attention of one size and mask: ``attention(qkv, bias)`` -> (B, S, H * D), whose buffers are allocated once.

    ``mask``: (B, S, S) of ones and zeros in the data type, contiguous; 1 attends. ``qkv``: (B, S, 3 * H * D) without the bias,
    which has 3 * H * D elements and is added while loading. A row of zeros in the mask attends to everything alike.
    """

    def __init__(self, mask: Tensor, heads: int, head_dim: int, scale: float):
        import torch

        self.launch = launch_of(mask.shape[-1], heads, head_dim, str(mask.dtype).removeprefix("torch."))
        self._ops = torch.ops.stof_bytetransformer
        self._mask, self._heads, self._scale = mask, heads, scale
        batch, tokens = mask.shape[:2]
        single = {"dtype": torch.float32, "device": mask.device}
        if not self.launch.slab:
            self._split = mask.new_empty((3, heads, batch, tokens, head_dim))
        if self.launch.path == "long":
            self._scores = mask.new_empty((batch, heads, tokens, tokens))
            self._partials = torch.empty((batch, heads, -(-tokens // 128), tokens, 2), **single)
            self._stats = torch.empty((batch, heads, tokens, 2), **single)
            self._lengths = torch.full((batch,), tokens, dtype=torch.int32, device=mask.device)
        elif self.launch.path == "unfused":
            self._scores = mask.new_empty((heads * batch, tokens, tokens))
            self._context = mask.new_empty((heads * batch, tokens, head_dim))

    def __call__(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """One kernel (short), four (long) or five (unfused)."""
        if self.launch.slab:
            return self._ops.short_attention.default(qkv, bias, self._mask, self._heads, self._scale)
        if self.launch.path == "long":
            return self._ops.long_attention.default(
                qkv, bias, self._mask, self._lengths, self._heads, self._scale,
                self._split, self._scores, self._partials, self._stats,
            )  # fmt: skip
        return self._unfused(qkv, bias)

    def _unfused(self, qkv: Tensor, bias: Tensor) -> Tensor:
        import torch

        self._ops.split_heads.default(qkv, bias, self._heads, self._split)
        q, k, v = self._split.flatten(1, 2)
        scores, context = self._scores, self._context
        with half_sums():
            scores.baddbmm_(q, k.transpose(1, 2), beta=0, alpha=self._scale)
            self._ops.masked_softmax_.default(scores.unflatten(0, (self._heads, -1)), self._mask)
            torch.bmm(scores, v, out=context)
        return self._ops.merge_heads.default(context.unflatten(0, (self._heads, -1)))


def load() -> None:
    """Loads the kernels for the current GPU. `Unsupported` where they are neither built nor can be."""
    import torch

    try:
        native.load("bytetransformer", torch.cuda.get_device_capability())
    except native.Missing as reason:
        raise Unsupported(str(reason)) from None


def attention_mask(problem: Problem) -> Tensor:
    """The problem's mask as the kernels take it: (B, S, S) of ones and zeros. `Unsupported` for what that cannot say."""
    from .inputs import dense_keep, torch_dtype

    keep = dense_keep(problem)
    if keep.shape[1] != 1:
        if not bool((keep == keep[:, :1]).all()):
            raise Unsupported("ByteTransformer has one mask per sequence, shared by its heads; here heads differ")
        keep = keep[:, :1]
    if not bool(keep.any(-1).all()):
        raise Unsupported("a row attends to nothing: ByteTransformer would attend to everything there, not give 0")
    return keep[:, 0].expand(problem.batch, -1, -1).to(torch_dtype(problem.dtype)).contiguous()


@method(
    "bytetransformer",
    label="ByteTransformer (reimpl.)",
    experiments=("mha",),
    depends=native.sources("bytetransformer"),
    devices=("cuda",),
    reimplemented=True,
    rank=60,
)
def bytetransformer(problem: Problem, tensors: Tensors) -> Prepared:
    """Packing QKV and converting the mask are outside the timed call; the QKV bias is zero, and its addition is inside."""
    if problem.q_len != problem.kv_len:
        raise Unsupported("ByteTransformer has self-attention only; here queries and keys differ in number")
    if problem.grouped:
        raise Unsupported("ByteTransformer has one key head per query head; no grouped queries")
    launch = launch_of(problem.q_len, problem.heads, problem.head_dim, problem.dtype)
    load()
    mask = attention_mask(problem)
    qkv = pack(tensors.q, tensors.k, tensors.v)
    bias = qkv.new_zeros(qkv.shape[-1])
    attention = Attention(mask, problem.heads, problem.head_dim, problem.scale)
    notes = [str(launch), "mask tensor and packed QKV made before"]
    if removes_padding(mask.bool()):
        notes.append("padding kept: the original would drop these rows")

    def run() -> Tensor:
        return attention(qkv, bias).unflatten(-1, (problem.heads, -1)).transpose(1, 2)

    return Prepared(run, problem.pattern, note="; ".join(notes), mask_build=lambda: attention_mask(problem))
