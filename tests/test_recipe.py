import copy
import json
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import nn

from discedit import AblateComponents, Recipe, TopK, prune, unlearn, zoo
from discedit.recipes.operations import KINDS, Operation
from discedit.recipes.recipe import architecture_of

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def edits(trained, digit_scores):
    model, train, _ = trained
    return {
        "prune": prune(model, digit_scores, ratio=0.3, example_inputs=X),
        "prune and repair": prune(model, digit_scores, ratio=0.3, example_inputs=X, data=zoo.batches(train)),
        "unlearn": unlearn(model, digit_scores, classes=[3, 8]),
        "attenuated": unlearn(model, digit_scores, classes=[3, 8], method=AblateComponents(TopK(3), scale=0.5)),
        "negated around the mean": unlearn(
            model,
            digit_scores,
            classes=[3, 8],
            method=AblateComponents(TopK(3), scale=-1, around="mean"),
            data=zoo.batches(train),
        ),
        "repaired": unlearn(
            model, digit_scores, classes=[3], method=AblateComponents(repair="least_squares"), data=zoo.batches(train)
        ),
        "zeroed and removed": unlearn(
            model, digit_scores, classes=[3], method=AblateComponents(TopK(3), remove=True), example_inputs=X
        ),
    }


UNLEARNT = ["unlearn", "attenuated", "negated around the mean", "repaired", "zeroed and removed"]
EDITS = ["prune", "prune and repair", *UNLEARNT]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def same_sizes(a, b):
    return str(a) == str(b)  # torch's own description: channels, features, widths


@pytest.mark.parametrize("name", EDITS)
def test_undo_gives_every_bit_back(name, edits, trained):
    edited = edits[name].model
    before = copy.deepcopy(edited)
    restored = edits[name].recipe.undo(edited)
    assert same_state(restored, trained[0])
    assert same_sizes(restored, trained[0])
    assert same_state(edited, before)
    with torch.no_grad():
        assert torch.equal(restored(X), trained[0](X))


def test_every_kind_is_among_these(edits):
    """ "set" and "keep" too; a recipe that has none of its own values says so nowhere."""
    assert {operation.kind for edit in edits.values() for operation in edit.recipe.operations} == set(KINDS)
    kinds = {name: {operation.kind for operation in edits[name].recipe.operations} for name in UNLEARNT}
    assert kinds["unlearn"] == {"fill"}
    assert kinds["attenuated"] == {"scale"}
    assert kinds["negated around the mean"] == {"scale", "add"}
    assert kinds["repaired"] == {"fill", "add", "set"}
    assert kinds["zeroed and removed"] == {"fill", "keep", "attribute"}


def test_scaling_and_adding(edits, trained):
    """Exactly these entries, in the tensor's type."""
    for name in ("attenuated", "negated around the mean"):
        recipe = edits[name].recipe
        due = copy.deepcopy(trained[0].state_dict())
        for i, operation in enumerate(recipe.operations):
            rows, tensor = list(operation.index), due[operation.target]
            assert rows
            assert operation.dim == 0
            if operation.kind == "scale":
                assert operation.value == {"attenuated": 0.5}.get(name, -1)
                tensor[rows] *= operation.value
            else:
                tensor[rows] += recipe.tensors[f"set.{i}"]
        assert all(torch.equal(due[key], value) for key, value in edits[name].model.state_dict().items())


def test_scaling_and_adding_along_any_axis_and_in_half():
    model = nn.Linear(3, 2).bfloat16()
    operations = [
        Operation("scale", "weight", dim=1, index=(0, 2), value=-0.5),
        Operation("add", "weight", dim=1, index=(1,)),
        Operation("add", "bias", index=(1,)),
    ]
    values = {"set.1": torch.tensor([[0.3], [7.0]]), "set.2": torch.tensor([1.1])}
    edit = Recipe("unlearn", {}, {}, architecture_of(model), operations, values).apply(model)
    assert torch.equal(edit.model.weight[:, [0, 2]], model.weight[:, [0, 2]] * -0.5)
    assert torch.equal(edit.model.weight[:, 1], model.weight[:, 1] + values["set.1"][:, 0].bfloat16())
    assert torch.equal(edit.model.bias[1], model.bias[1] + values["set.2"][0].bfloat16())
    assert torch.equal(edit.model.bias[0], model.bias[0])
    assert edit.model.weight.dtype == torch.bfloat16
    assert same_state(edit.recipe.undo(edit.model), model)
    row = Recipe("unlearn", {}, {}, architecture_of(model), [Operation("add", "weight", index=(1,))])
    row.tensors["set.0"] = torch.tensor([[2.0]])  # one number for all of the row
    assert torch.equal(row.apply(model).model.weight[1], model.weight[1] + 2)


@pytest.mark.parametrize("name", ["prune", "prune and repair", "unlearn", "negated around the mean"])
def test_saved_applied_and_undone_in_a_new_process(name, edits, trained, tmp_path):
    from safetensors.torch import save_file

    edit = edits[name]
    edit.recipe.save(tmp_path / "edit.json")
    save_file(trained[0].state_dict(), tmp_path / "model.safetensors")
    save_file(edit.model.state_dict(), tmp_path / "edited.safetensors")
    script = """
        import sys, torch
        from safetensors.torch import load_file
        from discedit import Recipe, zoo
        folder = sys.argv[1]
        model = zoo.DigitsNet().eval()
        original, expected = (load_file(f"{folder}/{name}.safetensors") for name in ("model", "edited"))
        model.load_state_dict(original)
        edit = Recipe.load(f"{folder}/edit").apply(model)
        def same(a, b):
            return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        assert same(edit.model.state_dict(), expected)
        assert same(model.state_dict(), original)
        assert edit.model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
        assert same(edit.recipe.undo(edit.model).state_dict(), original)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True)


def test_applies_to_other_weights_and_undoes_those(edits):
    torch.manual_seed(1)
    fresh = zoo.DigitsNet().eval()
    for name in EDITS:
        edit = edits[name].recipe.apply(fresh)
        assert str(edit.model) == str(edits[name].model)
        assert same_state(edit.recipe.undo(edit.model), fresh)


def test_round_trip_of_the_file(edits, tmp_path):
    for name in EDITS:
        recipe = edits[name].recipe
        path = recipe.save(tmp_path / f"{name}.recipe")
        assert path.name == f"{name}.recipe.json"
        loaded = Recipe.load(path)
        assert loaded.operations == recipe.operations
        assert loaded.components == recipe.components
        assert loaded.settings == recipe.settings
        assert loaded.tensors.keys() == recipe.tensors.keys()
        assert all(torch.equal(loaded.tensors[key], recipe.tensors[key]) for key in recipe.tensors)
        assert json.loads(path.read_text())["components"] == recipe.components


def test_stores_what_was_removed_and_no_more(edits):
    recipe = edits["prune"].recipe
    removed = edits["prune"].parameters_before - edits["prune"].parameters_after
    buffers = 2 * sum(len(recipe.components[layer]) for layer in ("conv1", "conv2", "conv3"))
    assert sum(tensor.numel() for tensor in recipe.tensors.values()) == removed + buffers


def test_shared_tensors_change_in_every_place():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    keep = Operation("keep", "a.weight", dim=0, index=(0, 2))
    shapes = architecture_of(model)
    recipe = Recipe("prune", {}, {}, shapes, [keep])
    edit = recipe.apply(model)
    assert edit.model.a.weight is edit.model.b.weight
    assert edit.model.a.weight.shape == (2, 3)
    restored = edit.recipe.undo(edit.model)
    assert restored.a.weight is restored.b.weight
    assert torch.equal(restored.a.weight, model.a.weight)


def test_a_shared_module_goes_by_each_of_its_names():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    renamed = Operation("attribute", "b", name="out_features", before=3, value=2)
    edited = Recipe("prune", {}, {}, architecture_of(model), [renamed]).apply(model).model
    assert edited["a"].out_features == 2


@pytest.mark.parametrize("name", EDITS)
def test_another_architecture_is_refused_and_left_alone(name, edits):
    recipe = edits[name].recipe
    other = zoo.DigitsNet()
    other.fc1 = nn.Linear(64, 65)
    before = copy.deepcopy(other)
    with pytest.raises(
        ValueError,
        match=r"made for another architecture: tensor 'fc1.weight' must have shape \[64, 64\], .* \[65, 64\]",
    ):
        recipe.apply(other, inplace=True)
    assert same_state(other, before)
    with pytest.raises(ValueError, match=r"another architecture: tensor 'conv1.weight' .* has none \(absent\)"):
        recipe.apply(nn.Linear(2, 2))
    more = zoo.DigitsNet()
    more.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"tensor 'extra.weight' must have shape none \(absent\)"):
        recipe.apply(more)


def test_undo_refuses_a_model_without_the_edit(edits, trained):
    with pytest.raises(ValueError, match="this model does not carry this recipe's edit: tensor 'conv1.weight'"):
        edits["prune"].recipe.undo(trained[0])


def test_refusing_changes_nothing(edits, trained):
    """Shapes fit, but one module has no such attribute: found out before the first change."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(10, 64)), nn.Parameter(torch.ones(10))

    other = copy.deepcopy(trained[0])
    other.fc2 = Plain()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="attribute 'in_features' of module 'fc2' must be 64, it is None"):
        edits["prune"].recipe.apply(other, inplace=True)
    edited = edits["unlearn"].model
    mixed = copy.deepcopy(edited)
    mixed.fc1.double()
    state = copy.deepcopy(mixed.state_dict())
    with pytest.raises(ValueError, match="needs its values, found values of type"):
        edits["unlearn"].recipe.undo(mixed, inplace=True)
    for saved, model in ((before, other), (state, mixed)):
        assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_undo_in_another_type_is_refused(edits):
    with pytest.raises(
        ValueError, match=r"to undo, tensor .* \(torch.float64\) needs its values, found values of type"
    ):
        edits["unlearn"].recipe.undo(edits["unlearn"].model.double())


def test_damaged_and_foreign_files(edits, tmp_path):
    edits["unlearn"].recipe.save(tmp_path / "r.json")
    good = (tmp_path / "r.json").read_text()
    values = (tmp_path / "r.values.safetensors").read_bytes()

    def load(text=good, data=values):
        (tmp_path / "r.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "r.values.safetensors").write_bytes(data)
        return Recipe.load(tmp_path / "r.json")

    load()
    for text in (good[:50], "", "{}", "[1]", "null", '{"kind": "moments", "version": 1}', pickle.dumps({"a": 1})):
        with pytest.raises(ValueError, match=r"is not a discedit recipe file|is no text"):
            load(text)
    for data in (values[:-1], values[:9], b"", pickle.dumps(1)):
        with pytest.raises(ValueError, match="are damaged or belong to another recipe: checksum differs"):
            load(data=data)
    header = json.loads(good)

    def change(**fields):
        return json.dumps({**header, **fields})

    first = header["operations"][0]
    for text, message in (
        (change(version=2), "format version 2; this discedit reads 1"),
        (change(operations={}), "header field 'operations' must be list"),
        (change(operations=[{"kind": "exec", "target": "a"}]), "operation 0 must be one of keep, .* got 'exec'"),
        (change(operations=[{"kind": "fill"}]), "operation 0 must be an object with kind and target"),
        (
            change(operations=[{**first, "target": "nowhere"}]),
            "operation 0 must name a tensor of the model, got 'nowhere'",
        ),
        (
            change(operations=[{**first, "dim": 4}]),
            r"operation 0 must have a dim of '\S+', a tensor of shape .*, got 4",
        ),
        (change(operations=[{**first, "index": [64]}]), r"operation 0 must have increasing indices in 0..63"),
        (change(operations=[{**first, "index": [2, 1]}]), "operation 0 must have increasing indices"),
        (change(operations=[{**first, "value": "0"}]), "operation 0 must fill with a number, got '0'"),
        (change(operations=[{**first, "index": 5}]), "operation 0 must have a list of indices, got 5"),
        (change(operations=[{**first, "dim": True}]), "operation 0 must have a dim of .*, got True"),
        (
            change(
                operations=[{"kind": "attribute", "target": "fc1", "name": "training", "before": True, "value": "no"}]
            ),
            "operation 0 must change an integer or a list of integers, got True, 'no'",
        ),
        (change(operations=[{"kind": "attribute", "target": "fc1", "name": "_hooks"}]), "must name a public attribute"),
    ):
        with pytest.raises(ValueError, match=message):
            load(text)
    scaled = {"kind": "scale", "target": "fc1.bias", "index": [2]}
    added = {"kind": "add", "target": "fc1.bias", "index": [2]}
    for operation, message in (
        (scaled, "operation 0 must scale with a number, got None"),
        ({**scaled, "value": "2"}, "operation 0 must scale with a number, got '2'"),
        ({**scaled, "value": True}, "operation 0 must scale with a number, got True"),
        ({**scaled, "value": 2, "index": [64]}, r"operation 0 must have increasing indices in 0..63"),
        ({**scaled, "value": 2, "index": [True]}, r"operation 0 must have increasing indices in 0..63"),
        (
            {**scaled, "value": 2, "dim": 1},
            r"operation 0 must have a dim of 'fc1.bias', a tensor of shape \[64\], got 1",
        ),
        ({**added, "index": [2, 2]}, r"operation 0 must have increasing indices in 0..63"),
        ({**added, "index": [-1]}, r"operation 0 must have increasing indices in 0..63"),
        ({**added, "dim": -1}, "operation 0 must have a dim of .*, got -1"),
        ({**added, "target": "fc9.bias"}, "operation 0 must name a tensor of the model, got 'fc9.bias'"),
        ({**added, "values": [1.0]}, "operation 0 must be an object with kind and target"),
        ({**added, "target": ["fc1.bias"]}, "operation 0 must have a name for target"),
        ({**added, "index": [2, None]}, r"operation 0 must have increasing indices in 0..63"),
    ):
        with pytest.raises(ValueError, match=message):
            load(change(operations=[operation]))
    (tmp_path / "r.values.safetensors").unlink()
    (tmp_path / "r.json").write_text(good)
    with pytest.raises(FileNotFoundError, match="needs 'r.values.safetensors' beside it"):
        Recipe.load(tmp_path / "r.json")
    with pytest.raises(FileNotFoundError, match=r"recipe file .*none.json' does not exist"):
        Recipe.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["negated around the mean", "repaired", "prune and repair"])
def test_values_that_do_not_fit_are_refused_before_anything_changes(name, edits, trained, tmp_path):
    """What a JSON file that was changed by hand, whose values' checksum is right, may lead to."""
    path = edits[name].recipe.save(tmp_path / "edit")
    loaded = Recipe.load(path)
    model = copy.deepcopy(trained[0])
    for i in reversed(range(len(loaded.operations))):
        operation = loaded.operations[i]
        if operation.kind not in ("add", "set"):
            continue
        tensors = {key: value for key, value in loaded.tensors.items() if key != f"set.{i}"}
        fitting = loaded.tensors[f"set.{i}"]
        for values in (None, fitting[:1], fitting.flatten()[0], torch.cat([fitting, fitting])):
            broken = {**tensors, f"set.{i}": values} if values is not None else tensors
            if values is not None and values.shape == fitting.shape:
                continue
            recipe = Recipe(
                loaded.edit, loaded.settings, loaded.components, loaded.architecture, loaded.operations, broken
            )
            with pytest.raises(
                ValueError, match=rf"Recipe: operation {i} (lacks|must have) .*values .*for tensor '{operation.target}'"
            ):
                recipe.apply(model, inplace=True)
            assert same_state(model, trained[0])
    header = json.loads(path.read_text())
    for operation in header["operations"]:
        if operation["kind"] == "add":
            operation["index"] = operation["index"][:-1]
    path.write_text(json.dumps(header))
    shortened = Recipe.load(path)
    if name == "negated around the mean":
        with pytest.raises(ValueError, match=r"must have values of shape \[\d+\] .* found shape \[\d+\]"):
            shortened.apply(model, inplace=True)
    assert same_state(model, trained[0])


@pytest.mark.parametrize("kind", ["fill", "scale"])
@pytest.mark.parametrize("value", [10**400, 1e300, -1e300], ids=["400 digits", "1e300", "-1e300"])
def test_numbers_that_a_tensor_cannot_hold_are_refused(kind, value):
    model = torch.nn.Linear(2, 3)
    operation = Operation(kind, "bias", index=(1,), value=value)
    recipe = Recipe("unlearn", {}, {}, architecture_of(model), [operation])
    before = model.bias.clone()
    with pytest.raises(ValueError, match=rf"number to {kind} tensor 'bias' with must be in the range of its type"):
        recipe.apply(model, inplace=True)
    assert torch.equal(model.bias, before)
    huge = Recipe("unlearn", {}, {}, architecture_of(model), [Operation("fill", "bias", index=(1,), value=1 << 70)])
    assert huge.apply(model).model.bias.tolist()[1] == float(1 << 70)


@pytest.mark.parametrize("change", [{"components": {"fc1": 3}}, {"settings": {"directions": {"fc1": 0.5}}}])
def test_lists_by_layer_must_be_lists(tmp_path, change):
    model = torch.nn.Linear(2, 3)
    path = Recipe("unlearn", {}, {}, architecture_of(model), []).save(tmp_path / "r")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="must be lists by layer"):
        Recipe.load(path)


@pytest.mark.parametrize("step", ["apply_operation", "undo_operation"])
def test_what_fails_in_the_middle_changes_nothing(step, monkeypatch):
    """In place, memory may end at any operation: the very tensors stay, with their values, and so do attributes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(40, 3, 8, 8)
    importances = {"0": torch.arange(8.0)}
    edit = prune(model, importances, threshold=3.0, example_inputs=x[:2], data=[x])
    rows = (Operation("fill", "0.bias", index=(1,), value=5.0), Operation("scale", "0.weight", index=(0,), value=2.0))
    recipe = replace(edit.recipe, operations=[*edit.recipe.operations, *rows])
    if step == "undo_operation":
        made = recipe.apply(model, inplace=True)
        recipe = made.recipe
    kinds = {operation.kind for operation in recipe.operations}
    assert kinds == {"keep", "attribute", "set", "fill", "scale"}
    objects = dict([*model.named_parameters(), *model.named_buffers()])
    before = {name: tensor.clone() for name, tensor in objects.items()}
    shown = repr(model)
    module = sys.modules["discedit.recipes.recipe"]
    done = getattr(module, step)
    for last in range(len(recipe.operations)):
        count = iter(range(len(recipe.operations)))

        def failing(*args, last=last, count=count):
            found = done(*args)
            if next(count) == last:
                raise MemoryError("no more")
            return found

        monkeypatch.setattr(module, step, failing)
        with pytest.raises(MemoryError):
            recipe.undo(model, inplace=True) if step == "undo_operation" else recipe.apply(model, inplace=True)
        assert repr(model) == shown
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert tensor is objects[name]
            assert torch.equal(tensor, before[name])
