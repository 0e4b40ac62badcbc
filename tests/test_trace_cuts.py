"""What torch-pruning cannot follow, what the model gives beside logits, and what runs in train mode alone: each layer
that such things concern is cut rightly or left whole with the reason, and the rest is pruned all the same."""

import copy
import re
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from helpers import Net, prune_with
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from discedit import AblateComponents, TopFraction, collect_moments, prune, score, unlearn
from discedit.graph.pruning_graph import KINDS, Graph

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(width_in, width, **options):
    return nn.Conv2d(width_in, width, 3, padding=1, **options)


def head(net, x):
    return net.head(x.mean((2, 3)))


def around(part, width_in=8, width=8):
    """a, b, the part, c, d and the head in a row."""
    torch.manual_seed(0)
    return Net(
        lambda s, x: head(s, s.d(s.c(s.part(s.b(s.a(x).relu()))).relu()).relu()),
        a=conv(3, 8), b=conv(8, width_in), part=part, c=conv(width, 8), d=conv(8, 6), head=nn.Linear(6, 4),
    ).eval()  # fmt: skip


def pruned(net, x=X, **options):
    return prune_with(net, criterion="l1", **{"ratio": 0.4, **options}, example_inputs=x)


class C2f(nn.Module):
    """Parts of a split, and what blocks make of the last, side by side."""

    def __init__(self, split, shortcut):
        super().__init__()
        self.split, self.shortcut = split, shortcut
        self.first, self.last = nn.Conv2d(8, 16, 1), nn.Conv2d(32, 8, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)) for _ in range(2))

    def forward(self, x):
        parts = list(self.split(self.first(x)))
        for block in self.blocks:
            parts.append(block(parts[-1]) + (parts[-1] if self.shortcut else 0))
        return self.last(torch.cat(parts, 1))


class Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x[:, :4].clone(), x[:, 4:].clone()

    @staticmethod
    def backward(ctx, one, other):
        return torch.cat([one, other], 1)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.flip(1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(1)


class PairLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class NamedConv(nn.Conv2d):
    def forward(self, x):
        return {"maps": super().forward(x)}


def shuffled(x, groups=2):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def pairs(x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def frozen():
    return Net(lambda s, x: x * s.scale, scale=nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False))


# name -> the part, its widths, the layers that must be pruned, the construct that the reason for `whole` must name
CUTS = {
    "parts of given sizes, swapped": (
        Net(lambda s, x: torch.cat(x.split((3, 5), 1)[::-1], 1)), (8, 8), "b",
        r"SplitWithSizesBackward0 in part \(Net\)",
    ),
    "the middle part of three": (
        Net(lambda s, x: x.split((2, 4, 2), 1)[1]), (8, 4), "b", r"SplitWithSizesBackward0 in part"
    ),
    "a function that splits": (
        Net(lambda s, x: torch.cat(Halves.apply(x)[::-1], 1)), (8, 8), "b",
        r"cannot follow its channels through HalvesBackward in part",
    ),
    "a function that moves channels": (
        Net(lambda s, x: Backwards.apply(x)), (8, 8), "b", r"BackwardsBackward in part"
    ),
    "a shuffle": (Net(lambda s, x: shuffled(x)), (8, 8), "b", r"ViewBackward0 in part"),
    "torch's own shuffle": (nn.ChannelShuffle(4), (8, 8), "b", r"ChannelShuffleBackward0 in part \(ChannelShuffle\)"),
    "pixels for channels": (nn.PixelShuffle(2), (8, 2), "b", r"PixelShuffleBackward0 in part \(PixelShuffle\)"),
    "patches for channels": (Net(lambda s, x: pairs(x)), (8, 32), "b", r"ViewBackward0 in part"),
    "chosen channels": (
        Net(lambda s, x: x.index_select(1, torch.arange(7, -1, -1))), (8, 8), "b", r"IndexSelectBackward0 in part"
    ),
    "one channel after the other": (
        Net(lambda s, x: torch.stack(x.unbind(1)[::-1], 1)), (8, 8), "b", r"UnbindBackward0 in part"
    ),
    "a Fourier transform over channels": (
        Net(lambda s, x: torch.fft.fft(x, dim=1).real), (8, 8), "b", r"FftR2CBackward0 in part"
    ),
    "what is computed anew": (
        Net(lambda s, x: checkpoint(s.inner, x, use_reentrant=True), inner=conv(8, 8)), (8, 8), "b",
        r"CheckpointFunctionBackward in part",
    ),
    "a linear layer that gives a tuple": (
        Net(lambda s, x: s.inner(x.movedim(1, -1))[0].movedim(-1, 1), inner=PairLinear(8, 8)), (8, 8), "b",
        r"in part.inner \(PairLinear\): the layer's output is not one tensor",
    ),
    "a convolution that gives a dict": (
        Net(lambda s, x: s.inner(x)["maps"], inner=NamedConv(8, 8, 1)), (8, 8), "b",
        r"in part.inner \(NamedConv\): the layer's output is not one tensor",
    ),
    "an integer parameter": (frozen(), (8, 8), "", ""),
    "two channels at a time, joined with constants": (
        Net(lambda s, x: torch.cat([torch.ones_like(x[:, :3]), x, x.relu()], 1)), (8, 19), "", ""
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", CUTS)
def test_what_cannot_be_followed_is_cut_out(name):
    part, widths, whole, why = CUTS[name]
    edit = pruned(around(copy.deepcopy(part), *widths))
    assert set("abcd") - set(whole) <= edit.recipe.components.keys()
    for layer in whole:
        assert re.search(why, edit.skipped[layer]), edit.skipped[layer]
    assert edit.model(X).shape == (4, 4)
    edit.model.train()(X)


SPLITS = {
    "split": lambda x: x.split((8, 8), 1),
    "chunk": lambda x: x.chunk(2, 1),
    "equal parts": lambda x: x.split(8, 1),
    "counted from the end": lambda x: x.chunk(2, -3),
}


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("how", SPLITS)
def test_blocks_beside_a_split(how, shortcut):
    edit = pruned(around(C2f(SPLITS[how], shortcut)))
    inner = {"part.blocks.0.0", "part.blocks.1.0", "part.last"}
    outer = {"part.blocks.0.2", "part.blocks.1.2"}
    assert edit.recipe.components.keys() == {*"abcd", *inner} | (set() if shortcut else outer)
    assert edit.skipped.keys() == {"part.first"} | (outer if shortcut else set())
    why = "not channel by channel" if shortcut else "split or folded further on, so that none can go alone"
    pattern = rf"{why} \(torch-pruning may not follow Split\w+ in part \(C2f\)"
    assert re.search(pattern, edit.skipped["part.first"])


def test_parts_are_told_apart_in_any_order():
    """torch-pruning numbers them as it comes by."""

    def function(s, x):
        first, second, third = s.inner(x).split((4, 4, 4), 1)
        return second * third.sigmoid() + first

    net = around(Net(function, inner=conv(8, 12)), 8, 4)
    found = Graph("prune", net, X).find(["part.inner"], KINDS)[0]["part.inner"]
    assert sorted(sorted(rows) for rows in found.rows) == [[i, i + 4, i + 8] for i in range(4)]

    def others(s, x):
        return torch.cat([layer(part) for layer, part in zip(s.inner, x.split([2, 6], 1), strict=True)], 1)

    edit = pruned(around(Net(others, inner=nn.ModuleList([conv(2, 5), conv(6, 4)])), 8, 9))
    assert {"part.inner.0", "part.inner.1"} <= edit.recipe.components.keys()


def test_shufflenet():
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    net = models.ShuffleNetV2([2, 2, 1], [8, 16, 24, 32, 40], num_classes=4).eval()
    edit = pruned(net, torch.randn(2, 3, 64, 64))
    assert {"conv1.0", "conv5.0", "stage3.1.branch2.0"} <= edit.recipe.components.keys()
    assert re.search(r"ViewBackward0 in stage2.1 \(InvertedResidual\)", edit.skipped["stage2.1.branch2.5"])


def test_what_cannot_be_removed_together_is_removed_in_part():
    """The two layers check each other's width, and may both be cut only to the same."""

    def function(s, x):
        one, other = s.a(x), s.b(x)
        if one.shape[1] < 8 and other.shape[1] < 8:
            raise RuntimeError("one must be whole")
        return head(s, s.c(one).relu() + s.d(other).relu())

    torch.manual_seed(0)
    net = Net(function, a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), d=conv(8, 6), head=nn.Linear(6, 4)).eval()
    edit = pruned(net)
    assert list(edit.recipe.components) == ["a"]
    assert edit.skipped["b"] == "together with a: the model does not run without its channels: one must be whole"


@pytest.mark.parametrize("budget", [{"parameters": 0.7}, {"macs": 0.7}, {"global_ratio": 0.3}])
def test_other_budgets_pass_over_what_cannot_be_followed(budget):
    for part in (Net(lambda s, x: torch.cat(Halves.apply(x)[::-1], 1)), C2f(SPLITS["split"], True)):
        edit = pruned(around(part), ratio=None, **budget)
        assert edit.parameters_after < edit.parameters_before
        assert edit.skipped


def test_models_that_mind_nan_have_no_heads_that_are_known():
    class Wary(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.out = 2, nn.Linear(8, 8)
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            if x.isnan().any():
                raise ValueError("NaN")
            q, k, v = (f(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for f in (self.query, self.key, self.value))
            found = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            if found.isnan().any():
                raise ValueError("NaN")
            return self.out(found)

    torch.manual_seed(0)

    def function(s, x):
        x = x.flatten(2).transpose(1, 2)
        return s.head(s.b(s.a(x).relu() + s.wary(s.c(x))).mean(1))

    net = Net(
        function,
        a=nn.Linear(3, 8), c=nn.Linear(3, 8), wary=Wary(), b=nn.Linear(8, 6), head=nn.Linear(6, 4),
    ).eval()  # fmt: skip
    edit = pruned(net)
    assert "b" in edit.recipe.components
    assert "whose heads cannot be told apart" in edit.skipped["wary.value"]


Named = namedtuple("Named", "logits features")


@dataclass
class Data:
    logits: torch.Tensor
    features: list


def maps(net, x):
    u = net.a(x).relu()
    v = net.b(u).relu()
    w = net.c(v).relu()
    return u, v, w, net.head(net.norm(w.mean((2, 3))))


def giving(function):
    """Three convolutions; the function makes the outputs of their maps and the logits."""
    torch.manual_seed(0)
    return Net(
        lambda s, x: function(*maps(s, x)),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), norm=nn.BatchNorm1d(8), head=nn.Linear(8, 4),
    ).eval()  # fmt: skip


# name -> what the model gives, the layers that must stay whole and where that stands
OUTPUTS = {
    "a tuple": (lambda u, v, w, y: (y, w.mean((2, 3))), {"c": "output[1]"}),
    "a dict": (lambda u, v, w, y: {"logits": y, "embedding": w.mean((2, 3))}, {"c": "output['embedding']"}),
    "maps within a list": (lambda u, v, w, y: {"logits": y, "maps": [u, (v,)]}, {"a": "output['maps'][0]"}),
    "a named tuple": (lambda u, v, w, y: Named(y, v), {"b": "output.features"}),
    "a dataclass": (lambda u, v, w, y: Data(y, [u]), {"a": "output.features[0]"}),
    "an object": (lambda u, v, w, y: SimpleNamespace(logits=y, features=v), {"b": "output.features"}),
    "no gradients": (lambda u, v, w, y: (y, v.detach()), {"b": "output[1]"}),
    "a mask": (lambda u, v, w, y: (y, v > 0), {"b": "output[1]"}),
    "features first": (lambda u, v, w, y: (w.mean((2, 3)), y), {"c": "output"}),
    "beside no tensors": (lambda u, v, w, y: {"name": "net", "number": 3, "of": {"logits": y, "v": v}}, {"b": "v"}),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_keeps_its_shape(name):
    function, whole = OUTPUTS[name]
    net = giving(function)
    edit = pruned(net)
    for layer, place in whole.items():
        assert place in edit.skipped[layer]
        free = ", which the kind 'outputs' in components allows" if place != "output" else ""
        assert edit.skipped[layer].endswith(f"would change its shape{free}")
    assert edit.recipe.components
    assert not edit.recipe.components.keys() & whole.keys()
    for before, after in zip(tensors(net(X)), tensors(edit.model(X)), strict=True):
        assert before.shape == after.shape


def tensors(output):
    from torch.utils._pytree import tree_leaves

    output = vars(output) if isinstance(output, (Data, SimpleNamespace)) else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def test_parameters_among_the_outputs_keep_their_shape():
    net = giving(lambda u, v, w, y: y)
    net.function = lambda s, x: (maps(s, x)[3], s.head.weight)
    edit = pruned(net)
    assert list(edit.recipe.components) == ["a", "b"]
    assert (
        edit.skipped["c"]
        == "the model's output[1] would change its shape, which the kind 'outputs' in components allows"
    )


# name -> what the model gives, and what is left of the second output of a whole network whose gone channels are hidden
SHRINKING = {
    "pooled": (lambda u, v, w, y: (y, v.mean((2, 3))), lambda out, left: out[:, left]),
    "maps": (lambda u, v, w, y: (y, v), lambda out, left: out[:, left]),
    "channels last": (lambda u, v, w, y: (y, v.permute(0, 2, 3, 1)), lambda out, left: out[..., left]),
}


@pytest.mark.parametrize("name", SHRINKING)
def test_other_outputs_may_shrink(name):
    function, left_of = SHRINKING[name]
    net = giving(function)
    kept, edit = pruned(net), pruned(net, keep_outputs=False)
    assert list(kept.recipe.components) == ["a", "c"]
    assert list(edit.recipe.components) == ["a", "b", "c"]
    assert "outputs" in edit.recipe.settings["components"]
    left = {layer: [i for i in range(8) if i not in gone] for layer, gone in edit.recipe.components.items()}
    with torch.no_grad():
        for layer, reader in (("a", net.b), ("b", net.c), ("c", net.head)):
            reader.weight[:, edit.recipe.components[layer]] = 0
        net.norm.weight[edit.recipe.components["c"]] = 0
        net.norm.bias[edit.recipe.components["c"]] = 0
    (logits, out), (smaller_logits, smaller) = net(X), edit.model(X)
    torch.testing.assert_close(smaller_logits, logits)
    torch.testing.assert_close(smaller, left_of(out, left["b"]))
    assert edit.model.c.in_channels == len(left["b"])


@pytest.mark.parametrize(
    ("function", "pruned_layers"),
    [
        (lambda u, v, w, y: (y, v.sum(1)), ["a", "c"]),  # would not be what is left of it
        (lambda u, v, w, y: (y, v.detach()), ["a", "c"]),  # cannot be followed
        (lambda u, v, w, y: (y, v.flatten(1)), ["a", "c"]),  # nor can that, in torch-pruning's graph
        (lambda u, v, w, y: v, ["a"]),  # the first
    ],
)
def test_what_is_not_just_fewer_channels_keeps_its_shape(function, pruned_layers):
    edit = pruned(giving(function), keep_outputs=False)
    assert list(edit.recipe.components) == pruned_layers
    assert "b" in edit.skipped


def test_every_output_is_that_of_hiding():
    """A sum over channels has the same shape with fewer of them, but not the same values."""
    for function in (lambda u, v, w, y: (y, v.sum(1)), lambda u, v, w, y: {"logits": y, "loss": v.square().mean()}):
        edit = pruned(giving(function))
        assert list(edit.recipe.components) == ["a", "c"]
        assert "not the same as hiding them from the layers that read them (the model's output" in edit.skipped["b"]


def test_states_of_a_cache_are_no_outputs():
    edit = pruned(giving(lambda u, v, w, y: {"logits": y, "past_key_values": [(v, w)]}))
    assert list(edit.recipe.components) == ["a", "b", "c"]


def with_branch(branch, function=None, **layers):
    """Two outputs in train mode, of which the second comes from a branch behind b."""

    def forward(s, x):
        v = s.b(s.a(x).relu()).relu()
        y = s.head(s.c(v).relu().mean((2, 3)))
        return function(s, v, y) if s.training else y

    function = function or (lambda s, v, y: (y, s.branch(v)))
    torch.manual_seed(0)
    return Net(forward, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=nn.Linear(8, 4), branch=branch, **layers)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = conv(8, 6), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(functional.dropout(self.norm(self.conv(x)).relu().mean((2, 3)), 0.5, self.training))


class Noise(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) > 0.3) + torch.randn_like(x) if self.training else x


FLAT = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))
BRANCHES = {  # network, and the widths of what reads b in the branch
    "an auxiliary head": lambda: (with_branch(Auxiliary()), "branch.conv"),
    "flattened maps": lambda: (with_branch(FLAT, lambda s, v, y: {"logits": y, "aux": s.branch(v)}), "branch.2"),
    "added to the logits": lambda: (
        with_branch(nn.Linear(8, 4), lambda s, v, y: y + s.branch(v.mean((2, 3)))), "branch",
    ),
    "behind noise": lambda: (
        with_branch(Auxiliary(), lambda s, v, y: (y, s.branch(s.noise(v))), noise=Noise()), "branch.conv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_of_train_mode_shrink_too(name, samples):
    net, reader = BRANCHES[name]()
    state = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    edit = pruned(net, X[:samples])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert list(edit.recipe.components) == ["a", "b", "c"]
    kept = {op.target: len(op.index) for op in edit.recipe.operations if op.kind == "keep" and op.dim == 1}
    assert kept[f"{reader}.weight"] == state[f"{reader}.weight"].shape[1] // 2
    copy.deepcopy(edit.model).train()(X)
    if hasattr(net.branch, "conv"):
        assert edit.skipped["branch.conv"].startswith("it runs in train mode alone")
    # What the branch gives is what it gave without the channels of b, the batch's statistics and chance left out.
    for layer in net.branch.modules(), edit.model.branch.modules():
        for module in layer:
            module.eval()
    if name == "an auxiliary head":
        gone = torch.tensor(edit.recipe.components["b"])
        left = torch.tensor([i for i in range(8) if i not in gone])
        maps = torch.randn(2, 8, 8, 8).index_fill(1, gone, 0)
        torch.testing.assert_close(edit.model.branch(maps[:, left]), net.branch(maps))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (
            lambda s, v, y: y + functional.linear(v.mean((2, 3)), s.table),
            "does not run without its channels: in train mode: ",
        ),
        (
            lambda s, v, y: (y, v),
            "the model's output[1] in train mode would change its shape, which the kind 'outputs'",
        ),
        (lambda s, v, y: (y, s.branch(v).sum(1)), "not the same as hiding them"),
        (lambda s, v, y: (y, v.view(len(v), 8, -1)), "in train mode"),
    ],
)
def test_what_feeds_other_branches_of_train_mode_stays_whole(function, why):
    edit = pruned(with_branch(nn.Identity(), function, table=nn.Parameter(torch.randn(4, 8))))
    assert list(edit.recipe.components) == ["a", "c"]
    assert why in edit.skipped["b"]
    edit.model.train()(X)


def test_branches_are_repaired_around():
    """What runs in train mode alone reads nothing on the calibration data."""
    net = with_branch(Auxiliary())
    for options in ({"repair": "least_squares"}, {"criterion": "energy"}, {"repair": "compensation"}):
        edit = prune(net, ratio=0.4, example_inputs=X, data=[torch.randn(40, 3, 8, 8)], **options)
        assert "b" in edit.recipe.components
        edit.model.train()(X)


def test_exits_after_every_layer():
    """Deep supervision: in train mode a list of logits."""

    def function(s, x):
        exits = []
        for layer, leave in zip(s.stages, s.exits, strict=True):
            x = layer(x).relu()
            if s.training or leave is s.exits[-1]:
                exits.append(leave(x.mean((2, 3))))
        return exits if s.training else exits[0]

    torch.manual_seed(0)
    stages = nn.ModuleList([conv(3, 8), conv(8, 10), conv(10, 12)])
    net = Net(function, stages=stages, exits=nn.ModuleList([nn.Linear(width, 4) for width in (8, 10, 12)]))
    edit = pruned(net)
    assert list(edit.recipe.components) == ["stages.0", "stages.1", "stages.2"]
    assert [leave.in_features for leave in edit.model.exits] == [4, 6, 7]
    assert [y.shape for y in edit.model.train()(X)] == [(4, 4)] * 3


def test_layers_of_train_mode_alone_share_a_stream():
    def function(s, v, y):
        return s.head(s.c(v + s.branch(v)).relu().mean((2, 3)))

    net = with_branch(conv(8, 8), function)
    for repair in ("least_squares", "compensation"):
        data = [torch.randn(40, 3, 8, 8)]
        edit = prune(net, ratio=0.4, example_inputs=X, data=data, components="stream", repair=repair, criterion="l1")
        assert list(edit.recipe.components) == ["b"]
        assert edit.model.branch.out_channels == edit.model.branch.in_channels == edit.model.b.out_channels == 4
        edit.model.train()(X)


@pytest.mark.parametrize("budget", [{"macs": 0.7}, {"parameters": 0.7}, {"global_ratio": 0.3}])
def test_branches_of_train_mode_count_in_every_budget(budget):
    edit = pruned(with_branch(FLAT, lambda s, v, y: {"logits": y, "aux": s.branch(v)}), ratio=None, **budget)
    assert edit.model.branch[2].in_features == 4 * edit.model.b.out_channels
    edit.model.train()(X)


def test_models_that_do_not_train_are_pruned_all_the_same():
    edit = pruned(with_branch(nn.Identity(), lambda s, v, y: 1 / 0))
    assert list(edit.recipe.components) == ["a", "b", "c"]


def test_googlenet_trains_on():
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    net = models.GoogLeNet(num_classes=4, init_weights=False)
    x = torch.randn(2, 3, 64, 64)
    edit = pruned(net, x, ratio=0.3)
    assert edit.model.aux1.conv.conv.in_channels == edit.model.inception4b.branch1.conv.in_channels < 512
    assert edit.skipped["aux1.fc1"].startswith("it runs in train mode alone")
    assert [out.shape for out in edit.model.train()(x)] == [out.shape for out in net.train()(x)]


def sometimes(choose):
    def forward(s, x):
        v = s.b(s.a(x).relu()).relu()
        return s.other(v.mean((2, 3))) if choose(x) else s.head(s.c(v).relu().mean((2, 3)))

    torch.manual_seed(0)
    return Net(forward, a=conv(3, 8), b=conv(8, 12), c=conv(12, 8), head=nn.Linear(8, 4), other=nn.Linear(12, 4)).eval()


def test_modules_that_did_not_run_are_named():
    net = sometimes(lambda x: x.mean() > 100)
    with pytest.warns(UserWarning, match="prune: example_inputs must run all .*: other as many as b. If they are used"):
        edit = pruned(net)
    assert list(edit.recipe.components) == ["a", "b", "c"]
    with pytest.warns(UserWarning, match="other as many as b") as caught:
        pruned(net, steps=2)
    assert len(caught) == 1
    pruned(net, ignore=["b"])  # what is left whole reads on
    class_of = type(net)
    flagged = class_of(net.function, **dict(net.named_children()))
    flagged.exit = nn.Sequential(nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(768, 4))
    with pytest.warns(UserWarning, match="other as many as b; exit.0 as many as b"):
        pruned(flagged.eval())

    def read(s, x):
        v = s.b(s.a(x).relu()).relu()
        return s.head(s.c(v).relu().mean((2, 3))) + functional.linear(v.mean((2, 3)), s.other.weight)

    net.function = read
    pruned(net)  # not called, but its weight is used: nothing to warn of


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_scripts_are_left_alone():
    edit = pruned(around(torch.jit.script(nn.Conv2d(8, 8, 1))))
    assert list(edit.recipe.components) == ["a", "c", "d"]
    assert "it multiplies with a parameter, but not by a call of a layer" in edit.skipped["b"]


def test_unlearning_names_them_too():
    net = sometimes(lambda x: x.mean() > 100)
    scores = score(collect_moments(net, [(torch.randn(40, 3, 8, 8), torch.arange(40) % 4)], 4))
    with pytest.warns(UserWarning, match="unlearn: example_inputs must run all .*: other as many as b"):
        unlearn(
            net,
            scores,
            classes=[0],
            method=AblateComponents(TopFraction(0.3), sign="any", remove=True),
            layers=["b"],
            example_inputs=X,
        )


RECURRENT = {
    "long short-term memory": lambda: nn.LSTM(8, 6, batch_first=True),
    "of two layers, both ways": lambda: nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True),
    "gated": lambda: nn.GRU(8, 6, batch_first=True),
    "gated, both ways": lambda: nn.GRU(8, 6, bidirectional=True, batch_first=True),
    "plain": lambda: nn.RNN(8, 6, batch_first=True),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_networks_lose_inputs(name):
    torch.manual_seed(0)
    rnn = RECURRENT[name]()
    net = Net(
        lambda s, x: s.head(s.rnn(s.b(s.a(x).relu()).relu().mean(2).transpose(1, 2))[0][:, -1]),
        a=conv(3, 8), b=conv(8, 8), rnn=rnn, head=nn.Linear(6 * (1 + rnn.bidirectional), 4),
    ).eval()  # fmt: skip
    edit = pruned(net)
    assert {layer: len(gone) for layer, gone in edit.recipe.components.items()} == {"a": 4, "b": 4}
    assert (edit.model.rnn.input_size, edit.model.rnn.hidden_size) == (4, 6)
    with torch.no_grad():
        hidden = copy.deepcopy(net)
        hidden.b.weight[:, edit.recipe.components["a"]] = 0
        for parameter in (p for key, p in hidden.rnn.named_parameters() if key.startswith("weight_ih_l0")):
            parameter[:, edit.recipe.components["b"]] = 0
        fresh = torch.randn(3, 3, 8, 8)
        torch.testing.assert_close(edit.model(fresh), hidden(fresh))
        assert torch.equal(edit.recipe.undo(edit.model)(fresh), net(fresh))
    edit.model.train()(X).sum().backward()
    edit = pruned(net, data=[torch.randn(40, 3, 8, 8)])
    assert edit.recipe.settings["unrepaired"]["rnn"].endswith("only Conv2d and Linear can be fitted")


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def test_what_a_recurrent_network_gives_stays_whole():
    torch.manual_seed(0)
    rnn = nn.LSTM(8, 6, batch_first=True)
    net = Net(
        lambda s, x: s.head(s.c(tokens(s.a(x)) + s.rnn(s.b(tokens(x)))[0]).mean(1)),
        a=conv(3, 6), b=nn.Linear(3, 8), c=nn.Linear(6, 8), rnn=rnn, head=nn.Linear(8, 4),
    ).eval()  # fmt: skip
    edit = pruned(net)
    assert list(edit.recipe.components) == ["b", "c"]
    assert edit.model.rnn.hidden_size == 6
    shared = Net(
        lambda s, x: s.head(s.rnn(s.b(tokens(x)))[0].mean(1) + s.other(x.new_ones(1, 2, 8))[0].mean(1)),
        b=nn.Linear(3, 8), rnn=nn.LSTM(8, 6, batch_first=True), other=nn.LSTM(8, 6, batch_first=True),
        head=nn.Linear(6, 4),
    ).eval()  # fmt: skip
    shared.other.weight_ih_l0 = shared.rnn.weight_ih_l0
    with pytest.raises(ValueError, match="b: it feeds rnn, whose parameters are shared"):
        pruned(shared)


def test_numbers_that_a_network_keeps_of_its_channels_follow_them():
    """Only where the network would not run with those that it has, and only those of the channels that go."""
    torch.manual_seed(0)
    net = Net(
        lambda s, x: s.head(s.a(x).reshape(len(x), s.hidden_dim, -1).mean(2)),
        a=conv(3, 6), head=nn.Linear(6, 4),
    ).eval()  # fmt: skip
    net.hidden_dim, net.batch = 6, 6
    whole = net(X)
    edit = pruned(net, ratio=0.5)
    assert (edit.model.hidden_dim, edit.model.batch) == (3, 6)
    kept = next(op.index for op in edit.recipe.operations if op.target == "head.weight")
    masked = torch.zeros_like(net.head.weight).index_copy(1, torch.tensor(kept), net.head.weight[:, list(kept)])
    expected = functional.linear(net.a(X).flatten(2).mean(2), masked, net.head.bias)
    torch.testing.assert_close(edit.model(X), expected)
    restored = edit.recipe.undo(edit.model)
    assert restored.hidden_dim == 6
    assert torch.equal(restored(X), whole)
    unused = Net(lambda s, x: head(s, s.a(x)), a=conv(3, 6), head=nn.Linear(6, 4)).eval()
    unused.hidden_dim = 6
    assert pruned(unused, ratio=0.5).model.hidden_dim == 6


class Blur(nn.Module):
    """A filter for each channel, in a buffer, and their number."""

    def __init__(self, channels, alike):
        super().__init__()
        self.channels = channels
        filters = torch.ones(1, 1, 3, 3) / 9 if alike else torch.rand(channels, 1, 3, 3)
        self.register_buffer("filters", filters.expand(channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, x):
        return functional.conv2d(x, self.filters, stride=2, groups=self.channels)


@pytest.mark.parametrize("alike", [True, False])
def test_filters_in_buffers_go_with_their_channels(alike):
    net = around(Blur(8, alike))
    edit = pruned(net)
    assert edit.model.part.channels == len(edit.model.part.filters) == edit.model.b.out_channels == 4
    kept = next(op.index for op in edit.recipe.operations if op.target == "b.weight" and op.dim == 0)
    assert torch.equal(edit.model.part.filters, net.part.filters[list(kept)])
    restored = edit.recipe.undo(edit.model)
    assert torch.equal(restored(X), net(X))
