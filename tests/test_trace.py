"""What one forward pass shows of a model: small networks, one for each fact."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from helpers import Net
from torch import nn
from torch.nn import functional as F

from discedit.model.trace import ModelTrace

X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def logits_of(net, x):
    return net.fc(net.conv(x).relu().mean((2, 3)))


def classifier(after=lambda y: y):
    torch.manual_seed(0)
    return Net(lambda net, x: after(logits_of(net, x)), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 4)).eval()


class Shared(nn.Module):
    """A layer and a norm that run twice, a norm behind an activation, and others that run once."""

    def __init__(self):
        super().__init__()
        self.late, self.first = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)
        self.repeated, self.one, self.two, self.unused = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.norm, self.norm_of_repeated, self.norm_of_two, self.last, self.behind_relu = (
            nn.BatchNorm2d(4) for _ in range(5)
        )
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.norm(self.first(x))
        x = self.norm_of_repeated(self.repeated(self.repeated(x)))
        x = self.norm_of_two(self.two(self.norm_of_two(self.one(x))))
        x = self.last(self.late(x))
        return self.behind_relu(self.relu(x))


def test_order_runs_and_norms_of_what_runs_once():
    model = Shared().train()
    trace = ModelTrace.of(model, X)
    names = ["unused", "late", "two", "one", "repeated", "first"]
    assert trace.in_order(names) == ["first", "repeated", "one", "two", "late"]
    assert [trace.runs[name] for name in ("first", "repeated", "norm_of_two")] == [1, 2, 2]
    assert trace.order[""] == 0
    assert trace.order["first"] < trace.order["norm"] < trace.order["repeated"]
    assert trace.norms == {"first": "norm", "late": "last"}


def test_a_pass_leaves_no_trace_in_the_model():
    model = Shared().train()
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert ModelTrace.of(model, X).samples == 2
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        ModelTrace.of(model, X[:, :2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


Pair = namedtuple("Pair", ["hidden", "logits"])


@dataclass
class Answer:
    features: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("after", "place"),
    [
        (lambda y: y, "output"),
        (lambda y: y.clone(), "output"),
        (lambda y: y.view(-1, 4), "output"),
        (lambda y: y.double(), "output"),
        (lambda y: (y, y.sum()), "output[0]"),
        (lambda y: {"features": y.exp(), "logits": y}, "output['logits']"),
        (lambda y: Pair(y.exp(), y), "output.logits"),
        (lambda y: Answer(y.exp(), y), "output.logits"),
        (lambda y: F.dropout(y, 0.5, False), "output"),
    ],
    ids=["as it is", "copy", "view", "cast", "tuple", "dict", "named tuple", "dataclass", "dropout"],
)
def test_the_head_gives_the_logits(after, place):
    trace = ModelTrace.of(classifier(after), X)
    assert (trace.head, trace.classifier, trace.logits) == ("fc", "fc", place)
    assert trace.outputs[place] == (2, 4)


@pytest.mark.parametrize("after", [lambda y: y.softmax(1), torch.exp, torch.relu_, lambda y: 2 * y])
def test_what_changes_the_logits_is_no_head(after):
    """Of an activation in place, the tensor is the very one that the layer gave."""
    trace = ModelTrace.of(classifier(after), X)
    assert (trace.head, trace.classifier) == (None, "fc")


def test_other_heads():
    torch.manual_seed(0)
    layers = {"one": nn.Linear(6, 4), "other": nn.Linear(6, 4)}
    model = Net(lambda net, x: (net.one(x), net.other(x))[0].clone(), **layers).eval()
    trace = ModelTrace.of(model, torch.randn(3, 6))
    assert (trace.head, trace.classifier) == ("one", "one")  # not the layer that runs last
    maps = Net(lambda net, x: net.conv(x), conv=nn.Conv2d(3, 4, 3)).eval()
    assert ModelTrace.of(maps, X).head == "conv"
    flat = Net(lambda net, x: net.conv(x.mean((2, 3), keepdim=True)).flatten(1), conv=nn.Conv2d(3, 4, 1)).eval()
    assert ModelTrace.of(flat, X).head == "conv"
    pooled = Net(lambda net, x: net.conv(x).mean((2, 3)), conv=nn.Conv2d(3, 4, 3)).eval()
    assert (ModelTrace.of(pooled, X).head, ModelTrace.of(pooled, X).classifier) == (None, "conv")
    assert ModelTrace.of(Net(lambda net, x: None, conv=nn.Conv2d(3, 4, 3)), X).outputs == {}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_behind_an_activation_is_not_behind_the_layer(inplace):
    """In place, the activation gives back the very tensor that the layer gave."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(inplace), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Dropout(), nn.BatchNorm2d(4)
    )
    trace = ModelTrace.of(model, X)
    assert trace.norms == {"3": "5"}  # dropout does nothing
    assert trace.bias_norm("0") is None


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("norm", "affine", "constants"),
    [
        (nn.BatchNorm2d(4), True, True),
        (WithActivation(4), False, True),
        (nn.BatchNorm2d(4, track_running_stats=False), False, False),
        (nn.GroupNorm(2, 4), False, False),
    ],
    ids=["plain", "with an activation inside", "of the batch", "group norm"],
)
def test_what_a_norm_behind_does(norm, affine, constants):
    trace = ModelTrace.of(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm).eval(), X)
    assert trace.norms == {"0": "1"}
    assert trace.has_affine_norm("0") == affine
    assert trace.bias_norm("0") is (norm if constants else None)
    assert ("neither a bias nor a batch norm" in trace.why_not_fitted("0")) == (not constants)


def test_a_copy_answers_for_its_own_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    trace, edited = ModelTrace.of(model, X), copy.deepcopy(model)
    assert not trace.why_not_fitted("0")
    edited[0].register_forward_hook(lambda module, args, output: output + 1)
    other = trace.of_copy(edited)
    assert other.bias_norm("0") is edited[1]
    assert "forward or hooks of its own" in other.why_not_fitted("0")
    assert not trace.why_not_fitted("0")


def test_windows_folded_into_the_batch():
    def forward(net, x):
        windows = net.windows(x.unflatten(2, (2, 3)).permute(0, 2, 1, 3, 4).flatten(0, 1))
        table = net.table(torch.ones(7, 2))
        return net.fc(windows.unflatten(0, (-1, 2)).mean((1, 3, 4)) + table.mean())

    layers = {"windows": nn.Conv2d(3, 4, 3), "table": nn.Linear(2, 4), "fc": nn.Linear(4, 2), "idle": nn.Linear(2, 2)}
    trace = ModelTrace.of(Net(forward, **layers), X, windows=True)
    assert trace.windows == {"windows": 2, "table": 0, "fc": 1}
    assert trace.why_not_erased("windows") == "it reads 2 rows for each sample, such as windows of it"
    assert trace.why_not_erased("table").startswith("the rows that it reads are not the samples in the order of the")
    assert trace.why_not_erased("fc") == ""
    assert trace.why_not_erased("idle") == "it does not run as a module of its own"
    called = ModelTrace.of(Net(lambda net, x: net.fc(input=x), fc=nn.Linear(6, 2)), X)
    assert called.why_not_erased("fc") == "it is not called with a tensor of samples as its first argument"


def test_sums_and_consumers_of_a_residual_block():
    def forward(net, x):
        x = net.stem(x)
        inner = F.relu(net.norm1(net.inner(x)), inplace=True)
        x = (x + net.norm2(net.outer(inner))).relu()
        return net.fc(net.plain(x.relu()).relu().mean((2, 3)))

    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 4, 1)} | {name: nn.Conv2d(4, 4, 1) for name in ("inner", "outer", "plain")}
    norms = {"norm1": nn.BatchNorm2d(4), "norm2": nn.BatchNorm2d(4), "fc": nn.Linear(4, 2)}
    trace = ModelTrace.of(Net(forward, **layers, **norms).eval(), X)
    assert trace.sums == {"stem", "outer"}
    assert trace.norms == {"inner": "norm1", "outer": "norm2"}
    assert trace.consumers == {"stem": ["inner"], "inner": ["outer"]}  # behind the sum, components have met others


class LoRA(nn.Linear):
    """A low-rank update beside the weight."""

    def __init__(self, width, rank=1):
        super().__init__(width, width)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def test_layers_that_are_not_plain_say_so():
    layers = [nn.Linear(4, 4) for _ in range(3)]
    layers[1].forward = lambda x: F.linear(x, layers[1].weight) * 2
    layers[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    trace = ModelTrace(nn.Sequential(*layers, LoRA(4)))  # which needs no pass
    assert [bool(trace.why_not_plain(name)) for name in "0123"] == [False, True, True, True]
    assert "it is a LoRA" in trace.why_not_read("3")
    trace.model = None  # it is asked once
    assert trace.why_not_plain("0") == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_modules_do_is_seen_in_half_precision_too(dtype):
    trace = ModelTrace.of(nn.Sequential(nn.Conv2d(3, 4, 1), WithActivation(4)).eval().to(dtype), X.to(dtype))
    assert not trace.has_affine_norm("0")
    assert trace.bias_norm("0") is not None
    layer = nn.Linear(4, 4).to(dtype)
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias).relu()
    assert "whose output is not what Linear makes" in ModelTrace(layer).why_not_plain("")


def test_names_are_those_without_the_wrapper():
    model = classifier()
    trace = ModelTrace.of(nn.DataParallel(model), X)
    assert trace.model is model
    assert trace.head == "fc"
    assert list(trace.runs) == ["", "conv", "fc"]


def test_other_modules_are_followed_where_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    trace = ModelTrace.of(model, X, None, layers=["2"])
    assert trace.norms == {"0": "1"}
    assert (trace.samples, trace.largest, trace.head) == (5, 4 * 6 * 6 * 4, "3")
    assert trace.consumers == {"0": ["3"], "2": ["3"]}
    assert list(trace.given) == ["0", "1", "2", "3", ""]  # as they end
    assert trace.given["2"] == (5, 4, 6, 6)


def test_what_runs_in_train_mode():
    def function(net, x):
        y = net.fc(net.norm(net.conv(x)).mean((2, 3)))
        return (y, net.branch(y)) if net.training else y

    class Norm(nn.BatchNorm2d):
        """Of nobody's own making as far as torch knows, so that it learns in train mode."""

    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": Norm(4), "fc": nn.Linear(4, 4), "branch": nn.Linear(4, 2)}
    net = Net(function, **layers, never=nn.Linear(2, 2)).eval()
    state = copy.deepcopy(net.state_dict())
    assert ModelTrace.of(net, X).training is None
    trace = ModelTrace.of(net, X, training=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert trace.branches
    assert trace.training.runs.keys() - trace.runs.keys() == {"branch"}
    assert trace.training.outputs == {"output[0]": (2, 4), "output[1]": (2, 2)}
    assert not ModelTrace.of(classifier(), X, training=True).branches
    fails = Net(lambda net, x: 1 / 0 if net.training else net.conv(x), conv=nn.Conv2d(3, 4, 3)).eval()
    trace = ModelTrace.of(fails, X, training=True)
    assert (trace.training, trace.branches) == (None, False)
