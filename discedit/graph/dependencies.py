"""torch-pruning's dependency graph of a model, with what it cannot follow cut out of it.

torch-pruning 1.6.1 gives a network up as a whole when one operation in it has a form that it does not know. Here the
graph is put together step by step: an operation at which a step fails is cut out and named, so that the channels that
enter or leave it stay whole and the rest can be followed. Parts of a split and of a concatenation are told apart by the
edges of autograd's graph, not by the order in which torch-pruning comes by. Every output of the model ends the graph,
and where other modules run in train mode, their pass is followed as well.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from discedit.model.attention import Untraceable as Untraceable
from discedit.model.forward import call, hooked, tensors_in
from discedit.model.functional import LayersCalled
from discedit.model.trace import ModelTrace, in_training, training_branches

# Operations that may mix channels, or move them, and that torch-pruning takes for others that do not.
_MIXING = re.compile(
    r"(Unsafe)?View|Reshape|AsStrided|(Unsafe)?Split|Unbind|Stack|Index|Select|Slice|Gather|Scatter|Take|Roll|Flip|"
    r"Sort|Topk|Repeat|Unfold|Pixel|Fft|Cum|Glu|.*Shuffle|Bmm|Mm|Addmm|Mv|Dot|Convolution|Mkldnn|Constant|Permute|Transpose|Rnn|Lstm|Gru"
)
_PRODUCTS = re.compile("(Addmm|Mm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Linear|(Mkldnn)?Convolution|MkldnnLinear)Backward")
_SAME = re.compile("(T|Transpose|Permute|View|UnsafeView|Reshape|ReshapeAlias|Unsqueeze|Expand|ToCopy|Clone)Backward")
_SIGNED = 2**64  # autograd keeps a negative axis as an unsigned number


class DependencyTrace:
    """What torch-pruning makes of a model, which is in eval mode afterwards, with its buffers as they were.

    Args:
        trace: of the model, train mode included; its parameters want gradients.

    Attributes:
        graph: its dependency graph, whose index mappings are settled.
        trained: the modules that run in train mode alone.
        used: names of the parameters that the outputs come from.
        outputs: what stands for an output in the graph, by identity -> where it stands.
        opaque: what torch-pruning cannot follow, by identity -> why channels there must stay.
        doubtful: what it follows as if it worked channel by channel, which it need not, by identity -> what it is, and
            the module in which it stands.
    """

    def __init__(self, trace: ModelTrace, inputs: Any) -> None:
        import torch_pruning  # here, so that what only scores does without it

        self.trace, self.model, self.inputs = trace, trace.model, inputs
        self.names = {module: name for name, module in self.model.named_modules()}
        self.graph = torch_pruning.DependencyGraph()
        for kind in (nn.GRU, nn.RNN):  # read their inputs as nn.LSTM does, which torch-pruning knows
            self.graph.register_customized_layer(kind, torch_pruning.pruner.function.LSTMPruner())
        registered = map(torch_pruning.ops.type2class, self.graph.REGISTERED_PRUNERS)
        self.kinds = (*registered, *self.graph.CUSTOMIZED_PRUNERS)  # modules that torch-pruning takes as a whole
        nested = trace.nested | (trace.training.nested if trace.training else set())
        # torch-pruning looks at the outputs of its layers while the model runs, and dies of those that are no tensors.
        self.odd = [module for module, name in self.names.items() if name in nested and isinstance(module, self.kinds)]
        self.roots: dict[str, Tensor] = {}  # where an output stands -> what ends the graph there
        self.owners: dict[Any, nn.Module] = {}  # what computes a module's output -> the module
        self.within: list[str] = []  # modules that run now
        self.places: dict[Any, str] = {}  # what computes something -> the module in which it stands
        self.concats: dict[Any, list[int]] = {}
        self.opaque: dict[int, str] = {}
        hooks = {module: set(module._forward_hooks) for module in self.model.modules()}
        try:
            with (
                hooked([handle for module in self.model.modules() for handle in self._hooks(module)]),
                torch.random.fork_rng([trace.device] if trace.device.type == "cuda" else []),
                torch.enable_grad(),
                _Rewritten(self.concats),
                LayersCalled(self.model, for_graph=True),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                self._build()
        finally:
            for module, before in hooks.items():  # torch-pruning leaves its own behind when the model raises
                for key in module._forward_hooks.keys() - before:
                    del module._forward_hooks[key]
        edges = self._edges()
        node_of = self.graph.module2node
        nodes = {node.grad_fn: node for node in node_of.values()}
        nodes |= {function: node_of[m] for function, m in self.owners.items() if m in node_of}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._settle(edges, nodes)
        self.outputs = {
            id(nodes[root.grad_fn].module): place for place, root in self.roots.items() if root.grad_fn in nodes
        }
        # A module in several places of the pass, or a layer whose parameters another function reads, is used as well.
        leaves = {id(function.variable) for function in edges if hasattr(function, "variable")}
        self.used = {name for name, parameter in self.model.named_parameters() if id(parameter) in leaves}
        self.trained = set() if trace.training is None else trace.training.runs.keys() - trace.runs.keys()
        self.doubtful = {
            id(node.module): (self._named(node), self._stands_in(node))
            for node in node_of.values()
            if node.module not in self.names and not isinstance(node.module, nn.Parameter)
            if _is_own(node.grad_fn) or _MIXING.match(node.grad_fn.name())
        }

    def _hooks(self, module: nn.Module) -> list[Any]:
        """Hooks that note what is computed in which module."""
        if isinstance(module, torch.jit.ScriptModule):  # takes none
            return []
        name = self.names[module]

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._place(_functions((args, kwargs)), self.within[-1] if self.within else "")
            self.within.append(name)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            while self.within and self.within.pop() != name:
                pass  # left by an exception
            functions = _functions(output)
            self._place(functions, name)
            if functions and isinstance(module, self.kinds):
                self.owners[functions[0]] = module

        return [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]

    def _place(self, functions: Iterable[Any], name: str) -> None:
        """What had been computed by now, and stands in no other module, stands in this one."""
        stack = list(functions)
        while stack:
            function = stack.pop()
            if function not in self.places:
                self.places[function] = name
                stack += [source for source, _ in function.next_functions if source is not None]

    def _build(self) -> None:
        """What torch-pruning's `build_dependency` does before it looks at shapes."""
        graph = self.graph
        graph.verbose, graph.model, graph.ignored_params = False, self.model, []
        graph._module2name = dict(self.names)
        graph.IGNORED_LAYERS_IN_TRACING.extend(self.odd)
        graph._param_to_name, graph.unwrapped_parameters = graph._detect_unwrapped_parameters(None)
        graph.module2node = graph._trace(self.model, self.inputs, self._forward, output_transform=None)
        graph._build_dependency(graph.module2node)

    def _forward(self, model: nn.Module, inputs: Any) -> list[Tensor]:
        """The outputs of a pass in eval mode, and of one in train mode where that runs or gives something else."""
        given = dict(tensors_in(call(model, inputs)))
        if self.trace.branches:
            try:
                with training_branches(model):
                    given |= in_training(call(model, inputs))
            except Exception:  # with gradients it may not run: then the trial of an edit has to show what it breaks
                self.within.clear()
        # Each of its own: what is an output and is read further on would else be no end of the graph.
        self.roots = {place: tensor * 1 for place, tensor in given.items() if tensor.grad_fn is not None}
        return list(self.roots.values())

    def _edges(self) -> dict[Any, list[tuple[Any, int]]]:
        """Each function that the outputs come from -> what it reads, in torch-pruning's order."""
        edges: dict[Any, list[tuple[Any, int]]] = {}
        stack = [root.grad_fn for root in reversed(self.roots.values())]
        while stack:
            function = stack.pop()
            if function not in edges:
                edges[function] = [edge for edge in getattr(function, "next_functions", ()) if edge[0] is not None]
                stack += [source for source, _ in edges[function]]
        return edges

    def _settle(self, edges: Mapping[Any, list[tuple[Any, int]]], nodes: Mapping[Any, Any]) -> None:
        """Index mappings of all operations, once and for all; what fails is cut out."""
        from torch_pruning.dependency import index_mapping, shape_infer
        from torch_pruning.ops import OPTYPE

        update = {
            OPTYPE.CONCAT: index_mapping.update_concat_index_mapping,
            OPTYPE.RESHAPE: index_mapping.update_reshape_index_mapping,
            OPTYPE.UNBIND: index_mapping.update_unbind_index_mapping,
            OPTYPE.EXPAND: index_mapping.update_expand_index_mapping,
            OPTYPE.SLICE: index_mapping.update_slice_index_mapping,
        }
        graph = self.graph
        everything = list(graph.module2node.values())
        for node in everything:
            node.enable_index_mapping = True  # torch-pruning gives it up behind tokens that are parameters
            if node.type == OPTYPE.OUTPUT:
                node.module.shape = None  # its second axis need not be that of channels
        readers: dict[Any, list[tuple[Any, int]]] = {}  # a node -> what reads it, and which of its parts
        for function, sources in edges.items():
            for source, part in sources:
                if function in nodes and source in nodes:
                    readers.setdefault(nodes[source], []).append((nodes[function], part))
        odd = {self.names[module] for module in self.odd}
        for node in everything:
            if self._stands_in(node) in odd:
                self._cut(node, "the layer's output is not one tensor")
            elif (
                node.module not in self.names
                and _reads_parameter(node.grad_fn)
                and not self._is_within(node, self.kinds)
            ):
                self._cut(node, "it multiplies with a parameter, but not by a call of a layer")
            elif _is_own(node.grad_fn) and any(part for _, part in readers.get(node, ())):
                self._cut(node, "it gives several tensors")
            elif self._is_within(node, nn.RNNBase):
                node.type = OPTYPE.ELEMENTWISE  # what it does with gates is none of the channels that are read
            elif node.type == OPTYPE.SPLIT:
                try:
                    _split(node, readers.get(node, []))
                except Exception as error:
                    self._cut(node, str(error))
        for _ in range(2):  # what is known of one helps with others
            for node in everything:
                if id(node.module) in self.opaque or node.type not in update:
                    continue
                try:
                    sizes = self.concats.get(node.grad_fn) if node.type == OPTYPE.CONCAT else None
                    if sizes and shape_infer.infer_in_channels_recursively(graph, node, [0]) in (None, sum(sizes)):
                        _concatenate(node, sizes, nodes)
                    else:
                        update[node.type](graph, node)
                except Exception as error:  # whatever torch-pruning makes of an operation that it does not know
                    self._cut(node, str(error))
        self._bound(everything, (*update, OPTYPE.SPLIT))

    def _bound(self, everything: list[Any], settled: tuple[Any, ...]) -> None:
        """No index grows without end, as it would where torch-pruning takes some views for others."""
        from torch_pruning.dependency import index_mapping

        tensors = (*self.model.parameters(), *self.model.buffers())
        widest = max((size for tensor in tensors for size in tensor.shape), default=0)
        for node in everything:
            for dependency in node.dependencies:
                first, second = dependency.index_mapping
                if isinstance(second, index_mapping._ConcatIndexMapping) and second.reverse:
                    first, second = second, first  # what became of the parts before it comes after it on the way back
                blame = partial(self._why, node if node.type in settled else dependency.target)
                mappings = [mapping for mapping in (first, second) if mapping is not None]
                dependency.index_mapping = [partial(_bounded, mapping, widest, blame) for mapping in mappings]

    def _is_within(self, node: Any, kinds: type | tuple[type, ...]) -> bool:
        """Whether an operation stands in a module of these classes."""
        return node.module not in self.names and isinstance(self.model.get_submodule(self._stands_in(node)), kinds)

    def _cut(self, node: Any, error: str) -> None:
        """Nothing is followed through the node any more; what reaches it learns why."""
        from torch_pruning.ops import OPTYPE

        self.opaque[id(node.module)] = self._why(node, error)
        # Neighbours still lead here, so that they learn why, but no index is to be mapped on the way.
        for neighbour in (*node.inputs, *node.outputs):
            for dependency in neighbour.dependencies:
                if dependency.target is node:
                    dependency.index_mapping = [None, None]
        node.dependencies = []
        node.type = OPTYPE.ELEMENTWISE

    def _why(self, node: Any, error: str) -> str:
        return f"torch-pruning cannot follow its channels through {self._named(node)}: {error}"

    def _named(self, node: Any) -> str:
        """An operation, by its name in autograd, and the module in which it stands."""
        place = self._stands_in(node)
        where = f"{place} ({type(self.model.get_submodule(place)).__name__})" if place else "the model's forward"
        return f"{node.grad_fn.name()} in {where}"

    def _stands_in(self, node: Any) -> str:
        """The module in which an operation stands."""
        return str(self.names.get(node.module) or self.places.get(node.grad_fn, ""))


def _functions(value: Any) -> list[Any]:
    """What computed the tensors in there."""
    return [tensor.grad_fn for _, tensor in tensors_in(value) if tensor.grad_fn is not None]


def _is_own(function: Any) -> bool:
    """Whether it is a `torch.autograd.Function` in Python."""
    return isinstance(function, torch.autograd.function.BackwardCFunction)


def _reads_parameter(function: Any) -> bool:
    """Whether it is a product with a parameter, be it viewed or cast: torch-pruning takes it for one by channels."""
    if function is None or not _PRODUCTS.match(function.name()):
        return False
    for source, _ in function.next_functions:
        while source is not None and _SAME.match(source.name()) and len(source.next_functions) == 1:
            source = source.next_functions[0][0]
        if source is not None and hasattr(source, "variable") and source.variable.ndim > 1:
            return True
    return False


def _axis(function: Any, ndim: int) -> int:
    """The axis that a function works along, counted from the front."""
    dim = int(function._saved_dim)
    return dim - _SIGNED + ndim if dim >= _SIGNED // 2 else dim


def _split(node: Any, readers: list[tuple[Any, int]]) -> None:
    """Index mappings between the parts of a split and what reads each, as far as it splits channels."""
    from torch_pruning.dependency.index_mapping import _SplitIndexMapping

    function = node.grad_fn
    shape = tuple(getattr(function, "_saved_self_sym_sizes", ()))
    if not shape or not hasattr(function, "_saved_dim"):
        raise ValueError("what it splits is not known")
    axis = _axis(function, len(shape))
    if (axis != 1 and axis != len(shape) - 1) or (axis > 1 and len(shape) > 3 and function._saved_dim == axis):
        return  # windows, heads or positions
    if hasattr(function, "_saved_split_sizes"):
        sizes = [int(size) for size in function._saved_split_sizes]
    else:
        step = int(function._saved_split_size)
        sizes = [min(step, shape[axis] - start) for start in range(0, shape[axis], max(step, 1))]
    ends = list(itertools.accumulate(sizes, initial=0))
    parts: dict[Any, Iterator[int]] = {}
    for reader in dict.fromkeys(reader for reader, _ in readers):
        own = [part for other, part in readers if other is reader]
        parts[reader] = iter(own)
        _map_spans(node, reader, _SplitIndexMapping, [ends[part : part + 2] for part in own], 0)
    node.module.split_sizes = [sizes[next(parts[reader])] for reader in node.outputs]  # as shapes are looked for
    node.module.offsets = list(itertools.accumulate(node.module.split_sizes, initial=0))


def _concatenate(node: Any, sizes: list[int], nodes: Mapping[Any, Any]) -> None:
    """Index mappings of a concatenation of known widths, constants among them."""
    from torch_pruning.dependency.index_mapping import _ConcatIndexMapping

    ends = list(itertools.accumulate(sizes, initial=0))
    spans: dict[Any, list[list[int]]] = {}
    for index, (source, _) in enumerate(node.grad_fn.next_functions):
        if source in nodes:
            spans.setdefault(nodes[source], []).append(ends[index : index + 2])
    for source, own in spans.items():
        _map_spans(source, node, _ConcatIndexMapping, own, 1)
    node.module.offsets = ends


def _map_spans(source: Any, reader: Any, mapping: Any, spans: list[list[int]], turn: int) -> None:
    """Between what gives channels and what reads them, each time a span of them; `turn`: of two mappings, which."""
    for one, other, reverse in ((source, reader, False), (reader, source, True)):
        for dependency, span in zip([d for d in one.dependencies if d.target is other], spans, strict=True):
            dependency.index_mapping[turn] = mapping(offset=span, reverse=reverse)


class _Rewritten(TorchFunctionMode):
    """Does what torch-pruning cannot follow in a way that it can.

    It looks for channels on axis 1: concatenations and crops of maps with channels last, such as Swin's merging of
    patches, are done there, and the widths of what is concatenated are noted. A gated linear unit becomes the product
    of two parts.
    """

    def __init__(self, sizes: dict[Any, list[int]]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (functional.glu, torch._C._nn.glu):
            given = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
            value, gate = given["input"].chunk(2, given.get("dim", -1))
            return value * gate.sigmoid()
        if func in (torch.cat, torch.concat, torch.concatenate) and "out" not in kwargs:
            given = {**dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}
            parts, dim = given["tensors"], given.get("dim", given.get("axis", 0))
            last = isinstance(dim, int) and parts[0].ndim > 2 and dim in (-1, parts[0].ndim - 1)
            joined = torch.cat([part.movedim(-1, 1) for part in parts], 1) if last else func(*args, **kwargs)
            if (joined.ndim in (2, 4, 5) and dim in (1, 1 - joined.ndim)) or last:
                self.sizes[joined.grad_fn] = [part.shape[-1 if last else 1] for part in parts]
            return joined.movedim(1, -1).contiguous() if last else joined
        if func is Tensor.__getitem__ and args[0].ndim == 4 and isinstance(args[1], tuple):
            index = [slice(None) if part is Ellipsis else part for part in args[1]]
            if len(index) == 4 and all(isinstance(part, slice) for part in index) and index[-1] == slice(None):
                return args[0].movedim(-1, 1)[index[0], :, index[1], index[2]].movedim(1, -1)
        return func(*args, **kwargs)


def _bounded(mapping: Callable[[Any], Any], limit: int, blame: Callable[[str], str], indices: Any) -> Any:
    try:
        mapped = mapping(indices)
    except Exception as error:
        raise Untraceable(blame(str(error))) from error
    if any(not 0 <= index.idx < limit for index in mapped):
        raise Untraceable(blame("its indices grow without end"))
    return mapped
