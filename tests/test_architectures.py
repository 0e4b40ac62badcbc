"""Edits on small networks of many shapes: an edit is right, or the layer is skipped and the reason given."""

import copy
import itertools

import pytest
import torch
from helpers import Net
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from discedit import AblateComponents, TopFraction, collect_moments, prune, score, unlearn
from discedit.model.size import macs_of_weights

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4


def conv(width_in, width, **options):
    return nn.Conv2d(width_in, width, 3, padding=1, **options)


def head(net, x):
    return net.head(x.mean((2, 3)))


def shuffled(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def gated(net, x):
    first, second = net.a(x).chunk(2, 1)
    return head(net, net.b(first * second.sigmoid()))


def tied():
    net = Net(
        lambda s, x: head(s, s.d(s.c(s.b(s.a(x).relu()).relu()).relu()).relu()),
        a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), d=conv(8, 8), head=nn.Linear(8, 4),
    )  # fmt: skip
    net.c.weight = net.b.weight
    return net


def shared():
    layer = conv(8, 8)
    first, second = nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.ReLU())
    return Net(
        lambda s, x: head(s, s.d(s.second(s.first(s.a(x)))).relu()),
        a=conv(3, 8), first=first, second=second, d=conv(8, 8), head=nn.Linear(8, 4),
    )  # fmt: skip


def normed(norm):
    return Net(
        lambda s, x: head(s, s.b(s.n(s.a(x)).relu()).relu()), a=conv(3, 8), n=norm, b=conv(8, 8), head=nn.Linear(8, 4)
    )


# name -> network, layers that prune must take, layers that it must skip and a part of the reason
CASES = {
    "plain": (lambda: normed(nn.BatchNorm2d(8)), ["a", "b"], {}),
    "sigmoid": (
        lambda: Net(
            lambda s, x: head(s, s.b(s.a(x).sigmoid()).sigmoid()), a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 4)
        ),
        ["a", "b"],
        {},
    ),
    "concat": (
        lambda: Net(
            lambda s, x: head(s, s.c(torch.cat([s.a(x), s.b(x)], 1).relu()).relu()),
            a=conv(3, 8), b=conv(3, 8), c=conv(16, 8), head=nn.Linear(8, 4),
        ),
        ["a", "b", "c"],
        {},
    ),
    "depthwise": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.b(s.a(x).relu()).relu()).relu()),
            a=conv(3, 8), b=conv(8, 8, groups=8), c=conv(8, 8), head=nn.Linear(8, 4),
        ),
        ["a", "c"],
        {},
    ),
    "flatten": (
        lambda: Net(lambda s, x: s.head(s.a(x).relu().flatten(1)), a=conv(3, 8), head=nn.Linear(512, 4)),
        ["a"],
        {},
    ),
    "feeds a grouped convolution": (
        lambda: Net(
            lambda s, x: head(s, s.b(s.a(x).relu()).relu()),
            a=conv(3, 8), b=conv(8, 8, groups=4), head=nn.Linear(8, 4),
        ),
        ["a"],
        {},
    ),
    "group norm": (lambda: normed(nn.GroupNorm(4, 8)), ["a", "b"], {}),
    "instance norm": (lambda: normed(nn.InstanceNorm2d(8)), ["a", "b"], {}),
    "layer norm": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.n(s.a(x.mean((2, 3))))).relu()),
            a=nn.Linear(3, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 8), head=nn.Linear(8, 4),
        ),
        ["a", "b"],
        {},
    ),
    "tied": (
        tied,
        ["d"],
        {
            "a": "it feeds b, whose parameters",
            "b": "its parameters are shared: b.weight, c.weight",
            "c": "its parameters are shared",
        },
    ),
    "channel shuffle": (
        lambda: Net(
            lambda s, x: head(s, s.c(s.b(shuffled(s.a(x).relu(), 2)).relu()).relu()),
            a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=nn.Linear(8, 4),
        ),
        ["b", "c"],
        {"a": "removing its channels is not the same as hiding them"},
    ),
    "gated": (
        lambda: Net(gated, a=conv(3, 8), b=conv(4, 6), head=nn.Linear(6, 4)), ["a", "b"], {}
    ),
    "gated linear unit": (
        lambda: Net(
            lambda s, x: head(s, s.b(functional.glu(s.a(x), 1)).relu()),
            a=conv(3, 12), b=conv(6, 6), head=nn.Linear(6, 4),
        ),
        ["a", "b"],
        {},
    ),
    "gated linear unit of tokens": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.glu(s.a(x.flatten(2).transpose(1, 2)))).mean(1)),
            a=nn.Linear(3, 12), glu=nn.GLU(), b=nn.Linear(6, 6), head=nn.Linear(6, 4),
        ),
        ["a", "b"],
        {},
    ),
    "fixed view": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.a(x).relu().view(-1, 512)).relu()),
            a=conv(3, 8), b=nn.Linear(512, 8), head=nn.Linear(8, 4),
        ),
        ["b"],
        {"a": "the model does not run without its channels"},
    ),
    "weight norm": (
        lambda: Net(
            lambda s, x: head(s, s.b(s.a(x).relu()).relu()),
            a=parametrizations.weight_norm(conv(3, 8)), b=conv(8, 8), head=nn.Linear(8, 4),
        ),
        ["b"],
        {"a": "its weight is computed"},
    ),
    "pixel shuffle": (
        lambda: Net(
            lambda s, x: head(s, s.b(nn.functional.pixel_shuffle(s.a(x), 2)).relu()),
            a=conv(3, 8), b=conv(2, 8), head=nn.Linear(8, 4),
        ),
        ["b"],
        {"a": ""},
    ),
    "transposed and one-dimensional": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.a(x).relu().flatten(2)).relu().mean(2)),
            a=nn.ConvTranspose2d(3, 8, 2), b=nn.Conv1d(8, 6, 3), head=nn.Linear(6, 4),
        ),
        ["a", "b"],
        {},
    ),
}  # fmt: skip


def scored(net):
    return score(collect_moments(net, [(X, Y)], 4))


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(1)
    make, pruned, skipped = CASES[request.param]
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_()
            module.running_mean.normal_()
    return net, pruned, skipped


def silence(module, channels):
    dim = -1 if isinstance(module, (nn.Linear, nn.LayerNorm)) else 1
    module.register_forward_hook(lambda _m, _a, out: out.index_fill(dim, torch.tensor(channels), 0))


def narrow(norm, gone):
    left = [i for i in range(norm.normalized_shape[0]) if i not in gone]

    def forward(x):
        weight, bias = norm.weight[left], norm.bias[left]
        narrowed = nn.functional.layer_norm(x[..., left], [len(left)], weight, bias, norm.eps)
        return torch.zeros_like(x).index_copy(-1, torch.tensor(left), narrowed)

    norm.forward = forward


def test_prune_is_hiding_or_says_why_not(case, request):
    net, pruned, skipped = case
    scores = scored(net)
    if not pruned:
        with pytest.raises(ValueError, match="no layer can be pruned"):
            prune(net, scores, ratio=0.4, example_inputs=X[:2])
        return
    edit = prune(net, scores, ratio=0.4, example_inputs=X[:2])
    assert list(edit.recipe.components) == pruned
    assert edit.skipped.keys() == skipped.keys()
    for layer, why in skipped.items():
        assert why in edit.skipped[layer]
    assert edit.parameters_after < edit.parameters_before
    # By hand, on fresh inputs: what the next layer sees of the removed channels is nothing.
    chain = [name for name in ("a", "b", "c", "d", "head") if hasattr(net, name)]
    readers = dict(itertools.pairwise(chain))
    if request.node.callspec.params["case"] in ("concat", "gated", "gated linear unit", "gated linear unit of tokens"):
        return  # two layers have one reader, or two channels one input: not a chain
    hidden = copy.deepcopy(net)
    if isinstance(getattr(net, "n", None), nn.LayerNorm):  # over the channels that are left
        narrow(hidden.n, edit.recipe.components["a"])
    for layer, channels in edit.recipe.components.items():
        reader = hidden.get_submodule(readers[layer])
        groups = reader.in_features // len(scores[layer]) if isinstance(reader, nn.Linear) else 1
        index = torch.tensor([c * groups + i for c in channels for i in range(groups)])
        if hasattr(reader, "groups") and reader.groups > 1:  # depthwise: nothing of the channel comes out either
            silence(reader, channels)
            continue
        dim = -1 if isinstance(reader, nn.Linear) else 1
        reader.register_forward_pre_hook(lambda _m, a, dim=dim, index=index: (a[0].index_fill(dim, index, 0),))
    fresh = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(edit.model(fresh), hidden(fresh), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [name for name, (_, pruned, _) in CASES.items() if pruned], indirect=True)
def test_prune_is_undone_bit_for_bit(case):
    net, _, _ = case
    edit = prune(net, scored(net), ratio=0.4, example_inputs=X[:2])
    restored = edit.recipe.undo(edit.model)
    for name, tensor in net.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor)


@pytest.mark.parametrize("make", [tied, shared])
def test_multiply_accumulates_of_one_weight_in_two_places(make):
    net, x = make().eval(), X[:1]
    weight = "b.weight" if make is tied else "first.0.weight"
    by_weight, rest = macs_of_weights(net, x)
    assert by_weight == {"a.weight": 64 * 8 * 27, weight: 2 * 64 * 8 * 72, "d.weight": 64 * 8 * 72, "head.weight": 32}
    assert rest == 0
    edit = prune(net, macs=0.9, example_inputs=x, layers=["d"])
    assert edit.recipe.settings["budget"]["reached"] == edit.macs_after <= 0.9 * edit.macs_before


def test_unlearn_silences_or_says_why_not(case):
    net, _, skipped = case
    scores = scored(net)
    editable = [layer for layer in scores if not any(w in skipped.get(layer, "") for w in ("shared", "computed"))]
    edit = unlearn(net, scores, classes=[0], method=AblateComponents(TopFraction(0.3), sign="any"), layers=editable)
    outputs = {}
    for layer in edit.recipe.components:
        module = edit.model.get_submodule(scores.norms.get(layer, layer))
        module.register_forward_hook(lambda _m, _a, out, layer=layer: outputs.__setitem__(layer, out))
    with torch.no_grad():
        edit.model(X)
    for layer, channels in edit.recipe.components.items():
        dim = -1 if isinstance(edit.model.get_submodule(layer), nn.Linear) else 1
        assert not outputs[layer].index_select(dim, torch.tensor(channels)).any(), layer
    for layer in set(scores) - set(editable):
        with pytest.raises(
            ValueError, match=f"layer '{layer}' cannot be edited: its (weight is computed|parameters are shared)"
        ):
            unlearn(net, scores, classes=[0], layers=[layer])


def test_a_norm_that_cannot_be_silenced_is_refused():
    net = normed(nn.GroupNorm(4, 8, affine=False))
    with pytest.raises(
        ValueError, match="layer 'a' cannot be ablated: 'n' behind it mixes channels and has no weights"
    ):
        unlearn(net, scored(net), classes=[0], method=AblateComponents(sign="any"), layers=["a"])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.head(s.a(x).relu().mean((2, 3))).log_softmax(1),
        lambda s, x: s.head(s.a(x).relu().mean((2, 3))).double(),
        lambda s, x: {"loss": torch.zeros(()), "logits": s.head(s.a(x).relu().mean((2, 3)))},
        lambda s, x: (s.head(s.a(x).relu().mean((2, 3))), x),
    ],
)
def test_the_head_is_found_behind_anything(function):
    net = Net(function, a=conv(3, 8), head=nn.Linear(8, 4))
    assert list(scored(net)) == ["a"]
    assert list(collect_moments(net, [X], 4, labels="predicted")) == ["a"]


def test_linear_layers_on_maps_have_their_channels_last():
    net = Net(
        lambda s, x: s.head(s.a(x.permute(0, 2, 3, 1)).relu().mean((1, 2))), a=nn.Linear(3, 7), head=nn.Linear(7, 4)
    )
    moments = collect_moments(net, [(X, Y)], 4)
    assert moments["a"].channels == 7
    expected = net.a(X.permute(0, 2, 3, 1)).double().mean((1, 2))
    torch.testing.assert_close(moments["a"].mean[0], expected[Y == 0].mean(0))


def test_an_ambiguous_named_layer_is_refused():
    net = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(372, 4))
    with pytest.raises(ValueError, match="layer '2': pool: layout must be named for a map with 3 axes"):
        collect_moments(net, [(X, Y)], 4, layers=["2"])


def test_named_layers_know_their_norms_too():
    net = normed(nn.BatchNorm2d(8)).eval()
    moments = collect_moments(net, [(X, Y)], 4, layers=["a", "n"])
    assert moments.norms == {"a": "n"}
    assert list(moments) == ["a", "n"]
    assert torch.equal(moments["a"].mean, moments["n"].mean)
    scores = score(moments)
    edit = prune(net, scores, ratio=0.5, example_inputs=X[:1])
    assert edit.skipped == {"n": "it is a BatchNorm2d; only convolutions and linear layers can be edited"}
    with pytest.raises(ValueError, match="layer 'n' cannot be edited: it is a BatchNorm2d"):
        unlearn(net, scores, classes=[0], layers=["n"])


def test_batch_statistics_do_not_decide_scores():
    """A norm without running statistics depends on the batch: the layer is read before it."""
    net = normed(nn.BatchNorm2d(8, track_running_stats=False)).eval()
    whole = score(collect_moments(net, [(X, Y)], 4))
    parts = score(collect_moments(net, [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)], 4))
    torch.testing.assert_close(whole["a"], parts["a"], rtol=1e-5, atol=1e-6)


def test_modules_with_work_in_train_are_switched_back():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    net = Net(lambda s, x: head(s, s.a(x)), a=conv(3, 8), head=Merging(8, 4)).train()
    net.a.eval()
    collect_moments(net, [(X, Y)], 4)
    assert net.head.training
    assert not net.head.merged
    assert not net.a.training


def test_a_last_batch_of_one_sample_does_not_stop_the_repair():
    net = Net(
        lambda s, x: s.head(s.n(s.a(x.mean((2, 3)))).relu()),
        a=nn.Linear(3, 8),
        n=nn.BatchNorm1d(8),
        head=nn.Linear(8, 4),
    ).eval()
    whole = prune(net, scored(net), ratio=0.4, example_inputs=X[:2], data=[(X[:39], Y[:39])])
    split = prune(net, scored(net), ratio=0.4, example_inputs=X[:2], data=[[X[:39]], [X[39:]]])
    assert torch.equal(whole.model.n.running_var, split.model.n.running_var)


def test_layers_that_saw_different_classes():
    net = normed(nn.BatchNorm2d(8)).eval()
    moments = collect_moments(net, [(X, Y)], 4, layers=["a"])
    moments.merge(collect_moments(net, [(X[Y < 3], Y[Y < 3])], 4, layers=["b"]))
    scores = score(moments)
    assert scores["b"][:, 3].isnan().all()
    assert not scores.reduce("max")["b"].isnan().any()
    edit = unlearn(net, scores, classes=[3], method=AblateComponents(TopFraction(0.4), sign="any"), layers=["a", "b"])
    assert edit.recipe.components.keys() == {"a"}
