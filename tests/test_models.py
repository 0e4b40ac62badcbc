"""Model classes that people use, small and with random weights: what `prune` makes of each is a working model."""

import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from discedit import prune
from discedit.recipes.recipe import Recipe
from discedit.scoring.scores import Scores

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

INNER = ("filters", "neurons", "heads")
ALL = (*INNER, "stream")
SIZE = 32


def hugging_face(name, **config):
    config = getattr(transformers, f"{name}Config")(num_labels=5, **config)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def resnet(block, layers):
    return torchvision.models.ResNet(block, layers, num_classes=5)


def vgg():
    features = torchvision.models.vgg.make_layers([8, "M", 12, "M"], batch_norm=True)
    net = torchvision.models.VGG(features, init_weights=False)
    net.classifier = nn.Sequential(nn.Linear(12 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))
    return net


def vit():
    shape = {"image_size": SIZE, "patch_size": 8, "hidden_size": 24, "intermediate_size": 40}
    return hugging_face("ViT", num_hidden_layers=2, num_attention_heads=3, **shape)


def swin():
    shape = {"image_size": SIZE, "patch_size": 2, "window_size": 4}
    return hugging_face("Swin", embed_dim=12, depths=[2, 2], num_heads=[3, 6], **shape)


def timm_vit():
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24}
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_heads=3, num_classes=5, **shape)


# name -> network, whether it has attention whose heads can go, number of its streams
MODELS = {
    "torchvision ResNet of basic blocks": (
        lambda: resnet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1]), False, 4,
    ),
    "torchvision ResNet of bottlenecks": (
        lambda: resnet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1]), False, 4,
    ),
    "torchvision VGG": (vgg, False, 0),
    "torchvision MobileNetV2": (lambda: torchvision.models.MobileNetV2(5, width_mult=0.25), False, 6),
    "torchvision DenseNet": (lambda: torchvision.models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5), False, 0),
    "transformers ViT": (vit, True, 1),
    "transformers Swin": (swin, True, 2),
    "transformers ConvNext": (
        lambda: hugging_face("ConvNext", num_stages=2, hidden_sizes=[8, 12], depths=[2, 2], patch_size=4), False, 2,
    ),
    "transformers ResNet": (
        lambda: hugging_face("ResNet", embedding_size=8, hidden_sizes=[12, 16], depths=[2, 2], layer_type="bottleneck"),
        False, 2,
    ),
    "timm ViT": (timm_vit, True, 1),
    "timm ResNet": (lambda: timm.create_model("resnet10t", num_classes=5), False, 4),
}  # fmt: skip
STREAMS = [name for name, (_, _, streams) in MODELS.items() if streams]


def made(name):
    """Trained networks have no constants left: neither have these."""
    torch.manual_seed(0)
    net = MODELS[name][0]().double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1 or parameter.std() == 0 or parameter.numel() < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return net


def images(number, seed):
    return torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(net, x):
    with torch.no_grad():
        out = net(x)
    return out if isinstance(out, torch.Tensor) else out.logits


@functools.cache
def pruned(name, kinds):
    """A network and what prune makes of it."""
    net = made(name)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    values = {n: torch.rand(len(m.weight), 2, dtype=torch.float64) for n, m in layers.items()}
    rest = {"bound": "minimax", "witness": "quadratic", "statistic": "mean", "norms": {}}
    scores = Scores(values, {n: torch.ones_like(v).char() for n, v in values.items()}, torch.tensor([9, 9]), **rest)
    return net, prune(net, scores, ratio=0.34, example_inputs=images(2, 2), components=kinds)


def pruned_most(name):
    return pruned(name, ALL if MODELS[name][2] else INNER)


def dropped(recipe):
    """(tensor, dim) -> indices that are gone."""
    return {
        (op.target, op.dim): sorted(set(range(recipe.architecture[op.target][op.dim])) - set(op.index))
        for op in recipe.operations
        if op.kind == "keep"
    }


def hidden(net, gone):
    """The network with the removed channels hidden from the modules that read them, and from the layer norms."""
    net = copy.deepcopy(net)

    def hide(channels, dim):
        return lambda _, args: (args[0].index_fill(dim, torch.tensor(channels), 0),)

    def normalise(channels, dim):
        def hook(norm, args, _):
            x = args[0].movedim(dim, -1)
            left = torch.tensor(sorted(set(range(x.shape[-1])) - set(channels)))
            short = functional.layer_norm(x[..., left], left.shape, norm.weight[left], norm.bias[left], norm.eps)
            return torch.full_like(x, 1e3).index_copy(-1, left, short).movedim(-1, dim)

        return hook

    for (name, axis), channels in gone.items():
        module = net.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.LayerNorm) and name.endswith("weight"):
            dim = 1 if getattr(module, "data_format", "") == "channels_first" else -1
            module.register_forward_hook(normalise(channels, dim))
        elif axis == 1 and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(hide(channels, -1 if isinstance(module, nn.Linear) else 1))
    return net


@pytest.mark.parametrize(("name", "kinds"), [(name, INNER) for name in MODELS] + [(name, ALL) for name in STREAMS])
def test_is_hiding_on_fresh_images(name, kinds):
    net, edit = pruned(name, kinds)
    x = images(3, 3)
    expected = logits(hidden(net, dropped(edit.recipe)), x)
    torch.testing.assert_close(logits(edit.model, x), expected, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(expected, logits(net, x), rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_and_what_does_not(name):
    net, edit = pruned(name, INNER)
    inner, gone = edit.recipe.components, dropped(edit.recipe)
    values = [layer for layer, _ in net.named_modules() if layer.endswith(("v_proj", "qkv"))]
    assert bool(values) == MODELS[name][1]
    assert set(values) <= inner.keys()
    for layer, rows in inner.items():
        assert gone[f"{layer}.weight", 0] == rows
    reasons = (
        r"shares its channels|tied to a parameter|normalises over them|in \d+ groups|the heads that|change its shape"
    )
    assert all(re.search(reasons, why) for why in edit.skipped.values())
    assert edit.parameters_after == sum(p.numel() for p in edit.model.parameters()) < edit.parameters_before
    assert type(edit.model) is type(net)
    _, most = pruned_most(name)
    assert len(most.recipe.components) == len(inner) + MODELS[name][2]
    assert not any("shares" in why or "tied" in why for why in most.skipped.values())
    assert MODELS[name][2] == 0 or most.parameters_after < edit.parameters_after


@pytest.mark.parametrize("name", MODELS)
def test_attributes_are_the_shapes(name):
    _, edit = pruned_most(name)
    for module in edit.model.modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert module.weight.shape[:2] == shape
            assert module.in_channels % module.groups == 0
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_mean.shape == (module.num_features,)
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.shape == module.bias.shape == module.normalized_shape
        elif hasattr(module, "num_attention_heads") and hasattr(module, "v_proj"):
            assert module.num_attention_heads * module.head_dim == module.v_proj.out_features
        elif hasattr(module, "qkv"):
            assert 3 * module.num_heads * module.head_dim == module.qkv.out_features
            assert module.num_heads == 2


@pytest.mark.parametrize("name", MODELS)
def test_recipe_on_another_instance_and_back(name, tmp_path):
    _, edit = pruned_most(name)
    x = images(2, 4)
    recipe = Recipe.load(edit.recipe.save(tmp_path / "edit"))
    other = made(name)
    logits(other, x)  # some classes set attributes when they first run
    again = recipe.apply(other)
    assert torch.equal(logits(again.model, x), logits(edit.model, x))
    restored = again.recipe.undo(again.model)
    ours, before = restored.state_dict(), other.state_dict()
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[key], before[key]) for key in before)
    for (_, a), (_, b) in zip(restored.named_modules(), other.named_modules(), strict=True):
        plain = {key: value for key, value in vars(b).items() if isinstance(value, (int, float, tuple))}
        assert plain == {key: vars(a)[key] for key in plain}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_pruned_models_are_exported(name):
    _, edit = pruned_most(name)
    model, x = copy.deepcopy(edit.model).float(), images(2, 5).float()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(logits(exported, x), logits(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # within torch
@pytest.mark.parametrize("name", list(MODELS))
def test_pruned_models_run_in_onnx(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    _, edit = pruned_most(name)
    model, x = copy.deepcopy(edit.model).float(), images(2, 5).float()
    if name == "transformers Swin":  # whole or pruned, torch.onnx cannot take its fused attention apart
        model.set_attn_implementation("eager")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), logits(model, x), rtol=1e-4, atol=1e-5)
