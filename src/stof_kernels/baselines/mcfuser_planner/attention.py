"""Attention and chains of two products as callables: shapes and strides in, a tuned kernel out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .chain import Chain, Peaks, attention_chain, memory_bound
from .codegen import Layout
from .model import estimate, unfused_seconds
from .pruning import padded, space_of
from .search import SearchSettings
from .tuning import Tuned, device_peaks, tune

_MOST_CHAINS = 65535  # second dimension of a CUDA grid


@dataclass(frozen=True)
class Form:
    """What an attention computes beside its tensors: ``scale`` of the scores, None for head_dim ** -0.5.

    ``step`` ``softmax_exp`` leaves the row's maximum out; ``tokens_first`` writes the output in (B, Lq, H, D) memory.
    """

    scale: float | None = None
    step: str = "softmax"
    tokens_first: bool = False


@dataclass(frozen=True)
class TunedAttention:
    """One attention of fixed shapes and strides: ``(q, k, v, mask) -> out``."""

    tuned: Tuned
    form: Form

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Output (B, H, Lq, D), in memory as the form says. Tensors of other shapes or strides are not checked."""
        out = _output(q, self.form.tokens_first)
        self.tuned.kernel(_operands(q, k, v, mask, out))
        return out


def tune_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    form: Form = Form(),
    settings: SearchSettings = SearchSettings(),  # noqa: B008  # frozen
    peaks: Peaks | None = None,
) -> TunedAttention:
    """Tune softmax(scale q k^T + mask) v for tensors like these; q (B, H, Lq, D), k and v (B, Hkv, Lk, D), fp16 or bf16.

    ``mask``: additive, broadcastable to (B, H, Lq, Lk); its last dimension may be Lk rounded up to 16, with -inf beyond Lk.
    ValueError for shapes that do not fit together.
    """
    _check(q, k, v, mask, form.step)
    scale = q.shape[-1] ** -0.5 if form.scale is None else form.scale
    out = _output(q, form.tokens_first)
    chain, layout = attention_problem(q, k, v, mask, out, scale, form.step)
    found = tune(chain, layout, _operands(q, k, v, mask, out), peaks or device_peaks(q.device), settings)
    return TunedAttention(found, form)


_known: dict[tuple[object, ...], TunedAttention] = {}


def tuned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    form: Form = Form(),
    settings: SearchSettings = SearchSettings(),  # noqa: B008  # frozen
) -> TunedAttention:
    """`tune_attention`, once per process for tensors of the same shapes, strides, type and device: masks may differ."""
    forms = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (q, k, v, mask) if t is not None)
    key = (forms, mask is None, form)
    if key not in _known:
        _known[key] = tune_attention(q, k, v, mask, form, settings=settings)
    return _known[key]


def known() -> tuple[TunedAttention, ...]:
    """What `tuned_attention` has tuned since the last `forget`."""
    return tuple(_known.values())


def forget() -> None:
    """Tune again what was tuned before, for measurements of tuning itself."""
    _known.clear()


def attention_problem(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, scale: float, step: str
) -> tuple[Chain, Layout]:
    """The chain and the layout of an attention: k is read as its transpose, a broadcast mask by strides of 0."""
    batch, heads, q_len, head_dim = q.shape
    chain = attention_chain(batch, heads, q_len, k.shape[2], head_dim, mask is not None, step)
    chain = replace(chain, element_bytes=q.element_size())
    strides = [("A", q.stride()), ("B", k.transpose(-1, -2).stride())]
    if mask is not None:
        wide = mask.expand(batch, heads, q_len, mask.shape[-1])
        strides.append(("M", wide.stride()))
    strides += [("D", v.stride()), ("E", out.stride())]
    columns = mask.shape[-1] if mask is not None else 0
    return chain, Layout(tuple(strides), heads, heads // k.shape[1], scale, q.dtype == torch.float32, columns)


@dataclass(frozen=True)
class TunedChain:
    """E = f(A B) D for fixed shapes and strides: ``(a, b, d) -> e``; ``fused`` False runs two separate products.

    ``tuned`` is None where the model already said that fusing does not pay.
    """

    step: str
    fused: bool
    tuned: Tuned | None
    fused_seconds: float
    unfused_seconds: float

    def __call__(self, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        """e (batch, m, h)."""
        if not self.fused:
            return unfused_chain(a, b, d, self.step)
        e = a.new_empty(a.shape[0], a.shape[1], d.shape[2])
        self.tuned.kernel((a, b, d, e))
        return e


def tune_chain(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    step: str = "none",
    always: bool = False,
    settings: SearchSettings = SearchSettings(),  # noqa: B008  # frozen
    peaks: Peaks | None = None,
) -> TunedChain:
    """Tune f(a b) d for tensors like these: a (batch, m, k), b (batch, k, n), d (batch, n, h); weights may be expanded views.

    Fused only where the chain is memory-bound and the model predicts a gain, or ``always``; else torch's own products.
    """
    if (
        a.dim() != 3
        or a.shape[2] != b.shape[1]
        or b.shape[2] != d.shape[1]
        or not a.shape[0] == b.shape[0] == d.shape[0]
    ):
        shapes = " ".join(str(tuple(t.shape)) for t in (a, b, d))
        raise ValueError(f"chain: shapes are {shapes}, allowed: (batch, m, k) (batch, k, n) (batch, n, h)")
    peaks = peaks or device_peaks(a.device)
    chain = Chain(a.shape[1], b.shape[2], a.shape[2], d.shape[2], a.shape[0], step, element_bytes=a.element_size())
    fused, apart = predicted(chain, peaks), unfused_seconds(chain, peaks)
    if not always and not fusing_pays(chain, peaks):
        return TunedChain(step, False, None, fused, apart)
    e = a.new_empty(a.shape[0], a.shape[1], d.shape[2])
    strides = tuple((x, (t.stride(0), 0, *t.stride()[1:])) for x, t in zip("ABDE", (a, b, d, e), strict=True))
    layout = Layout(strides, exact=a.dtype == torch.float32)
    return TunedChain(step, True, tune(chain, layout, (a, b, d, e), peaks, settings), fused, apart)


def unfused_chain(a: Tensor, b: Tensor, d: Tensor, step: str) -> Tensor:
    """The chain as torch's operators."""
    c = torch.bmm(a, b)
    return torch.bmm({"none": c, "relu": F.relu(c), "gelu": F.gelu(c)}[step], d)


def predicted(chain: Chain, peaks: Peaks) -> float:
    """The model's best seconds of the fused chain, infinity where no candidate survives the rules."""
    return min((estimate(c, peaks).seconds for c in space_of(chain, peaks)), default=float("inf"))


def fusing_pays(chain: Chain, peaks: Peaks) -> bool:
    """Whether a chain is memory-bound [paper] and the model prefers one kernel to two [ours]."""
    return memory_bound(chain, peaks) and predicted(chain, peaks) < unfused_seconds(chain, peaks)


def padded_mask(mask: Tensor) -> Tensor:
    """An additive mask (..., Lk) widened with -inf to a multiple of 16 columns, so that its rows stay aligned. [paper]"""
    return F.pad(mask, (0, padded(mask.shape[-1]) - mask.shape[-1]), value=float("-inf"))


def _output(q: Tensor, tokens_first: bool) -> Tensor:
    batch, heads, q_len, head_dim = q.shape
    if tokens_first:
        return q.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    return q.new_empty(q.shape)


def _operands(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> list[Tensor]:
    return [q, k, *([] if mask is None else [mask]), v, out]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, step: str) -> None:
    if step not in ("softmax", "softmax_exp"):
        raise ValueError(f"attention: step is {step!r}, allowed: softmax, softmax_exp")
    batch, heads, q_len, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim or heads % k.shape[1]:
        shapes = " ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention: shapes are {shapes}, allowed: (B, H, Lq, D) and twice (B, Hkv, Lk, D)")
    if batch * heads > _MOST_CHAINS:
        raise ValueError(f"attention: batch * heads is {batch * heads}, allowed: up to {_MOST_CHAINS}")
    if mask is not None:
        widths = {k.shape[2], padded(k.shape[2])}
        wanted = (batch, heads, q_len)
        fits = mask.dim() == 4 and all(m in (1, w) for m, w in zip(mask.shape, wanted, strict=False))
        if not fits or mask.shape[3] not in widths:
            raise ValueError(
                f"attention: mask has shape {tuple(mask.shape)}, allowed: what broadcasts to {(*wanted, k.shape[2])}"
            )
