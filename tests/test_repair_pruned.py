"""`repair_pruned` on what others have pruned, against the repair of `prune` for the same removal."""

import copy
import sys

import pytest
import torch
import torch_pruning
from helpers import Net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as masks

from discedit import Edit, Recipe, prune, repair_pruned, zoo
from discedit.integrations.torch_pruning import DiscEditImportance

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected:UserWarning")


class Residual(nn.Module):
    """Two convolutions and a shortcut, with a convolution of its own where the width changes."""

    def __init__(self, width_in, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Identity()
        if width_in != width:
            self.short = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class Inverted(nn.Module):
    """As in MobileNetV2: wider, depthwise, narrower, and the shortcut."""

    def __init__(self, width, inner):
        super().__init__()
        self.up, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.through = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2, self.down = nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn3(self.down(F.relu6(self.bn2(self.through(F.relu6(self.bn1(self.up(x))))))))


class Layer(nn.Module):
    """Of a vision transformer."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = 2

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 5)
        self.layers = nn.Sequential(Layer(12), Layer(12))

    def forward(self, x):
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def convolutional(*blocks):
    width = 12
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16 if isinstance(blocks[-1], Residual) else width, 5)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, *tail)


NETWORKS = {
    "resnet": lambda: convolutional(Residual(12, 12), Residual(12, 16), Residual(16, 16)),
    "mobilenet": lambda: convolutional(Inverted(12, 24), Inverted(12, 24)),
    "vit": Tokens,
}
INNER = ("conv1", "up", "through", "fc1")  # layers that add to no stream


def network(name, seed=0):
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.2, 1)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model


def images(number=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 3, 8, 8, generator=generator) for _ in range(number)]


def by_torch_pruning(model, x, ratio=0.3, ignored=None):
    """A copy after one step of torch-pruning's MagnitudePruner; by default streams and attention stay."""
    smaller = copy.deepcopy(model)
    if ignored is None:
        ignored = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and name.rpartition(".")[2] not in INNER
        ]
    torch_pruning.pruner.MagnitudePruner(
        smaller,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[smaller.get_submodule(name) for name in ignored],
    ).step()
    return smaller.eval()


def without(model, removed, batches, repair="least_squares", **options):
    """The model after `prune` has removed these outputs."""
    importances = {}
    for layer, rows in removed.items():
        importances[layer] = torch.ones(len(model.get_submodule(layer).weight))
        importances[layer][rows] = 0
    options = {"threshold": 0.5, "example_inputs": batches[0], "data": batches, "repair": repair} | options
    return prune(model, importances, **options)


def worst(model, other):
    """The largest difference between tensors, over the largest number in them."""
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    return max(
        float((one[name] - two[name]).abs().max() / one[name].abs().max().clamp(min=1e-12))
        for name in one
        if one[name].is_floating_point()
    )


def error(model, original, x):
    with torch.no_grad():
        return float((model(x) - original(x)).square().mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_torch_pruning_leaves_gets_the_repair_of_prune(name):
    model, batches, x = network(name), images(), images(1, seed=2)[0]
    smaller = by_torch_pruning(model, x[:1])
    before, whole = copy.deepcopy(smaller.state_dict()), copy.deepcopy(model.state_dict())
    edit = repair_pruned(model, smaller, batches)
    assert isinstance(edit, Edit)
    removed = dict(edit.recipe.settings["removed"])
    for layer in [layer for layer in removed if layer.endswith("through")]:
        assert removed.pop(layer) == removed[layer.replace("through", "up")]
    assert all(map(len, removed.values()))
    assert worst(edit.model, without(model, removed, batches).model) < 1e-5
    assert error(edit.model, model, x) < 0.6 * error(smaller, model, x)
    assert all(torch.equal(value, smaller.state_dict()[key]) for key, value in before.items())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in whole.items())
    undone = edit.recipe.undo(edit.model)
    assert all(torch.equal(value, undone.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_streams_that_torch_pruning_cuts(name):
    model, batches = network(name), images()
    head = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    smaller = by_torch_pruning(model, batches[0][:1], ignored=head)
    edit = repair_pruned(model, smaller, batches)
    removed = edit.recipe.settings["removed"]
    assert {"0", "1.conv2" if name == "resnet" else "1.down"} <= removed.keys()
    leaders = {layer: rows for layer, rows in removed.items() if layer.split(".")[-1] in INNER or layer in "0"}
    leaders |= {layer: removed[layer] for layer in ("2.conv2",) if layer in removed}
    assert worst(edit.model, without(model, leaders, batches, components="all").model) < 1e-5
    assert error(edit.model, model, batches[0]) < error(smaller, model, batches[0])


@pytest.mark.data
def test_on_real_images_it_wins_back_what_torch_pruning_loses(cifar):
    model, train, test = cifar
    ignored = [name for name, part in model.named_modules() if name.endswith(("conv2", "linear")) or name == "conv1"]
    smaller = by_torch_pruning(model, test.tensors[0][:1], ignored=ignored)
    repaired = repair_pruned(model, smaller, zoo.batches(train)).model

    def accuracy(network):
        with torch.no_grad():
            return float((network(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean())

    assert accuracy(repaired) > accuracy(smaller) + 0.15


def test_in_place_and_saved(tmp_path):
    model, batches = network("resnet"), images()
    smaller = by_torch_pruning(model, batches[0][:1])
    edit = repair_pruned(model, smaller, batches)
    edit.recipe.save(tmp_path / "repair")
    again = Recipe.load(tmp_path / "repair").apply(smaller)
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.1)
    own = list(smaller.parameters())
    inside = repair_pruned(model, smaller, batches, inplace=True)
    assert inside.model is smaller
    assert all(one is other for one, other in zip(own, smaller.parameters(), strict=True))
    assert worst(smaller, edit.model) == worst(again.model, edit.model) == 0
    assert inside.optimizer(optimizer).param_groups[0]["params"] == own
    assert edit.parameters_after == edit.parameters_before == sum(p.numel() for p in own)
    assert "parameters" in edit.summary()


def test_a_failure_in_place_changes_nothing():
    model, batches = network("resnet"), images()
    smaller = by_torch_pruning(model, batches[0][:1])
    before = copy.deepcopy(smaller.state_dict())
    batches[1][3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="repair_pruned: data must give finite feature maps"):
        repair_pruned(model, smaller, batches, inplace=True)
    assert all(torch.equal(value, smaller.state_dict()[key]) for key, value in before.items())


def test_what_was_trained_needs_its_indices():
    model, batches = network("mobilenet"), images()
    smaller = copy.deepcopy(model)
    importance = DiscEditImportance(smaller, {f"{i}.up": torch.rand(24) for i in (1, 2)})
    ignored = [part for name, part in smaller.named_modules() if name == "0" or name.endswith(("down", "5"))]
    torch_pruning.pruner.BasePruner(
        smaller, batches[0][:1], importance, pruning_ratio=0.3, ignored_layers=ignored
    ).step()
    exact = repair_pruned(model, smaller, batches)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn_like(parameter))
    with pytest.raises(ValueError, match=r"'1\.up' has 16 of 24, and its weights .*kept=\{'1\.up': \[\.\.\.\]\}"):
        repair_pruned(model, smaller, batches)
    edit = repair_pruned(model, smaller, batches, kept=importance.kept)
    assert {layer: edit.recipe.settings["removed"][layer] for layer in importance.kept} == {
        layer: exact.recipe.settings["removed"][layer] for layer in importance.kept
    }
    assert error(edit.model, model, batches[0]) < error(smaller, model, batches[0])
    halves = [importance.kept["1.up"], importance.kept["2.up"].tolist()]
    by_list = repair_pruned(model, smaller, batches, kept=dict(zip(("1.up", "2.up"), halves, strict=True)))
    assert worst(by_list.model, edit.model) == 0


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_that_went_through_16_bits_are_found(kind):
    model, batches = network("resnet"), images()
    smaller = by_torch_pruning(model, batches[0][:1])
    exact = repair_pruned(model, smaller, batches).recipe.settings["removed"]
    assert repair_pruned(model, smaller.to(kind).float(), batches).recipe.settings["removed"] == exact


def perceptron(width=8):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def cut(model, kept):
    """By hand: layers of a perceptron without some outputs, by number, and their readers without these inputs."""
    smaller = copy.deepcopy(model)
    for layer, rows in kept.items():
        own, reader = smaller[layer], smaller[layer + 2]
        own.weight, own.bias = nn.Parameter(own.weight[rows].detach()), nn.Parameter(own.bias[rows].detach())
        reader.weight = nn.Parameter(reader.weight[:, rows].detach())
        own.out_features = reader.in_features = len(rows)
    return smaller


def rows_of(number=3, width=6):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(200, width, generator=generator) for _ in range(number)]


def test_surgery_by_hand():
    model, batches = perceptron(), rows_of()
    smaller = cut(model, {0: [0, 2, 3, 7], 2: [1, 2, 4, 5, 6]})
    edit = repair_pruned(model, smaller, [(x, torch.zeros(len(x))) for x in batches])
    assert edit.recipe.settings["removed"] == {"0": [1, 4, 5, 6], "2": [0, 3, 7]}
    assert worst(edit.model, without(model, {"0": [1, 4, 5, 6], "2": [0, 3, 7]}, batches).model) < 1e-5


def test_equal_rows_are_told_apart_by_what_is_beside_them():
    model, batches = perceptron(), rows_of()
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[3]  # another bias
        model[2].weight[4] = model[2].weight[6] = 0
    smaller = cut(model, {0: [0, 1, 2, 5, 7], 2: [0, 2, 3, 6]})
    assert repair_pruned(model, smaller, batches).recipe.settings["removed"] == {"0": [3, 4, 6], "2": [1, 4, 5, 7]}
    with torch.no_grad():
        model[2].bias[4] = model[2].bias[6]  # now they give the same, and either may be the one that is left
    smaller = cut(model, {2: [0, 2, 3, 6]})
    assert repair_pruned(model, smaller, batches).recipe.settings["removed"] == {"2": [1, 5, 6, 7]}


def test_rows_that_differ_where_nothing_is_left_are_refused():
    model, batches = perceptron(), rows_of()
    with torch.no_grad():
        model[2].weight[3, 1:], model[2].bias[3] = model[2].weight[5, 1:], model[2].bias[5]
    smaller = cut(model, {0: [1, 2, 3, 4, 5, 6, 7], 2: [0, 1, 2, 5]})
    with pytest.raises(ValueError, match=r"'2' has 4 of 8, and several outputs .*\(3, 5\): give their indices"):
        repair_pruned(model, smaller, batches)
    edit = repair_pruned(model, smaller, batches, kept={"2": [0, 1, 2, 5]})
    assert edit.recipe.settings["removed"]["2"] == [3, 4, 6, 7]


@pytest.mark.parametrize("silent", [False, True], ids=["norm as it was", "norm silenced as well"])
def test_masked_outputs_stay_masked(trained, silent):
    model, train, test = trained
    masked = copy.deepcopy(model)
    masks.ln_structured(masked.conv2, "weight", 0.4, n=2, dim=0)
    masks.remove(masked.conv2, "weight")
    gone = (masked.conv2.weight.flatten(1) == 0).all(1)
    if silent:
        with torch.no_grad():
            masked.bn2.weight[gone], masked.bn2.bias[gone] = 0, 0
    edit = repair_pruned(model, masked, zoo.batches(train))
    assert edit.recipe.settings["masked"] == {"conv2": gone.nonzero().flatten().tolist()}
    assert torch.equal(edit.model.conv2.weight, masked.conv2.weight)
    assert not torch.equal(edit.model.conv3.weight, masked.conv3.weight)
    x = test.tensors[0]
    assert error(edit.model, model, x) < 0.5 * error(masked, model, x)


def test_masked_outputs_that_are_fitted_stay_masked():
    model, batches = perceptron(), rows_of()
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (0, 2):
            smaller[layer].weight[[1, 4]], smaller[layer].bias[[1, 4]] = 0, 0
    edit = repair_pruned(model, smaller, batches)
    assert edit.recipe.settings["masked"] == {"0": [1, 4], "2": [1, 4]}
    assert not edit.model[2].weight[[1, 4]].any()
    assert not edit.model[2].bias[[1, 4]].any()
    assert error(edit.model, model, batches[0]) < error(smaller, model, batches[0])


def test_a_reader_that_cannot_be_repaired_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Conv2d(4, 5, 1)).eval()
    smaller = by_torch_pruning(model, images(1)[0][:1], ignored=["2", "3"])
    edit = repair_pruned(model, smaller, images())
    assert "ConvTranspose2d" in edit.skipped["2"]
    assert edit.skipped == edit.recipe.settings["unrepaired"]


def test_a_repair_that_brings_outputs_no_closer_gives_a_warning(monkeypatch):
    model, batches = perceptron(), rows_of()
    smaller = cut(model, {0: [0, 2, 3, 4, 5, 6, 7]})
    monkeypatch.setattr(sys.modules["discedit.editing.repair_pruned"], "take_back", lambda *_, **__: None)

    def spoiled(op, edited, *_, **__):
        edited[2].weight.data.mul_(-1)

    monkeypatch.setattr(sys.modules["discedit.editing.repair_pruned"], "repaired", spoiled)
    with pytest.warns(
        UserWarning, match="repair_pruned: the repair brings .* more data, or none at all, may do better"
    ):
        repair_pruned(model, smaller, batches)


# What cannot be vouched for.


def renamed(model):
    smaller = cut(model, {0: [0, 1]})
    smaller.add_module("more", nn.Identity())
    return smaller


def masked_still(model):
    smaller = copy.deepcopy(model)
    masks.ln_structured(smaller[0], "weight", 0.5, n=2, dim=0)
    return smaller


def grown(model):
    smaller = cut(model, {0: [0, 1]})
    smaller[4] = nn.Linear(9, 3)
    return smaller


def of_another_class(model):
    smaller = cut(model, {0: [0, 1]})
    smaller[4] = nn.Bilinear(1, 1, 1)
    smaller[4].weight = nn.Parameter(torch.zeros(3, 8))
    smaller[4].bias = nn.Parameter(torch.zeros(3))
    return smaller


def torn(model):
    smaller = cut(model, {0: [0, 1, 2]})
    smaller[2] = nn.Linear(2, 8)
    return smaller


def narrower(model):
    smaller = cut(model, {0: [0, 1, 2]})
    smaller[4] = nn.Linear(8, 2)
    return smaller


def thinned(model):
    smaller = copy.deepcopy(model)
    masks.l1_unstructured(smaller[2], "weight", 5)
    masks.remove(smaller[2], "weight")
    return smaller


def unread(model):
    smaller = cut(model, {})
    smaller[0].weight.data.mul_(2)
    return smaller


def turned(model):
    return cut(model, {0: [0, 1, 2, 3], 2: [3, 1, 6]})


REFUSED = {
    renamed: "pruned must have modules of the names that original has, 'more' is none of these",
    masked_still: r"pruned must have tensors of the names .*'0\.weight_mask' .*: torch\.nn\.utils\.prune\.remove makes",
    grown: r"pruned must have tensors that are no larger than .*, '4\.weight' has shape \(3, 9\), it had \(3, 8\)",
    of_another_class: "pruned must have layers of the classes that original has, '4' is a Bilinear, it was a Linear",
    torn: "pruned must run on data, it raised RuntimeError",
    narrower: r"pruned must give outputs of the shapes that original gives, \{'output': \(2, 3\)\}, got .*\(2, 2\)",
    thinned: "pruned must have lost whole outputs, 5 single weights of '2' have become 0",
    copy.deepcopy: "pruned must have lost channels that layers read, every layer reads what it did",
    unread: "pruned must have lost channels that layers read",
    turned: "'2' has 3 of 8, and its outputs stand in another order than the original's.$",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_refusals(make):
    model = perceptron()
    with pytest.raises(ValueError, match=f"^repair_pruned: .*{REFUSED[make]}"):
        repair_pruned(model, make(model), rows_of())


@pytest.mark.parametrize(
    ("kept", "kind", "says"),
    [
        ([0], TypeError, "kept must be a mapping"),
        ({"1": [0]}, ValueError, "kept must name convolutions and linear layers of the models, '1' is none"),
        ({"0": [0, 2]}, ValueError, r"kept\['0'\] must be 3 increasing indices in 0\.\.7, one for each"),
        ({"0": [2, 0, 1]}, ValueError, r"kept\['0'\] must be 3 increasing"),
        ({"0": [0, 1, 8]}, ValueError, r"kept\['0'\] must be 3 increasing"),
        ({"0": [-1, 1, 2]}, ValueError, r"kept\['0'\] must be 3 increasing"),
        ({"0": [0, 1.5, 2]}, ValueError, r"kept\['0'\] must be 3 increasing"),
        ({"0": 3}, ValueError, r"kept\['0'\] must be 3 increasing"),
    ],
)
def test_kept_that_does_not_fit(kept, kind, says):
    model = perceptron()
    with pytest.raises(kind, match=f"repair_pruned: {says}"):
        repair_pruned(model, cut(model, {0: [0, 1, 2]}), rows_of(), kept=kept)


def test_other_arguments_that_do_not_fit():
    model, batches = perceptron(), rows_of()
    smaller = cut(model, {0: [0, 1, 2]})
    with pytest.raises(TypeError, match=r"repair_pruned: original must be a torch\.nn\.Module, got str"):
        repair_pruned("resnet", smaller, batches)
    with pytest.raises(TypeError, match=r"repair_pruned: pruned must be a torch\.nn\.Module, got NoneType"):
        repair_pruned(model, None, batches)
    with pytest.raises(ValueError, match="repair_pruned: original must run on data, it raised RuntimeError"):
        repair_pruned(model, smaller, rows_of(width=5))
    with pytest.raises(TypeError, match="repair_pruned: data must give batches, got int"):
        repair_pruned(model, smaller, 3)
    with pytest.raises(ValueError, match="repair_pruned: data must give at least one sample"):
        repair_pruned(model, smaller, [])
    smaller[4] = model[4]
    with pytest.raises(ValueError, match="repair_pruned: pruned must have tensors of its own"):
        repair_pruned(model, smaller, batches, inplace=True)
    repair_pruned(model, smaller, batches)


def test_kernels_that_shrank_are_refused():
    model = network("resnet")
    smaller = by_torch_pruning(model, images(1)[0][:1])
    smaller.get_submodule("1").conv2.weight.data = smaller.get_submodule("1").conv2.weight.data[:, :, 1:2, 1:2]
    with pytest.raises(ValueError, match=r"must have kernels of the sizes .*'1\.conv2' has \(1, 1\), it had \(3, 3\)"):
        repair_pruned(model, smaller, images())


def test_heads_that_are_gone():
    model, batches = network("vit"), images()
    smaller = copy.deepcopy(model)
    for layer in smaller.layers:  # the first of two heads
        rows = torch.tensor([*range(6, 12), *range(18, 24), *range(30, 36)])
        layer.qkv.weight, layer.qkv.bias = (nn.Parameter(p[rows].detach()) for p in (layer.qkv.weight, layer.qkv.bias))
        layer.proj.weight = nn.Parameter(layer.proj.weight[:, 6:].detach())
        layer.heads = 1
    edit = repair_pruned(model, smaller, batches)
    gone = [*range(6), *range(12, 18), *range(24, 30)]
    assert edit.recipe.settings["removed"] == {"layers.0.qkv": gone, "layers.1.qkv": gone}
    assert error(edit.model, model, batches[0]) < 0.8 * error(smaller, model, batches[0])


def test_layers_that_run_at_other_times_are_refused():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 8), c=nn.Linear(8, 3)).eval()
    smaller = copy.deepcopy(model)
    smaller.function = lambda m, x: m.c(m.b(m.a(m.a(x))))
    smaller.b.weight, smaller.b.bias = (nn.Parameter(p[:5].detach()) for p in (smaller.b.weight, smaller.b.bias))
    smaller.c.weight = nn.Parameter(smaller.c.weight[:, :5].detach())
    with pytest.raises(ValueError, match="must run the layers that original does, 'a' runs 2 times, it did 1 times"):
        repair_pruned(model, smaller, rows_of())
