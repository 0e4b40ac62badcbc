"""What hangs on what, in networks small enough to know the answer by hand."""

import pytest
import torch
from helpers import Net
from torch import nn
from torch.nn import functional

from discedit import prune, zoo
from discedit.graph.pruning_graph import KINDS, Components, Graph
from discedit.scoring.scores import Scores

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Multi-head attention with separate layers, with a bias per head, and a gate on what it puts out."""

    def __init__(self, width, num_heads, head_dim):
        super().__init__()
        self.num_heads, self.head_dim, self.inner_dim = num_heads, head_dim, num_heads * head_dim
        self.key, self.query, self.value, self.gate = (nn.Linear(width, self.inner_dim) for _ in range(4))
        self.norm = nn.LayerNorm(head_dim)
        self.bias = nn.Parameter(torch.randn(num_heads, 1, 64))
        self.out = nn.Linear(self.inner_dim, width)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.num_heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        found = functional.scaled_dot_product_attention(self.norm(q), k, v, self.bias[:, :, :t])
        found = found.transpose(1, 2).reshape(n, t, self.inner_dim)
        return self.out(found * self.gate(x).sigmoid())


class SharedKeys(nn.Module):
    """Grouped-query attention: two heads have one key and one value."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.num_heads = 4
        self.query, self.out = nn.Linear(width, 4 * head_dim), nn.Linear(4 * head_dim, width)
        self.key, self.value = nn.Linear(width, 2 * head_dim), nn.Linear(width, 2 * head_dim)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.query(x).view(n, t, 4, -1).transpose(1, 2)
        k, v = (f(x).view(n, t, 2, -1).transpose(1, 2).repeat_interleave(2, 1) for f in (self.key, self.value))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def conv(width_in, width, **options):
    return nn.Conv2d(width_in, width, 3, padding=1, **options)


def head(net, x):
    return net.head(x.mean((2, 3)))


def layers_of(net):
    return [name for name, module in net.named_modules() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))]


def found(net, kinds=KINDS, x=X):
    return Graph("prune", net.eval(), x).find(layers_of(net), kinds)


def attention(module=Attention, *sizes):
    torch.manual_seed(0)
    return Net(
        lambda s, x: s.head(s.attention(s.embed(x.flatten(2).transpose(1, 2))).mean(1)),
        embed=nn.Linear(3, 10),
        attention=module(10, *sizes or (3, 4)),
        head=nn.Linear(10, 2),
    )


def jointly_normed():
    net = attention()
    net.attention.out = nn.Sequential(nn.LayerNorm(12), net.attention.out)
    return net


def residual():
    torch.manual_seed(0)
    return Net(
        lambda s, x: head(s, s.n(s.c(s.b(s.a(x)).relu()) + s.a(x))),
        a=conv(3, 6), b=conv(6, 5), c=conv(5, 6), n=nn.BatchNorm2d(6), head=nn.Linear(6, 4),
    )  # fmt: skip


def singles(count):
    return tuple((i,) for i in range(count))


def test_kinds_rows_and_layers():
    got, skipped = found(residual())
    assert got == {
        "a": Components("a", "stream", singles(6), ("a", "c")),
        "b": Components("b", "filters", singles(5), ("b",)),
    }
    assert skipped == {"head": "the model's output would change its shape"}
    got, skipped = found(residual(), ("filters",))
    assert list(got) == ["b"]
    assert skipped["a"] == "it shares its channels with c"
    assert skipped["c"] == "it shares its channels with a"
    got, skipped = found(residual(), ("neurons",))
    assert not got
    assert skipped["b"] == "its components are filters, which are not among those to remove"


def test_a_stream_goes_by_its_first_layer_of_those_asked_for():
    graph = Graph("prune", residual().eval(), X)
    assert list(graph.find(["c", "b", "a"], KINDS)[0]) == ["b", "a"]
    assert list(graph.find(["c", "b"], KINDS)[0]) == ["c", "b"]


def test_a_graph_is_not_used_up():
    net = residual().eval()
    graph = Graph("prune", net, X)
    chosen = {"a": [1, 4], "b": [0]}
    first = graph.plan(chosen)
    assert graph.consumers(chosen) == [("b", [1, 4]), ("c", [0]), ("head", [1, 4])]
    assert graph.producers(chosen) == {"a": [1, 4], "b": [0], "c": [1, 4]}
    assert graph.plan({"b": [2]})[1] == {}
    assert graph.plan(chosen) == first
    assert first[1] == {}
    kept = {(op.target, op.dim): op.index for op in first[0] if op.kind == "keep"}
    six, five = (0, 2, 3, 5), (1, 2, 3, 4)
    assert kept == {
        ("a.weight", 0): six, ("a.bias", 0): six, ("b.weight", 1): six, ("c.weight", 0): six, ("c.bias", 0): six,
        ("n.weight", 0): six, ("n.bias", 0): six, ("n.running_mean", 0): six, ("n.running_var", 0): six,
        ("head.weight", 1): six, ("b.weight", 0): five, ("b.bias", 0): five, ("c.weight", 1): five,
    }  # fmt: skip
    changed = {(op.target, op.name): (op.before, op.value) for op in first[0] if op.kind == "attribute"}
    assert changed == {
        ("a", "out_channels"): (6, 4), ("b", "in_channels"): (6, 4), ("c", "out_channels"): (6, 4),
        ("n", "num_features"): (6, 4), ("head", "in_features"): (6, 4),
        ("b", "out_channels"): (5, 4), ("c", "in_channels"): (5, 4),
    }  # fmt: skip


def squeezed(s, x):
    x = s.b(s.a(x).relu())
    return s.head(s.c(x * s.up(s.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()).mean((2, 3)))


class ResponseNorm(nn.Module):
    """Divides by the mean over channels, as ConvNeXt V2 does."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.bias + self.weight * x * size / (size.mean(-1, keepdim=True) + 1e-6)


def test_a_sum_in_place_on_a_view_is_a_stream():
    def function(s, x):
        both = torch.cat([s.a(x), s.b(x)], 1)[:, :6]
        both += s.c(x)
        return s.head(both.relu().mean((2, 3)))

    torch.manual_seed(0)
    net = Net(function, a=conv(3, 3), b=conv(3, 3), c=conv(3, 6), head=nn.Linear(6, 2)).eval()
    assert {parts.kind for parts in Graph("prune", net, X).find("abc", KINDS)[0].values()} <= {"stream"}


class Shifted(nn.Module):
    """Its channels have a place: what each gives comes from the one before."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x.roll(1, -1) * self.weight


def test_a_module_that_takes_channels_by_their_place_is_no_norm():
    torch.manual_seed(0)
    net = Net(
        lambda s, x: s.head(s.c(s.n(s.a(x.movedim(1, -1)))).mean((1, 2))), a=nn.Linear(3, 6), n=Shifted(6),
        c=nn.Linear(6, 4), head=nn.Linear(4, 2),
    ).eval()  # fmt: skip
    failed = Graph("prune", net, X).plan({"a": [1]})[1]
    assert "Shifted takes channels by their place" in failed["a"]


INNER = {  # network; layer -> number of its components, layers that produce them, those that follow
    "squeeze and excitation": (
        lambda: Net(
            squeezed, a=conv(3, 6), b=conv(6, 6, groups=6), down=conv(6, 4), up=conv(4, 6), c=conv(6, 4),
            head=nn.Linear(4, 2),
        ),
        {"a": (6, ("a", "up"), ("b",)), "down": (4, ("down",), ()), "c": (4, ("c",), ())},
    ),
    "a gate beside": (
        lambda: Net(
            lambda s, x: s.head(s.c(s.a(x) * s.b(x).sigmoid()).mean((2, 3))), a=conv(3, 6), b=conv(3, 6), c=conv(6, 4),
            head=nn.Linear(4, 2),
        ),
        {"a": (6, ("a", "b"), ()), "c": (4, ("c",), ())},
    ),
    "response norm": (
        lambda: Net(
            lambda s, x: s.head(s.c(s.n(s.a(x.movedim(1, -1)).relu())).mean((1, 2))), a=nn.Linear(3, 6),
            n=ResponseNorm(6), c=nn.Linear(6, 4), head=nn.Linear(4, 2),
        ),
        {"a": (6, ("a",), ()), "c": (4, ("c",), ())},
    ),
    "groups": (
        lambda: Net(
            lambda s, x: s.head(s.d(s.c(s.b(s.a(x))) * s.g(x)).mean((2, 3))), a=conv(3, 8), b=conv(8, 12, groups=4),
            c=nn.GroupNorm(6, 12), g=conv(3, 12), d=conv(12, 4), head=nn.Linear(4, 2),
        ),
        {"a": (2, ("a", "b", "g"), ()), "d": (4, ("d",), ())},  # of 3 and of 2 channels: 6 at a time
    ),
    "several outputs for each input": (
        lambda: Net(
            lambda s, x: s.head(s.c(s.b(s.a(x))).mean((2, 3))), a=conv(3, 4), b=conv(4, 12, groups=4), c=conv(12, 5),
            head=nn.Linear(5, 2),
        ),
        {"a": (4, ("a", "b"), ()), "c": (5, ("c",), ())},
    ),
    "a norm over all channels of maps": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.n(s.a(x))).mean((2, 3))), a=conv(3, 8), n=nn.GroupNorm(1, 8), b=conv(8, 4),
            head=nn.Linear(4, 2),
        ),
        {"a": (8, ("a",), ()), "b": (4, ("b",), ())},
    ),
    "a root mean square norm": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.n(s.a(x.movedim(1, -1)))).mean((1, 2))), a=nn.Linear(3, 8), n=nn.RMSNorm(8),
            b=nn.Linear(8, 4), head=nn.Linear(4, 2),
        ),
        {"a": (8, ("a",), ()), "b": (4, ("b",), ())},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INNER)
def test_what_is_multiplied_or_normalised_within_a_block_is_no_stream(name):
    make, expected = INNER[name]
    torch.manual_seed(0)
    net = make().eval()
    graph = Graph("prune", net, X)
    got, skipped = graph.find([n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))], KINDS[:3])
    assert {layer: (len(parts.rows), parts.layers, parts.followers) for layer, parts in got.items()} == expected
    assert list(skipped) == ["head"]
    chosen = {layer: [0] for layer in got}
    operations, failed = graph.plan(chosen)
    assert operations
    assert not failed


def test_footprint_of_one_component():
    graph = Graph("prune", residual().eval(), X)
    assert graph.footprint("b") == [("b.weight", 0, 1), ("b.bias", 0, 1), ("c.weight", 1, 1)]
    flat = Net(lambda s, x: s.head(s.a(x).flatten(1)), a=conv(3, 4), head=nn.Linear(256, 2)).eval()
    assert Graph("prune", flat, X).footprint("a") == [("a.weight", 0, 1), ("a.bias", 0, 1), ("head.weight", 1, 64)]
    heads = Graph("prune", attention().eval(), X).footprint("attention.value")
    inside = [
        (f"attention.{name}.{kind}", 0, 4) for name in ("query", "key", "value", "gate") for kind in ("weight", "bias")
    ]
    assert sorted(heads) == sorted([*inside, ("attention.out.weight", 1, 4), ("attention.bias", 0, 1)])


def test_whole_heads_go():
    net = attention().eval()
    graph = Graph("prune", net, X)
    got, skipped = graph.find(layers_of(net), KINDS)
    assert got["attention.value"] == Components(
        "attention.value",
        "heads",
        tuple(tuple(range(4 * h, 4 * h + 4)) for h in range(3)),
        ("attention.value",),
        tuple(f"attention.{name}" for name in ("key", "query", "gate")),
    )
    others = [f"attention.{name}" for name in ("query", "key", "gate")]
    assert not set(others) & {*got, *skipped}
    alone = graph.find(others, KINDS)[1]
    assert set(alone.values()) == {"its rows belong to the heads that attention.value stands for"}
    operations, failed = graph.plan({"attention.value": [1]})
    assert not failed
    left = (0, 1, 2, 3, 8, 9, 10, 11)
    assert {op.index for op in operations if op.kind == "keep"} == {left, (0, 2)}
    changed = {(op.target, op.name): op.value for op in operations if op.kind == "attribute"}
    assert changed["attention", "num_heads"] == 2
    assert changed["attention", "inner_dim"] == 8
    assert ("attention", "head_dim") not in changed
    assert not any("norm" in op.target for op in operations)


class Table(nn.Module):
    """Biases by head, which are read without a call of the module."""

    def __init__(self, tokens, heads):
        super().__init__()
        self.table, self.shape = nn.Parameter(torch.randn(tokens * tokens, heads)), (tokens, tokens, heads)

    def bias(self):
        return self.table.view(self.shape).permute(2, 0, 1)


class HeadByHead(nn.Module):
    """One layer gives queries, keys and wider values, head by head, through a batch norm, as in LeViT."""

    def __init__(self, width, heads, tokens, beside):
        super().__init__()
        self.num_heads, self.val_attn_dim = heads, heads * 4
        self.qkv, self.norm = nn.Linear(width, heads * 8, bias=False), nn.BatchNorm1d(heads * 8)
        self.out = nn.Linear(heads * 4, width)
        if not beside:
            self.table = Table(tokens, heads)

    def forward(self, x, bias=None):
        samples, tokens, _ = x.shape
        x = self.norm(self.qkv(x).flatten(0, 1)).view(samples, tokens, self.num_heads, -1).transpose(1, 2)
        q, k, v = x.split([2, 2, 4], 3)
        attention = (q @ k.transpose(2, 3) + (self.table.bias() if bias is None else bias)).softmax(-1)
        return self.out((attention @ v).transpose(1, 2).reshape(samples, tokens, self.val_attn_dim))


@pytest.mark.parametrize("beside", [False, True])
def test_heads_that_lie_one_by_one_with_tables_of_biases(beside):
    torch.manual_seed(0)
    block = nn.Module()
    block.attention = HeadByHead(6, 4, 64, beside)
    if beside:
        block.table = Table(64, 4)

    def function(s, x):
        bias = s.block.table.bias() if beside else None
        return s.head(s.block.attention(s.a(x.flatten(2).transpose(1, 2)), bias).mean(1))

    net = Net(function, a=nn.Linear(3, 6), block=block, head=nn.Linear(6, 2)).eval()
    graph = Graph("prune", net, X)
    got = graph.find(["block.attention.qkv"], ["heads"])[0]["block.attention.qkv"]
    assert got.rows == tuple(tuple(range(8 * h, 8 * h + 8)) for h in range(4))
    operations, failed = graph.plan({"block.attention.qkv": [1, 2]})
    assert not failed
    table = "block.table.table" if beside else "block.attention.table.table"
    kept = {op.target: op.index for op in operations if op.kind == "keep"}
    assert kept[table] == (0, 3)
    assert len(kept["block.attention.norm.running_mean"]) == 16


def test_heads_count_by_the_mean_over_their_rows():
    net = attention().eval()
    values = torch.zeros(12, 2, dtype=torch.float64)
    values[:, 0] = torch.tensor([0.0, 0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6])
    rest = {"bound": "minimax", "witness": "quadratic", "statistic": "mean", "norms": {}}
    scores = Scores({"attention.value": values}, {"attention.value": values.char()}, torch.tensor([9, 9]), **rest)
    edit = prune(net, scores, ratio=0.34, example_inputs=X, criterion="max")
    assert edit.recipe.components == {"attention.value": [4, 5, 6, 7]}
    assert edit.widths == {"attention.value": 12}
    assert edit.model.attention.num_heads == 2


@pytest.mark.parametrize("components", ["stream", ("filters", "stream")])
def test_streams_are_opt_in(components):
    net = residual().eval()
    values = {
        name: torch.rand(len(module.weight), 2).double()
        for name, module in net.named_modules()
        if name in "abc" and name
    }
    rest = {"bound": "minimax", "witness": "quadratic", "statistic": "mean", "norms": {}}
    scores = Scores(values, {n: v.char() for n, v in values.items()}, torch.tensor([9, 9]), **rest)
    assert list(prune(net, scores, ratio=0.5, example_inputs=X, criterion="max").recipe.components) == ["b"]
    edit = prune(net, scores, ratio=0.5, example_inputs=X, components=components, criterion="max")
    assert list(edit.recipe.components) == (["a"] if components == "stream" else ["a", "b"])
    assert edit.recipe.components["a"] == sorted(values["a"].amax(1).argsort()[:3].tolist())
    data = [torch.randn(40, 3, 8, 8)]
    repaired = prune(net, scores, ratio=0.5, example_inputs=X, components=components, data=data, criterion="max")
    before, plain, better = (m(data[0]).detach() for m in (net, edit.model, repaired.model))
    assert (better - before).square().mean() < 0.5 * (plain - before).square().mean()


@pytest.mark.parametrize("components", ["layers", ("filters", "rows"), ()])
def test_unknown_components(components):
    with pytest.raises(ValueError, match="prune: components must "):
        prune(residual(), None, ratio=0.5, example_inputs=X, components=components)


def multihead():
    def function(s, x):
        tokens = s.embed(x.flatten(2).transpose(1, 2))
        tokens = tokens + s.attention(tokens, tokens, tokens)[0]
        return s.head(s.b(s.a(tokens).relu()).mean(1))

    return Net(
        function,
        embed=nn.Linear(3, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True),
        a=nn.Linear(8, 6), b=nn.Linear(6, 7), head=nn.Linear(7, 2),
    )  # fmt: skip


def other_positions():
    def function(s, x):
        x = s.a(x)
        return head(s, functional.pad(x, (0, 0, 0, 0, 1, 1)) + s.b(x))

    return Net(function, a=conv(3, 4), b=conv(4, 6), head=nn.Linear(6, 2))


def half_shared():
    """The first two channels of b meet those of a, the others are b's own."""

    def function(s, x):
        x, y = s.a(x), s.b(x)
        return head(s, torch.cat([x + y[:, :2], y[:, 2:]], 1))

    return Net(function, a=conv(3, 2), b=conv(3, 5), head=nn.Linear(5, 2))


def paired():
    """Channels 2i and 2i + 1 of a are one of b."""

    def function(s, x):
        x = s.a(x)
        return head(s, s.b(x[:, ::2] * x[:, 1::2]))

    return Net(function, a=conv(3, 8), b=conv(4, 6), head=nn.Linear(6, 2))


def joined():
    """The two channels of a are one of b."""

    def function(s, x):
        x = s.a(x)
        return head(s, s.b(x[:, :1] * x[:, 1:]))

    return Net(function, a=conv(3, 2), b=conv(1, 6), head=nn.Linear(6, 2))


def circular():
    """Four channels of a are one of c, and are taken apart again."""

    def function(s, x):
        x = s.a(x)
        folded = x.view(3, 16, 4, 4)
        return head(s, s.b(folded.view(3, 4, 8, 8) + x)) + s.c(folded).mean((2, 3))

    return Net(function, a=conv(3, 4), b=conv(4, 6), c=conv(16, 2), head=nn.Linear(6, 2))


def fused_gate():
    def function(s, x):
        first, second = s.a(x).chunk(2, 1)
        return head(s, s.b(first * second.sigmoid()))

    return Net(function, a=conv(3, 8), b=conv(4, 6), head=nn.Linear(6, 2))


def computed_norm():
    net = Net(
        lambda s, x: head(s, s.b(s.n(s.a(x)))), a=conv(3, 4), n=nn.BatchNorm2d(4), b=conv(4, 4), head=nn.Linear(4, 2)
    )
    nn.utils.parametrizations.weight_norm(net.n)
    return net


def shared_norm():
    net = Net(
        lambda s, x: head(s, s.b(s.n(s.a(x)))), a=conv(3, 4), n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4), b=conv(4, 4),
        head=nn.Linear(4, 2),
    )  # fmt: skip
    net.m.weight = net.n.weight
    return net


def wide_layer_norm():
    return Net(
        lambda s, x: head(s, s.b(s.n(s.a(x)))),
        a=conv(3, 4),
        n=nn.LayerNorm((4, 8, 8)),
        b=conv(4, 4),
        head=nn.Linear(4, 2),
    )


UNCLEAR = "it belongs to the attention of attention, whose heads cannot be told apart"
REFUSED = {  # network, and the reasons by layer
    "attention with shared keys": (
        lambda: attention(SharedKeys, 2),
        dict.fromkeys((f"attention.{name}" for name in ("query", "key", "value")), UNCLEAR),
    ),
    "attention with a norm over all heads": (
        jointly_normed,
        dict.fromkeys((f"attention.{name}" for name in ("query", "key", "value", "gate")), UNCLEAR),
    ),
    "one of several inputs for each output": (
        lambda: Net(lambda s, x: head(s, s.b(s.a(x))), a=conv(3, 8), b=conv(8, 4, groups=4), head=nn.Linear(4, 2)),
        {
            "a": "it shares its channels with b, of which b must stay: it is a Conv2d from 8 to 4 channels in 4 groups",
            "b": "it is a Conv2d from 8 to 4 channels in 4 groups, which cannot be cut",
        },
    ),
    "a stream at other positions": (
        other_positions,
        {name: f"it shares its channels with {other}, not channel by channel" for name, other in ("ab", "ba")},
    ),
    "a stream of some": (
        half_shared,
        {
            "a": "it shares its channels with b, not channel by channel",
            "b": "it shares its channels with a, not channel by channel",
        },
    ),
    "all filters in one": (joined, {"a": "its channels are split or folded"}),
    "views that lead round in circles": (circular, {"a": "torch-pruning cannot follow its channels"}),
    "a computed norm": (computed_norm, {"a": "a norm follows it whose weight is computed or shared"}),
    "a shared norm": (shared_norm, {"a": "a norm follows it whose weight is computed or shared"}),
    "a layer norm over maps": (wide_layer_norm, {"a": "a layer norm over several axes follows it"}),
    "a layer that does not run": (
        lambda: Net(lambda s, x: head(s, s.a(x)), a=conv(3, 4), b=conv(4, 4), head=nn.Linear(4, 2)),
        {"b": "it does not run on the example inputs"},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    make, reasons = REFUSED[name]
    torch.manual_seed(0)
    got, skipped = found(make())
    assert not set(got) & set(reasons)
    for layer, why in reasons.items():
        assert skipped[layer].startswith(why), skipped[layer]


def test_channels_that_meet_go_together():
    torch.manual_seed(0)
    graph = Graph("prune", paired().eval(), X)
    assert graph.find(["a"], ["filters"])[0]["a"].rows == ((0, 1), (2, 3), (4, 5), (6, 7))
    operations, failed = graph.plan({"a": [2]})
    assert not failed
    kept = {(op.target, op.dim): op.index for op in operations if op.kind == "keep"}
    assert kept["a.weight", 0] == (0, 1, 2, 3, 6, 7)
    assert kept["b.weight", 1] == (0, 1, 3)


def test_a_gate_goes_with_what_it_gates():
    torch.manual_seed(0)
    graph = Graph("prune", fused_gate().eval(), X)
    got = graph.find(["a"], ["filters"])[0]
    assert got["a"] == Components("a", "filters", ((0, 4), (1, 5), (2, 6), (3, 7)), ("a",))
    assert graph.footprint("a") == [("a.weight", 0, 2), ("a.bias", 0, 2), ("b.weight", 1, 1)]
    operations, failed = graph.plan({"a": [1]})
    assert not failed
    assert next(op.index for op in operations if op.target == "a.weight") == (0, 2, 3, 4, 6, 7)


def test_other_layers_beside_multihead_attention():
    got, skipped = found(multihead(), kinds=("neurons",))
    assert list(got) == ["a", "b"]
    assert skipped["embed"] == "it shares its channels with attention.out_proj"
    got, _ = found(multihead())
    assert got["embed"].kind == "stream"
    assert got["embed"].layers == ("embed", "attention.out_proj")


def test_shortcuts_padded_with_zeros_are_refused():
    torch.manual_seed(0)
    net = zoo.CifarResNet(1)
    got, skipped = found(net, x=torch.randn(1, 3, 32, 32))
    assert {layer: components.kind for layer, components in got.items()} == {
        f"layer{stage}.0.conv1": "filters" for stage in (1, 2, 3)
    }
    assert all("not channel by channel" in skipped[f"layer{stage}.0.conv2"] for stage in (1, 2, 3))


def shuffled(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def test_the_check_has_the_last_word():
    """torch-pruning follows neither a shuffle nor a sum over all channels."""
    torch.manual_seed(0)
    net = Net(lambda s, x: head(s, s.b(shuffled(s.a(x), 2)).relu()), a=conv(3, 10), b=conv(10, 4), head=nn.Linear(4, 2))
    operations, failed = Graph("prune", net.eval(), X).plan({"a": [0, 1, 2, 7], "b": [1]})
    assert list(failed) == ["a"]
    assert failed["a"].startswith("removing its channels is not the same as hiding them")
    assert {op.target for op in operations} == {"b", "b.weight", "b.bias", "head", "head.weight"}
    net = Net(
        lambda s, x: head(s, s.a(x) + s.b(x).sum((1, 2, 3), keepdim=True)),
        a=conv(3, 4), b=conv(3, 4), head=nn.Linear(4, 2),
    )  # fmt: skip
    operations, failed = Graph("prune", net.eval(), X).plan({"a": [1]})
    assert not operations
    why = "removing its channels is not the same as hiding them from the layers that read them"
    assert failed == {"a": why, "b": why}


def test_parameters_outside_layers():
    """Shifts per channel and per token go with the channels; those for all channels stay."""
    torch.manual_seed(0)

    def function(s, x):
        tokens = torch.cat([s.first.expand(3, -1, -1), s.a(x.flatten(2).transpose(1, 2))], 1)
        return s.head(s.b((s.scale * tokens + s.place(torch.arange(65))).relu()).mean(1))

    net = Net(
        function,
        a=nn.Linear(3, 7), scale=nn.Parameter(torch.rand(1)), first=nn.Parameter(torch.randn(1, 1, 7)),
        place=nn.Embedding(65, 7), b=nn.Linear(7, 5), head=nn.Linear(5, 2),
    )  # fmt: skip
    graph = Graph("prune", net.eval(), X)
    got, _ = graph.find(["a", "b"], KINDS)
    assert (got["a"].kind, got["b"].kind) == ("neurons", "neurons")
    assert {place for place in graph.footprint("a") if place[0][0] in "spf"} == {
        ("place.weight", 1, 1),
        ("first", 2, 1),
    }
    operations, failed = graph.plan({"a": [0, 6]})
    assert not failed
    assert next(op.value for op in operations if op.target == "place") == 5


def test_concatenations_behind_tokens_that_are_parameters():
    torch.manual_seed(0)

    def function(s, x):
        tokens = s.n(torch.cat([s.first.expand(3, -1, -1), s.a(x.flatten(2).transpose(1, 2))], 1))
        return s.head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))

    net = Net(
        function,
        a=nn.Linear(3, 7), first=nn.Parameter(torch.randn(1, 1, 7)), n=nn.LayerNorm(7), head=nn.Linear(14, 2),
    )  # fmt: skip
    graph = Graph("prune", net.eval(), X)
    assert graph.find(["a"], KINDS)[0]["a"].kind == "neurons"
    assert graph.consumers({"a": [2]}) == [("head", [2, 9])]
    assert graph.plan({"a": [2]})[1] == {}
    assert ("first", 2, 1) in graph.footprint("a")


@pytest.mark.parametrize("dots", [True, False])
def test_merged_patches_of_maps_with_channels_last(dots):
    torch.manual_seed(0)

    def function(s, x):
        x = s.a(x.permute(0, 2, 3, 1))
        four = [x[..., i::2, j::2, :] if dots else x[:, i::2, j::2, :] for i in range(2) for j in range(2)]
        return s.head(s.b(s.n(torch.cat(four, -1))).relu().mean((1, 2)))

    net = Net(function, a=nn.Linear(3, 5), n=nn.LayerNorm(20), b=nn.Linear(20, 6), head=nn.Linear(6, 2))
    graph = Graph("prune", net.eval(), X)
    assert graph.find(["a"], KINDS)[0]["a"] == Components("a", "neurons", singles(5), ("a",))
    assert graph.consumers({"a": [1]}) == [("b", [1, 6, 11, 16])]
    assert graph.plan({"a": [1, 4]})[1] == {}


def test_what_goes_along():
    torch.manual_seed(0)
    net = Net(
        lambda s, x: s.head(s.b(s.m(s.p(s.n(s.dw(s.a(x))))).transpose(1, 3)).mean((1, 2))),
        a=conv(3, 6), dw=conv(6, 6, groups=6), n=nn.InstanceNorm2d(6), p=nn.PReLU(6), m=nn.BatchNorm2d(6, affine=False),
        b=nn.Linear(6, 5), head=nn.Linear(5, 2),
    )  # fmt: skip
    graph = Graph("prune", net.eval(), X)
    assert graph.find(["dw", "a"], ["filters"]) == ({"a": Components("a", "filters", singles(6), ("a",), ("dw",))}, {})
    assert graph.find(["dw"], ["filters"])[0]["dw"].layers == ("a", "dw")
    operations, failed = graph.plan({"a": [2]})
    assert not failed
    assert {(op.target, op.name) for op in operations if op.kind == "attribute"} == {
        ("a", "out_channels"), ("dw", "in_channels"), ("dw", "out_channels"), ("dw", "groups"), ("n", "num_features"),
        ("p", "num_parameters"), ("m", "num_features"), ("b", "in_features"),
    }  # fmt: skip


def test_layer_norms_normalise_what_is_left():
    torch.manual_seed(0)
    net = Net(
        lambda s, x: s.head(s.b(s.n(s.a(x.flatten(1)))).relu()),
        a=nn.Linear(192, 9), n=nn.LayerNorm(9), b=nn.Linear(9, 8), head=nn.Linear(8, 2),
    ).eval()  # fmt: skip
    graph = Graph("prune", net, X)
    operations, failed = graph.plan({"a": [0, 5]})
    assert not failed
    assert next(op for op in operations if op.target == "n" and op.kind == "attribute").value == [7]
    assert graph.find(["a"], ["neurons"])[0]["a"].kind == "neurons"


@pytest.mark.parametrize("op", ["prune", "unlearn"])
def test_models_that_cannot_be_traced(op):
    with pytest.raises(ValueError, match=f"^{op}: the model cannot be traced on example_inputs: .*shape"):
        Graph(op, nn.Linear(4, 4), X)


def test_the_model_is_left_as_it_was():
    net = residual().train()
    net.a.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    Graph("prune", net, X).plan({"b": [1]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert not net.a.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
