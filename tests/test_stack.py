"""A stack of edits: whatever was removed, what is left is exactly what applying only the rest would give."""

import copy
import doctest
import itertools
import json
import random

import pytest
import torch
from helpers import Net
from torch import nn
from torch.nn import functional

from discedit import AblateComponents, Recipe, Stack, TopFraction, prune, unlearn, zoo
from discedit.graph.pruning_graph import Graph
from discedit.recipes import stack as module_under_test
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import architecture_of

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ROWS = {"a": 6, "b": 5, "c": 7}  # of the small network


def small(seed=0):
    torch.manual_seed(seed)
    net = Net(
        lambda s, x: s.head(s.c(s.b(s.n(s.a(x)).relu()).relu().flatten(1)).relu()),
        a=nn.Conv2d(3, 6, 3, padding=1), n=nn.BatchNorm2d(6), b=nn.Conv2d(6, 5, 3, padding=1),
        c=nn.Linear(80, 7), head=nn.Linear(7, 3),
    )  # fmt: skip
    for tensor in (net.n.weight, net.n.bias, net.n.running_mean):
        tensor.data.normal_()
    return net.eval()


def depthwise():
    torch.manual_seed(0)
    return Net(
        lambda s, x: s.head(s.c(s.b(s.a(x).relu()).relu()).relu().mean((2, 3))),
        a=nn.ConvTranspose2d(3, 6, 2), b=nn.Conv2d(6, 6, 3, groups=6), c=nn.Conv2d(6, 6, 1), head=nn.Linear(6, 3),
    ).eval()  # fmt: skip


def residual():
    torch.manual_seed(0)
    return Net(
        lambda s, x: s.head(s.n(s.c(s.b(s.a(x)).relu()) + s.a(x)).mean((2, 3))),
        a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 5, 1), c=nn.Conv2d(5, 6, 1), n=nn.BatchNorm2d(6), head=nn.Linear(6, 3),
    ).eval()  # fmt: skip


class Core(nn.Module):
    """Counts heads and owns no tensor."""

    def __init__(self, num_heads):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q, k, v):
        n, t, _ = q.shape
        q, k, v = (part.view(n, t, self.num_heads, -1).transpose(1, 2) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.all_head_size = 6, 24
        self.query, self.key, self.value = (nn.Linear(3, 24) for _ in range(3))
        self.core, self.out = Core(6), nn.Linear(24, 5)

    def forward(self, x):
        return self.out(self.core(self.query(x), self.key(x), self.value(x)))


def heads():
    torch.manual_seed(0)
    return Net(
        lambda s, x: s.head(s.attention(x.flatten(2).transpose(1, 2)).mean(1)),
        attention=Attention(), head=nn.Linear(5, 3),
    ).eval()  # fmt: skip


NETWORKS = {
    "small": (small, ["a", "b", "c"]),
    "depthwise": (depthwise, ["a", "c"]),
    "residual": (residual, ["a", "b"]),
    "heads": (heads, ["attention.value"]),
}


def same(a, b):
    """Every bit, every name, every width."""
    assert str(a) == str(b)
    mine, other = a.state_dict(), b.state_dict()
    assert list(mine) == list(other)
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
    for (name, part), twin in zip(a.named_modules(), b.modules(), strict=True):
        counts = [{k: v for k, v in vars(m).items() if isinstance(v, (int, tuple))} for m in (part, twin)]
        assert counts[0] == counts[1], name


def pruned(model, rows):
    """The recipe that removes these components, straight from the graph."""
    operations, failed = Graph("prune", model, X).plan(rows)
    assert not failed
    return Recipe("prune", {}, {layer: list(gone) for layer, gone in rows.items()}, architecture_of(model), operations)


def written(model, kind, tensor, index, dim=0, values=None):
    value = {"fill": 0.0, "scale": 0.7}.get(kind)
    tensors = {} if values is None else {"set.0": values}
    operation = Operation(kind, tensor, dim=dim, index=tuple(index), value=value)
    return Recipe("unlearn", {}, {}, architecture_of(model), [operation], tensors)


def zeroed(model, layer, index):
    """Rows of a layer and its bias, as `unlearn` zeroes them."""
    operations = [Operation("fill", f"{layer}.{part}", index=tuple(index), value=0.0) for part in ("weight", "bias")]
    return Recipe("unlearn", {}, {layer: list(index)}, architecture_of(model), operations)


def in_order(model, recipes):
    for recipe in recipes:
        model = recipe.apply(model).model
    return model


@pytest.mark.slow
def test_overlapping_zeroing_edits_in_all_orders_of_removal():
    base = small()
    recipes = {
        "one": zeroed(base, "a", [0, 1, 2]),
        "two": zeroed(base, "a", [2, 3]),
        "three": written(base, "scale", "a.weight", [1, 2, 5]),
        "four": written(base, "add", "a.weight", [0, 5], values=torch.randn(2, 3, 3, 3)),
    }
    for pushed in (list(recipes), list(recipes)[::-1]):
        for removed in itertools.permutations(recipes):
            stack = Stack(base)
            for name in pushed:
                stack.push(name, recipes[name])
            left = list(pushed)
            for name in removed:
                same(stack.model, in_order(base, [recipes[other] for other in left]))
                stack.remove(name)
                left.remove(name)
                assert stack.names == left
            same(stack.model, base)


class Known:
    """What the stack should be, kept in the base's numbers: writes one after the other, then all removals at once."""

    def __init__(self, base):
        self.base, self.edits = base, {}

    def kept(self, layer):
        gone = {
            row for kind, where, rows, _ in self.edits.values() if kind == "prune" and where == layer for row in rows
        }
        return [row for row in range(ROWS[layer]) if row not in gone]

    def model(self):
        writes = [recipe for kind, _, _, recipe in self.edits.values() if kind != "prune"]
        gone = {layer: sorted(set(range(ROWS[layer])) - set(self.kept(layer))) for layer in ROWS}
        model = in_order(self.base, writes)
        return pruned(model, {k: v for k, v in gone.items() if v}).apply(model).model if any(gone.values()) else model


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_of_pushes_and_removals(seed):
    chance = random.Random(seed)
    base = small(seed)
    stack, known = Stack(base), Known(base)
    generator = torch.Generator().manual_seed(seed)
    for step in range(14):
        if len(stack) > 5 or (len(stack) and chance.random() < 0.35):
            name = chance.choice(stack.names)
            stack.remove(name)
            del known.edits[name]
        else:
            name, layer = f"edit {step}", chance.choice(list(ROWS))
            kind = chance.choice(["prune", "prune", "fill", "scale", "add"])
            on_base = chance.random() < 0.5
            candidates = range(ROWS[layer]) if on_base else known.kept(layer)
            most = [row for row in candidates if row < 4] if kind == "prune" else list(candidates)
            rows = sorted(chance.sample(most, min(len(most), chance.randint(1, 3))))
            if not rows:
                continue
            model = base if on_base else stack.model
            index = [list(candidates).index(row) for row in rows]
            values = torch.randn(len(rows), generator=generator) if kind == "add" else None
            if kind == "prune":
                recipe, in_base = pruned(model, {layer: index}), None
            else:
                tensor = f"{layer}.bias" if kind == "add" else f"{layer}.weight"
                recipe = written(model, kind, tensor, index, values=values)
                in_base = written(base, kind, tensor, rows, values=values)
            stack.push(name, recipe)
            known.edits[name] = (kind, layer, rows, in_base)
        expected = known.model()
        same(stack.model, expected)
        with torch.no_grad():
            assert torch.equal(stack.model(X), expected(X))
        assert stack.names == list(known.edits)
        # The recipes as they stand: forwards from the base, and backwards to it.
        assert list(stack.recipes) == stack.names
        same(in_order(base, stack.recipes.values()), expected)
        undone = stack.model
        for recipe in reversed(stack.recipes.values()):
            undone = recipe.undo(undone)
        same(undone, base)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_prunings_on_prunings_in_all_orders_of_removal(name):
    make, layers = NETWORKS[name]
    base = make()
    # In the base's numbers, by components; the third is made on what the first two leave, the last overlaps.
    gone = {"p": {0}, "q": {2}, "r": {3}, "s": {2, 4}}
    p, s = (pruned(base, dict.fromkeys(layers, rows)) for rows in ([0], [2, 4]))
    step = {layer: [1] for layer in layers}
    one = p.apply(base).model
    q = pruned(one, step)
    r = pruned(q.apply(one).model, step)
    expected = {}
    for count in range(1, 5):
        for left in itertools.combinations(gone, count):
            rows = sorted(set.union(*(gone[edit] for edit in left)))
            expected[left] = pruned(base, dict.fromkeys(layers, rows)).apply(base).model
    for removed in itertools.permutations(gone):
        stack = Stack(base)
        for edit, recipe in zip("pqrs", (p, q, r, s), strict=True):
            stack.push(edit, recipe)
        for leaving in removed:
            left = tuple(stack.names)
            same(stack.model, expected[left])
            with torch.no_grad():
                assert torch.equal(stack.model(X), expected[left](X))
            stack.remove(leaving)
        same(stack.model, base)


def test_an_edit_made_on_a_pruned_model_keeps_its_rows():
    base = small()
    stack = Stack(base)
    stack.push("prune", pruned(base, {"a": [0, 2], "b": [1]}))
    stack.push("cat", zeroed(stack.model, "a", [0, 1]))  # rows 1 and 3 of the base
    assert stack.recipes["cat"].components == {"a": [0, 1]}
    stack.remove("prune")
    same(stack.model, zeroed(base, "a", [1, 3]).apply(base).model)
    assert stack.recipes["cat"].components == {"a": [1, 3]}
    assert stack.recipes["cat"].operations[0].index == (1, 3)


def test_rows_that_a_pruning_took_come_back_with_it():
    base = small()
    stack = Stack(base)
    stack.push("prune", pruned(base, {"a": [0, 2]}))
    stack.push("cat", zeroed(base, "a", [2, 3]))
    stack.push("gone", zeroed(base, "a", [0, 2]))
    assert stack.recipes["cat"].operations == [
        Operation("fill", f"a.{part}", index=(1,), value=0.0) for part in ("weight", "bias")
    ]
    assert stack.recipes["cat"].components == {"a": [1]}
    assert stack.recipes["gone"].operations == []
    stack.remove("prune")
    same(stack.model, zeroed(base, "a", [0, 2, 3]).apply(base).model)


def test_values_of_an_addition_follow_rows_and_columns():
    base = small()
    values = torch.arange(2.0 * 6 * 9).reshape(2, 6, 3, 3)
    column = torch.tensor([5.0, 7.0]).reshape(2, 1, 1, 1)  # one number for each row
    stack = Stack(base)
    stack.push("prune", pruned(base, {"a": [0, 4], "b": [3]}))
    stack.push("add", written(base, "add", "b.weight", [1, 3], values=values))
    stack.push("column", written(base, "add", "b.weight", [1, 3], values=column))
    small_rows = [1, 2, 3, 5]
    expected = base.b.weight[1] + values[0] + 5
    assert torch.equal(stack.model.b.weight[1], expected[small_rows])
    stack.push("along", written(stack.model, "add", "b.weight", [0, 2], dim=1, values=torch.ones(4, 2, 1, 1)))
    expected[[1, 3]] += 1
    assert torch.equal(stack.model.b.weight[1], expected[small_rows])
    before = stack.model
    with pytest.raises(
        ValueError, match=r"edit 'along' cannot be as it is without 'prune': it adds values .* tensor 'b.weight'"
    ):
        stack.remove("prune")
    assert stack.model is before
    stack.remove("along")
    stack.remove("prune")
    same(stack.model, in_order(base, [written(base, "add", "b.weight", [1, 3], values=v) for v in (values, column)]))


def whole(model, name):
    operation = Operation("set", name)
    shape = architecture_of(model)[name]
    return Recipe("prune", {}, {}, architecture_of(model), [operation], {"set.0": torch.full(shape, 2.0)})


def refused(stack, call, *parts):
    """A change is refused with these words, and nothing of the stack has changed."""
    model, names, recipes = stack.model, stack.names, stack.recipes
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Stack") as error:
        call()
    for part in parts:
        assert part in str(error.value)
    assert stack.model is model
    assert stack.names == names
    assert all(mine is other for mine, other in zip(stack.recipes.values(), recipes.values(), strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_whole_tensors_cannot_be_translated():
    base = small()
    stack = Stack(base)
    stack.push("prune", pruned(base, {"a": [0], "c": [1]}))
    stack.push("repair", whole(stack.model, "b.weight"))
    stack.push("elsewhere", whole(stack.model, "b.bias"))
    stack.push("more", pruned(base, {"c": [2, 3]}))
    refused(
        stack,
        lambda: stack.remove("prune"),
        "edit 'repair' cannot be as it is without 'prune'",
        "sets values of shape [5, 5, 3, 3] for the whole of tensor 'b.weight' along dimension 1",
        "Remove it first, and make it anew on stack.model",
    )
    refused(
        stack,
        lambda: stack.push("late", whole(base, "head.weight")),
        "edit 'late' cannot be as it is on top of the others",
        "sets values of shape [3, 7] for the whole of tensor 'head.weight' along dimension 1",
    )
    stack.remove("more")
    stack.remove("repair")
    stack.remove("prune")
    same(stack.model, whole(base, "b.bias").apply(base).model)


def test_rows_of_the_same_number_are_not_the_same_rows():
    """The shapes fit, but the values belong to other rows."""
    base = small()
    stack = Stack(base)
    stack.push("p", pruned(base, {"a": [0]}))
    stack.push("q", pruned(base, {"a": [1]}))
    stack.push("repair", whole(stack.model, "a.bias"))
    stack.push("r", pruned(base, {"a": [2]}))
    refused(stack, lambda: stack.remove("p"), "'p'", "'repair'", "'a.bias'")
    refused(stack, lambda: stack.remove("q"), "'q'", "'repair'", "'a.bias'")
    stack.remove("r")
    assert stack.model.a.bias.tolist() == [2.0] * 4


def test_nothing_would_be_left():
    base = small()
    stack = Stack(base)
    stack.push("first", pruned(base, {"b": [0, 1, 2]}))
    refused(
        stack,
        lambda: stack.push("rest", pruned(base, {"b": [3, 4]})),
        "edit 'rest' cannot be as it is on top of the others",
        "nothing would be left of tensor 'b.weight' along dimension 0",
    )


def test_an_attribute_that_no_tensor_tells():
    base = small()
    base.width = 6

    def narrowed(model, keep, value):
        recipe = pruned(model, {"a": keep})
        change = Operation("attribute", "", name="width", before=model.width, value=value)
        return Recipe("prune", {}, {}, recipe.architecture, [*recipe.operations, change])

    stack = Stack(base)
    stack.push("p", narrowed(base, [0, 1], 4))
    stack.push("q", narrowed(stack.model, [0], 3))
    assert stack.model.width == 3
    stack.remove("p")  # what shrank in proportion tells it: 5 of 6
    assert stack.model.width == 5
    stack = Stack(base)
    stack.push("p", narrowed(base, [0, 1], 4))
    stack.push("odd", narrowed(stack.model, [0], 1))
    refused(stack, lambda: stack.remove("p"), "'odd' cannot be as it is without 'p'", "attribute 'width'")
    refused(
        stack,
        lambda: stack.push("late", narrowed(base, [1, 2], 1)),
        "edit 'late' cannot be as it is on top of the others",
        "attribute 'width' of module '' from 6 to 1",
    )


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_equal_widths_are_told_apart(kind):
    """Inputs and outputs of as many channels, cut alike: each attribute follows its own axis."""
    base = Net(lambda s, x: s.c(s.b(s.a(x))), a=kind(3, 8, 1), b=kind(8, 8, 1), c=kind(8, 2, 1)).eval()
    stack = Stack(base)
    stack.push("p", pruned(base, {"a": [0, 1]}))
    stack.push("q", pruned(base, {"a": [1, 2], "b": [5, 6]}))
    expected = pruned(base, {"a": [0, 1, 2], "b": [5, 6]}).apply(base).model
    same(stack.model, expected)
    stack.remove("p")
    same(stack.model, pruned(base, {"a": [1, 2], "b": [5, 6]}).apply(base).model)


def test_tied_tensors_have_one_numbering():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    base = Tied()
    shapes = architecture_of(base)
    stack = Stack(base)
    stack.push("keep", Recipe("prune", {}, {}, shapes, [Operation("keep", "a.weight", index=(1, 3))]))
    stack.push("zero", written(base, "fill", "b.weight", [0, 3]))
    assert stack.model.a.weight is stack.model.b.weight
    assert torch.equal(stack.model.b.weight, torch.stack([base.a.weight[1], torch.zeros(4)]))
    stack.push("again", written(stack.model, "fill", "a.weight", [0]))
    stack.remove("keep")
    assert stack.model.a.weight is stack.model.b.weight
    assert stack.model.b.weight.any(1).tolist() == [False, False, True, False]


def test_pruning_and_unlearning_of_a_trained_network(trained, digit_scores):
    base, train, _ = trained
    x = torch.randn(2, 1, 8, 8)
    state = copy.deepcopy(base.state_dict())
    stack = Stack(base)
    stack.push("three", unlearn(base, digit_scores, classes=[3]))
    stack.push(
        "eight",
        unlearn(base, digit_scores, classes=[8], method=AblateComponents(TopFraction(0.2)), layers=["conv3", "fc1"]),
    )
    stack.push("repaired", prune(stack.model, digit_scores, ratio=0.3, example_inputs=x, data=zoo.batches(train)))
    stack.remove("three")
    # The repair's values stay; what it does not set is as without the first edit.
    expected = unlearn(
        base, digit_scores, classes=[8], method=AblateComponents(TopFraction(0.2)), layers=["conv3", "fc1"]
    ).model
    same(stack.model, stack.recipes["repaired"].apply(expected).model)
    stack.remove("eight")
    assert stack.names == ["repaired"]
    stack.remove("repaired")
    same(stack.model, base)
    halved = AblateComponents(TopFraction(0.1), scale=0.5, around="mean")
    attenuated = unlearn(base, digit_scores, classes=[5], method=halved, layers=["fc1"], data=zoo.batches(train))
    kinds = {operation.kind for operation in attenuated.recipe.operations}
    assert kinds == {"scale", "add"}
    smaller = prune(base, digit_scores, ratio=0.3, example_inputs=x)
    stack.push("smaller", smaller)
    stack.push("five", attenuated)
    dropped = smaller.recipe.components["fc1"]
    rows = [row for row in range(64) if row not in dropped]
    assert torch.equal(stack.model.fc1.bias, attenuated.model.fc1.bias[rows])
    assert torch.equal(
        smaller.model.fc1.weight, prune(base, digit_scores, ratio=0.3, example_inputs=x).model.fc1.weight
    )
    stack.remove("smaller")
    same(stack.model, attenuated.model)
    stack.remove("five")
    removed = unlearn(base, digit_scores, classes=[3], method=AblateComponents(remove=True), example_inputs=x)
    stack.push("smaller", smaller)
    stack.push("removed", removed)
    gone = {row for recipe in (smaller.recipe, removed.recipe) for row in recipe.components["fc1"]}
    assert stack.model.fc2.in_features == 64 - len(gone)
    assert stack.model(x).shape == (2, 10)
    stack.remove("smaller")
    same(stack.model, removed.model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


def test_neither_model_is_shared():
    base = small()
    before = copy.deepcopy(base)
    stack = Stack(base)
    same(stack.model, base)
    assert stack.model is not base
    recipe = zeroed(base, "a", [1])
    stack.push("one", recipe)
    models = [stack.model]
    recipe.operations.clear()
    with torch.no_grad():
        base.a.weight.zero_()  # later changes of the caller's model do not reach the stack
        stack.model.b.weight.zero_()  # nor do changes of a model it gave out
        stack.recipes["one"].operations.clear()
    stack.push("two", zeroed(base, "c", [0]))
    models.append(stack.model)
    stack.remove("two")
    models.append(stack.model)
    assert len({id(part) for model in models for part in model.parameters()}) == 3 * len(list(base.parameters()))
    same(stack.model, zeroed(before, "a", [1]).apply(before).model)


def test_refusals():
    base = small()
    stack = Stack(base)
    stack.push("cat", zeroed(base, "a", [1]))
    stack.push("prune", pruned(base, {"a": [0]}))
    recipe = zeroed(base, "a", [2])
    push = stack.push
    refused(stack, lambda: push("cat", recipe), "name must not be in the stack yet, got 'cat'", "['cat', 'prune']")
    refused(stack, lambda: push("", recipe), "name must be a string that is not empty, got ''")
    refused(stack, lambda: push(3, recipe), "name must be a string that is not empty, got 3")
    refused(stack, lambda: stack.remove("dog"), "name must be one of ['cat', 'prune'], got 'dog'")
    with pytest.raises(TypeError, match="edit must be a discedit.Edit or a discedit.Recipe, got Net"):
        push("dog", base)
    other = small()
    other.c = nn.Linear(80, 9)
    refused(
        stack,
        lambda: push("dog", zeroed(other, "a", [2])),
        "its tensor 'c.weight' had shape [9, 80], in the base it has [7, 80], in stack.model [7, 80]",
    )
    on_pruned = pruned(base, {"a": [0]}).apply(base).model
    on_pruned.extra = nn.Linear(1, 1)
    refused(
        stack,
        lambda: push("dog", zeroed(on_pruned, "a", [2])),
        "'extra.weight' had shape [1, 1], in the base it has none (absent), in stack.model none (absent)",
    )
    shapes = architecture_of(base)
    for operation, why in (
        (Operation("fill", "a.weight", index=(2, 1), value=0.0), "must have increasing indices in 0..5, got [2, 1]"),
        (Operation("fill", "a.weight", index=(6,), value=0.0), "must have increasing indices in 0..5, got [6]"),
        (Operation("fill", "a.weight", index=(-1,), value=0.0), "must have increasing indices in 0..5, got [-1]"),
        (Operation("fill", "a.weight", dim=4, index=(1,), value=0.0), "must have a dim of 'a.weight'"),
        (Operation("fill", "nowhere", index=(1,), value=0.0), "must name a tensor of the model, got 'nowhere'"),
        (Operation("keep", "a.weight"), "must leave something of 'a.weight', it keeps no index"),
        (Operation("turn", "a.weight"), "must be one of keep, fill, scale, add, set, attribute, got 'turn'"),
        (Operation("set", "a.bias"), "lacks its values for tensor 'a.bias'"),
        (
            Operation("attribute", "a", name="out_channels", before=7, value=6),
            "'out_channels' of module 'a' must be 7, it is 6",
        ),
        (Operation("attribute", "z", name="out_channels", before=7, value=6), "the model has no module 'z'"),
    ):
        refused(stack, lambda operation=operation: push("dog", Recipe("prune", {}, {}, shapes, [operation])), why)
    values = {"set.0": torch.zeros(5)}
    for kind, index in (("set", ()), ("add", (0, 1))):
        recipe = Recipe("prune", {}, {}, shapes, [Operation(kind, "a.bias", index=index)], values)
        refused(
            stack, lambda recipe=recipe: push("dog", recipe), "must have values of shape", "'a.bias', found shape [5]"
        )
    stack.model.a.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))  # a model changed by others is not the stack's
    refused(stack, lambda: push("dog", zeroed(stack.model, "a", [2])), "'a.weight' had shape [4, 3, 3, 3]")


def test_container():
    base = small()
    stack = Stack(base)
    assert len(stack) == 0
    assert stack.names == []
    assert stack.recipes == {}
    stack.push("cat", zeroed(base, "a", [1]).apply(base))
    assert "cat" in stack
    assert "dog" not in stack
    assert len(stack) == 1
    assert repr(stack) == "Stack(['cat'])"


def filled():
    """A stack whose edits were made on models that it no longer holds."""
    base = small()
    stack = Stack(base)
    stack.push("p", pruned(base, {"a": [0], "b": [2]}))
    stack.push("a/b\u00fc ", zeroed(stack.model, "a", [0, 3]))
    stack.push("q", pruned(stack.model, {"a": [1]}))
    stack.push("set", whole(stack.model, "head.weight"))
    stack.push("add", written(base, "add", "c.bias", [1, 4], values=torch.tensor([1.0, 2.0])))
    stack.push("r", pruned(base, {"a": [0, 5]}))
    stack.remove("p")
    return base, stack


def test_saved_and_loaded(tmp_path):
    base, stack = filled()
    path = stack.save(tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "stack.json"
    for removed in itertools.permutations(stack.names, 2):
        _, mine = filled()
        loaded = Stack.load(path.parent, base)
        assert loaded.names == mine.names
        same(loaded.model, mine.model)
        for name in removed:
            mine.remove(name)
            loaded.remove(name)
            same(loaded.model, mine.model)
        more = pruned(mine.model, {"c": [1]})
        mine.push("more", more)
        loaded.push("more", more)
        same(loaded.model, mine.model)
    assert not any("undo" in name for file in path.parent.glob("0*.json") for name in Recipe.load(file).tensors)


def test_saving_again_replaces_and_deletes_no_other_file(tmp_path):
    base, stack = filled()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "007.json").write_text("{}")
    stack.save(tmp_path)
    stack.remove("set")
    stack.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"notes.txt", "007.json", "stack.json"} < names
    assert len(names) == 3 + 2 * len(stack)
    same(Stack.load(tmp_path, base).model, stack.model)
    Stack(base).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "007.json", "stack.json"}
    same(Stack.load(tmp_path, base).model, base)


def test_damaged_and_foreign_stacks(tmp_path):
    base, stack = filled()
    path = stack.save(tmp_path)
    good = json.loads(path.read_text())

    def load(model=base, **fields):
        path.write_text(json.dumps({**good, **fields}))
        return Stack.load(tmp_path, model)

    def entry(**fields):
        return [{**good["entries"][0], **fields}, *good["entries"][1:]]

    same(load().model, stack.model)
    other = small()
    other.c = nn.Linear(80, 9)
    with pytest.raises(
        ValueError, match=r"model must have the architecture .* 'c.weight' must have shape \[7, 80\], .*9"
    ):
        load(other)
    for fields, message in (
        ({"kind": "recipe"}, "is not a discedit stack file"),
        ({"version": 2}, "format version 2"),
        ({"architecture": []}, "'architecture' must be dict"),
        ({"entries": {}}, "'entries' must be list"),
        ({"entries": ["x"]}, "an entry must be an object, got 'x'"),
        ({"entries": entry(name="")}, "names must differ and not be empty, got ''"),
        ({"entries": entry(name=None)}, "'name' must be str"),
        ({"entries": entry(name="q")}, "names must differ and not be empty, got 'q'"),
        ({"entries": entry(rows={"nowhere": {"0": [1]}})}, "rows of tensor 'nowhere', dimension '0'"),
        ({"entries": entry(rows={"a.bias": {"1": [1]}})}, "rows of tensor 'a.bias', dimension '1'"),
        ({"entries": entry(rows={"a.bias": {"0": [6]}})}, r"indices below 6, got \[6\]"),
        ({"entries": entry(rows={"a.bias": {"0": "0"}})}, "indices below 6, got '0'"),
        ({"entries": entry(rows={"a.bias": 3})}, "rows of tensor 'a.bias', dimension '', must be a list"),
        ({"entries": entry(rows={"a.bias": {"0": list(range(6))}})}, "leaves no row of tensor 'a.bias'"),
        ({"entries": entry(rows={})}, "the rows of .* are not those of its recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**fields)
    with pytest.raises(FileNotFoundError, match=r"recipe file .*999.json' does not exist"):
        load(entries=entry(file="../../999.json"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no text"):
        Stack.load(tmp_path, base)
    with pytest.raises(FileNotFoundError, match=r"stack file .*stack.json' does not exist"):
        Stack.load(tmp_path / "none", base)


def test_docstring_example():
    result = doctest.testmod(module_under_test)
    assert result.attempted >= 8
    assert result.failed == 0
