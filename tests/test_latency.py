"""Budgets of latency by a clock that counts what calls are given: the table against models that are smaller."""

import itertools
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import discedit
from discedit import LatencyTable, MaxLatency, iterative_prune, prune
from discedit.editing import latency
from discedit.editing import prune as pruning
from discedit.graph.pruning_graph import Graph
from discedit.model.forward import frozen_eval
from discedit.recipes.latencies import LatencyTerm
from discedit.recipes.recipe import reduced
from discedit.selection.divergence import least_divergence


class Clock(TorchDispatchMode):
    """A machine that works on blocks: each size of a tensor counts as the next multiple of one."""

    block = 1

    def __init__(self):
        super().__init__()
        self.time = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
            blocks = [[-(-size // self.block) * self.block for size in tensor.shape] for tensor in tensors]
            self.time += 1e-3 * sum(math.prod(sizes) for sizes in blocks)
        return func(*args, **(kwargs or {}))


def counted(run, device=None):
    with Clock() as clock:
        run()
    return clock.time


@pytest.fixture(params=[1, 4], ids=["smooth", "blocks of 4"])
def clock(request, monkeypatch):
    monkeypatch.setattr(Clock, "block", request.param)
    monkeypatch.setattr(latency, "stopwatch", counted)
    for number in ("MOST_ROUNDS", "LEAST_ROUNDS", "MOST_TURNS", "LEAST_TURNS"):  # each gives the same
        monkeypatch.setattr(latency, number, 1)
    return request.param


class Net(nn.Module):
    """A block, a depthwise convolution, two layers that meet, one that reads maps as vectors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.wide, self.depth = nn.Conv2d(8, 40, 1), nn.Conv2d(40, 40, 3, groups=40, padding=1)
        self.left, self.right = nn.Conv2d(40, 8, 1), nn.Conv2d(40, 8, 1)
        self.last = nn.Conv2d(16, 8, 3, stride=2)
        self.hidden, self.head = nn.Linear(8 * 9, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        x = functional.relu_(self.conv2(functional.relu(self.bn1(self.conv1(x)))) + x)
        x = functional.hardswish(self.depth(self.wide(x)))
        x = torch.cat([self.left(x), self.right(x)], 1).sigmoid()
        return self.head(functional.gelu(self.hidden(self.last(x).flatten(1))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images():
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def table_of(net, x, kinds=("filters", "neurons")):
    graph = Graph("prune", net, x)
    layers = [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    found, _ = graph.find([layer for layer in layers if layer != "head"], kinds)
    return graph, *latency.measured_latencies("prune", graph, found, x)


@pytest.mark.parametrize("kinds", [("filters", "neurons"), ("filters", "neurons", "stream")])
def test_a_table_is_what_smaller_models_take(net, images, clock, kinds):
    graph, table, failed = table_of(net, images[:2], kinds)
    assert not failed
    # What meets at one place was measured at some sums of what goes; on blocks it is not linear between them.
    layers = [layer for layer in table.layers if clock == 1 or layer not in ("left", "right")]
    assert table.scale == pytest.approx(1, abs=1e-9 if clock == 1 else 0.05)
    with torch.no_grad(), frozen_eval(net):
        assert table.whole == pytest.approx(counted(lambda: net(images[:2])))
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            choices = {layer: table.layers[layer] for layer in layers}
            removed = {n: c[int(torch.randint(len(c), (), generator=generator))] for n, c in choices.items()}
            operations, why = graph.plan({layer: range(number) for layer, number in removed.items()})
            smaller = reduced(net, operations)
            assert not why
            saved = table.whole - counted(lambda model=smaller: model(images[:2]))
            assert table.whole - table.latency(removed) == pytest.approx(table.scale * saved, rel=1e-9)


def test_the_widths_that_may_stay_are_those_that_save(net, images, clock):
    _, table, _ = table_of(net, images[:2])
    stay = {layer: [width - n for n in table.worthwhile(layer)] for layer, width in {"wide": 40, "conv1": 12}.items()}
    assert stay == {"wide": [40, 32, 24, 16, 8], "conv1": [*range(12, 0, -1)] if clock == 1 else [12, 8, 4]}
    others = {"conv1": 3, "left": 2}
    for layer, numbers in table.layers.items():
        along = table.along(others, layer, torch.tensor(numbers))
        without = table.latency(others | {layer: 0})
        assert along.tolist() == pytest.approx([without - table.latency(others | {layer: n}) for n in numbers])
        assert bool((along.diff() >= -1e-12).all())


@pytest.mark.parametrize("across", ["divergence", "rank"])
def test_prune_meets_what_was_asked_and_keeps_the_table(net, images, clock, across, tmp_path):
    data, options = [images[:10], images[10:]], {"example_inputs": images[:2]}
    edit = prune(net, data=data, budget=MaxLatency(0.7, across=across), **options)
    asked = edit.recipe.settings["budget"]
    assert edit.recipe.settings["latency"] == 0.7
    assert asked["met"]
    assert asked["reached"] <= asked["asked"] == pytest.approx(0.7 * edit.latencies.whole)
    with torch.no_grad():
        before, after = (counted(lambda model=model: model(images[:2])) for model in (net, edit.model))
    assert (edit.latency_before, edit.latency_after) == (pytest.approx(before), pytest.approx(after))
    assert asked["measured"] == edit.latency_after <= (0.7 if clock == 1 else 0.72) * edit.latency_before
    assert f"latency: {before:.3g} -> {after:.3g} ms" in edit.summary()
    json.dumps(edit.recipe.settings)
    # A table is spent on other budgets without measuring, and gives the same for the same.
    edit.latencies.save(tmp_path / "table.safetensors")
    table = LatencyTable.load(tmp_path / "table.safetensors")
    assert repr(table) == repr(edit.latencies)
    way = edit.divergences or across
    again = prune(net, budget=MaxLatency(0.7, across=way, table=table), data=data, **options)
    assert again.recipe.components == edit.recipe.components
    milliseconds = 0.8 * table.whole
    other = prune(
        net, budget=MaxLatency(milliseconds, across=way, table=table, round_to=8, floor=8), data=data, **options
    )
    stay = {layer: other.widths[layer] - len(rows) for layer, rows in other.recipe.components.items()}
    assert all(number == other.widths[layer] or number % 8 == 0 for layer, number in stay.items())
    assert other.latency_after < other.latency_before


def test_in_steps(net, images, clock):
    edit = iterative_prune(
        net, example_inputs=images[:2], steps=2, budget=MaxLatency(0.7, across="rank"), data=[images], repair="none"
    )
    assert edit.latency_after <= 0.72 * edit.latency_before
    assert edit.recipe.settings["steps"] == 2


def test_tables_of_others_are_refused(net, images, clock, tmp_path):
    table = prune(net, example_inputs=images[:2], latency=0.985, components="neurons").latencies
    smaller = prune(net, example_inputs=images[:2], ratio=0.5).model
    with pytest.raises(ValueError, match="prune: table must be of this model"):
        prune(smaller, example_inputs=images[:2], budget=MaxLatency(0.9, table=table))
    edit = prune(net, example_inputs=images[:2], budget=MaxLatency(0.985, table=table))
    assert edit.skipped["conv1"] == "the table of latencies does not have it"
    table.layers["hidden"][-1] = 30
    with pytest.raises(ValueError, match="table must be of the same components, layer 'hidden' has others"):
        prune(net, example_inputs=images[:2], budget=MaxLatency(0.9, table=table))
    path = tmp_path / "table.safetensors"
    table.save(path)
    header, tensors = discedit.common.files.load_tensors(path, "latencies")
    del tensors["0/times"]
    discedit.common.files.save_tensors(path, "latencies", header, tensors)
    with pytest.raises(ValueError, match="is damaged: tensor '0/times' is missing"):
        LatencyTable.load(path)


class Padded(nn.Module):
    """Calls something else for odd widths."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.second(x.mul(1.0) if x.shape[1] % 2 else x).relu())


def test_layers_whose_latency_cannot_be_known_stay_whole(monkeypatch):
    monkeypatch.setattr(latency, "stopwatch", counted)
    edit = prune(Padded().eval(), example_inputs=torch.randn(4, 6), latency=0.9)
    assert "the model calls something else" in edit.skipped["first"]
    assert edit.recipe.components["second"]


def test_what_is_missed_is_said(net, images, monkeypatch):
    monkeypatch.setattr(latency, "stopwatch", counted)
    with pytest.warns(UserWarning, match=r"latency: 0\.\d+ ms asked, .* reached: every layer is at its floor"):
        prune(net, example_inputs=images[:2], latency=0.01)
    monkeypatch.setattr(pruning, "latencies", lambda *_: (10.0, 8.9))
    with pytest.warns(UserWarning, match=r"latency: 8 ms asked of 10 ms, 8.9 ms measured: the table said"):
        prune(net, example_inputs=images[:2], latency=0.8)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "20ms", None])
def test_bad_values(value):
    with pytest.raises(ValueError, match=r"latency must be a number of milliseconds from 1 on or a share in \(0, 1\)"):
        MaxLatency(value)


def test_bad_tables():
    with pytest.raises(TypeError, match="prune: table must be a LatencyTable, got dict"):
        MaxLatency(0.5, table={})


def test_a_real_clock(net, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is reached is the machine's
        edit = prune(net, example_inputs=images, budget=MaxLatency(0.8, across="rank"))
    table = edit.latencies
    times = torch.cat([term.times.flatten() for term in table.terms])
    assert bool(((times > 0) & times.isfinite()).all())
    assert 0 <= table.scale < math.inf
    assert min(edit.latency_before, edit.latency_after, table.whole) > 0


def test_steps_of_a_cost_are_seen():
    """Of two layers that diverge alike, where one saves nothing before half of it is gone."""
    numbers = torch.arange(9)
    curves = {"line": (numbers.double() ** 2), "steps": (numbers.double() ** 2)}
    saved = {"line": numbers.double(), "steps": torch.where(numbers < 4, 0.0, 4.0).double()}

    def cost(gone):
        return 16 - sum(float(saved[layer][number]) for layer, number in gone.items())

    def along(gone, layer, those):
        return saved[layer][those]

    permitted = {layer: [*range(9)] for layer in curves}
    for room in (12, 11, 10):
        gone = least_divergence(curves, permitted, cost, room, along)
        loss, best = (
            sum(float(curves[layer][n]) for layer, n in each.items())
            for each in (
                gone,
                min(
                    (dict(zip(curves, pair, strict=True)) for pair in itertools.product(range(9), repeat=2)),
                    key=lambda each: (cost(each) > room, sum(float(curves[layer][n]) for layer, n in each.items())),
                ),
            )
        )
        assert cost(gone) <= room
        assert loss == best


def test_a_term_is_linear_between_its_places():
    grid = (torch.tensor([0, 2, 4]), torch.tensor([0, 4]))
    times = torch.tensor([[8.0, 4.0], [9.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    table = LatencyTable(
        10.0, 0.5, {"a": [0, 2, 4], "b": [0, 4]}, [LatencyTerm(({"a": 1}, {"b": 1}), grid, times)], {}, {}
    )
    for (a, b), expected in {(0, 0): 8, (2, 0): 8, (4, 4): 1, (1, 2): (8 + 4 + 8 + 3) / 4, (3, 4): 2}.items():
        assert table.latency({"a": a, "b": b}) == pytest.approx(10 - 0.5 * (8 - expected))
