"""`SparseMask`: a mask of any shape as lists of its non-empty cells, built once and used by every kernel."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..kernels import raw
from ..masks import MaskMod, Pattern, predicate
from ..planner import AttentionProblem, KernelConfig, MaskStats, Plan, choose
from . import cells
from .arguments import buffer_sizes, check_sizes, four_dims
from .blocks import can_write, write_blocks
from .cells import CellLists
from .device import device_spec
from .layout import Layout, derive, refresh, tile_stats

_TENSORS = ("strip_ptr", "cell_col", "cell_slot", "cell_bits", "counts")


@dataclass(eq=False, repr=False)
class SparseMask:
    """Which keys each query attends to, for ``batch * heads`` planes of ``q_len`` x ``kv_len`` positions.

    Build one with `from_pattern`, `from_dense` or `from_blocks`. ``batch`` and ``heads`` are 1 where the mask is shared, at no
    cost, or the full size. The tensors are the canonical content that every kernel's layout is derived from:

    - ``strip_ptr`` int32 (planes * strips + 1): where each strip of 16 queries starts in the lists;
    - ``cell_col`` int32 (capacity): key-cell index of each non-empty 16 x 16 cell, ascending inside a strip;
    - ``cell_slot`` int32 (capacity): -1 for a full cell, else its row of ``cell_bits``;
    - ``cell_bits`` int16 (bit capacity, 16): word r, bit c: query row r of the strip attends key c of the cell;
    - ``counts`` int64 (4): listed cells, bit rows in use, kept positions over all planes, overflow (0 or 1);
    - ``layout``: what `prepare` derived for a compiled call, or None.

    Capacities are rounded up to powers of two, so that masks of one shape class have the same tensor shapes and a new mask does
    not recompile a compiled model.
    """

    strip_ptr: Tensor
    cell_col: Tensor
    cell_slot: Tensor
    cell_bits: Tensor
    counts: Tensor
    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 1
    fixed: bool = False
    name: str = "mask"
    layout: Layout | None = None
    calls: dict = field(default_factory=dict, init=False)
    """Of `sparse_attention`: shapes of q and k it was called with, and what a call like that needs; see ops/."""
    _cache: dict = field(default_factory=dict, init=False)

    # ---- constructors ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pattern(
        cls,
        pattern: Pattern | MaskMod,
        q_len: int,
        kv_len: int,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str = "cpu",
        capacity: int | str | None = None,
    ) -> SparseMask:
        """Mask of a rule: a `stof_kernels.masks` pattern or any callable ``(b, h, q, kv) -> bool`` (a FlexAttention mask_mod).

        The S x S matrix is never formed. ``capacity`` as in `from_dense`. Raises ValueError for negative lengths or sizes below
        1, TypeError for a rule that is neither a pattern nor a callable or that does not return bools.
        """
        rule = pattern if isinstance(pattern, Pattern) else predicate(pattern)
        check_sizes("from_pattern", q_len, kv_len, batch, heads)
        lists = cells.lists_from_pattern(rule, q_len, kv_len, batch, heads, device)
        return cls._from_lists(lists, q_len, kv_len, batch, heads, capacity, str(rule))

    @classmethod
    def from_dense(
        cls,
        keep: Tensor,
        q_len: int | None = None,
        kv_len: int | None = None,
        capacity: int | str | None = None,
    ) -> SparseMask:
        """Mask of a bool tensor broadcastable to (B, H, Lq, Lk), True = attend (torch semantics), on its device.

        Dimensions that are missing, of size 1 or expanded (stride 0) are shared by all batch entries or heads. ``q_len`` and
        ``kv_len`` say how far a last dimension of size 1 reaches; without them it is taken as it is. ``capacity``: None sizes
        the lists to this mask (on a GPU one small read-back); a number of 16 x 16 cells, or "max", fixes the buffers so that
        `update_` can put any mask into them that fits. Raises TypeError if not bool, ValueError for more than 4 dimensions or
        lengths that do not fit.
        """
        keep = four_dims(keep, q_len, kv_len)
        batch, heads, q_len, kv_len = keep.shape
        if capacity is not None and keep.is_cuda:
            # Nothing may be read back here, so the lists are built where they stay.
            mask = cls._empty((batch, heads, q_len, kv_len), keep.device, capacity, (0, 0), "dense")
            raw.build_cells_out(keep, *mask.lists.tensors)
            return mask
        lists = CellLists(*raw.build_cells(keep))
        return cls._from_lists(lists, q_len, kv_len, batch, heads, capacity, "dense")

    @classmethod
    def from_blocks(
        cls, keep_blocks: Tensor, block: int, q_len: int, kv_len: int, capacity: int | str | None = None
    ) -> SparseMask:
        """Mask of whole blocks: bool broadcastable to (B, H, ceil(Lq/block), ceil(Lk/block)), True = attend.

        Work and memory are those of the kept blocks where ``block`` is a multiple of 16. Raises TypeError if not bool,
        ValueError for a block below 1 or a table of the wrong size.
        """
        check_sizes("from_blocks", q_len, kv_len, 1, 1)
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"from_blocks: block is {block!r}, allowed: an integer >= 1")
        rows, cols = -(-q_len // block), -(-kv_len // block)
        table = four_dims(keep_blocks, rows, cols, what="keep_blocks")
        batch, heads = table.shape[:2]
        name = f"blocks(block={block})"
        if capacity is not None and table.is_cuda and can_write(block, kv_len):
            # Nothing may be read back here, as in `from_dense`.
            mask = cls._empty((batch, heads, q_len, kv_len), table.device, capacity, (0, 0), name)
            write_blocks(mask.lists, table, block, q_len, kv_len)
            return mask
        if block % cells.CELL == 0:
            lists = cells.lists_from_blocks(table, block, q_len, kv_len)
        else:
            rule = predicate(lambda b, h, q, kv: table[b, h, q // block, kv // block], name="blocks")
            lists = cells.lists_from_pattern(rule, q_len, kv_len, batch, heads, table.device)
        return cls._from_lists(lists, q_len, kv_len, batch, heads, capacity, name)

    @classmethod
    def _from_lists(
        cls, lists: CellLists, q_len: int, kv_len: int, batch: int, heads: int, capacity: int | str | None, name: str
    ) -> SparseMask:
        needed = lists.cell_col.numel(), lists.cell_bits.shape[0]
        mask = cls._empty((batch, heads, q_len, kv_len), lists.counts.device, capacity, needed, name)
        mask._fill(lists)
        return mask

    @classmethod
    def _empty(
        cls,
        shape: tuple[int, int, int, int],
        device: torch.device,
        capacity: int | str | None,
        needed: tuple[int, int],
        name: str,
    ) -> SparseMask:
        """Buffers without content: of the given capacity, or of the shape class of the ``needed`` (cells, bit rows)."""
        batch, heads, q_len, kv_len = shape
        strips = batch * heads * cells.n_strips(q_len)
        n_cells, n_bits = buffer_sizes(capacity, *needed, most=strips * cells.n_cols(kv_len))
        return cls(
            strip_ptr=torch.zeros(strips + 1, dtype=torch.int32, device=device),
            cell_col=torch.zeros(n_cells, dtype=torch.int32, device=device),
            cell_slot=torch.full((n_cells,), -1, dtype=torch.int32, device=device),
            cell_bits=torch.zeros(n_bits, cells.CELL, dtype=torch.int16, device=device),
            counts=torch.zeros(4, dtype=torch.int64, device=device),
            q_len=q_len,
            kv_len=kv_len,
            batch=batch,
            heads=heads,
            fixed=capacity is not None,
            name=name,
        )

    # ---- content -----------------------------------------------------------------------------------------------------

    def update_(self, keep: Tensor) -> SparseMask:
        """Put another dense mask into the same buffers; with fixed capacity a captured graph then replays with it.

        ``keep``: bool, broadcastable to (batch, heads, q_len, kv_len). With fixed capacity nothing is read back, layouts that
        kernels use are derived again in place, and an oversized mask makes the output NaN (`check` says why). A compact mask
        raises ValueError if it does not fit or if a captured graph holds its sizes; the old mask then stays.
        """
        table = self._as_planes("update_", "keep", keep, self.q_len, self.kv_len)
        if self.fixed and self.device.type == "cuda":
            raw.build_cells_out(table, *self.lists.tensors)
            self._refresh_layouts()
        else:
            self._update_compact(CellLists(*raw.build_cells(table)))
        self._forget_content()
        self.name = "dense"
        return self

    def update_blocks_(self, keep_blocks: Tensor, block: int) -> SparseMask:
        """Put whole blocks into the same buffers, as `update_` does with a dense mask but with work for the blocks alone.

        ``keep_blocks``: bool, broadcastable to (batch, heads, ceil(q_len/block), ceil(kv_len/block)); ``block``: a multiple of
        16. With fixed capacity on a GPU nothing is read back, so a captured graph replays with the tensor's new content; that
        needs ``kv_len`` to be a multiple of 16, ValueError otherwise. What does not fit is treated as by `update_`.
        """
        if isinstance(block, bool) or not isinstance(block, int) or block < 1 or block % cells.CELL:
            raise ValueError(f"update_blocks_: block is {block!r}, allowed: a multiple of {cells.CELL}")
        sizes = -(-self.q_len // block), -(-self.kv_len // block)
        table = self._as_planes("update_blocks_", "keep_blocks", keep_blocks, *sizes)
        if self.fixed and self.device.type == "cuda":
            if not can_write(block, self.kv_len):
                raise ValueError(
                    f"update_blocks_: kv_len is {self.kv_len}, allowed with fixed capacity: a multiple of {cells.CELL}"
                )
            write_blocks(self.lists, table, block, self.q_len, self.kv_len)
            self._refresh_layouts()
        else:
            self._update_compact(cells.lists_from_blocks(table, block, self.q_len, self.kv_len))
        self._forget_content()
        self.name = f"blocks(block={block})"
        return self

    def _as_planes(self, where: str, what: str, keep: Tensor, rows: int, cols: int) -> Tensor:
        """``keep`` expanded to (batch, heads, rows, cols), or one clear error."""
        table = four_dims(keep, rows, cols, what=what)
        if table.device != self.device:
            raise ValueError(f"{where}: {what} is on {table.device}, allowed: the mask's device {self.device}")
        if table.shape[0] not in (1, self.batch) or table.shape[1] not in (1, self.heads):
            allowed = (self.batch, self.heads, rows, cols)
            raise ValueError(f"{where}: {what} has shape {tuple(keep.shape)}, allowed: broadcastable to {allowed}")
        return table.expand(self.batch, self.heads, -1, -1)

    def _refresh_layouts(self) -> None:
        for (config, copies), layout in self._layouts.items():
            refresh(self, layout, config, copies)

    def _update_compact(self, lists: CellLists) -> None:
        """Take over exact-size lists whose sizes are known on the host."""
        needed = lists.cell_col.numel(), lists.cell_bits.shape[0]
        held = self.capacity, self.cell_bits.shape[0]
        if not self.fixed and (needed[0] > held[0] or needed[1] > held[1]):
            raise ValueError(
                f"update_: the mask needs {needed[0]} cells ({needed[1]} partial), the buffers hold {held[0]} "
                f"({held[1]} partial); build with capacity= to leave room"
            )
        if self._cache.get("captured") or any(int(packed[1]) for packed, *_ in self.calls.values()):
            raise ValueError(
                "update_: a captured graph holds this mask's sizes; build with capacity= to replay with new masks"
            )
        self._fill(lists)
        self._layouts.clear()
        self.layout = None

    def _fill(self, lists: CellLists) -> None:
        """Copy exact-size lists into the buffers; what does not fit only raises the overflow flag."""
        n, n_bits = lists.cell_col.numel(), lists.cell_bits.shape[0]
        self.counts.copy_(lists.counts)
        if n > self.capacity or n_bits > self.cell_bits.shape[0]:
            self.counts[3] = 1
            self.strip_ptr.zero_()
            return
        self.strip_ptr.copy_(lists.strip_ptr)
        self.cell_col[:n].copy_(lists.cell_col)
        self.cell_slot[:n].copy_(lists.cell_slot)
        self.cell_bits[:n_bits].copy_(lists.cell_bits)

    def _forget_content(self) -> None:
        """Drop what was computed from the content; plans of a fixed mask come from its shape and capacity and stay."""
        if not self.fixed:
            self._cache.clear()
            self.calls.clear()

    @property
    def _layouts(self) -> dict[tuple[KernelConfig, int], Layout]:
        return self._cache.setdefault("layouts", {})

    def to_dense(self) -> Tensor:
        """Bool (batch, heads, q_len, kv_len) on the mask's device, True = attend."""
        self.check()
        return cells.dense_from_lists(self.lists, self.q_len, self.kv_len, self.batch, self.heads)

    def check(self) -> SparseMask:
        """Raise ValueError if the mask overflowed its fixed capacity or its lists are damaged; returns the mask."""
        listed, bit_rows, _, overflow = self.counts.tolist()
        if overflow:
            raise ValueError(
                f"mask {self.name}: {listed} non-empty cells ({bit_rows} partial) do not fit the fixed capacity of "
                f"{self.capacity} cells; results computed with it are NaN; build with a larger capacity="
            )
        problem = _damage(self, listed, bit_rows)
        if problem:
            raise ValueError(f"mask {self.name}: {problem}")
        return self

    # ---- properties --------------------------------------------------------------------------------------------------

    @property
    def lists(self) -> CellLists:
        """The five list tensors, padded to capacity."""
        return CellLists(self.strip_ptr, self.cell_col, self.cell_slot, self.cell_bits, self.counts)

    @property
    def device(self) -> torch.device:
        """Where the lists live."""
        return self.counts.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len)."""
        return self.batch, self.heads, self.q_len, self.kv_len

    @property
    def capacity(self) -> int:
        """How many non-empty 16 x 16 cells the buffers hold."""
        return self.cell_col.numel()

    @property
    def stats(self) -> MaskStats:
        """What the planner needs to know of the mask: read back once, then cached until the next `update_`.

        With fixed capacity the content may change without the host's knowledge, so the stats are those of full buffers, and
        plans come from shape and capacity alone.
        """
        if "stats" not in self._cache:
            planes = self.batch * self.heads
            strips, cols = planes * cells.n_strips(self.q_len), cells.n_cols(self.kv_len)
            if self.fixed:
                n = min(self.capacity, strips * cols)
                listed, partial, kept = n, n, n * cells.CELL**2
            else:
                listed, _, kept, _ = self.counts.tolist()
                partial = int((self.cell_slot[:listed] >= 0).sum())
            tiles = tile_stats(self) if self.device.type == "cuda" else ()
            self._cache["stats"] = MaskStats(listed, partial, kept, strips, cols, planes, tiles)
        return self._cache["stats"]

    @property
    def kept(self) -> float:
        """Share of kept (query, key) positions over all planes, from 0 to 1; reads one number back from the device."""
        positions = self.batch * self.heads * self.q_len * self.kv_len
        return int(self.counts[2]) / positions if positions else 0.0

    def plan_for(self, q: Tensor, k: Tensor, policy: str = "cost") -> Plan:
        """The planner's choice for q (B, Hq, Lq, D) and k (B, Hkv, Lk, D), made once per problem and kept until `update_`."""
        key = (policy, *_problem_key(q, k))
        if key not in self._cache:
            dtype = str(q.dtype).removeprefix("torch.")
            problem = AttentionProblem(
                q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], dtype, self.stats
            )
            self._cache[key] = choose(problem, device_spec(self.device), policy)
        return self._cache[key]

    def layout_for(self, q: Tensor, k: Tensor, config: KernelConfig | None = None) -> Layout:
        """What the kernel planned for q and k reads (or the kernel of ``config``), derived at first use and then kept.

        Raises RuntimeError inside a CUDA graph capture if it was not derived before: call `prepare` first.
        """
        key = ("layout", config, *_problem_key(q, k))
        layout = self._cache.get(key)
        if layout is None:
            self._refuse_capture()
            config = config or self.plan_for(q, k).config
            copies = max(1, q.shape[0] * q.shape[1] // (self.batch * self.heads))
            layout = self._layouts.get((config, copies))
            if layout is None:
                layout = self._layouts[config, copies] = derive(self, config, copies)
            self._cache[key] = layout
        if self.device.type == "cuda" and not self.fixed and torch.cuda.is_current_stream_capturing():
            self._cache["captured"] = True
        return layout

    def _refuse_capture(self) -> None:
        """Planning and deriving a layout read from the device, which a graph capture forbids."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"mask {self.name}: no layout was derived for this problem before the graph capture; "
                "call mask.prepare(q, k) before capturing"
            )

    def prepare(self, q: Tensor, k: Tensor) -> SparseMask:
        """Plan and derive the layout for q (B, Hq, Lq, D) and k (B, Hkv, Lk, D) now; returns the mask.

        Compiled calls and graph captures, which can do neither, use what was prepared last. Eager calls prepare by themselves.
        """
        self.layout = self.layout_for(q, k)
        return self

    def to(self, device: torch.device | str) -> SparseMask:
        """The same mask on another device (itself if it is there already); plans are made anew."""
        device = torch.device(device)
        if device == self.device or (device.index is None and device.type == self.device.type):
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS}, layout=None)

    def __getstate__(self) -> dict:
        """For copies and pickles: the content. What was derived from it points into this mask's memory."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init} | {"layout": None}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __repr__(self) -> str:
        shape = "x".join(str(n) for n in self.shape)
        return f"SparseMask({self.name}, {shape}, {self.capacity} cells{' fixed' if self.fixed else ''}, {self.device})"


def _problem_key(q: Tensor, k: Tensor) -> tuple:
    """What a plan depends on besides the mask."""
    return q.shape, k.shape, q.dtype, torch.get_num_threads()


def _damage(mask: SparseMask, listed: int, bit_rows: int) -> str | None:
    """What is wrong with the lists, or None."""
    ptr = mask.strip_ptr
    if int(ptr[0]) != 0 or int(ptr[-1]) != listed or bool((ptr.diff() < 0).any()):
        return f"strip_ptr does not rise from 0 to the {listed} listed cells"
    col, slot = mask.cell_col[:listed], mask.cell_slot[:listed]
    if listed and (int(col.min()) < 0 or int(col.max()) >= cells.n_cols(mask.kv_len)):
        return f"cell_col leaves 0..{cells.n_cols(mask.kv_len) - 1}"
    first = torch.zeros(listed + 1, dtype=torch.bool, device=col.device)
    first[ptr.to(torch.int64)] = True
    if bool(((col.diff() <= 0) & ~first[1:listed]).any()):
        return "cell_col does not ascend inside a strip"
    if listed and (int(slot.min()) < -1 or int(slot.max()) >= bit_rows):
        return f"cell_slot leaves -1..{bit_rows - 1}"
    return None


def _flatten(mask: SparseMask) -> tuple[list[Tensor], tuple]:
    tensors = [getattr(mask, name) for name in _TENSORS]
    static = tuple(
        (f.name, getattr(mask, f.name)) for f in fields(mask) if f.init and f.name not in (*_TENSORS, "layout")
    )
    return [*tensors, *(mask.layout.tensors if mask.layout else ())], static


def _unflatten(tensors: list[Tensor], static: tuple) -> SparseMask:
    n = len(_TENSORS)
    layout = Layout(*tensors[n:]) if len(tensors) > n else None
    return SparseMask(*tensors[:n], **dict(static), layout=layout)


torch.utils._pytree.register_pytree_node(
    SparseMask, _flatten, _unflatten, serialized_type_name="stof_kernels.SparseMask"
)
