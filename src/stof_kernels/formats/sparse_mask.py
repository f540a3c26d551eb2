"""`SparseMask`: a mask of any shape as lists of its non-empty cells, built once and used by every kernel."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..kernels import raw
from ..masks import MaskMod, Pattern, predicate
from ..planner import AttentionProblem, KernelConfig, MaskStats, Plan, choose
from . import cells
from .arguments import block_table, buffer_sizes, check_sizes, four_dims
from .cells import CellLists
from .device import device_spec
from .integrity import damage
from .layout import Layout, build_in_place, derive, stats_of

TENSORS = ("strip_ptr", "cell_col", "cell_slot", "cell_bits", "counts")
"""Fields that hold the canonical lists."""


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

    What lies past the listed cells and the bit rows in use is undefined. Capacities are rounded up to powers of two, so that
    masks of one shape class have the same tensor shapes and a new mask does not recompile a compiled model.
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
    block: int = cells.CELL
    """Fixed buffers are sized for masks of whole blocks of this edge; another mask may need more than its cells say."""
    layout: Layout | None = None
    calls: dict = field(default_factory=dict, init=False)
    """Of `sparse_attention`: shapes of q it was called with, and the last call of each, packed for repeats; see ops/."""
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
        compiled: bool = False,
    ) -> SparseMask:
        """Mask of a rule: a `stof_kernels.masks` pattern or any callable ``(b, h, q, kv) -> bool`` (a FlexAttention mask_mod).

        The S x S matrix is never formed. ``capacity`` as in `from_dense`. ``compiled`` evaluates the rule by torch.compile,
        which takes seconds once per rule and pays for long masks of a callable, whose every position must be looked at. Raises
        ValueError for negative lengths or sizes below 1, TypeError for a rule that is neither a pattern nor a callable or that
        does not return bools.
        """
        rule = pattern if isinstance(pattern, Pattern) else predicate(pattern)
        check_sizes("from_pattern", q_len, kv_len, batch, heads)
        lists = cells.lists_from_pattern(rule, q_len, kv_len, batch, heads, device, compiled)
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
            build_in_place(mask, keep)
            return mask
        lists = CellLists(*raw.build_cells(keep))
        return cls._from_lists(lists, q_len, kv_len, batch, heads, capacity, "dense")

    @classmethod
    def from_blocks(
        cls, keep_blocks: Tensor, block: int, q_len: int, kv_len: int, capacity: int | str | None = None
    ) -> SparseMask:
        """Mask of whole blocks: bool broadcastable to (B, H, ceil(Lq/block), ceil(Lk/block)), True = attend.

        Or int32 or int64 (..., ceil(Lq/block), k): the kept blocks of each row of blocks by their numbers, as top-k gives them;
        a number that is none, such as -1, keeps nothing. Work and memory are those of the kept blocks where ``block`` is a
        multiple of 16. ``capacity`` as in `from_dense`, in 16 x 16 cells; on a GPU nothing is then read back, and the buffers
        have no room for partial cells other than those at the last keys. Raises TypeError for another dtype, ValueError for a
        block below 1 or a table of the wrong size.
        """
        check_sizes("from_blocks", q_len, kv_len, 1, 1)
        table = block_table(keep_blocks, block, q_len, kv_len)
        name, (batch, heads) = f"blocks(block={block})", table.shape[:2]
        if block % cells.CELL:
            # Its edges cut cells, so their positions are looked at.
            rule = predicate(lambda b, h, q, kv: table[b, h, q // block, kv // block], name="blocks")
            lists = cells.lists_from_pattern(rule, q_len, kv_len, batch, heads, table.device)
        elif capacity is None or not table.is_cuda:
            lists = cells.lists_from_blocks(table, block, q_len, kv_len)
        else:
            # Nothing may be read back here, as in `from_dense`.
            mask = cls._empty((batch, heads, q_len, kv_len), table.device, capacity, (0, 0), name, block)
            build_in_place(mask, table, block)
            return mask
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
        block: int = cells.CELL,
    ) -> SparseMask:
        """Buffers without content: of the given capacity, or of the shape class of the ``needed`` (cells, bit rows).

        ``block`` as the field: blocks of more than a cell have partial cells at the last keys only.
        """
        batch, heads, q_len, kv_len = shape
        strips = batch * heads * cells.n_strips(q_len)
        n_cells, n_bits = buffer_sizes(capacity, *needed, most=strips * cells.n_cols(kv_len))
        if capacity is not None and block > cells.CELL:
            n_bits = min(n_bits, strips if kv_len % cells.CELL else 1)
        return cls(
            strip_ptr=torch.empty(strips + 1, dtype=torch.int32, device=device),
            cell_col=torch.empty(n_cells, dtype=torch.int32, device=device),
            cell_slot=torch.empty(n_cells, dtype=torch.int32, device=device),
            cell_bits=torch.empty(n_bits, cells.CELL, dtype=torch.int16, device=device),
            counts=torch.empty(4, dtype=torch.int64, device=device),
            q_len=q_len,
            kv_len=kv_len,
            batch=batch,
            heads=heads,
            fixed=capacity is not None,
            name=name,
            block=block,
        )

    # ---- content -----------------------------------------------------------------------------------------------------

    def update_(self, keep: Tensor) -> SparseMask:
        """Put another dense mask into the same buffers; with fixed capacity a captured graph then replays with it.

        ``keep``: bool, broadcastable to (batch, heads, q_len, kv_len). With fixed capacity nothing is read back, layouts that
        kernels use are derived again in place, and an oversized mask makes the output NaN (`check` says why). A compact mask
        raises ValueError if it does not fit or if a captured graph holds its sizes; the old mask then stays.
        """
        table = self._as_planes("update_", "keep", four_dims(keep, self.q_len, self.kv_len))
        return self._update(table, None, "dense")

    def update_blocks_(self, keep_blocks: Tensor, block: int) -> SparseMask:
        """Put whole blocks into the same buffers, as `update_` does with a dense mask but with work for the blocks alone.

        ``keep_blocks``: the table or the numbers of the blocks as in `from_blocks`, for 1 or ``batch`` and ``heads`` planes;
        ``block``: a multiple of 16. With fixed capacity on a GPU nothing is read back, so a captured graph replays with the
        tensor's new content. What does not fit is treated as by `update_`.
        """
        if isinstance(block, bool) or not isinstance(block, int) or block < 1 or block % cells.CELL:
            raise ValueError(f"update_blocks_: block is {block!r}, allowed: a multiple of {cells.CELL}")
        table = block_table(keep_blocks, block, self.q_len, self.kv_len)
        table = self._as_planes("update_blocks_", "keep_blocks", table)
        return self._update(table, block, f"blocks(block={block})")

    def _as_planes(self, where: str, what: str, table: Tensor) -> Tensor:
        """A 4-D table of this mask's lengths, expanded to its planes, or one clear error."""
        if table.device != self.device:
            raise ValueError(f"{where}: {what} is on {table.device}, allowed: the mask's device {self.device}")
        if table.shape[0] not in (1, self.batch) or table.shape[1] not in (1, self.heads):
            allowed = (self.batch, self.heads, *table.shape[2:])
            raise ValueError(f"{where}: {what} has shape {tuple(table.shape)}, allowed: broadcastable to {allowed}")
        return table.expand(self.batch, self.heads, -1, -1)

    def _update(self, table: Tensor, block: int | None, name: str) -> SparseMask:
        if self.fixed and self.device.type == "cuda":
            build_in_place(self, table, block, self._layouts)
        elif block is None:
            self._update_compact(CellLists(*raw.build_cells(table)))
        else:
            self._update_compact(cells.lists_from_blocks(table, block, self.q_len, self.kv_len))
        if not self.fixed:  # plans of a fixed mask come from its shape and capacity and stay
            self._cache.clear()
            self.calls.clear()
        self.name = name
        return self

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
            room = f"{self.capacity} cells" + (f" in whole blocks of {self.block}" if self.block > cells.CELL else "")
            raise ValueError(
                f"mask {self.name}: {listed} non-empty cells ({bit_rows} partial) do not fit the fixed capacity of "
                f"{room}; results computed with it are NaN; build with a larger capacity="
            )
        problem = damage(self.lists, self.kv_len, listed, bit_rows)
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
            self._cache["stats"] = stats_of(self)
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
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS}, layout=None)

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
