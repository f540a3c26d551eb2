"""Live bytes of tensors while a function runs, and the fewest that its order of operators allows."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(value: object) -> dict[int, torch.UntypedStorage]:
    """The memory behind every tensor in a value, by its identity."""
    found = (leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in found}


class LiveBytes(TorchDispatchMode):
    """Counts memory that operators allocate inside the mode until nothing refers to it; ``known`` tensors do not count."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self._known = set(storages(known))
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        result = func(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in self._known and key not in self._live:
                self._live[key] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


class Fewest(fx.Interpreter):
    """Runs a graph node by node; ``peak`` is then the most that any node needs: what it or a later one reads, its result."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self._sizes: dict[int, int] = {}
        self._made: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._step = 0

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        self._step += 1
        for key, storage in storages(value).items():
            self._sizes[key] = 0 if node.op == "placeholder" else self._sizes.get(key, storage.nbytes())
            self._made.setdefault(key, self._step)
            self._last[key] = self._step
        for source in node.all_input_nodes:
            self._last.update(dict.fromkeys(storages(self.env[source]), self._step))
        return value

    @property
    def peak(self) -> int:
        """Bytes, without the graph's inputs."""
        steps = range(1, self._step + 1)
        return max(sum(n for k, n in self._sizes.items() if self._made[k] <= at <= self._last[k]) for at in steps)
