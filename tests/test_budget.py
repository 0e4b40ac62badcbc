import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from discedit.model.size import count_macs
from discedit.selection import budget as budgets
from discedit.selection.budget import BUDGETS, Choice, Cost, choose

INF = math.inf


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def chosen(importances, *, limits=None, cost=None, few=(), **budget):
    """`choose` by a budget's name, with its limits."""
    [(name, value)] = budget.items()
    return choose(importances, BUDGETS[name](value, **limits or {}), cost=cost, few=few)


def normalised(importances, how):
    return {layer: budgets.normalised(layer, values, how) for layer, values in importances.items()}


def ordered(importances):
    """(layer, index) of all components, by importance, then layer, then index."""
    rank = {layer: position for position, layer in enumerate(importances)}
    components = [(v, rank[layer], i, layer) for layer, values in importances.items() for i, v in enumerate(values)]
    return [(layer, i) for _, _, i, layer in sorted(components)]


def most(width, asked, floor, multiple):
    """The largest number that may go, not above what is asked, by trying all of them."""
    return max(r for r in range(asked + 1) if r == 0 or (width - r >= floor and (width - r) % multiple == 0))


def rounded(importances, components, limits):
    """What goes of the components asked for, layer by layer."""
    removed = {}
    for layer, values in importances.items():
        asked = [i for name, i in components if name == layer]
        count = most(len(values), len(asked), limits["floor"].get(layer, 1), limits["round_to"])
        removed[layer] = sorted(asked[:count])
    return removed


def instance(seed):
    """A random problem: layers that read one another and join their outputs, with equal and infinite importances."""
    rng = random.Random(seed)
    widths = {f"layer{i}": rng.randint(1, 9) for i in range(rng.randint(1, 5))}
    values = rng.choice([[0.5], [0.0, 0.25, 0.5, 1.0], [-INF, 0.1, 0.2, INF], [rng.random() for _ in range(50)]])
    importances = {layer: [rng.choice(values) for _ in range(width)] for layer, width in widths.items()}
    floor = {layer: rng.choice([1, 1, 2, width, width + 3]) for layer, width in widths.items() if rng.random() < 0.5}
    limits = {"floor": floor, "round_to": rng.choice([1, 1, 2, 3, 4, 8])}
    # Each index of a dimension belongs to a component, or to none.
    owners, footprints, macs = {}, {layer: [] for layer in widths}, {}
    for reader in [*widths, "head"]:
        read = [layer for layer in widths if rng.random() < 0.5]
        columns = [None] * rng.randint(0 if read else 1, 3)
        for layer in read:
            entries = rng.randint(1, 3)
            columns += [(layer, i) for i in range(widths[layer]) for _ in range(entries)]
            footprints[layer].append((f"{reader}.weight", 1, entries))
        rng.shuffle(columns)
        rows = [(reader, i) for i in range(widths[reader])] if reader in widths else [None] * 3
        owners[f"{reader}.weight"] = [rows, columns]
        owners[f"{reader}.bias"] = [rows]
        if reader in widths:
            footprints[reader] += [(f"{reader}.weight", 0, 1), (f"{reader}.bias", 0, 1)]
        if rng.random() < 0.8:
            macs[f"{reader}.weight"] = rng.randint(1, 100) * len(rows) * len(columns)
    shapes = {name: tuple(map(len, dims)) for name, dims in owners.items()}
    fixed = rng.randint(0, 1000)

    def left(removed):
        """Parameters and multiply-accumulates, counted on tensors that have lost what goes."""
        gone = {(layer, i) for layer, indices in removed.items() for i in indices}
        sizes = {}
        for name, dims in owners.items():
            tensor = torch.zeros(shapes[name])
            for dim, owner in enumerate(dims):
                tensor = tensor.index_select(
                    dim, torch.tensor([i for i, o in enumerate(owner) if o not in gone]).long()
                )
            sizes[name] = tensor.numel()
        return sum(sizes.values()), fixed + sum(m * sizes[name] / math.prod(shapes[name]) for name, m in macs.items())

    return SimpleNamespace(
        importances={layer: vector(*values) for layer, values in importances.items()},
        numbers=importances,
        limits=limits,
        cost=Cost(footprints, shapes, macs, fixed),
        left=left,
        rng=rng,
    )


@pytest.mark.parametrize("seed", range(12))
def test_targets_are_met_by_the_first_prefix_that_does(seed):
    case = instance(seed)
    order = ordered(case.numbers)
    choices = [rounded(case.numbers, order[:length], case.limits) for length in range(len(order) + 1)]
    sizes = [case.left(removed) for removed in choices]
    for which, budget in enumerate(("parameters", "macs")):
        reachable = [round(size[which]) for size in sizes]
        for target in {*reachable, case.rng.randint(0, reachable[0] + 1), max(0, reachable[-1] - 1)}:
            first = next((i for i, size in enumerate(sizes) if size[which] <= target + 1e-6), None)
            got = chosen(case.importances, **{budget: target}, cost=case.cost, limits=case.limits)
            best = choices[-1 if first is None else first]
            assert got.removed == best
            assert got.met == (first is not None)
            assert got.asked == target
            assert got.reached == pytest.approx(case.left(best)[which], rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_budgets_of_components_are_what_they_say(seed):
    case = instance(seed)
    order, limits = ordered(case.numbers), case.limits
    ratio = case.rng.choice([0, 0.1, 0.3, 0.5, 0.7, 0.99])
    asked = [
        component
        for layer, values in case.numbers.items()
        for component in [c for c in order if c[0] == layer][: math.ceil(ratio * len(values) - 1e-9)][: len(values) - 1]
    ]
    got = chosen(case.importances, ratio=ratio, limits=limits)
    assert got.removed == rounded(case.numbers, asked, limits)
    assert (got.asked, got.reached) == (len(asked), sum(map(len, got.removed.values())))

    threshold = case.rng.choice([0.1, 0.25, 0.6, INF, -INF])
    asked = [(layer, i) for layer, i in order if case.numbers[layer][i] < threshold]
    got = chosen(case.importances, threshold=threshold, limits=limits)
    assert got.removed == rounded(case.numbers, asked, limits)
    assert (got.asked, got.reached) == (len(asked), sum(map(len, got.removed.values())))

    room = {n: most(len(v), len(v), limits["floor"].get(n, 1), limits["round_to"]) for n, v in case.numbers.items()}
    number, taken = min(len(order) - 1, math.ceil(ratio * len(order) - 1e-9)), []
    for layer, i in order:
        if len(taken) < number and room[layer]:
            room[layer] -= 1
            taken.append((layer, i))
    got = chosen(case.importances, global_ratio=ratio, limits=limits)
    assert got.removed == rounded(case.numbers, taken, limits)
    assert (got.asked, got.met) == (number, len(taken) == number)


@pytest.mark.parametrize(
    ("ratio", "count", "gone"),
    [(0.3, 4, 1), (0.34, 3, 1), (0.1, 4, 0), (0.3, 12, 4), (0.5, 3, 2), (0.99, 4, 3), (0.5, 1, 0)],
)
def test_of_a_few_large_components_the_nearest_number_goes(ratio, count, gone):
    choice = chosen({"heads": torch.arange(count).float()}, ratio=ratio, few=["heads"])
    assert choice.removed == {"heads": list(range(gone))}
    assert (choice.met, choice.asked) == (True, gone)


@pytest.mark.parametrize("seed", range(12))
def test_limits_hold_for_every_budget(seed):
    case = instance(seed)
    everything = (
        {"ratio": 0.999},
        {"global_ratio": 0.999},
        {"threshold": INF},
        {"parameters": 0},
        {"macs": 0},
    )
    for budget in everything:
        got = chosen(case.importances, **budget, cost=case.cost, limits=case.limits)
        for layer, values in case.numbers.items():
            stay = len(values) - len(got.removed[layer])
            assert got.removed[layer] == sorted(set(got.removed[layer]))
            assert stay == len(values) or (
                stay >= case.limits["floor"].get(layer, 1) and stay % case.limits["round_to"] == 0
            )


class Joined(nn.Module):
    """Two convolutions whose outputs are joined and read by a third, then a head that no removal changes."""

    def __init__(self, first, second, third):
        super().__init__()
        self.first = nn.Conv2d(3, first, 3, padding=1)
        self.norm = nn.BatchNorm2d(first)
        self.second = nn.Conv2d(3, second, 3, padding=1, bias=False)
        self.third = nn.Conv2d(first + second, third, 3, stride=2)
        self.reader = nn.Linear(third * 9, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        joined = torch.cat([self.norm(self.first(x)).relu(), self.second(x).relu()], dim=1)
        return self.head(self.reader(self.third(joined).relu().flatten(1)))


JOINED = {
    "first": [
        ("first.weight", 0, 1),
        ("first.bias", 0, 1),
        ("norm.weight", 0, 1),
        ("norm.bias", 0, 1),
        ("third.weight", 1, 1),
    ],
    "second": [("second.weight", 0, 1), ("third.weight", 1, 1)],
    "third": [("third.weight", 0, 1), ("third.bias", 0, 1), ("reader.weight", 1, 9)],
}


def counted(model, x):
    """Parameters and multiply-accumulates (two operations each, as torch counts them)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


def joined_cost():
    """Of Joined(8, 6, 10) on one sample of 8 x 8."""
    positions = {"first.weight": 64, "second.weight": 64, "third.weight": 9, "reader.weight": 1}
    shapes = {name: tuple(p.shape) for name, p in Joined(8, 6, 10).named_parameters()}
    return Cost(JOINED, shapes, {name: n * math.prod(shapes[name]) for name, n in positions.items()}, fixed_macs=20)


@pytest.mark.parametrize("widths", [(8, 6, 10), (5, 6, 10), (8, 2, 10), (8, 6, 1), (3, 4, 7), (1, 1, 1)])
def test_cost_is_that_of_the_smaller_model(widths):
    removed = dict(zip(JOINED, (8 - widths[0], 6 - widths[1], 10 - widths[2]), strict=True))
    cost = joined_cost()
    assert (cost.parameters(removed), cost.macs(removed)) == counted(Joined(*widths), torch.zeros(1, 3, 8, 8))


def test_cost_of_a_plain_sequence():
    def build(filters):
        return nn.Sequential(
            nn.Conv2d(3, filters, 3), nn.BatchNorm2d(filters), nn.Conv2d(filters, 4, 1), nn.Flatten(), nn.Linear(144, 7)
        )

    shapes = {name: tuple(p.shape) for name, p in build(16).named_parameters()}
    footprints = {"0": [("0.weight", 0, 1), ("0.bias", 0, 1), ("1.weight", 0, 1), ("1.bias", 0, 1), ("2.weight", 1, 1)]}
    cost = Cost(footprints, shapes, {"0.weight": 36 * 27 * 16, "2.weight": 36 * 4 * 16, "4.weight": 144 * 7}, 0)
    for filters in (16, 11, 1):
        removed = {"0": 16 - filters}
        assert (cost.parameters(removed), cost.macs(removed)) == counted(build(filters), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_a_share_of_a_real_model_is_just_met(budget, share):
    generator = torch.Generator().manual_seed(0)
    widths = dict(zip(JOINED, (8, 6, 10), strict=True))
    importances = {layer: torch.rand(n, generator=generator, dtype=torch.float64) for layer, n in widths.items()}
    got = chosen(importances, **{budget: share}, cost=joined_cost())
    x = torch.zeros(1, 3, 8, 8)
    which = ("parameters", "macs").index(budget)
    whole = counted(Joined(*widths.values()), x)[which]
    smaller = {layer: n - len(got.removed[layer]) for layer, n in widths.items()}
    assert got.met
    assert got.reached == counted(Joined(*smaller.values()), x)[which] <= share * whole
    # With the last one back it is too large.
    last = max(
        ((layer, i) for layer, indices in got.removed.items() for i in indices),
        key=lambda component: importances[component[0]][component[1]],
    )
    smaller[last[0]] += 1
    assert counted(Joined(*smaller.values()), x)[which] > share * whole


def flat_cost(**widths):
    """One parameter and two multiply-accumulates for each component."""
    footprints = {layer: [(layer, 0, 1)] for layer in widths}
    shapes = {layer: (width,) for layer, width in widths.items()}
    return Cost(footprints, shapes, {layer: 2.0 * width for layer, width in widths.items()}, 0)


def test_shares_do_not_lose_a_component_to_rounding():
    values = torch.arange(100, dtype=torch.float64)
    assert 0.29 * 100 < 29
    assert chosen({"a": values}, ratio=0.29).removed["a"] == [*range(29)]
    assert chosen({"a": values}, global_ratio=0.29).reached == 29
    for budget in ("parameters", "macs"):
        got = chosen({"a": values}, **{budget: 0.29}, cost=flat_cost(a=100))
        assert got.removed["a"] == [*range(71)]
    assert chosen({"a": values[:10]}, ratio=1 - 2**-53).removed["a"] == [*range(9)]


def test_a_ratio_for_some_layers():
    importances = {"a": vector(3, 1, 2, 0), "b": vector(0, 0, 0, 0), "c": vector(1, 0, 1, 0)}
    got = chosen(importances, ratio={"c": 0.5, "a": 0.75})
    assert got.removed == {"a": [1, 2, 3], "b": [], "c": [1, 3]}


def test_equal_importances_go_in_order_of_layers_then_indices():
    importances = {"late": vector(1, 1, 1), "early": vector(1, -0.0, 1, 0.0)}
    got = chosen(importances, global_ratio=5 / 7)
    assert got.removed == {"late": [0, 1], "early": [0, 1, 3]}
    got = chosen(importances, parameters=6, cost=flat_cost(late=3, early=4))
    assert got.removed == {"late": [], "early": [1]}


def test_infinite_importances_go_first_and_last():
    importances = {"a": vector(INF, 1, -INF), "b": vector(5, INF, INF)}
    assert chosen(importances, global_ratio=0.5).removed == {"a": [1, 2], "b": [0]}
    assert chosen(importances, threshold=INF).removed == {"a": [1, 2], "b": [0]}
    got = chosen(importances, parameters=2, cost=flat_cost(a=3, b=3))
    assert got.removed == {"a": [1, 2], "b": [0, 1]}


def test_a_layer_never_loses_its_last_component():
    importances = {"one": vector(0), "two": vector(0, 0), "none": vector()}
    for budget in ({"ratio": 0.9}, {"threshold": 1}, {"global_ratio": 0.9}, {"parameters": 0}):
        got = chosen(importances, **budget, cost=flat_cost(one=1, two=2, none=0))
        assert got.removed == {"one": [], "two": [0], "none": []}


def test_what_stays_is_rounded_up():
    importances = {"a": torch.arange(20.0), "b": torch.arange(7.0), "c": torch.arange(16.0)}
    for asked, gone in ((3, 0), (4, 4), (11, 4), (12, 12), (19, 12)):
        got = chosen(importances, ratio={"a": asked / 20}, limits={"round_to": 8})
        assert got.removed["a"] == [*range(gone)]
    got = chosen(importances, ratio={"a": 0.95}, limits={"floor": {"a": 9}, "round_to": 8})
    assert got.removed["a"] == [*range(4)]
    # b has fewer than 8, so it stays; the search goes on until whole steps of 8 do.
    cost = flat_cost(a=20, b=7, c=16)
    for target, left in ((42, 39), (39, 39), (38, 31), (31, 31), (30, 23), (23, 23)):
        got = chosen(importances, parameters=target, cost=cost, limits={"round_to": 8})
        assert (got.met, got.reached, got.removed["b"]) == (True, left, [])
    assert not chosen(importances, parameters=22, cost=cost, limits={"round_to": 8}).met


def test_layers_that_take_from_one_dimension_add_up():
    footprints = {"a": [("w", 1, 2)], "b": [("w", 1, 3), ("w", 0, 1)]}
    cost = Cost(footprints, {"w": (5, 4 * 2 + 2 * 3)}, {"w": 70.0 * 11}, fixed_macs=7)
    for a, b in ((0, 0), (3, 0), (0, 2), (3, 1)):
        assert cost.parameters({"a": a, "b": b}) == (5 - b) * (14 - 2 * a - 3 * b)
        assert cost.macs({"a": a, "b": b}) == 7 + 11 * (5 - b) * (14 - 2 * a - 3 * b)


def test_messages_say_how_close_it_came():
    importances = {"conv3": torch.arange(1000.0), "fc": torch.arange(2000.0), "x": vector(1), "y": vector(1)}
    cost = flat_cost(conv3=1000, fc=2000, x=1, y=1)
    limits = {"floor": {"conv3": 64, "fc": 1500}}
    got = chosen(importances, parameters=0.5, cost=cost, limits=limits)
    assert got.message == (
        "parameters: 1,501 asked, 1,566 reached: every layer is at its floor (largest layers left: fc (1500 of 2000), "
        "conv3 (64 of 1000), x (1 of 1), ...)."
    )
    assert (got.met, got.asked, got.reached) == (False, 1501, 1566)
    got = chosen(importances, macs=4000, cost=cost, limits=limits)
    assert (got.met, got.message) == (True, "macs: 4,000 asked, 4,000 reached.")
    for target in (6004, 10**400):
        got = chosen(importances, macs=target, cost=cost, limits=limits)
        assert (got.met, got.reached, any(got.removed.values())) == (True, 6004, False)
        assert got.message == f"macs: {target:,} asked, 6,004 present: nothing has to go."
    got = chosen(importances, parameters=3002, cost=cost, limits=limits)
    assert (got.met, got.message) == (True, "parameters: 3,002 asked, 3,002 present: nothing has to go.")
    got = chosen(importances, ratio=0.5, limits=limits)
    assert (got.met, got.message) == (
        False,
        "ratio: 1,500 components asked, 1,000 removed: at the floor: 1 of 4 layers (largest layers left: fc (1500 of "
        "2000)).",
    )
    got = chosen(importances, threshold=100, limits={"round_to": 8})
    assert (got.asked, got.reached, got.met) == (202, 96 + 96, False)  # x and y lie below 100 too, and stay
    got = chosen(importances, threshold=1, limits={"round_to": 8})
    assert got == Choice(
        {layer: [] for layer in importances},
        True,
        2,
        0,
        "threshold: 2 components asked, 0 removed: what stays is rounded up to multiples of 8.",
    )
    got = chosen(importances, global_ratio=0.999, limits=limits)
    assert (got.met, got.asked, got.reached) == (False, math.ceil(0.999 * 3002), 936 + 500)


def test_a_large_model_takes_few_evaluations():
    """100,000 components of 200 layers; each evaluation is a pass over them."""

    class Counting(Cost):
        calls = 0

        def parameters(self, removed):
            self.calls += 1
            return super().parameters(removed)

    generator = torch.Generator().manual_seed(0)
    importances = {f"l{i}": torch.rand(500, generator=generator, dtype=torch.float64) for i in range(200)}
    cost = Counting({f"l{i}": [(f"l{i}", 0, 1)] for i in range(200)}, {f"l{i}": (500, 3) for i in range(200)}, {}, 0)
    got = chosen(importances, parameters=123_456, cost=cost)
    assert got.reached == 123_456 // 3 * 3
    assert cost.calls <= 2 + math.ceil(math.log2(100_001))


def test_any_float_type_gives_the_same_choice():
    values = torch.tensor([0.5, 0.25, 1.0, 0.125])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        parameter = nn.Parameter(values.to(dtype))
        assert chosen({"a": parameter}, ratio=0.5).removed == {"a": [1, 3]}


def test_normalised():
    importances = {"a": vector(1, 3, 2, 2), "zero": vector(0, 0), "none": vector()}
    for how, expected in (
        ("none", [1, 3, 2, 2]),
        ("mean", [0.5, 1.5, 1, 1]),
        ("max", [1 / 3, 1, 2 / 3, 2 / 3]),
        ("rank", [0.25, 1, 0.5, 0.75]),
    ):
        got = normalised(importances, how)
        assert list(got) == ["a", "zero", "none"]
        torch.testing.assert_close(got["a"], vector(*expected))
        assert got["zero"].tolist() == ([0.5, 1] if how == "rank" else [0, 0])
        assert got["none"].shape == (0,)


@pytest.mark.parametrize("scale", [1e308, 5e-324, 1])
def test_division_neither_overflows_nor_underflows(scale):
    values = scale * vector(1, 0, 1, 0, 0)
    assert normalised({"a": values}, "mean")["a"].tolist() == [2.5, 0, 2.5, 0, 0]
    assert normalised({"a": values}, "max")["a"].tolist() == [1, 0, 1, 0, 0]


def test_ranks_take_the_same_share_of_every_layer():
    generator = torch.Generator().manual_seed(0)
    widths = {"a": 40, "b": 8, "c": 100}
    importances = {layer: 10.0**i * torch.rand(n, generator=generator) for i, (layer, n) in enumerate(widths.items())}
    importances["b"][:] = 1
    ranks = normalised(importances, "rank")
    assert chosen(ranks, global_ratio=0.25).removed == chosen(importances, ratio=0.25).removed
    assert normalised({"a": vector(INF, -INF, -1)}, "rank")["a"].tolist() == [1, 1 / 3, 2 / 3]


BUDGET_ERRORS = [
    *(
        ({name: value}, f"prune: {name} must be a number in [0, 1), got {value!r}.")
        for name in ("ratio", "global_ratio")
        for value in (1, -0.1, math.nan, "0.3", True)
    ),
    ({"ratio": {"a": 1.5}}, "prune: ratio['a'] must be a number in [0, 1), got 1.5."),
    *(({"threshold": value}, f"prune: threshold must be a number, got {value!r}.") for value in (math.nan, "1", True)),
    *(
        (
            {"macs": value},
            f"prune: macs must be an integer number of multiply-accumulates or a share in (0, 1), got {v}.",
        )
        for value, v in ((1.5, "1.5"), (1.0, "1.0"), (0.0, "0.0"), (-3, "-3"), (math.nan, "nan"), (True, "True"))
    ),
    ({"parameters": 1e6}, "parameters must be an integer number of parameters or a share in (0, 1), got 1000000.0."),
]


@pytest.mark.parametrize(("budget", "message"), BUDGET_ERRORS)
def test_bad_budgets(budget, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen({"a": vector(1, 2)}, **budget, cost=flat_cost(a=2))


def test_bad_input():
    good = {"a": vector(1, 2)}
    for across in ("none", "rank", "max"):
        with pytest.raises(ValueError, match="NaN, layer 'b' has 2 of 3, the first at component 1"):
            chosen(good | {"b": vector(0, math.nan, math.nan)}, global_ratio=0.5, limits={"across": across})
    for limits, message in (
        ({"floor": {"a": 0}}, "floor['a'] must be an integer of at least 1, got 0."),
        ({"round_to": 0}, "round_to must be an integer of at least 1, got 0."),
        ({"round_to": 2.0}, "round_to must be an integer of at least 1, got 2.0."),
    ):
        with pytest.raises(ValueError, match=re.escape(f"prune: {message}")):
            chosen(good, ratio=0.5, limits=limits)
    for how, value in (("mean", -1.0), ("max", -1.0), ("mean", INF), ("max", INF)):
        with pytest.raises(ValueError, match=f"at least 0 to be divided by their {how}, layer 'a' has {value}"):
            normalised({"a": vector(1, value)}, how)


def test_macs_of_modules_that_are_handed_parameters():
    class Shift(nn.Module):
        def forward(self, x, shift):
            return x + shift

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shift, self.by = nn.Linear(4, 3), Shift(), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.shift(self.first(x), self.by)

    model = Shifted()
    assert count_macs(model, torch.ones(2, 4)) == 24
    assert all(parameter.requires_grad for parameter in model.parameters())
