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

from discedit import AblateComponents, Recipe, Stack, TopFraction, prune, unlearn, zoo
from discedit.graph.pruning_graph import Graph
from discedit.recipes import stack as module_under_test
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import architecture_of

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ROWS = ["a", "b", "c"]  # layers of the small network


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


def written(model, kind, tensor, index, values=None):
    value = {"fill": 0.0, "scale": 0.7}.get(kind)
    tensors = {} if values is None else {"set.0": values}
    operation = Operation(kind, tensor, index=tuple(index), value=value)
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


@pytest.mark.parametrize("seed", range(4))
def test_random_sequences_of_pushes_and_removals(seed):
    """Of edits each made on the model as it then was: the stack is always what is left, applied in order."""
    chance = random.Random(seed)
    base = small(seed)
    stack, made = Stack(base), {}
    generator = torch.Generator().manual_seed(seed)
    for step in range(14):
        if len(stack) > 5 or (len(stack) and chance.random() < 0.35):
            name = chance.choice(stack.names)
            above = list(made)[list(made).index(name) + 1 :]
            if made[name].edit == "prune" and above:
                refused(stack, lambda name=name: stack.remove(name), f"edit {above[0]!r} cannot be without {name!r}")
                continue
            stack.remove(name)
            del made[name]
        else:
            name, layer = f"edit {step}", chance.choice(ROWS)
            kind = chance.choice(["prune", "fill", "scale", "add"])
            width = len(getattr(stack.model, layer).weight)
            rows = sorted(chance.sample(range(width), min(width, chance.randint(1, 2))))
            if kind == "prune" and width < 4:
                continue
            values = torch.randn(len(rows), generator=generator) if kind == "add" else None
            tensor = f"{layer}.bias" if kind == "add" else f"{layer}.weight"
            if kind == "prune":
                made[name] = pruned(stack.model, {layer: rows})
            else:
                made[name] = written(stack.model, kind, tensor, rows, values=values)
            stack.push(name, made[name])
        same(stack.model, in_order(base, made.values()))
        assert stack.names == list(stack.recipes) == list(made)
        # The recipes as they stand: forwards from the base, and backwards to it.
        same(in_order(base, stack.recipes.values()), stack.model)
        undone = stack.model
        for recipe in reversed(stack.recipes.values()):
            undone = recipe.undo(undone)
        same(undone, base)


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


def test_what_was_made_for_a_smaller_model_needs_the_removal_below_it():
    base = small()
    stack = Stack(base)
    stack.push("prune", pruned(base, {"a": [0], "c": [1]}))
    stack.push("repair", whole(stack.model, "b.weight"))
    refused(
        stack,
        lambda: stack.remove("prune"),
        "edit 'repair' cannot be without 'prune'",
        "tensor 'a.weight' must have shape [5, 3, 3, 3], the model's has [6, 3, 3, 3]",
        "Remove it first, and make it anew on stack.model",
    )
    refused(stack, lambda: stack.push("late", zeroed(base, "a", [1])), "edit 'late' cannot be on top of the others")
    stack.remove("repair")
    stack.remove("prune")
    same(stack.model, base)


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
    removed = unlearn(stack.model, digit_scores, classes=[3], method=AblateComponents(remove=True), example_inputs=x)
    stack.push("removed", removed)
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
    stack.push("prune", zeroed(base, "b", [0]))
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
        "tensor 'c.weight' must have shape [9, 80], the model's has [7, 80]",
    )
    more = small()
    more.extra = nn.Linear(1, 1)
    refused(
        stack,
        lambda: push("dog", zeroed(more, "a", [2])),
        "'extra.weight' must have shape [1, 1], the model's has none (absent)",
    )
    lacking = Recipe("prune", {}, {}, architecture_of(base), [Operation("set", "a.bias")])
    refused(stack, lambda: push("dog", lacking), "edit 'dog' cannot be on top", "lacks its values for tensor 'a.bias'")


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
    """A stack from which an edit was removed."""
    base = small()
    stack = Stack(base)
    stack.push("p", zeroed(base, "b", [2]))
    stack.push("a/b\u00fc ", zeroed(stack.model, "a", [0, 3]))
    stack.push("q", pruned(stack.model, {"a": [1]}))
    stack.push("set", whole(stack.model, "head.weight"))
    stack.push("add", written(stack.model, "add", "c.bias", [1, 4], values=torch.tensor([1.0, 2.0])))
    stack.push("r", pruned(stack.model, {"b": [0, 3]}))
    stack.remove("p")
    return base, stack


def test_saved_and_loaded(tmp_path):
    base, stack = filled()
    path = stack.save(tmp_path / "deep" / "folder")
    assert path == tmp_path / "deep" / "folder" / "stack.json"
    for removed in itertools.permutations(["a/b\u00fc ", "set", "add"], 2):
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
        ({"entries": good["entries"][2:]}, "edit 'set' cannot be on top of the others"),
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
