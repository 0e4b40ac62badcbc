"""Attention whose forward takes the width of its heads for that of its input, and layers whose weights are handed to
functions: both are pruned like any other."""

import copy
import io
import itertools
import json

import pytest
import torch
from helpers import Net
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from torchvision.models import swin_transformer

from discedit import Recipe, Stack, collect_moments, iterative_prune, prune, score
from discedit.model.attention import shifted_windows
from discedit.model.forward import frozen_eval
from discedit.model.functional import attend
from discedit.model.size import count_macs

WIDTH, HEADS = 12, 4


class Attention(nn.Module):
    def __init__(self, conv=False, drop=0.0):
        super().__init__()
        self.num_heads, self.dim, self.drop = HEADS, WIDTH, drop
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1) if conv else nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Conv2d(WIDTH, WIDTH, 1) if conv else nn.Linear(WIDTH, WIDTH)

    def mixed(self, q, k, v):
        shares = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return functional.dropout(shares, self.drop, self.training) @ v


class OfShape(Attention):
    def forward(self, x, mask=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(B, N, C))


class OfSize(Attention):
    def forward(self, x):
        width = x.size(-1)
        q, k, v = self.qkv(x).split(width, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, width // self.num_heads)).transpose(1, 2) for t in (q, k, v))
        return self.proj(self.mixed(q, k, v).transpose(1, 2).flatten(2).view(x.size(0), -1, width))


class OfAttribute(Attention):
    def forward(self, x):
        q, k, v = torch.split(self.qkv(x), self.dim, -1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], self.dim))


class Interleaved(Attention):
    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mixed(q, k, v).permute(0, 2, 3, 1).reshape(B, N, C))


class OwnBias(Attention):
    """Hands the weight to a function, with a bias put together."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)

    def forward(self, x):
        B, N, C = x.shape
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = functional.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(B, N, C))


class KeysAndValues(Attention):
    """One layer for both, and windows before and behind, in which the input's own width stays."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        del self.qkv

    def forward(self, x):
        B, N, C = x.shape
        x = x.view(B, 2, N // 2, C).reshape(2 * B, N // 2, C)
        head = C // self.num_heads
        q = self.q(x).reshape(2 * B, N // 2, self.num_heads, head).transpose(1, 2)
        k, v = self.kv(x).reshape(2 * B, N // 2, 2, self.num_heads, head).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(2 * B, N // 2, C))
        return x.view(B, 2, N // 2, C).reshape(B, N, C)


class OfMap(nn.Module):
    """Is told the size of its map, a tuple."""

    def __init__(self):
        super().__init__()
        self.attention = self.Inner()

    def forward(self, x):
        return self.attention(x, (2, x.shape[1] // 2))

    class Inner(Attention):
        def forward(self, x, size):
            B, N, C = x.shape
            x = x.transpose(1, 2).reshape(B, C, *size).flatten(2).transpose(1, 2)
            q, k, v = (
                t.reshape(B, N, self.num_heads, C // self.num_heads).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
            )
            return self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(B, N, C))


class Maps(Attention):
    def __init__(self):
        super().__init__(conv=True)

    def forward(self, x):
        x = x.transpose(1, 2).unflatten(2, (2, -1))
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).reshape(B, 3, self.num_heads, C // self.num_heads, H * W).unbind(1)
        x = self.mixed(q.transpose(-2, -1), k.transpose(-2, -1), v.transpose(-2, -1)).transpose(-2, -1)
        return self.proj(x.reshape(B, C, H, W)).flatten(2).transpose(1, 2)


def net(attention):
    torch.manual_seed(0)

    def run(s, x):
        tokens = s.embed(x)
        return s.head((tokens + s.attention(tokens)).mean(1))

    return Net(
        run,
        embed=nn.Linear(5, WIDTH), attention=attention(), head=nn.Linear(WIDTH, 3),
    ).eval()  # fmt: skip


X = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
FORMS = [OfShape, OfSize, OfAttribute, Interleaved, OwnBias, KeysAndValues, OfMap, Maps]


def without(model, edit, reader):
    """The whole model with zeros in the columns that the reader lost."""
    model = copy.deepcopy(model)
    weight = model.get_submodule(reader).weight
    kept = list(range(weight.shape[1]))
    for operation in edit.recipe.operations:
        if operation.target == f"{reader}.weight" and operation.kind == "keep" and operation.dim == 1:
            kept = [kept[index] for index in operation.index]
    gone = [channel for channel in range(weight.shape[1]) if channel not in kept]
    weight.data[:, gone] = 0
    return model, len(gone)


def is_close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("components", ["heads", "all"])
def test_heads_go_from_forwards_that_insist_on_their_width(form, components):
    model = net(form)
    edit = prune(model, None, ratio=0.5, example_inputs=X, criterion="l1", components=components)
    if components == "heads":
        inside = "attention.attention" if form is OfMap else "attention"
        masked, gone = without(model, edit, f"{inside}.proj")
        assert gone == WIDTH // 2
        assert is_close(edit.model(X), masked(X))
        assert not is_close(edit.model(X), model(X))
    else:
        assert edit.model.head.in_features == WIDTH // 2
    for inputs in (X[:3], torch.randn(2, 8, 5)):  # another batch, another length
        assert torch.equal(copy.deepcopy(edit.model)(inputs), edit.model(inputs))
    edit.model.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in edit.model.parameters())
    restored = edit.recipe.undo(edit.model.eval())
    assert torch.equal(restored(X), model(X))
    assert type(restored.attention) is form


@pytest.mark.parametrize("form", [OfShape, OwnBias])
def test_narrow_attention_is_saved_and_exported(form, tmp_path):
    model = net(form)
    edit = prune(model, None, ratio=0.5, example_inputs=X, criterion="l1")
    tokens = torch.randn(2, 6, WIDTH)
    exported = torch.export.export(edit.model.attention, (tokens,)).module()  # which was never called
    assert is_close(exported(tokens), edit.model.attention(tokens))
    expected = edit.model(X)
    assert isinstance(edit.model.attention, form)
    edit.recipe.save(tmp_path / "recipe")
    again = Recipe.load(tmp_path / "recipe").apply(net(form)).model
    again.load_state_dict(edit.model.state_dict())
    assert torch.equal(again(X), expected)
    buffer = io.BytesIO()
    torch.save(edit.model.attention, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(tokens), edit.model.attention(tokens))
    exported = torch.export.export(copy.deepcopy(edit.model.attention), (tokens,)).module()
    assert is_close(exported(tokens), edit.model.attention(tokens))


@pytest.mark.parametrize("value", ["forward", {"reader": 3}, {"reader": "proj", "code": "print()"}])
def test_a_damaged_recipe_is_refused(value, tmp_path):
    prune(net(OfShape), None, ratio=0.5, example_inputs=X, criterion="l1").recipe.save(tmp_path / "recipe")
    header = json.loads((tmp_path / "recipe.json").read_text())
    [operation] = [operation for operation in header["operations"] if operation.get("name") == "forward"]
    operation["value"] = value
    (tmp_path / "recipe.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"is damaged: operation \d+ must tell attention how to run"):
        Recipe.load(tmp_path / "recipe")


def test_a_recipe_for_other_attention_leaves_the_model_as_it_was():
    """The same shapes, another name of a layer."""
    recipe = prune(net(OfShape), None, ratio=0.5, example_inputs=X, criterion="l1").recipe
    [operation] = [operation for operation in recipe.operations if operation.name == "forward"]
    operation.value["reader"] = "out"
    model = net(OfShape)
    before = model(X)
    with pytest.raises(ValueError, match="the attention OfShape must have a layer 'out', it has none"):
        recipe.apply(model, inplace=True)
    assert torch.equal(model(X), before)


def test_dropout_of_attention_goes_on_in_train_mode():
    model = net(lambda: OfShape(drop=0.5))
    edit = prune(model, None, ratio=0.5, example_inputs=X, criterion="l1")
    assert torch.equal(edit.model(X), edit.model(X))
    edit.model.train()
    assert not torch.equal(edit.model(X), edit.model(X))


def test_attention_whose_numbers_follow_keeps_its_class():
    class Follows(Attention):
        def __init__(self):
            super().__init__()
            self.attn_dim = WIDTH

        def forward(self, x):
            B, N, _ = x.shape
            q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(self.mixed(q, k, v).transpose(1, 2).reshape(B, N, self.attn_dim))

    edit = prune(net(Follows), None, ratio=0.5, example_inputs=X, criterion="l1", components="heads")
    assert edit.model.attention.attn_dim == WIDTH // 2
    assert type(edit.model.attention) is Follows


def test_arguments_that_were_not_given_are_not_taken_in_silence():
    edit = prune(net(OfShape), None, ratio=0.5, example_inputs=X, criterion="l1")
    tokens = torch.randn(2, 6, WIDTH)
    edit.model.attention(tokens, mask=None)
    with pytest.raises(AssertionError, match="mask"):
        edit.model.attention(tokens, mask=torch.ones(6, 6))


class TakesAnything(OfShape):
    def forward(self, x, *more, mask=None, **options):
        return super().forward(x)


class WithoutGradients(OfShape):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (TakesAnything, "write -1: torch.fx cannot follow its forward"),
        (WithoutGradients, "torch-pruning's trace does not reach it"),
    ],
)
def test_odd_forwards_keep_their_heads(form, why):
    with pytest.raises(ValueError, match=f"prune: no layer can be pruned .*attention.qkv: [^;]*(; where [^;]*)?{why}"):
        prune(net(form), None, ratio=0.5, example_inputs=X, criterion="l1", components="heads")


def test_a_forward_that_cannot_be_followed_is_refused_with_the_reason():
    class Odd(OfShape):
        def forward(self, x, mask=None):
            return super().forward(x) if len(x) % 2 == 0 else super().forward(x[:1])

    with pytest.raises(
        ValueError, match="takes the heads' width for that of its input, write -1: torch.fx cannot follow"
    ):
        prune(net(Odd), None, ratio=0.5, example_inputs=X, criterion="l1", components="heads")


def test_a_forward_that_keeps_something_is_refused_and_keeps_nothing_of_ours():
    class Keeps(OfShape):
        def __init__(self):
            super().__init__()
            self.cache = {}

        def forward(self, x):
            if "mean" not in self.cache:
                self.cache["mean"] = self.qkv.weight.mean()
            return super().forward(x) + self.cache["mean"]

    model = net(Keeps)
    with pytest.raises(ValueError, match="its forward keeps what it finds for the next call"):
        prune(model, None, ratio=0.5, example_inputs=X, criterion="l1", components="heads")
    assert all(type(kept) is torch.Tensor for kept in model.attention.cache.values())


def test_heads_go_in_steps_and_come_back():
    model = net(OfShape)
    edit = iterative_prune(model, None, ratio=0.75, steps=3, example_inputs=X, criterion="l1", components="heads")
    assert edit.model.attention.num_heads == 1
    masked, _ = without(model, edit, "attention.proj")
    assert is_close(edit.model(X), masked(X))
    assert torch.equal(edit.recipe.undo(edit.model)(X), model(X))


def test_edits_of_attention_stack():
    model, stack = net(OfShape), Stack(net(OfShape))
    stack.push("half", prune(model, None, ratio=0.5, example_inputs=X, criterion="l1", components="heads"))
    stack.push("more", prune(stack.model, None, ratio=0.5, example_inputs=X, criterion="l1", components="heads"))
    assert stack.model.attention.num_heads == 1
    assert stack.model(X).isfinite().all()
    stack.remove("more")
    assert stack.model.attention.num_heads == 2
    assert stack.model.attention.proj.weight.shape == (WIDTH, 6)
    stack.remove("half")
    assert torch.equal(stack.model(X), model(X))


def encoder(batch_first=True, norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=batch_first, norm_first=norm_first)

    def run(s, x):
        tokens = s.embed(x)
        tokens = s.encoder(tokens if batch_first else tokens.transpose(0, 1))
        return s.head(tokens.mean(1 if batch_first else 0))

    return Net(
        run, embed=nn.Linear(5, WIDTH), encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(WIDTH, 3)
    ).eval()  # fmt: skip


class Cross(nn.Module):
    """Queries of one width, keys and values of another."""

    def __init__(self, **options):
        super().__init__()
        self.embed, self.other, self.head = nn.Linear(5, WIDTH), nn.Linear(5, 8), nn.Linear(WIDTH, 3)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=8, batch_first=True, **options)

    def forward(self, x):
        other = self.other(x)
        return self.head(self.attention(self.embed(x), other, other, need_weights=False)[0].mean(1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("make", [encoder, lambda: encoder(False), lambda: encoder(norm_first=True), Cross])
def test_multihead_attention_loses_heads(make):
    torch.manual_seed(0)
    model = make().eval()
    edit = prune(model, None, ratio=0.5, example_inputs=X, criterion="l1", components="heads")
    readers = [name for name, module in model.named_modules() if name.endswith("out_proj")]
    masked = model
    for reader in readers:
        masked, gone = without(masked, edit, reader)
        assert gone == WIDTH // 2
    # With gradients and without: torch's fast path, which knows one width alone, must not be taken.
    assert is_close(edit.model(X), masked(X))
    assert not is_close(edit.model(X), model(X))
    with torch.inference_mode():
        assert is_close(edit.model(X), masked(X))
    assert count_macs(edit.model, X) < count_macs(model, X)
    assert torch.equal(edit.recipe.undo(edit.model)(X), model(X))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_streams_go_through_multihead_attention():
    model = encoder(norm_first=True)
    edit = prune(model, None, ratio=0.5, example_inputs=X, criterion="l1", components="all")
    assert not edit.skipped
    assert edit.model.embed.out_features == edit.model.head.in_features == WIDTH // 2
    assert edit.model.encoder.layers[0].self_attn.in_proj_weight.shape == (3 * WIDTH // 2, WIDTH // 2)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[0, 3:] = True
    edit.model.encoder(edit.model.embed(X), src_key_padding_mask=padding)
    edit.model.train()(X).sum().backward()


def test_multihead_attention_with_keys_of_its_own_stays_whole():
    with pytest.raises(ValueError, match="no layer can be pruned .*must stay as it is: it adds keys of its own"):
        prune(Cross(add_bias_kv=True).eval(), None, ratio=0.5, example_inputs=X, criterion="l1")


def test_multihead_attention_with_a_forward_of_its_own_stays_whole():
    class Doubled(nn.MultiheadAttention):
        def forward(self, query, key, value, **options):
            return super().forward(2 * query, key, value, **options)

    model = Cross().eval()
    model.attention = Doubled(WIDTH, HEADS, kdim=8, vdim=8, batch_first=True).eval()
    expected = model(X)
    with frozen_eval(model):
        assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="no layer can be pruned .*its forward is not that of torch's class"):
        prune(model, None, ratio=0.5, example_inputs=X, criterion="l1")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("read", ["output", "consumer"])
def test_heads_of_multihead_attention_are_scored_where_they_are_read(read):
    """The scores are those of what the output projection reads, whichever place is read elsewhere."""
    model = encoder()
    batches = [(torch.randn(8, 6, 5), torch.arange(8) % 2) for _ in range(3)]
    moments = collect_moments(model, batches, num_classes=2, read=read)
    layer = "encoder.layers.0.self_attn"
    seen = []
    handle = model.get_submodule(f"{layer}.out_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with frozen_eval(model):
        for inputs, _ in batches:
            model(inputs)
    handle.remove()
    means = torch.cat(seen).mean(1).double()
    labels = torch.cat([labels for _, labels in batches])
    expected = torch.stack([means[labels == c].mean(0) for c in range(2)])
    assert torch.allclose(moments[layer].mean, expected, atol=1e-6)
    scores = score(moments)
    assert scores[layer].shape == (WIDTH, 2)
    edit = prune(model, scores, ratio=0.5, example_inputs=X, criterion="min", components="heads")
    heads = scores.reduce("min")[layer].view(HEADS, -1).mean(1)
    assert edit.recipe.components[layer] == sorted(
        row for head in heads.argsort()[: HEADS // 2].tolist() for row in range(head * 3, head * 3 + 3)
    )


def test_layers_that_functions_are_handed_are_scored():
    """As if the model had called them, with the bias that it hands over."""
    model = net(OwnBias)
    batches = [(torch.randn(8, 6, 5), torch.arange(8) % 2) for _ in range(2)]
    moments = collect_moments(model, batches, num_classes=2, read="output")
    attention = model.attention
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    found = torch.cat([functional.linear(model.embed(x), attention.qkv.weight, bias).mean(1) for x, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    expected = torch.stack([found[labels == c].double().mean(0) for c in range(2)])
    assert torch.allclose(moments["attention.qkv"].mean, expected, atol=1e-6)
    assert attention.qkv.bias is None


@pytest.mark.parametrize(("form", "needed"), [(OwnBias, True), (OfShape, False)])
def test_functions_are_watched_only_where_they_are_handed_weights(form, needed):
    """Each function that runs meanwhile costs microseconds."""
    modes = []

    def loader():
        for _ in range(3):
            modes.append(len(_get_current_function_mode_stack()))
            yield torch.randn(8, 6, 5), torch.arange(8) % 2

    collect_moments(net(form), loader(), num_classes=2)
    assert modes == [1, int(needed), int(needed)]
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("version", ["", "V2"])
@pytest.mark.parametrize("shift", [[0, 0], [1, 2]])
def test_shifted_windows_are_what_torchvision_gives(version, shift):
    torch.manual_seed(0)
    layer = getattr(swin_transformer, f"ShiftedWindowAttention{version}")(WIDTH, [3, 5], shift, HEADS).double().eval()
    for parameter in layer.parameters():
        parameter.data.normal_()
    for size in ((3, 5), (6, 10), (7, 11), (2, 2)):
        x = torch.randn(2, *size, WIDTH).double()
        assert torch.allclose(shifted_windows(layer, x), layer(x))


@pytest.mark.parametrize("version", ["", "V2"])
def test_windows_of_torchvision_lose_heads(version):
    block = getattr(swin_transformer, f"SwinTransformerBlock{version}")
    torch.manual_seed(0)
    model = Net(
        lambda s, x: s.head(s.block(s.embed(x.view(4, 6, 1, 5))).mean((1, 2))),
        embed=nn.Linear(5, WIDTH), block=block(WIDTH, HEADS, [3, 3], [1, 1], stochastic_depth_prob=0.0),
        head=nn.Linear(WIDTH, 3),
    ).eval()  # fmt: skip
    edit = prune(model, None, ratio=0.5, example_inputs=X, criterion="l1", components="heads")
    masked, gone = without(model, edit, "block.attn.proj")
    assert gone == WIDTH // 2
    assert is_close(edit.model(X), masked(X))
    assert not is_close(edit.model(X), model(X))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("other", [None, 8])
def test_attend_is_what_torch_gives(batch_first, other):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, kdim=other, vdim=other, batch_first=batch_first).double()
    query, key = torch.randn(3, 5, WIDTH).double(), torch.randn(3, 7, other or WIDTH).double()
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    padding = torch.zeros(3, 7).double()
    padding[0, 3:] = -torch.inf
    masks = (None, torch.randn(5, 7).double(), torch.randn(3 * HEADS, 5, 7).double())
    for weights, average, mask, pad in itertools.product((True, False), (True, False), masks, (None, padding)):
        options = {"need_weights": weights, "attn_mask": mask, "average_attn_weights": average}
        theirs = layer(query, key, key, key_padding_mask=pad, **options)
        ours = attend(layer, query, key, key, key_padding_mask=pad, **options)
        assert torch.allclose(ours[0], theirs[0])
        assert (ours[1] is None) == (theirs[1] is None)
        assert ours[1] is None or torch.allclose(ours[1], theirs[1])
    one = attend(layer, query[:, 0], key[:, 0], key[:, 0])[0]  # a single sequence
    assert torch.allclose(one, layer(query[:, 0], key[:, 0], key[:, 0])[0])
