"""Bolt's graph pass: dense layers and batched products become calls of its kernels, the rest stays for the other compiler.

Patterns, the longest first: dense + bias + GELU (erf), dense + bias + ReLU, dense + bias, dense, batch_matmul; fp16 only.
Dense layers of one input that follow each other are first made one (Q, K and V). Two dense layers in a row are tried as one
persistent kernel where residence allows it. Not patterns, as in the original: residual adds, LayerNorm, softmax, SiLU,
tanh-GELU, transposes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .problem import Gemm, Pair
from .profiler import Profiler
from .templates import PADDING, PERSISTENT, alignment, padded, residence

aten = torch.ops.aten
_ACTIVATIONS = {aten.relu.default: "bias_relu", aten.gelu.default: "bias_gelu"}


@dataclass
class Report:
    """What the pass did to one graph; ``chains`` are the pairs of products in a row, with why they stay two (empty: fused)."""

    launches: Counter[str] = field(default_factory=Counter)
    gemms: Counter[Gemm] = field(default_factory=Counter)
    chains: Counter[tuple[Pair, str]] = field(default_factory=Counter)
    combined: int = 0
    padded: int = 0
    left: Counter[str] = field(default_factory=Counter)

    @property
    def persistent(self) -> int:
        """Pairs of products that became one kernel."""
        return sum(count for (_, refusal), count in self.chains.items() if not refusal)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.launches.items()))
        launches = f"{self.launches.total()} CUTLASS-style launches ({kinds})"
        return f"{launches}, {len(self.gemms)} shapes, {self.persistent} persistent fusions"


@dataclass
class _Dense:
    """A dense layer: the product and the ``last`` node of its pattern, weight (n, k) and bias as nodes."""

    product: fx.Node
    last: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    epilogue: str

    @property
    def x(self) -> fx.Node:
        """The input as the graph has it now: the layer before may have been replaced."""
        return self.product.args[1 if self.product.target is aten.addmm.default else 0]

    @property
    def gemm(self) -> Gemm:
        n, k = _shape(self.weight)
        return Gemm(math.prod(_shape(self.x)[:-1]), padded(n), padded(k), epilogue=self.epilogue)


def rewrite(module: fx.GraphModule, profiler: Profiler) -> Report:
    """Replaces the patterns in an exported ATen graph, in place; weights stay what they are, changed copies are new buffers.

    Nodes need ``meta["val"]``. The kernels are picked, and measured, here.
    """
    report = Report()
    weights = _Weights(module)
    with torch.no_grad():
        _combine(module.graph, weights, report)
        dense = [found for node in module.graph.nodes if (found := _dense(node, weights, report))]
        done: set[fx.Node] = set()
        for layer in dense:
            if layer.product in done:
                continue
            follower = _follower(layer, dense)
            if follower is not None and _persistent(layer, follower, profiler, report):
                done.add(follower.product)
                continue
            _replace_dense(layer, weights, profiler, report)
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target in (aten.matmul.default, aten.bmm.default):
                _replace_batched(node, profiler, report)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return report


# ---- matching --------------------------------------------------------------------------------------------------------


def _dense(node: fx.Node, weights: _Weights, report: Report) -> _Dense | None:
    """The dense layer whose product this node is, with the longest pattern behind it."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
    elif node.target is aten.addmm.default and len(node.args) == 3 and not node.kwargs:
        bias, x, weight = node.args
    elif node.target is aten.mm.default:
        (x, weight), bias = node.args, None
    else:
        return None
    tensors = [t for t in (x, weight, bias) if t is not None]
    dtypes = {str(t.meta["val"].dtype).removeprefix("torch.") for t in tensors}
    if dtypes != {"float16"}:
        report.left[f"dense in {' and '.join(sorted(dtypes))}"] += 1
        return None
    if bias is not None and len(_shape(bias)) != 1:
        report.left["dense with a bias of several dimensions"] += 1
        return None
    if node.target is not aten.linear.default:  # the weight is (k, n): turned around once, before the model runs
        if weight.op != "get_attr":
            report.left["product of two activations without a batch"] += 1
            return None
        weight = weights.changed(weight, lambda w: w.t().contiguous(), node)
    last, epilogue = node, "linear" if bias is None else "bias"
    if bias is not None and len(node.users) == 1:
        user = next(iter(node.users))
        exact = user.kwargs.get("approximate", "none") == "none"
        if user.op == "call_function" and user.target in _ACTIVATIONS and exact:
            last, epilogue = user, _ACTIVATIONS[user.target]
    return _Dense(node, last, weight, bias, epilogue)


def _follower(layer: _Dense, dense: list[_Dense]) -> _Dense | None:
    """The dense layer that alone reads this one's result, at once."""
    if len(layer.last.users) != 1:
        return None
    user = next(iter(layer.last.users))
    return next((other for other in dense if other.product is user and other.x is layer.last), None)


def _combine(graph: fx.Graph, weights: _Weights, report: Report) -> None:
    """Dense layers that read one input, one behind the other, without a pattern's activation: one product of all columns."""
    run: list[fx.Node] = []
    for node in [*graph.nodes, None]:
        if node is not None and (node.op != "call_function" or node.target is not aten.linear.default):
            continue
        if run and (node is None or not _alike(run[0], node)):
            if len(run) > 1:
                _as_one(run, weights)
                report.combined += len(run)
            run = []
        if node is not None and _alike(node, node):
            run.append(node)


def _alike(first: fx.Node, node: fx.Node) -> bool:
    """Whether two dense layers can be one; with itself, whether a layer can be combined at all."""
    same = node.args[0] is first.args[0] and len(node.args) == len(first.args)
    constants = all(arg.op == "get_attr" for arg in node.args[1:] if arg is not None)
    biased = len(node.args) > 2 and node.args[2] is not None
    active = biased and len(node.users) == 1 and next(iter(node.users)).target in _ACTIVATIONS
    dtypes = {arg.meta["val"].dtype for arg in node.args if arg is not None}
    both = biased == (len(first.args) > 2 and first.args[2] is not None)
    return same and constants and not active and both and dtypes == {torch.float16}


def _as_one(run: list[fx.Node], weights: _Weights) -> None:
    first = run[0]
    graph = first.graph
    args = [first.args[0], weights.joined([node.args[1] for node in run], first)]
    if len(first.args) > 2 and first.args[2] is not None:
        args.append(weights.joined([node.args[2] for node in run], first))
    sizes = [_shape(node)[-1] for node in run]
    with graph.inserting_before(first):
        whole = graph.call_function(aten.linear.default, tuple(args))
        whole.meta["val"] = first.meta["val"].new_empty(*_shape(first)[:-1], sum(sizes))
        begin = 0
        for node, size in zip(run, sizes, strict=True):
            part = graph.call_function(aten.slice.Tensor, (whole, -1, begin, begin + size))
            part.meta["val"] = node.meta["val"]
            begin += size
            for user in list(node.users):
                if user.target is aten.view.default:  # of a tensor whose rows lie apart
                    user.target = aten.reshape.default
            node.replace_all_uses_with(part)
    for node in run:
        graph.erase_node(node)


# ---- replacing -------------------------------------------------------------------------------------------------------


class _Weights:
    """Weights in another form, made once: buffers of the graph's module."""

    def __init__(self, module: fx.GraphModule):
        self._module, self._made = module, {}

    def tensor(self, node: fx.Node) -> Tensor:
        """What a get_attr node reads."""
        found = self._module
        for name in node.target.split("."):
            found = getattr(found, name)
        return found.detach()

    def changed(self, node: fx.Node, change, before: fx.Node) -> fx.Node:
        """The weight after ``change``, as a node."""
        return self._node(change(self.tensor(node)), before)

    def joined(self, nodes: list[fx.Node], before: fx.Node) -> fx.Node:
        """Weights one behind the other along their first dimension."""
        return self._node(torch.cat([self.tensor(node) for node in nodes]), before)

    def _node(self, tensor: Tensor, before: fx.Node) -> fx.Node:
        name = f"bolt_weight_{len(self._made)}"
        self._made[name] = tensor
        self._module.register_buffer(name, tensor, persistent=False)
        with before.graph.inserting_before(before):
            node = before.graph.get_attr(name)
        node.meta["val"] = tensor
        return node


def _padded_weight(layer: _Dense, weights: _Weights) -> tuple[fx.Node, fx.Node | None]:
    n, k = _shape(layer.weight)
    gemm, pad = layer.gemm, torch.nn.functional.pad
    weight, bias = layer.weight, layer.bias
    if (gemm.n, gemm.k) != (n, k):
        weight = weights.changed(weight, lambda w: pad(w, (0, gemm.k - k, 0, gemm.n - n)), layer.product)
        if bias is not None and gemm.n != n:
            bias = weights.changed(bias, lambda b: pad(b, (0, gemm.n - n)), layer.product)
    return weight, bias


def _replace_dense(layer: _Dense, weights: _Weights, profiler: Profiler, report: Report) -> None:
    gemm, (n, k) = layer.gemm, _shape(layer.weight)
    constant = layer.weight.op == "get_attr" and (layer.bias is None or layer.bias.op == "get_attr")
    if (gemm.n, gemm.k) != (n, k) and not constant:
        report.left["dense of sizes to pad whose weight is computed"] += 1
        return
    weight, bias = _padded_weight(layer, weights)
    report.padded += alignment(n, k) != PADDING
    build = _Build(layer.last)
    x = build.padded(build.rows(layer.x, (gemm.m, k)), (gemm.k - k,))
    number = profiler.pick(gemm).candidate
    out = build(torch.ops.stof_bolt.gemm.default, x, weight, bias, gemm.number, number)
    build.finish(out, gemm.n, n)
    report.launches[f"dense+{gemm.epilogue}" if layer.bias is not None else "dense"] += 1
    report.gemms[gemm] += 1


def _persistent(first: _Dense, second: _Dense, profiler: Profiler, report: Report) -> bool:
    """Fuses two dense layers in a row if their sizes allow it and it is faster; says why not otherwise."""
    pair = Pair(first.gemm, second.gemm)
    (n0, k0), (n1, k1) = _shape(first.weight), _shape(second.weight)
    test = residence(pair.first.m, n0, k0, n1, k1, pair.second.m)
    if test.refusal:
        report.chains[pair, test.refusal] += 1
        return False
    kernel = profiler.pick_pair(pair, test.kernels)
    if kernel is None:
        report.chains[pair, "slower than two kernels"] += 1
        return False
    build = _Build(second.last)
    out = build(
        torch.ops.stof_bolt.persistent.default,
        *(build.rows(first.x, (pair.first.m, k0)), first.weight, first.bias, pair.first.number),
        *(second.weight, second.bias, pair.second.number, PERSISTENT.index(kernel)),
    )
    build.finish(out, n1, n1)
    report.chains[pair, ""] += 1
    report.launches[f"persistent in {kernel.residence}"] += 1
    return True


def _replace_batched(node: fx.Node, profiler: Profiler, report: Report) -> None:
    """A batched product: the right operand is turned to (n, k), inner sizes are padded to 8."""
    a, b = node.args
    if {str(t.meta["val"].dtype) for t in (a, b)} != {"torch.float16"}:
        report.left[f"batch_matmul in {a.meta['val'].dtype}".replace("torch.", "")] += 1
        return
    (*outer, m, k), n = _shape(a), _shape(b)[-1]
    if not outer or list(_shape(b)[:-2]) != outer:
        report.left["product with broadcast operands"] += 1
        return
    batch = math.prod(outer)
    gemm = Gemm(m, padded(n), padded(k), batch)
    build = _Build(node)
    left = build.padded(build.rows(a, (batch, m, k)), (gemm.k - k,))
    turned = build(aten.transpose.int, b, -1, -2)
    right = build.padded(build.rows(turned, (batch, n, k)), (gemm.k - k, gemm.n - n))
    out = build(torch.ops.stof_bolt.gemm.default, left, right, None, 0, profiler.pick(gemm).candidate)
    build.finish(out, gemm.n, n)
    report.padded += alignment(n, k) != PADDING
    report.launches["batch_matmul"] += 1
    report.gemms[gemm] += 1


class _Build:
    """New nodes before ``node``, whose result they replace."""

    def __init__(self, node: fx.Node):
        self._node = node

    def __call__(self, target, *args) -> fx.Node:
        with self._node.graph.inserting_before(self._node):
            return self._node.graph.call_function(target, args)

    def rows(self, x: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        """Contiguous in another shape."""
        return self(aten.contiguous.default, self(aten.reshape.default, x, list(shape)))

    def padded(self, x: fx.Node, by: tuple[int, ...]) -> fx.Node:
        """Zeros behind the last dimensions, the last one first."""
        if not any(by):
            return x
        return self(aten.constant_pad_nd.default, x, [size for more in by for size in (0, more)], 0)

    def finish(self, out: fx.Node, found: int, wanted: int) -> None:
        """The first ``wanted`` of ``found`` columns in the replaced node's shape, in its place."""
        if found != wanted:
            out = self(aten.slice.Tensor, out, -1, 0, wanted)
        out = self(aten.reshape.default, out, list(_shape(self._node)))
        out.meta["val"] = self._node.meta["val"]
        self._node.replace_all_uses_with(out)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)
