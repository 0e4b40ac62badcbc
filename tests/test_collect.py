import copy

import pytest
import torch
from helpers import Net, same_bits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import discedit
from discedit import collect_moments, ops, zoo
from discedit.moments import collect


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.Linear(8, 5),
    )


def small_data(samples=40, classes=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, 8, 8, generator=generator)
    return TensorDataset(x, torch.arange(samples) % classes)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_reads_every_layer_at_once(backend):
    model, data = small_model().eval(), small_data()
    moments = collect_moments(model, DataLoader(data, 16), 5, backend=backend)
    assert list(moments) == ["0", "3", "5"]  # execution order, without the head
    assert moments.norms == {"0": "1"}
    x, labels = data.tensors
    with torch.no_grad():
        expected = {"0": model[:3](x), "3": model[:4](x), "5": model[:6](x)}
    for layer, maps in expected.items():
        exact = ops.class_moments(maps, labels, 5, backend="reference")
        torch.testing.assert_close(moments[layer].mean, exact.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments[layer].m4, exact.m4, rtol=1e-4, atol=1e-6)
        assert torch.equal(moments[layer].count, exact.count)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"statistic": "max", "witness": "linear"},
        {"statistic": "rms", "witness": "exp", "scale": 0.4},
        {"statistic": ("mean", "positive_fraction", "absmax"), "witness": "vector"},
    ],
    ids=["linear", "exp", "vector"],
)
def test_every_witness_is_class_moments_of_what_the_layer_gives(backend, options):
    """In batches of changing size, so that buffers are reused, dropped and made anew."""
    model, (x, labels) = small_model().eval(), small_data().tensors
    loader = [(x[a:b], labels[a:b]) for a, b in ((0, 10), (10, 20), (20, 23), (23, 33), (33, 40))]
    moments = collect_moments(model, loader, 5, backend=backend, **options)
    assert moments.settings == {"num_classes": 5, "scale": None, "read": "consumer", **options}
    with torch.no_grad():
        expected = {"0": model[:3](x), "3": model[:4](x), "5": model[:6](x)}
    for layer, maps in expected.items():
        exact = ops.class_moments(maps, labels, 5, backend="reference", **options)
        for ours, theirs in zip(moments[layer].tensors(), exact.tensors(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(moments[layer].count, exact.count)


def test_scales_by_layer():
    moments = collect_moments(
        small_model(), DataLoader(small_data(), 20), 5, witness="exp", scale={"0": 0.5, "3": 1, "5": 2}
    )
    for layer, scale in (("0", 0.5), ("3", 1), ("5", 2)):
        alone = collect_moments(
            small_model(),
            DataLoader(small_data(), 20),
            5,
            layers=[layer if layer != "0" else "1"],
            witness="exp",
            scale=scale,
        )
        assert torch.equal(moments[layer].mean, next(iter(alone.values())).mean)


def test_one_forward_pass():
    model, calls = small_model(), []
    handle = model.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    collect_moments(model, DataLoader(small_data(), 10), 5)
    handle.remove()
    assert calls == [2, 3, 3, 10, 10, 10, 10]  # a trace, and three samples twice, to see on which axis they are


def test_batches_of_any_size_agree():
    model = small_model()
    reference = collect_moments(model, DataLoader(small_data(), 40), 5)
    for size in (1, 7, 39):
        other = collect_moments(model, DataLoader(small_data(), size), 5)
        for layer, state in reference.items():
            torch.testing.assert_close(other[layer].mean, state.mean, rtol=1e-5, atol=1e-6)


def test_leaves_no_trace():
    model = small_model().train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    loader = DataLoader(small_data(), 8, shuffle=True)
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    collect_moments(model, loader, 5)
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert hooks_of(model) == 0
    assert torch.is_grad_enabled()


class Broken(nn.Module):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.conv, self.fc, self.left = nn.Conv2d(3, 2, 3), nn.Linear(2, 5), after

    def forward(self, x):
        x = self.conv(x)
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is on fire")
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("after", [0, 2])
def test_leaves_no_trace_after_an_exception(after):
    model = Broken(after).train()
    rng = torch.get_rng_state()
    with pytest.raises(OSError, match="on fire"):
        collect_moments(model, DataLoader(small_data(), 8, shuffle=True), 5)
    assert hooks_of(model) == 0
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_predicted_labels_are_the_models_argmax():
    model, data = small_model().eval(), small_data()
    x = data.tensors[0]
    with torch.no_grad():
        predicted = model(x).argmax(1)
    given = collect_moments(model, DataLoader(TensorDataset(x, predicted), 16), 5)
    for loader in (DataLoader(data, 16), [x[:16], x[16:32], x[32:]]):
        ours = collect_moments(model, loader, 5, labels="predicted")
        for layer, state in given.items():
            assert all(torch.equal(a, b) for a, b in zip(state.tensors(), ours[layer].tensors(), strict=True))


def test_any_iterable_of_pairs():
    model, (x, y) = small_model(), small_data().tensors
    reference = collect_moments(model, DataLoader(small_data(), 20), 5)
    forms = {
        "list": [(x[:20], y[:20]), [x[20:], y[20:]]],
        "generator": ((x[i : i + 20], y[i : i + 20]) for i in (0, 20)),
        "positional": [((x[:20],), y[:20]), ((x[20:],), y[20:].int())],
        "keywords": [({"input": x[:20]}, y[:20]), {"input": x[20:], "labels": y[20:]}],
        "python labels": [(x[:20], y[:20].tolist()), (x[20:], y[20:].numpy())],
    }
    for name, loader in forms.items():
        ours = collect_moments(model, loader, 5)
        for layer, state in reference.items():
            assert torch.equal(ours[layer].mean, state.mean), name


def test_named_layers_only():
    moments = collect_moments(small_model(), DataLoader(small_data(), 20), 5, layers=["2", "3"])
    assert {layer: state.channels for layer, state in moments.items()} == {"2": 6, "3": 4}


def test_tokens_and_dictionary_outputs():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mlp, self.head = nn.Linear(24, 7), nn.Linear(7, 9), nn.Linear(9, 5)

        def forward(self, x):
            tokens = self.mlp(self.embed(x.flatten(2).transpose(1, 2).reshape(len(x), 8, 24)).relu())
            return {"logits": self.head(tokens.mean(1))}

    model, data = Tokens(), small_data()
    moments = collect_moments(model, DataLoader(data, 20), 5)
    assert {layer: state.channels for layer, state in moments.items()} == {"embed": 7, "mlp": 9}
    x = data.tensors[0].flatten(2).transpose(1, 2).reshape(40, 8, 24)
    exact = ops.class_moments(model.embed(x).relu(), data.tensors[1], 5, layout="tokens")
    torch.testing.assert_close(moments["embed"].mean, exact.mean)


class Transformer(nn.Module):
    """A patch convolution, tokens in front of which a class token stands, and a head on that token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.mlp = nn.Conv2d(3, 7, 2, 2), nn.LayerNorm(7), nn.Linear(7, 9)
        self.neck, self.head = nn.Linear(9, 6), nn.Linear(6, 5)
        self.token = nn.Parameter(torch.ones(1, 1, 7))

    def tokens(self, x):
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return self.norm(torch.cat([self.token.expand(len(x), -1, -1) * x.mean((1, 2, 3))[:, None, None], patches], 1))

    def forward(self, x):
        return self.head(self.neck(self.mlp(self.tokens(x))[:, 0].relu()).relu())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("several", [False, True])
def test_cls_reads_the_layers_with_tokens_and_names_the_others(backend, several):
    torch.manual_seed(0)
    model, data = Transformer(), small_data()
    options = {"statistic": ("mean", "cls"), "witness": "vector"} if several else {"statistic": "cls"}
    message = r"left out, because statistic 'cls' needs .* \(samples, tokens, channels\): \['patch', 'neck'\]"
    with pytest.warns(UserWarning, match=message) as caught:
        moments = collect_moments(model, DataLoader(data, 20), 5, backend=backend, **options)
    assert [warning.filename for warning in caught] == [__file__]
    assert list(moments) == ["mlp"]
    x, labels = data.tensors
    with torch.no_grad():
        maps = model.mlp(model.tokens(x))
    exact = ops.class_moments(maps, labels, 5, layout="tokens", backend="reference", **options)
    for ours, theirs in zip(moments["mlp"].tensors(), exact.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    named = collect_moments(model, DataLoader(data, 20), 5, layers=["mlp", "norm"], backend=backend, **options)
    assert sorted(named) == ["mlp", "norm"]
    with pytest.raises(ValueError, match=r"layer 'patch': pool: statistic 'cls', .* shape \(20, 7, 4, 4\)"):
        collect_moments(model, DataLoader(data, 20), 5, layers=["mlp", "patch"], **options)


def test_only_what_is_read_stays_hooked():
    model, hooked = small_model(), []

    def note(_, args, __):
        if len(args[0]) == 20:
            hooked.append(
                [
                    {n for n, m in model.named_modules() if m._forward_hooks},
                    {n for n, m in model.named_modules() if m._forward_pre_hooks},
                ]
            )

    model.register_forward_hook(note)
    collect_moments(model, DataLoader(small_data(), 20), 5)
    assert hooked == [[{"", "3"}, {"3", "6"}]] * 2
    hooked.clear()
    collect_moments(model, DataLoader(small_data(), 20), 5, read="norm")
    assert hooked == [[{"", "1", "3", "5"}, set()]] * 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.shared(self.shared(self.first(x))).mean((2, 3)))


def test_layers_that_run_twice_are_left_out_and_named():
    with pytest.warns(UserWarning, match=r"left out, because they run more than once per forward pass: \['shared'\]"):
        moments = collect_moments(Twice(), DataLoader(small_data(), 20), 5)
    assert list(moments) == ["first"]


def test_a_layer_that_runs_twice_is_left_out_whoever_reads_it():
    net = Net(
        lambda net, x: net.head(net.shared(net.shared(net.first(x).mean((2, 3)))).relu()),
        first=nn.Conv2d(3, 4, 3), shared=nn.Linear(4, 4), head=nn.Linear(4, 5),
    ).eval()  # fmt: skip
    with pytest.warns(UserWarning, match=r"left out, because they run more than once .*: \['shared'\]"):
        assert list(collect_moments(net, DataLoader(small_data(), 20), 5)) == ["first"]


def test_a_layer_that_runs_twice_in_a_later_batch_is_an_error():
    """What it gave in the batches before is not of all samples."""

    def run(net, x):
        x = net.second(net.first(x))
        return net.head((net.second(x) if len(x) == 7 else x).mean((2, 3)))

    net = Net(run, first=nn.Conv2d(3, 4, 3), second=nn.Conv2d(4, 4, 1), head=nn.Linear(4, 5)).eval()
    with pytest.raises(ValueError, match=r"layer 'first' must be read once .* but 'second' ran again in a batch of 7"):
        collect_moments(net, DataLoader(small_data(27), 20), 5)


def test_progress_goes_to_stderr(capsys):
    collect_moments(small_model(), DataLoader(small_data(), 20), 5, progress=True)
    captured = capsys.readouterr()
    assert "moments" in captured.err
    assert captured.out == ""
    collect_moments(small_model(), DataLoader(small_data(), 20), 5, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_not_finite_names_layer_and_batch(value, labels):
    x, y = small_data().tensors
    x = x.clone()
    x[25, 0, 4, 4] = value
    loader = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    message = r"layer '0', batch 2: feature maps must be finite, found NaN or Inf in the map of sample 5, channel \d"
    with pytest.raises(ValueError, match=message):
        collect_moments(small_model(), loader, 5, labels=labels)


@pytest.fixture
def deferred(monkeypatch):
    """As on a device that nobody waits for between batches."""

    class Deferring(collect.NonFiniteMonitor):
        def __init__(self, device):
            super().__init__(device)
            self.defers = True

    monkeypatch.setattr(collect, "NonFiniteMonitor", Deferring)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_found_after_the_pass_too(deferred, value):
    x, y = small_data().tensors
    x = x.clone()
    x[15, 0, 4, 4] = x[25] = value
    loader = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 40, 10)]
    with pytest.raises(ValueError, match=r"layer '0', batch 1: feature maps must be finite"):
        collect_moments(small_model(), loader, 5)


def test_what_is_checked_later_gives_the_same_moments(deferred, monkeypatch):
    later = collect_moments(small_model(), DataLoader(small_data(), 15), 5)
    monkeypatch.undo()
    at_once = collect_moments(small_model(), DataLoader(small_data(), 15), 5)
    assert all(same_bits(later[layer], at_once[layer]) for layer in at_once)


def test_a_scale_too_large_is_found_after_the_pass_too(deferred):
    loader = DataLoader(small_data(), 15)
    with pytest.raises(ValueError, match=r"batch 0: feature maps must be finite, and exp\(-scale t\) below exp\(350\)"):
        collect_moments(small_model(), loader, 5, witness="exp", scale=1e6)


X, Y = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "loader must give at least one batch, it gave none"),
        ([X], {}, r"loader must give \(inputs, labels\) pairs, .*, batch 0 is a Tensor"),
        ([(X, Y), (X, Y + 2)], {}, r"batch 1: .*labels must lie in 0..4 \(num_classes=5\), found 5 at position 3"),
        ([(X, Y - 1)], {}, r"batch 0: .*labels must lie in 0..4 .* found -1 at position 0"),
        ([(X, Y.float())], {}, r"batch 0: .*labels must be integers \(class indices\), got float32"),
        ([(X, Y[:3])], {}, r"batch 0: .*x has 4 samples \(shape \(4, 6\)\), labels has shape \(3,\)"),
        ([(X, torch.tensor(1))], {}, r"batch 0: labels must hold one class index per sample, got shape \(\)"),
        ([(X, None)], {}, "batch 0: "),
        ([(X, Y)], {"labels": "guessed"}, "labels must be one of 'given', 'predicted', got 'guessed'"),
        ([(X, Y)], {"layers": ["conv"]}, "layers must name modules of the model, 'conv' is none"),
        ([(X, Y)], {"layers": []}, "layers must name at least one module, it is empty"),
        ([(X, Y)], {"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
        (
            [(X, Y)],
            {"num_classes": 4, "labels": "predicted"},
            r"needs logits of shape \(samples, 4\) .* got shape \(4, 5\)",
        ),
        ([(X, Y)], {"statistic": "median"}, "^collect_moments: statistic must be one of 'mean', .* got 'median'"),
        (
            [(X, Y)],
            {"statistic": ["mean"]},
            "^collect_moments: statistic must be a tuple or list of names for witness='vec",
        ),
        (
            [(X, Y)],
            {"read": "input"},
            "^collect_moments: read must be one of 'consumer', 'norm', 'output', got 'input'",
        ),
        ([(X, Y)], {"backend": "abacus"}, "^collect_moments: backend must be one of 'auto', .* got 'abacus'"),
        (
            [(X, Y)],
            {"witness": "exp"},
            "^collect_moments: scale must be a finite number above 0 for witness='exp', got None",
        ),
        (
            [(X, Y)],
            {"witness": "exp", "scale": {"0": 1.0, "5": 1.0}},
            r"layer '3', batch 0: scale must name every layer, layer '3' is not among \['0', '5'\]",
        ),
        ([(X, Y)], {"statistic": "cls"}, r"statistic 'cls' needs .* \(samples, tokens, channels\): \['0', "),
        (
            [(X, Y)],
            {"statistic": "cls", "layers": ["5"]},
            r"layer '5': pool: statistic 'cls', .* got layout='tokens' and shape \(4, 8\)",
        ),
    ],
)
def test_bad_input(loader, options, message):
    with pytest.raises(ValueError, match=message):
        collect_moments(small_model(), loader, **{"num_classes": 5, **options})


def test_models_without_layers_to_read():
    with pytest.raises(ValueError, match="model must have a convolution or linear layer, ReLU has none"):
        collect_moments(nn.ReLU(), [(X, Y)], 5)
    only_head = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with pytest.raises(ValueError, match="must have a convolution or linear layer besides its head '1'"):
        collect_moments(only_head, [(X, Y)], 5)


def test_a_typo_in_a_layer_name_gets_a_hint():
    with pytest.raises(ValueError, match=r"'layer1.0.conv3' is none; close names: 'layer1.0.conv2', 'layer1.0.conv1'"):
        collect_moments(zoo.CifarResNet(1), [(X, Y)], 10, layers=["layer1.0.conv3"])


@pytest.mark.data
def test_cifar_layers_and_norms(cifar):
    model, train, _ = cifar
    moments = collect_moments(model, zoo.batches(train), 10)
    assert len(moments) == 19
    assert moments.norms["layer3.2.conv2"] == "layer3.2.bn2"
    assert moments.samples == 1000
    assert repr(moments) == "Moments(19 layers, 688 channels, 10 classes, 1000 samples)"
    assert isinstance(moments, discedit.Moments)


class Windows(nn.Module):
    """Linear layers on windows of 4 tokens: as many samples as windows, by samples, and by windows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.by_sample, self.by_window, self.table = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(2, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        n = len(x)
        x = self.by_sample(x.reshape(n * 2, 4, 3)).relu().reshape(n, 2, 4, 5)
        x = self.by_window(x.transpose(0, 1).reshape(n * 2, 4, 5)).reshape(2, n, 4, 6).transpose(0, 1)
        return self.head((x + self.table(torch.ones(1, 7, 2)).mean()).mean((1, 2)))


def test_windows_are_pooled_over_each_sample():
    net = Windows().eval()
    x, labels = torch.randn(12, 8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2
    with pytest.warns(UserWarning, match=r"not the samples in the order of the batch, .*: \['by_window', 'table'\]"):
        moments = collect_moments(net, [(x[:7], labels[:7]), (x[7:], labels[7:])], 2)
    assert list(moments) == ["by_sample"]
    with torch.no_grad():
        expected = net.by_sample(x).mean(1).double()
    for k in range(2):
        torch.testing.assert_close(moments["by_sample"].mean[k], expected[labels == k].mean(0))
    assert moments["by_sample"].count.tolist() == [6, 6]
    with pytest.raises(ValueError, match=r"'by_window' gives shape \(4, 4, 6\) for 2 samples, in another order"):
        collect_moments(net, [(x, labels)], 2, layers=["by_window"])


class Views(nn.Module):
    """Views of a sample run as samples of their own, one sample's after the other's or, `mixed`, view after view."""

    def __init__(self, mixed=False, dims=2):
        super().__init__()
        torch.manual_seed(0)
        kind = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
        self.conv, self.norm, self.late = kind[0](3, 6, 3), kind[1](6), kind[0](6, 5, 2)
        self.neck, self.head = nn.Linear(5, 4), nn.Linear(4, 2)
        self.mixed = mixed

    def forward(self, x):
        views = x.shape[1]
        x = (x.transpose(0, 1) if self.mixed else x).flatten(0, 1)
        x = self.late(self.norm(self.conv(x)).relu()).relu().flatten(2).mean(2)
        x = x.unflatten(0, (views, -1)).mean(0) if self.mixed else x.unflatten(0, (-1, views)).mean(1)
        return self.head(self.neck(x).relu())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("read", ["consumer", "norm", "output"])
def test_views_folded_into_the_batch_are_pooled_over_each_sample(read, dims):
    net = Views(dims=dims).eval()
    x = torch.randn(10, 3, 3, *[6] * dims, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(10) % 2
    # Of the last batch each sample has one view more.
    more = torch.randn(4, 4, 3, *[6] * dims, generator=torch.Generator().manual_seed(2))
    loader = [(x[:1], labels[:1]), (x[1:], labels[1:]), (more, labels[:4])]
    moments = collect_moments(net, loader, 2, read=read)
    assert list(moments) == ["conv", "late", "neck"]
    with torch.no_grad():

        def seen(x):
            own = net.conv(x.flatten(0, 1))
            maps = {"output": own, "norm": net.norm(own), "consumer": net.norm(own).relu()}[read]
            return maps.unflatten(0, x.shape[:2]).transpose(1, 2).flatten(2).mean(2).double()

        expected = torch.cat([seen(x), seen(more)])
    both = torch.cat([labels, labels[:4]])
    for k in range(2):
        torch.testing.assert_close(moments["conv"].mean[k], expected[both == k].mean(0), rtol=1e-5, atol=1e-6)
    assert moments["conv"].count.tolist() == [7, 7]


@pytest.mark.parametrize("first", [1, 5])
def test_views_in_another_order_are_left_out(first):
    net = Views(mixed=True).eval()
    x, labels = torch.randn(10, 3, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 2
    loader = [(x[:first], labels[:first]), (x[first:], labels[first:])]
    with pytest.warns(UserWarning, match=r"not the samples in the order of the batch, .*: \['conv', 'late'\]"):
        assert list(collect_moments(net, loader, 2)) == ["neck"]


@pytest.mark.parametrize(
    ("length", "batch"), [(2, 1), (2, 2), (3, 3), (4, 2), (4, 8), (5, 3), (8, 8), (16, 4), (16, 8)]
)
def test_samples_on_the_second_axis(length, batch):
    """A sequence may be as long as a batch, or several times as long."""
    torch.manual_seed(0)
    first = Net(
        lambda net, x: net.head(net.b(net.a(x).relu()).relu().mean(1)),
        a=nn.Linear(5, 6), b=nn.Linear(6, 4), head=nn.Linear(4, 2),
    ).eval()  # fmt: skip
    second = copy.deepcopy(first)
    second.function = lambda net, x: net.head(net.b(net.a(x.transpose(0, 1)).relu()).relu().mean(0))
    x, labels = torch.randn(8, length, 5, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2
    loader = list(zip(x.split(batch), labels.split(batch), strict=True))
    for layers in (None, ["a"]):
        expected, got = (collect_moments(net, loader, 2, layers=layers) for net in (first, second))
        assert list(got) == list(expected)
        for layer, state in expected.items():
            torch.testing.assert_close(got[layer].mean, state.mean)


OUT_OF_ORDER = {
    "sorted": lambda net, x: net.head(net.a(x[(order := x[:, 0].argsort())]).relu())[order.argsort()],
    "reversed": lambda net, x: net.head(net.a(x.flip(0)).relu()).flip(0),
    "each with its mirror image": lambda net, x: (
        net.head(net.a(torch.cat([x, -x])).relu()).unflatten(0, (2, -1)).sum(0)
    ),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_samples_in_another_order_are_left_out(name):
    torch.manual_seed(0)
    net = Net(OUT_OF_ORDER[name], a=nn.Linear(5, 6), head=nn.Linear(6, 2)).eval()
    x, labels = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2
    with pytest.raises(ValueError, match=r"none can, because their rows are not the samples in the order .*: \['a'\]"):
        collect_moments(net, [(x, labels)], 2)
    with pytest.raises(ValueError, match="layer 'a' gives .* in another order"):
        collect_moments(net, [(x, labels)], 2, layers=["a"])


def test_chance_and_batches_of_one_size_are_no_other_order():
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 6), "head": nn.Linear(6, 2)}
    x, labels = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2
    noisy = Net(lambda net, x: net.head(net.a(x + torch.randn_like(x)).relu()), **layers).eval()
    fixed = Net(lambda net, x: net.head(net.a(x.view(6, 5)).relu()), **layers).eval()
    by_batch = Net(lambda net, x: net.head(net.a(x - x.mean(0)).relu()), **layers).eval()
    for net in (noisy, fixed, by_batch):
        assert list(collect_moments(net, zip(x.split(6), labels.split(6), strict=True), 2)) == ["a"]
    fixed.function = lambda net, x: net.head(net.a(x.view(6, 5).flip(0)).relu())
    with pytest.raises(ValueError, match="in another order"):
        collect_moments(fixed, zip(x.split(6), labels.split(6), strict=True), 2, layers=["a"])


def test_rows_that_are_no_parts_of_samples_are_refused_by_name():
    x, labels = torch.randn(4, 1, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(4) % 2
    loader = [(x, labels), (x.expand(-1, 3, -1, -1, -1), labels)]
    with pytest.raises(ValueError, match=r"layer 'conv' must give as many rows .* gave 12 rows for 4 samples"):
        collect_moments(Views().eval(), loader, 2, read="norm")


class Functional(nn.Module):
    """Activations, pooling and arithmetic that are no modules; a sum that ends a chain."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x, maps=None):
        maps = {} if maps is None else maps
        a = self.norm1(self.conv1(x))
        a = maps["conv1"] = functional.max_pool2d(functional.relu(a) * 2.0, 2)
        b = maps["conv2"] = self.norm2(self.conv2(a))
        b = (a + b).mean((2, 3))
        c = maps["fc1"] = functional.gelu(self.fc1(b))
        d = self.fc2(c)
        maps["fc2"] = d * torch.sigmoid(d)
        return self.head(maps["fc2"])


def test_components_are_read_as_their_consumers_see_them():
    torch.manual_seed(3)
    model, (x, labels) = Functional().eval(), small_data().tensors
    model.norm1.running_mean.uniform_(-1, 1)
    model.norm1.weight.data.uniform_(-1, 1)
    before = hooks_of(model)
    moments = collect_moments(model, [(x[:15], labels[:15]), (x[15:], labels[15:])], 5, read="consumer")
    assert hooks_of(model) == before
    maps = {}
    with torch.no_grad():
        model(x, maps)
    assert moments.read == "consumer"
    assert moments.norms == {"conv1": "norm1", "conv2": "norm2"}
    assert list(moments) == list(maps)
    for layer, seen in maps.items():
        exact = ops.class_moments(seen, labels, 5, backend="reference")
        torch.testing.assert_close(moments[layer].mean, exact.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments[layer].m2, exact.m2, rtol=1e-4, atol=1e-6)


class Mixed(nn.Module):
    """A linear layer over the positions of a convolution's maps, a convolution over a linear layer's tokens."""

    def __init__(self):
        super().__init__()
        self.patch, self.mix = nn.Conv2d(3, 6, 4, 4), nn.Linear(4, 4)
        self.tokens, self.across, self.head = nn.Linear(4, 4), nn.Conv1d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.mix(self.patch(x).relu().flatten(2))
        return self.head(self.across(self.tokens(x).relu()).mean(2))


def test_who_reads_along_another_axis_is_no_consumer():
    torch.manual_seed(3)
    model, (x, labels) = Mixed().eval(), small_data().tensors
    moments = collect_moments(model, [(x, labels)], 5)
    with torch.no_grad():
        patch = model.patch(x)
        tokens = model.tokens(model.mix(patch.relu().flatten(2)))
    for layer, maps, layout in (("patch", patch, "nchw"), ("tokens", tokens, "tokens")):
        exact = ops.class_moments(maps, labels, 5, layout=layout, backend="reference")
        torch.testing.assert_close(moments[layer].mean, exact.mean, rtol=1e-5, atol=1e-6)


def test_components_are_read_at_the_output_alone():
    torch.manual_seed(3)
    model, data = small_model().eval(), small_data()
    model[1].weight.data.uniform_(-2, -1)
    moments = collect_moments(model, DataLoader(data, 16), 5, read="output")
    assert moments.norms == {"0": "1"}
    with torch.no_grad():
        exact = ops.class_moments(model[0](data.tensors[0]), data.tensors[1], 5, backend="reference")
    torch.testing.assert_close(moments["0"].mean, exact.mean, rtol=1e-5, atol=1e-6)
    behind = collect_moments(model, DataLoader(data, 16), 5, read="norm")
    scores, behind = discedit.score(moments), discedit.score(behind)
    torch.testing.assert_close(scores["0"], behind["0"], rtol=1e-4, atol=1e-6)  # an affine map changes no score
    assert torch.equal(scores.direction["0"], -behind.direction["0"])  # but turns it round


def test_where_moments_were_read_is_kept_and_must_agree(tmp_path):
    loader = DataLoader(small_data(), 20)
    at_consumers, behind_norms = (collect_moments(small_model(), loader, 5, read=r) for r in ("consumer", "norm"))
    at_consumers.save(tmp_path / "moments")
    assert discedit.Moments.load(tmp_path / "moments").read == "consumer"
    scores = discedit.score(at_consumers)
    scores.save(tmp_path / "scores")
    assert discedit.Scores.load(tmp_path / "scores").settings["read"] == "consumer"
    assert discedit.score(behind_norms).settings["read"] == "norm"
    header, tensors = at_consumers.contents()
    del header["read"]  # of files from before there was a choice
    assert discedit.Moments.from_contents(header, tensors, "a file").read == "norm"
    with pytest.raises(ValueError, match=r"must have read='consumer' like this object, it has read='norm'"):
        at_consumers.merge(behind_norms)
    with pytest.raises(ValueError, match=r"read must be one of 'consumer', 'norm', 'output', got 'input'"):
        collect_moments(small_model(), loader, 5, read="input")


@pytest.mark.parametrize("collected", [collect_moments, discedit.collect_blocks])
def test_an_unknown_option_is_refused(collected):
    with pytest.raises(TypeError, match=r"collect_moments\(\) got an unexpected keyword argument 'checkpoint_evry'"):
        collected(small_model(), DataLoader(small_data(), 20), 5, checkpoint_evry=3)
