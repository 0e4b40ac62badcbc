"""Dimensions within heads: the basis in which they go, the forward that attention then has, and what has none."""

import copy
import io
import math

import pytest
import torch
import vision_ops  # noqa: F401  (before torchvision, timm and transformers)
from helpers import Net, mostly_slow
from torch import nn
from torch.nn import functional

from discedit import MaxMacs, MeasureDivergence, Recipe, Stack, iterative_prune, prune
from discedit.editing.attention_basis import balanced_pair
from discedit.model.attention import is_spec
from discedit.model.functional import attention_of_widths
from discedit.model.plain_attention import plain_attention

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

WIDTH, HEADS, SIZE = 24, 3, 32
DIMENSIONS = WIDTH // HEADS
BOTH = ["qk", "vo"]
IMAGES = [
    (x, torch.arange(16) % 5) for x in torch.randn(4, 16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
]
X = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def hugging_face(name="ViT", **config):
    shape = {"image_size": SIZE, "patch_size": 8, "hidden_size": WIDTH, "intermediate_size": 40, "num_labels": 5}
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=2, num_attention_heads=HEADS, **shape, **config)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def timm_vit(fused=True, **config):
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 5}
    net = timm.create_model("vit_tiny_patch16_224", **shape, **config)
    for block in net.blocks:
        block.attn.fused_attn = fused
    return net


def torchvision_vit():
    return torchvision.models.VisionTransformer(SIZE, 8, 2, HEADS, WIDTH, 40, num_classes=5)


def encoder(batch_first=True):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=batch_first)

    def run(s, x):
        tokens = s.embed(x).flatten(2).permute((0, 2, 1) if batch_first else (2, 0, 1))
        return s.head(s.encoder(tokens).mean(int(batch_first)))

    return Net(
        run, embed=nn.Conv2d(3, WIDTH, 8, 8), head=nn.Linear(WIDTH, 5),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )  # fmt: skip


# name -> network, the modules of its attention, the layers that read its heads there
MODELS = {
    "transformers ViT": (hugging_face, "vit.layers.{}.attention", "o_proj"),
    "transformers ViT, eager": (
        lambda: hugging_face(attn_implementation="eager"), "vit.layers.{}.attention", "o_proj",
    ),
    "transformers DeiT": (lambda: hugging_face("DeiT"), "deit.layers.{}.attention", "o_proj"),
    "timm ViT": (timm_vit, "blocks.{}.attn", "proj"),
    "timm ViT, not fused": (lambda: timm_vit(fused=False), "blocks.{}.attn", "proj"),
    "torchvision ViT": (torchvision_vit, "encoder.layers.encoder_layer_{}.self_attention", "out_proj"),
    "torch encoder": (encoder, "encoder.layers.{}.self_attn", "out_proj"),
    "torch encoder, samples second": (lambda: encoder(False), "encoder.layers.{}.self_attn", "out_proj"),
}  # fmt: skip


def made(name_or_net):
    """With no constants left, as if it had been trained."""
    torch.manual_seed(0)
    net = (MODELS[name_or_net][0]() if isinstance(name_or_net, str) else name_or_net()).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1 or parameter.std() == 0:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.shape[0] in (WIDTH, 3 * WIDTH):
                parameter.mul_(4)  # attention that attends to something
    return net


def logits(net, x=X):
    with torch.no_grad():
        out = net(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def pruned(net, kinds=BOTH, **options):
    options = {"ratio": 0.5, "repair": "none", "example_inputs": X[:1], "data": IMAGES} | options
    return prune(net, components=kinds, **options)


def spectrum_of(width, generator):
    x = torch.randn(2, 200, width, generator=generator, dtype=torch.float64)
    return (
        x
        * torch.logspace(0, -1, width, dtype=torch.float64)
        @ torch.randn(2, width, width, generator=generator).double()
    )


def test_the_basis_changes_no_product_and_its_first_dimensions_are_the_best():
    """Against other products of the same rank: the largest axes, random ones, and the truth, a truncated decomposition
    of the queries' and keys' products themselves."""
    generator = torch.Generator().manual_seed(0)
    q, k = spectrum_of(6, generator), spectrum_of(6, generator)
    second = [x.mT @ x / x.shape[1] for x in (q, k)]
    left, right, energy = balanced_pair(*second)
    assert torch.allclose(left.mT @ right, torch.eye(6, dtype=torch.float64).expand(2, 6, 6), atol=1e-6)
    turned_q, turned_k = q @ left.mT, k @ right.mT
    products = q @ k.mT  # of all queries with all keys: these are independent
    assert torch.allclose(turned_q @ turned_k.mT, products, atol=1e-8 * products.abs().max())
    assert bool((energy.diff(dim=1) <= 0).all())
    for rank in range(1, 6):
        lost = (products - turned_q[..., :rank] @ turned_k[..., :rank].mT).square().mean((1, 2))
        assert torch.allclose(lost, energy[:, rank:].sum(1), rtol=1e-2)
        u, s, v = torch.linalg.svd(products, full_matrices=False)
        best = (products - u[..., :rank] * s[:, None, :rank] @ v[:, :rank]).square().mean((1, 2))
        assert torch.allclose(lost, best, rtol=1e-2)
        sizes = second[0].diagonal(dim1=1, dim2=2) * second[1].diagonal(dim1=1, dim2=2)
        axes = sizes.argsort(1, descending=True)[:, None, :rank]
        along = torch.take_along_dim(q, axes, 2) @ torch.take_along_dim(k, axes, 2).mT
        assert bool((lost < (products - along).square().mean((1, 2))).all())
        for _ in range(20):
            some = torch.linalg.qr(torch.randn(2, 6, rank, generator=generator).double()).Q
            assert bool((lost < (products - (q @ some) @ (k @ some).mT).square().mean((1, 2))).all())


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_is_what_hiding_says(name):
    """The whole network in the new basis, with zeros for queries that are gone and for what reads values that are."""
    net, (_, places, reader) = made(name), MODELS[name]
    edit = pruned(net)
    assert edit.recipe.components == {f"{places.format(i)}.{kind}": [*range(4, 8)] for i in (0, 1) for kind in BOTH}
    assert not any(layer.endswith(("qk", "vo")) for layer in edit.skipped)
    turned = copy.deepcopy(net)
    gone = {}
    for index, operation in enumerate(edit.recipe.operations):
        tensor = None if operation.kind == "attribute" else turned.get_parameter(operation.target)
        if operation.kind == "set":
            tensor.data.copy_(edit.recipe.tensors[f"set.{index}"])
        elif operation.kind == "keep":
            gone[operation.target] = sorted({*range(tensor.shape[operation.dim])} - {*operation.index})
    assert torch.allclose(logits(turned), logits(net), atol=1e-4)  # the same function so far
    assert not torch.equal(logits(turned), logits(net))
    for tensor, indices in gone.items():
        values = turned.get_parameter(tensor).data
        if tensor.endswith(f"{reader}.weight"):
            values[:, indices] = 0
        elif "k_proj" not in tensor and "v_proj" not in tensor:  # of fused ones the first third are queries
            values[[i for i in indices if i < WIDTH]] = 0
    assert torch.allclose(logits(edit.model), logits(turned), atol=1e-5)
    assert not torch.allclose(logits(edit.model), logits(net), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_is_saved_applied_trained_and_undone(name, tmp_path):
    net = made(name)
    edit = pruned(net, ["qk", "vo", "heads", "neurons"], repair="least_squares")
    expected = logits(edit.model)
    recipe = Recipe.load(edit.recipe.save(tmp_path / "edit"))
    again = recipe.apply(copy.deepcopy(net))
    assert torch.equal(logits(again.model), expected)
    attention, buffer = again.model.get_submodule(MODELS[name][1].format(0)), io.BytesIO()
    torch.save(attention, buffer)
    buffer.seek(0)
    tokens = [torch.randn(2, 9, WIDTH)] * (3 if isinstance(attention, nn.MultiheadAttention) else 1)
    for found, given in zip(torch.load(buffer, weights_only=False)(*tokens), attention(*tokens), strict=True):
        assert found is given is None or torch.equal(found, given)
    output = again.model.train()(X)
    (output if isinstance(output, torch.Tensor) else output.logits).sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in attention.parameters())
    restored = again.recipe.undo(again.model.eval())
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), net.parameters(), strict=True))
    assert torch.equal(logits(restored), logits(net))
    for (_, a), (_, b) in zip(restored.named_modules(), net.named_modules(), strict=True):
        assert type(a) is type(b)


@pytest.mark.parametrize("name", mostly_slow(["timm ViT", "torchvision ViT", *MODELS], 2))
def test_attention_of_two_widths_is_exported_and_compiled(name):
    edit = pruned(made(name), ["qk"])
    expected = logits(edit.model)
    assert torch.allclose(logits(torch.export.export(edit.model, (X,)).module()), expected, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(edit.model, fullgraph=True, backend="eager")
    assert torch.allclose(logits(compiled), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # within torch
@pytest.mark.parametrize("name", MODELS)
def test_attention_of_two_widths_runs_in_onnx(name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    edit = pruned(made(name), ["qk"])
    program = torch.onnx.export(copy.deepcopy(edit.model), (X,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), logits(edit.model), rtol=1e-4, atol=1e-5)


def test_layers_and_kinds_have_widths_of_their_own_and_the_rest_stays_bit_for_bit():
    net = made("timm ViT")
    shares = {"blocks.0.attn.qk": 0.75, "blocks.1.attn.qk": 0.25, "blocks.1.attn.vo": 0.5}
    edit = pruned(net, ratio=shares)
    attention = [block.attn for block in edit.model.blocks]
    assert [len(a.qkv.weight) for a in attention] == [HEADS * (2 * 2 + 8), HEADS * (2 * 6 + 4)]
    assert [a.proj.in_features for a in attention] == [WIDTH, WIDTH // 2]
    assert torch.equal(attention[0].proj.weight, net.blocks[0].attn.proj.weight)
    assert torch.equal(attention[0].qkv.weight[-WIDTH:], net.blocks[0].attn.qkv.weight[-WIDTH:])


def test_what_counts_for_nothing_goes_without_a_loss():
    """Queries of half the rank, in a basis that shows none of it."""
    net = made("torch encoder")
    for layer in net.encoder.layers:
        weight, bias = layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data
        for head in range(HEADS):
            rows = slice(head * DIMENSIONS, (head + 1) * DIMENSIONS)
            basis = torch.linalg.qr(torch.randn(DIMENSIONS, DIMENSIONS)).Q[:, : DIMENSIONS // 2]
            weight[rows], bias[rows] = basis @ (basis.T @ weight[rows]), basis @ (basis.T @ bias[rows])
    assert torch.allclose(logits(pruned(net, ["qk"]).model), logits(net), atol=1e-3)


@pytest.mark.parametrize("name", ["timm ViT", "torchvision ViT", "transformers ViT"])
def test_a_budget_of_work_is_spent_by_heads_and_dimensions(name):
    """Their costs multiply: what is counted beforehand is what is counted then."""
    how = MeasureDivergence(samples=16, trials=24)
    for kinds in (["heads", "qk", "vo", "neurons"], ["stream", "heads", "qk"]):
        edit = pruned(made(name), kinds, ratio=None, budget=MaxMacs(0.6, across=how), repair="least_squares")
        assert edit.recipe.settings["budget"]["reached"] == pytest.approx(edit.macs_after, rel=0.01)
        assert edit.recipe.settings["budget"]["met"]
        assert {layer.rpartition(".")[2] for layer in edit.divergences} >= {"qk"}
        assert all(math.isfinite(d) for layer in edit.divergences.values() for d in layer.divergence.tolist())


def test_a_table_of_divergences_serves_another_budget():
    net = made("timm ViT")
    how = MeasureDivergence(samples=16, trials=24)
    table = pruned(net, ratio=None, budget=MaxMacs(0.9, across=how), repair="least_squares").divergences
    smaller = pruned(net, ratio=None, budget=MaxMacs(0.85, across=table), repair="least_squares")
    assert smaller.recipe.settings["budget"]["met"]
    with pytest.raises(ValueError, match="components='qk' needs data to find the basis"):
        prune(net, budget=MaxMacs(0.85, across=table), components=BOTH, example_inputs=X[:1])


def rope(self, x, **_):
    B, N, _ = x.shape
    q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    angle = torch.arange(N, dtype=x.dtype)[:, None] / torch.arange(1, 5, dtype=x.dtype)
    q, k = (
        torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
        for a, b in (q.chunk(2, -1), k.chunk(2, -1))
    )
    return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, -1))


class Rotary(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.num_heads, self.qkv, self.proj = number, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    forward = rope


def with_rotary():
    net = timm_vit()
    for block in net.blocks:
        block.attn = Rotary(HEADS)
    return net


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_rotary, r"is not softmax\(scale q'k\) v of its projections"),
        (lambda: timm_vit(qk_norm=True), r"it has parameters beside its projections \(q_norm.weight\)"),
        (
            lambda: hugging_face("Beit", use_relative_position_bias=True),
            "it has parameters beside its projections .*relative_position_bias_table",
        ),
    ],
)
def test_attention_of_another_form_is_refused_with_the_reason(make, why):
    net = made(make)
    with pytest.raises(ValueError, match=rf"no layer can be pruned \(\S+\.qk: [^;]*{why}"):
        pruned(net, ["qk"])
    edit = pruned(net, ["qk", "neurons"])
    assert [layer.endswith(".qk") for layer in edit.skipped if "qk" in layer.rpartition(".")[2]].count(True) == 2
    assert edit.parameters_after < edit.parameters_before


def test_dropout_goes_on_as_before():
    """The same random numbers: where it was, and as much."""
    for make in (
        lambda: timm_vit(attn_drop_rate=0.3, proj_drop_rate=0.2),
        lambda: timm_vit(fused=False, attn_drop_rate=0.3, proj_drop_rate=0.2),
        lambda: hugging_face(attention_probs_dropout_prob=0.3),
    ):
        net = made(make).double()
        edit = pruned(net, ["qk"], ratio=0.125, data=[(x.double(), y) for x, y in IMAGES], example_inputs=X.double())
        name = next(iter(edit.recipe.components)).removesuffix(".qk")
        narrow = edit.model.get_submodule(name)
        spec = narrow.narrow_spec
        assert is_spec(spec)
        module, x = net.get_submodule(name).train(), torch.randn(2, 9, WIDTH).double()
        torch.manual_seed(3)
        expected = module(x)
        torch.manual_seed(3)
        found = plain_attention(module, x, plain=spec)
        for one, other in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, expected)), strict=True):
            assert (one is None and other is None) or torch.allclose(one, other)


@pytest.mark.parametrize("mask", [torch.zeros(16, 16, dtype=torch.float64), torch.ones(16, 16, dtype=torch.bool)])
def test_a_mask_goes_on_and_other_arguments_are_refused(mask):
    causal = mask.masked_fill(torch.ones(16, 16).triu(1).bool(), False if mask.dtype is torch.bool else -torch.inf)

    def masked():
        return Net(
            lambda s, x: s.head(s.attention(s.embed(x).flatten(2).mT, attn_mask=causal).mean(1)),
            embed=nn.Conv2d(3, WIDTH, 8, 8), head=nn.Linear(WIDTH, 5),
            attention=timm.layers.Attention(WIDTH, HEADS, qkv_bias=True),
        )  # fmt: skip

    net = made(masked).double()
    data = [(x.double(), labels) for x, labels in IMAGES]
    attention = pruned(net, ["qk"], data=data, example_inputs=X.double()).model.attention
    x = torch.randn(2, 16, WIDTH).double()
    assert torch.allclose(attention(x, attn_mask=causal)[:, 0], attention(x[:, :1])[:, 0])
    assert not torch.allclose(attention(x, attn_mask=causal), attention(x))
    with pytest.raises(ValueError, match="Attention: argument 'is_causal' must be left out"):
        attention(x, is_causal=True)
    unseen = pruned(made("timm ViT"), ["qk"]).model.blocks[0].attn
    mask = causal if causal.dtype is torch.bool else causal.float()
    assert torch.allclose(unseen(x.float(), attn_mask=mask)[:, 0], unseen(x[:, :1].float())[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layers": {"qkv": "qqq"}}, "is damaged: operation .* must tell attention how to run"),
        ({"code": "print()"}, "is damaged: operation .* must tell attention how to run"),
        ({"count": "heads"}, "the attention Attention must have 'heads', it has none"),
        ({"reader": "out"}, "the attention Attention must have a layer 'out', it has none"),
    ],
)
def test_a_recipe_that_is_damaged_or_another_models_is_refused(change, why, tmp_path):
    net = made("timm ViT")
    recipe = pruned(net, ["qk"]).recipe
    operation = next(operation for operation in recipe.operations if operation.name == "forward")
    operation.value.update(change)
    before = logits(net)
    with pytest.raises(ValueError, match=why):
        Recipe.load(recipe.save(tmp_path / "edit")).apply(net, inplace=True)
    assert torch.equal(logits(net), before)


def test_narrow_queries_or_values_give_what_they_give_in_full():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    mask = torch.randn(5, 7)
    for a, b, c in ((q, k, v), (v[:, :, :5], v, k)):
        expected = (a @ b.mT * 0.3 + mask).softmax(-1) @ c
        assert torch.allclose(attention_of_widths(a, b, c, mask, scale=0.3), expected, atol=1e-6)
        plain = (a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) @ c
        assert torch.allclose(attention_of_widths(a, b, c), plain, atol=1e-6)


def test_edits_stack():
    net = made("transformers ViT")
    stack = Stack(copy.deepcopy(net))
    stack.push("queries", pruned(stack.model, ["qk"]))
    stack.push("heads", pruned(stack.model, ["heads"], ratio=0.4))
    stack.push("more", pruned(stack.model, BOTH))
    assert stack.model.vit.layers[0].attention.q_proj.out_features == 2 * 2  # heads, dimensions
    for name in ("more", "heads", "queries"):
        stack.remove(name)
    assert torch.equal(logits(stack.model), logits(net))


def test_what_makes_no_sense_is_refused():
    net = made("timm ViT")
    with pytest.raises(ValueError, match="prune: components='vo' needs data to find the basis .* got data=None"):
        prune(net, ratio=0.5, components=["vo"], example_inputs=X)
    with pytest.raises(ValueError, match="iterative_prune: components='qk' needs steps=1, got steps=2"):
        iterative_prune(net, ratio=0.5, components=["qk"], steps=2, example_inputs=X, data=IMAGES)
    with pytest.raises(ValueError, match=r"layers must name layers .*'blocks\.7\.attn\.qk' is none of"):
        pruned(net, layers=["blocks.7.attn.qk"])
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.attn\.qk' cannot be pruned: it has parameters beside"):
        pruned(made(lambda: timm_vit(qk_norm=True)), layers=["blocks.0.attn.qk"])
    with pytest.raises(ValueError, match="data must give finite queries, keys and values, .* has NaN or Inf"):
        pruned(net, data=[(x * math.nan, y) for x, y in IMAGES])
