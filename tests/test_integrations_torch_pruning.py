"""What torch-pruning removes with our scores, against a choice by hand from the same scores."""

from functools import partial

import pytest
import torch
import torch_pruning
from helpers import Net
from torch import nn
from torch.nn import functional as F
from torch_pruning.pruner import BasePruner, BNScalePruner, GroupNormPruner, GrowingRegPruner, MetaPruner
from torch_pruning.pruner.importance import GroupMagnitudeImportance

from discedit import importances, zoo
from discedit.integrations.torch_pruning import DiscEditImportance

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected:UserWarning")
KINDS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, KINDS)}


def random_scores(model, classes=3):
    """Layer -> (channels, classes), for every layer with weights."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(
            module.bias.numel() if module.bias is not None else len(module.weight), classes, generator=generator
        )
        for name, module in layers_of(model).items()
    }


def weights_of(model):
    return {name: module.weight.detach().clone() for name, module in layers_of(model).items()}


def lowest(values, number):
    """Indices of all but the so many lowest, ascending."""
    return sorted(sorted(range(len(values)), key=lambda i: float(values[i]))[number:])


def gone_at(width, ratio):
    """How many channels torch-pruning takes."""
    return width - int(width * (1 - ratio))


def prune_all(model, importance, x, *, ratio=0.34, pruner=BasePruner, steps=1, **options):
    made = pruner(model, x, importance=importance, pruning_ratio=ratio, iterative_steps=steps, **options)
    for _ in range(steps):
        made.step()
    return made


def graph_of(model, x):
    return torch_pruning.DependencyGraph().build_dependency(model, x)


def group_of(model, x, layer, outputs=True):
    """The group of all outputs (inputs) of a layer."""
    graph = graph_of(model, x)
    module = model.get_submodule(layer)
    pruner = graph.get_pruner_of_module(module)
    width = (pruner.get_out_channels if outputs else pruner.get_in_channels)(module)
    return graph.get_pruning_group(
        module, pruner.prune_out_channels if outputs else pruner.prune_in_channels, range(width)
    )


# The zoo's ResNet with real scores.


@pytest.fixture
def resnet(cifar):
    model = zoo.cifar_resnet("resnet20")
    stream = [m for name, m in model.named_modules() if name == "conv1" or name.endswith("conv2")]
    inner = [name for name, _ in model.named_modules() if name.endswith(".conv1")]
    return model, inner, {"example_inputs": cifar[2].tensors[0][:1], "ignored_layers": [*stream, model.linear]}


def by_hand(values, ratio, steps, across):
    """Layer -> indices kept after so many steps: lowest first, of each layer or of all over their layers' means."""
    kept = {layer: list(range(len(v))) for layer, v in values.items()}
    total = sum(map(len, kept.values()))
    for step in range(1, steps + 1):
        now = ratio * step / steps
        if across:
            ranked = []
            for layer, own in kept.items():
                mean = sum(float(values[layer][i]) for i in own) / len(own)
                ranked += [(float(values[layer][i]) / mean, layer, i) for i in own]
            for _, layer, i in sorted(ranked)[: len(ranked) - int(total * (1 - now))]:
                kept[layer].remove(i)
        else:
            for layer, own in kept.items():
                number = len(own) - int(len(values[layer]) * (1 - now))
                kept[layer] = [own[i] for i in lowest(values[layer][own], number)]
    return kept


@pytest.mark.data
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reduction", ["max", "min"])
def test_resnet_with_real_scores(resnet, cifar_scores, reduction, steps, across):
    model, inner, options = resnet
    before = weights_of(model)
    importance = DiscEditImportance(model, cifar_scores, reduction=reduction)
    prune_all(
        model, importance, ratio=0.45, steps=steps, global_pruning=across, x=options.pop("example_inputs"), **options
    )
    reduced = cifar_scores.reduce(reduction)
    expected = by_hand({layer: reduced[layer] for layer in inner}, 0.45, steps, across)
    for layer, weight in before.items():
        kept = expected.get(layer, list(range(len(weight))))
        reader = expected.get(layer.replace("conv2", "conv1"), list(range(weight.shape[1])))
        inputs = reader if layer.endswith(".conv2") else list(range(weight.shape[1]))
        assert torch.equal(model.get_submodule(layer).weight, weight[kept][:, inputs]), layer
        if layer in importance.kept:
            assert importance.kept[layer].tolist() == kept
    smaller = cifar_scores.select(importance.kept)
    assert all(torch.equal(smaller[layer], cifar_scores[layer][expected[layer]]) for layer in inner)


@pytest.mark.data
def test_a_new_pruner_goes_on_with_the_channels_that_are_left(resnet, cifar_scores):
    model, inner, options = resnet
    before = weights_of(model)
    x = options.pop("example_inputs")
    importance = DiscEditImportance(model, cifar_scores)
    prune_all(model, importance, x, ratio=0.25, **options)
    with torch.no_grad():  # fine-tuning between the steps
        for layer in inner:
            model.get_submodule(layer).weight.mul_(1.5)
    prune_all(model, importance, x, ratio=0.34, **options)
    for layer in inner:
        width = len(before[layer])
        left = width - gone_at(width, 0.25)
        kept = lowest(cifar_scores.reduce()[layer], width - left + gone_at(left, 0.34))
        assert torch.equal(model.get_submodule(layer).weight, before[layer][kept] * 1.5)


@pytest.mark.data
@pytest.mark.parametrize("pruner", [BasePruner, MetaPruner, BNScalePruner, GroupNormPruner, GrowingRegPruner])
def test_every_pruner_makes_the_same_choice(resnet, cifar_scores, pruner):
    model, inner, options = resnet
    before = weights_of(model)
    importance = DiscEditImportance(model, cifar_scores)
    prune_all(model, importance, options.pop("example_inputs"), pruner=pruner, **options)
    for layer in inner:
        kept = lowest(cifar_scores.reduce()[layer], gone_at(len(before[layer]), 0.34))
        assert torch.equal(model.get_submodule(layer).weight, before[layer][kept])


# Kinds of groups, on small networks.


def chain():
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.head(F.relu(m.second(F.relu(m.first(x)))).mean((2, 3))),
        first=nn.Conv2d(3, 8, 3),
        second=nn.Conv2d(8, 6, 3),
        head=nn.Linear(6, 4),
    )


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def residual():
    torch.manual_seed(0)
    return Net(
        lambda m, x: m.head(F.relu(m.a(x) + m.b(x)).mean((2, 3))),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(3, 8, 3),
        head=nn.Linear(8, 4),
    )


OVER_TWO = {
    "mean": lambda a, b: (a + b) / 2,
    "sum": lambda a, b: a + b,
    "max": torch.maximum,
    "prod": lambda a, b: a * b,
    "first": lambda a, b: a,
    "gate": lambda a, b: b,
}


@pytest.mark.parametrize("how", OVER_TWO)
def test_layers_that_are_summed(how):
    model, scores = residual(), random_scores(residual())
    a, b = (scores[layer].double().amax(1) for layer in "ab")
    importance = DiscEditImportance(model, scores, group_reduction=how, normalizer=None)
    group = group_of(model, X, "a")
    expected = OVER_TWO[how](a, b)
    torch.testing.assert_close(importance(group), expected, rtol=0, atol=1e-15)
    before = weights_of(model)
    prune_all(model, importance, X, ignored_layers=[model.head])
    kept = lowest(expected, 3)
    assert len(kept) == 5
    assert all(torch.equal(model.get_submodule(layer).weight, before[layer][kept]) for layer in "ab")


def test_a_group_of_which_some_layers_are_scored():
    model, scores = residual(), random_scores(residual())
    del scores["a"]
    before = weights_of(model)
    prune_all(model, DiscEditImportance(model, scores), X, ignored_layers=[model.head])
    assert torch.equal(model.a.weight, before["a"][lowest(scores["b"].amax(1), 3)])


def test_a_group_without_scores_stays_whole_or_goes_to_the_fallback():
    model = chain()
    scores = random_scores(model)
    del scores["second"]
    before = weights_of(model)
    prune_all(model, DiscEditImportance(model, scores), X, ignored_layers=[model.head])
    assert torch.equal(model.second.weight, before["second"][:, lowest(scores["first"].amax(1), 3)])
    model = chain()
    magnitude = GroupMagnitudeImportance(p=1, normalizer=None, group_reduction="first", target_types=[nn.Conv2d])
    prune_all(model, DiscEditImportance(model, scores, fallback=magnitude), X, ignored_layers=[model.head])
    first = lowest(scores["first"].amax(1), 3)
    second = lowest(before["second"].abs().sum((1, 2, 3)), 3)
    assert torch.equal(model.second.weight, before["second"][second][:, first])


def split():
    torch.manual_seed(0)

    def forward(m, x):
        low, high = m.stem(x).chunk(2, 1)
        return m.head(F.relu(m.reader(torch.cat([m.low(low), m.high(high)], 1))).mean((2, 3)))

    own = {name: nn.Conv2d(4, 4, 3, groups=4) for name in ("low", "high")}
    return Net(forward, stem=nn.Conv2d(3, 8, 3), **own, reader=nn.Conv2d(8, 5, 3), head=nn.Linear(5, 4))


def halves(model, group):
    """Where each half is in the root: torch-pruning 1.6.1 takes the parts of a split in reverse order."""
    return {
        name: next(i.root_idxs for i in group.items if i.dep.target.module is m)
        for name, m in layers_of(model).items()
        if name in ("low", "high")
    }


def test_split_and_depthwise_layers():
    model, scores = split(), random_scores(split())
    value = {layer: own.double().amax(1) for layer, own in scores.items()}
    group = group_of(model, X, "stem")
    places = halves(model, group)
    assert sorted(places["low"] + places["high"]) == list(range(8))
    expected = value["stem"].clone()
    for name, own in places.items():
        expected[own] += value[name]
    found = DiscEditImportance(model, scores, normalizer=None)(group)
    torch.testing.assert_close(found, expected / 2, rtol=0, atol=1e-15)


def test_channels_that_nobody_scored_go_last():
    model, scores = split(), random_scores(split())
    group = group_of(model, X, "stem")
    places = halves(model, group)
    found = DiscEditImportance(model, {"low": scores["low"]})(group)
    own = scores["low"].double().amax(1)
    torch.testing.assert_close(found[places["low"]], own / own.mean(), rtol=0, atol=1e-15)
    assert found[places["high"]].isinf().all()


def concatenated():
    torch.manual_seed(0)

    def forward(m, x):
        return m.head(F.relu(m.reader(m.both(torch.cat([m.a(x), m.b(x)], 1)))).mean((2, 3)))

    both = nn.Conv2d(11, 11, 3, groups=11)
    return Net(
        forward, a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(3, 6, 3), both=both, reader=nn.Conv2d(11, 7, 3), head=nn.Linear(7, 4)
    )


def test_concatenation_over_two_steps():
    """The second layer's channels lie behind the first's, and move when those go."""
    model, scores = concatenated(), random_scores(concatenated())
    value = {layer: own.double().amax(1) for layer, own in scores.items()}
    before = weights_of(model)
    importance = DiscEditImportance(model, scores, normalizer=None)
    found = importance(group_of(model, X, "b"))
    torch.testing.assert_close(found, (value["b"] + value["both"][5:]) / 2, rtol=0, atol=1e-15)
    prune_all(model, importance, X, ratio=0.5, steps=2, ignored_layers=[model.head, model.reader])
    kept = lowest((torch.cat([value["a"], value["b"]]) + value["both"]) / 2, 6)
    a, b = [i for i in kept if i < 5], [i - 5 for i in kept if i >= 5]
    assert torch.equal(model.both.weight, before["both"][kept])
    assert torch.equal(model.a.weight, before["a"][a])
    assert torch.equal(model.b.weight, before["b"][b])
    assert [importance.kept[layer].tolist() for layer in ("a", "b", "both")] == [a, b, kept]


def flattened():
    torch.manual_seed(0)
    return Net(lambda m, x: m.head(F.relu(m.conv(x)).flatten(1)), conv=nn.Conv2d(3, 4, 7), head=nn.Linear(36, 4))


def test_flattened_channels():
    """One channel is nine inputs, and an input has the score of its channel."""
    model, scores = flattened(), random_scores(flattened())
    own = scores["conv"].double().amax(1)
    importance = DiscEditImportance(model, scores, normalizer=None)
    assert torch.equal(importance(group_of(model, X, "head", outputs=False)), own.repeat_interleave(9))
    before = weights_of(model)
    prune_all(model, importance, X, ratio=0.5, ignored_layers=[model.head])
    kept = lowest(own, 2)
    assert torch.equal(model.conv.weight, before["conv"][kept])
    assert torch.equal(model.head.weight, before["head"].view(4, 4, 9)[:, kept].flatten(1))


def test_outputs_without_a_root_do_not_count():
    """As torch-pruning has it for key and value heads that several queries share."""
    model, scores = residual(), random_scores(residual())
    group = group_of(model, X, "a")
    shared = next(item for item in group.items if item.dep.target.module is model.b)
    shared.root_idxs = [None] * 8
    assert torch.equal(DiscEditImportance(model, scores, normalizer=None)(group), scores["a"].double().amax(1))


def test_part_of_a_group_in_its_order():
    model, scores = residual(), random_scores(residual())
    group = graph_of(model, X).get_pruning_group(model.a, torch_pruning.prune_conv_out_channels, [6, 1, 4])
    found = DiscEditImportance(model, scores, normalizer=None)(group)
    expected = ((scores["a"].double().amax(1) + scores["b"].double().amax(1)) / 2)[[6, 1, 4]]
    assert torch.equal(found, expected)


def test_convolution_in_groups():
    """torch-pruning takes the same places out of every group of channels."""
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(F.relu(m.conv(x)).mean((2, 3))), conv=nn.Conv2d(4, 12, 3, groups=2), head=nn.Linear(12, 4)
    )
    scores, before = random_scores(model), weights_of(model)
    prune_all(model, DiscEditImportance(model, scores), torch.randn(1, 4, 5, 5), ignored_layers=[model.head])
    kept = lowest(scores["conv"].amax(1).view(2, 6).mean(0), 3)
    assert torch.equal(model.conv.weight, before["conv"][[*kept, *(6 + i for i in kept)]])


def test_transposed_convolution():
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(F.relu(m.up(x)).mean((2, 3))),
        up=nn.ConvTranspose2d(3, 8, 2, stride=2),
        head=nn.Linear(8, 4),
    )
    scores, before = random_scores(model), weights_of(model)
    prune_all(model, DiscEditImportance(model, scores), X, ignored_layers=[model.head])
    assert torch.equal(model.up.weight, before["up"][:, lowest(scores["up"].amax(1), 3)])


def test_round_to():
    model, scores = residual(), random_scores(residual())
    before = weights_of(model)
    prune_all(model, DiscEditImportance(model, scores), X, ratio=0.2, round_to=4, ignored_layers=[model.head])
    kept = lowest((scores["a"].amax(1) + scores["b"].amax(1)) / 2, 4)
    assert torch.equal(model.a.weight, before["a"][kept])


# Scores of every kind.


@pytest.mark.parametrize(
    "normalizer", ["sum", "standarization", "mean", "max", "gaussian", "lamp", "sentinel_0.5", None]
)
@pytest.mark.parametrize("across", [False, True])
def test_scores_that_are_all_zero(normalizer, across):
    model = chain()
    scores = {layer: torch.zeros_like(own) for layer, own in random_scores(model).items()}
    scores["second"][2] = 0.5
    importance = DiscEditImportance(model, scores, normalizer=normalizer)
    assert torch.equal(importance(group_of(model, X, "first")), torch.zeros(8, dtype=torch.float64))
    assert importance(group_of(model, X, "second")).argmax() == 2
    if not across:  # torch-pruning takes all ties together, and then, because nothing would be left, none
        prune_all(model, importance, X, ignored_layers=[model.head])
        assert (model.first.out_channels, model.second.out_channels) == (5, 3)
        assert 2 in importance.kept["second"].tolist()


@pytest.mark.parametrize("normalizer", ["sum", "standarization", "mean", "max", "gaussian", "lamp", "sentinel_0.5"])
def test_normalisation_is_torch_prunings(normalizer):
    model, scores = chain(), random_scores(chain())
    own = scores["first"].double().amax(1)
    theirs = GroupMagnitudeImportance()._normalize(own.float(), normalizer)
    ours = DiscEditImportance(model, scores, normalizer=normalizer)(group_of(model, X, "first"))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-6)
    twice = DiscEditImportance(model, scores, normalizer=lambda values: 2 * values)
    assert torch.equal(twice(group_of(model, X, "first")), 2 * own)


@pytest.mark.parametrize("reduction", ["max", "mean", "min"])
def test_classes_without_samples_are_left_out(reduction):
    model, scores = chain(), random_scores(chain())
    expected = getattr(torch, {"max": "amax", "min": "amin"}.get(reduction, reduction))(scores["first"].double(), dim=1)
    with_empty = {layer: torch.cat([torch.full((len(own), 1), torch.nan), own], 1) for layer, own in scores.items()}
    importance = DiscEditImportance(model, with_empty, reduction=reduction, normalizer=None)
    assert torch.equal(importance(group_of(model, X, "first")), expected)


def test_a_number_per_channel():
    model = chain()
    own = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6], dtype=torch.bfloat16)
    found = DiscEditImportance(model, {"first": own}, normalizer=None)(group_of(model, X, "first"))
    assert torch.equal(found, own.double())


# Attention.


def transformers_vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        num_labels=5, image_size=16, patch_size=8, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def projections(model):
    return {name: m for name, m in model.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj"))}


def logits(output):
    return output.logits.sum()


def vit_pruned(**options):
    model = transformers_vit()
    scores, before = random_scores(model), weights_of(model)
    importance = DiscEditImportance(model, scores)
    heads = dict.fromkeys(projections(model).values(), 3)
    pruner = prune_all(
        model, importance, torch.randn(1, 3, 16, 16), num_heads=heads, ignored_layers=[model.classifier],
        output_transform=logits, **options,
    )  # fmt: skip
    return model, {layer: own.double().amax(1) for layer, own in scores.items()}, before, pruner


def check_vit(model, value, before, attention):
    """Whole network, given for each block's attention the rows that stay."""
    blocks = [f"vit.layers.{i}" for i in (0, 1)]
    adds = ["vit.embeddings.patch_embeddings.projection"]
    adds += [f"{block}.{name}" for block in blocks for name in ("attention.o_proj", "mlp.fc2")]
    stream = lowest(sum(value[layer] for layer in adds) / len(adds), gone_at(24, 0.34))
    assert torch.equal(model.get_submodule(adds[0]).weight, before[adds[0]][stream])
    for block, rows in zip(blocks, attention, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = f"{block}.attention.{name}"
            assert torch.equal(model.get_submodule(layer).weight, before[layer][rows][:, stream]), layer
        layer = f"{block}.attention.o_proj"
        assert torch.equal(model.get_submodule(layer).weight, before[layer][stream][:, rows])
        neurons = lowest(value[f"{block}.mlp.fc1"], gone_at(40, 0.34))
        layer = f"{block}.mlp.fc2"
        assert torch.equal(model.get_submodule(layer).weight, before[layer][stream][:, neurons])
    assert torch.equal(model.classifier.weight, before["classifier"][:, stream])


def of_attention(value, block):
    """(24,): the mean of query, key and value."""
    return sum(value[f"vit.layers.{block}.attention.{name}"] for name in ("q_proj", "k_proj", "v_proj")) / 3


def test_vit_whole_heads():
    model, value, before, pruner = vit_pruned(prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.34)
    attention = []
    for block in (0, 1):
        left = lowest(of_attention(value, block).view(3, 8).mean(1), 2)  # torch-pruning rounds up
        attention.append([8 * head + i for head in left for i in range(8)])
    check_vit(model, value, before, attention)
    assert set(pruner.num_heads.values()) == {1}
    assert model(torch.randn(2, 3, 16, 16)).logits.shape == (2, 5)


def test_vit_dimensions_of_heads_and_stream():
    model, value, before, _ = vit_pruned()
    attention = []
    for block in (0, 1):
        left = lowest(of_attention(value, block).view(3, 8).mean(0), gone_at(8, 0.34))
        attention.append([8 * head + i for head in range(3) for i in left])
    check_vit(model, value, before, attention)
    for block in model.vit.layers:
        block.attention.head_dim = 5  # which torch-pruning leaves to its caller
    assert model(torch.randn(2, 3, 16, 16)).logits.shape == (2, 5)


def test_fused_attention():
    """timm computes query, key and value in one layer: a channel of the projection goes with three of its rows."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    ).eval()
    scores, before = random_scores(model), weights_of(model)
    stream = [m for name, m in model.named_modules() if name.endswith(("attn.proj", "fc2", "patch_embed.proj"))]
    heads = {block.attn.qkv: 3 for block in model.blocks}
    importance = DiscEditImportance(model, scores)
    ignored = [model.head, *stream]
    prune_all(model, importance, torch.randn(1, 3, 16, 16), num_heads=heads, ignored_layers=ignored)
    for index in (0, 1):
        own = scores[f"blocks.{index}.attn.qkv"].double().amax(1).view(3, 3, 8)  # which, head, dimension
        left = lowest(own.mean((0, 1)), gone_at(8, 0.34))
        rows = [24 * which + 8 * head + i for which in range(3) for head in range(3) for i in left]
        qkv = f"blocks.{index}.attn.qkv"
        assert torch.equal(model.get_submodule(qkv).weight, before[qkv][rows])
        proj = f"blocks.{index}.attn.proj"
        assert torch.equal(model.get_submodule(proj).weight, before[proj][:, [r for r in rows if r < 24]])


def transformers_swin():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        num_labels=5, image_size=32, patch_size=2, window_size=4, embed_dim=12, depths=[1, 1], num_heads=[3, 6]
    )
    return transformers.SwinForImageClassification(config).eval()


def test_swin_inside_its_blocks():
    """With the streams ignored, because torch-pruning does not understand patch merging, nor windows across heads."""
    model = transformers_swin()
    scores, before = random_scores(model), weights_of(model)
    stream = [m for name, m in model.named_modules() if name.endswith(("o_proj", "fc2", "reduction", "projection"))]
    tables = [p for name, p in model.named_parameters() if name.endswith("bias_table")]
    heads = {m: 3 if ".layers.0." in name else 6 for name, m in projections(model).items()}
    prune_all(
        model, DiscEditImportance(model, scores), torch.randn(1, 3, 32, 32), num_heads=heads,
        ignored_layers=[model.classifier, *stream, *tables], output_transform=logits,
    )  # fmt: skip
    for stage, (width, number) in enumerate(((12, 3), (24, 6))):
        block = f"swin.encoder.layers.{stage}.blocks.0"
        value = [scores[f"{block}.attention.{name}"].double().amax(1) for name in ("q_proj", "k_proj", "v_proj")]
        left = lowest((sum(value) / 3).view(number, 4).mean(0), gone_at(4, 0.34))
        rows = [4 * head + i for head in range(number) for i in left]
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(
                model.get_submodule(f"{block}.attention.{name}").weight, before[f"{block}.attention.{name}"][rows]
            )
        neurons = lowest(scores[f"{block}.mlp.fc1"].amax(1), gone_at(4 * width, 0.34))
        assert torch.equal(model.get_submodule(f"{block}.mlp.fc2").weight, before[f"{block}.mlp.fc2"][:, neurons])
        model.get_submodule(f"{block}.attention").head_dim = len(left)
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 5)


@pytest.mark.filterwarnings("ignore:Maximum recursive depth reached:UserWarning")
def test_swin_of_torchvision_neurons():
    """Its attention calls functions with the weights, not the layers: torch-pruning sees none there."""
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    torch.manual_seed(0)
    shape = {"patch_size": [2, 2], "embed_dim": 12, "depths": [1, 1], "num_heads": [3, 6], "window_size": [4, 4]}
    model = swin.SwinTransformer(**shape, num_classes=5).eval()
    scores, before = random_scores(model), weights_of(model)
    hidden = [name for name in before if name.endswith("mlp.0")]
    others = [module for name, module in layers_of(model).items() if name not in hidden]
    prune_all(model, DiscEditImportance(model, scores), torch.randn(1, 3, 32, 32), ignored_layers=others)
    for layer in hidden:
        kept = lowest(scores[layer].amax(1), gone_at(len(before[layer]), 0.34))
        assert torch.equal(model.get_submodule(layer).weight, before[layer][kept])
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


# Following the model.


def test_groups_pruned_by_hand_are_followed():
    model, scores = chain(), random_scores(chain())
    importance = DiscEditImportance(model, scores, normalizer=None)
    graph = graph_of(model, X)
    importance.follow(graph)
    importance.follow(graph)  # once is enough
    prune = partial(graph.get_pruning_group, model.first, torch_pruning.prune_conv_out_channels)
    prune([1, 5]).prune()
    prune(range(6)).prune([2])  # which is channel 3: a group that makes another
    prune([0])  # is not pruned
    assert importance.kept["first"].tolist() == [0, 2, 4, 6, 7]
    left = [i for i in range(8) if i in (0, 2, 4, 6, 7)]
    assert torch.equal(importance(prune(range(5))), scores["first"].double().amax(1)[left])
    with pytest.raises(ValueError, match=r"groups must be of a graph of the model"):
        DiscEditImportance(residual(), random_scores(residual()))(prune(range(5)))


def test_changes_behind_its_back():
    model, scores = chain(), random_scores(chain())
    importance = DiscEditImportance(model, scores)
    graph = graph_of(model, X)
    torch_pruning.prune_conv_out_channels(model.first, [2])
    torch_pruning.prune_conv_in_channels(model.second, [2])
    group = graph.get_pruning_group(model.first, torch_pruning.prune_conv_out_channels, range(7))
    with pytest.raises(ValueError, match=r"observed groups alone \(see follow\), 'first' has 7 channels, 8 of its 8"):
        importance(group)
    model = chain()
    importance = DiscEditImportance(model, scores)
    model.first = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match="'first' was replaced"):
        importance(group_of(model, X, "second"))


def test_a_group_beyond_a_layers_channels():
    """A zero-padded shortcut, as the zoo's ResNets have: torch-pruning takes 4 and 8 channels for the same ones."""
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head((F.pad(m.narrow(x), (0, 0, 0, 0, 2, 2)) + m.wide(x)).mean((2, 3))),
        narrow=nn.Conv2d(3, 4, 3), wide=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 4),
    )  # fmt: skip
    importance = DiscEditImportance(model, random_scores(model))
    with pytest.raises(ValueError, match=r"reaches channel 7 of 'narrow', which has 4.*ignored_layers"):
        importance(group_of(model, X, "wide"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": {}}, ValueError, "scores must be Scores or a mapping of layer names to tensors, got {}"),
        ({"scores": [1]}, ValueError, r"scores must be Scores or a mapping of layer names to tensors, got \[1\]"),
        ({"scores": {"third": torch.ones(8)}}, ValueError, "name modules of the model, 'third' is none"),
        ({"scores": {"first": [1.0] * 8}}, TypeError, r"scores\['first'\] must be a torch.Tensor, got list"),
        ({"scores": {"first": torch.ones(7)}}, ValueError, "each of the layer's 8 channels, got 7"),
        ({"scores": {"first": torch.ones(8, 2, 1)}}, ValueError, r"\(channels, classes\), got \(8, 2, 1\)"),
        ({"scores": {"first": torch.full((8, 2), torch.nan)}}, ValueError, "at least one class, all of it is NaN"),
        ({"scores": {"first": torch.tensor([1.0] * 7 + [torch.nan])}}, ValueError, "got nan for channel 7"),
        ({"reduction": "pairwise_min"}, ValueError, "reduction must be one of"),
        ({"group_reduction": "median"}, ValueError, "group_reduction must be one of.*'median'"),
        ({"normalizer": "minmax"}, ValueError, "normalizer must be one of.*'minmax'"),
        ({"normalizer": "sentinel_1.5"}, ValueError, "normalizer must be one of.*'sentinel_1.5'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    model = chain()
    arguments = {"scores": random_scores(model), **change}
    with pytest.raises(error, match="DiscEditImportance: .*" + message):
        DiscEditImportance(model, **arguments)


def test_errors_of_shared_modules_and_normalizers():
    model = chain()
    model.alias = model.first
    with pytest.raises(ValueError, match="name a module once, 'alias' and 'first' are the same"):
        DiscEditImportance(model, {"first": torch.ones(8), "alias": torch.ones(8)})
    model = chain()
    importance = DiscEditImportance(model, {"first": torch.tensor([-1.0, 1] * 4)})
    with pytest.raises(ValueError, match="normalizer must give finite numbers, 'mean' gives"):
        importance(group_of(model, X, "first"))


# From data, without labels.


def batches_of(x, size=64):
    return [(part, torch.zeros(len(part))) for part in x.split(size)]


def test_from_data_is_the_energy_that_channels_add_to_what_reads_them():
    model = chain().eval()
    x = torch.randn(192, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    importance = DiscEditImportance.from_data(model, batches_of(x), normalizer=None)
    with torch.no_grad():
        read = F.relu(model.second(F.relu(model.first(x)))).mean((2, 3)).double()
        weight = model.head.weight.double()
        read = read - read.mean(0)
        energy = read.square().mean(0) * weight.square().sum(0) / (read @ weight.T).square().mean(0).sum()
    found = importance(group_of(model, X, "second"))
    torch.testing.assert_close(found, energy, rtol=1e-4, atol=0)
    by_hand = importances(model, None, "energy", example_inputs=X, data=batches_of(x))
    torch.testing.assert_close(importance(group_of(model, X, "first")), by_hand["first"], rtol=0, atol=0)
    assert set(importance.kept) == {"first", "second"}


def test_from_data_falls_back_to_squared_weights():
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(F.relu(m.up(F.relu(m.first(x)))).mean((2, 3))),
        first=nn.Conv2d(3, 8, 3),
        up=nn.ConvTranspose2d(8, 6, 3),  # cannot be read, so that what feeds it cannot be judged
        head=nn.Linear(6, 4),
    ).eval()
    data = iter([torch.randn(32, 3, 9, 9, generator=torch.Generator().manual_seed(1))])
    importance = DiscEditImportance.from_data(model, data, criterion="reconstruction")
    assert set(importance.kept) == {"up"}
    group = group_of(model, X, "first")
    torch.testing.assert_close(importance(group), GroupMagnitudeImportance(p=2)(group))
    mine = DiscEditImportance.from_data(model, [X], fallback=lambda group: torch.arange(8.0))
    assert mine(group).tolist() == list(range(8))


@pytest.mark.data
def test_from_data_loses_less_than_squared_weights(cifar, resnet):
    model, inner, options = resnet
    whole, train, test = cifar
    x = options.pop("example_inputs")
    importance = DiscEditImportance.from_data(model, zoo.batches(train))
    prune_all(model, importance, x, ratio=0.3, **options)
    other = zoo.cifar_resnet("resnet20")
    ignored = [other.get_submodule(name) for name in layers_of(other) if name not in inner]
    prune_all(other, torch_pruning.importance.MagnitudeImportance(p=2), x, ratio=0.3, ignored_layers=ignored)

    def accuracy(network):
        with torch.no_grad():
            return float((network(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean())

    assert accuracy(whole) > accuracy(model) > accuracy(other) + 0.02
    assert {layer: len(importance.kept[layer]) for layer in inner} == {
        layer: other.get_submodule(layer).out_channels for layer in inner
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"criterion": "max"},
            ValueError,
            "criterion must be one of 'energy', 'reconstruction', 'fidelity', got 'max'",
        ),
        ({"data": 3}, TypeError, "data must give batches, got int"),
        ({"data": []}, ValueError, "data must give at least one sample, it gave none"),
        ({"model": "resnet"}, TypeError, r"model must be a torch\.nn\.Module, got str"),
        ({"model": nn.Sequential(nn.Conv2d(3, 4, 3))}, ValueError, "model must have channels that can be removed"),
    ],
)
def test_errors_of_from_data(change, error, message):
    arguments = {"model": chain().eval(), "data": [X]} | change
    with pytest.raises(error, match=rf"DiscEditImportance\.from_data: {message}"):
        DiscEditImportance.from_data(**arguments)
