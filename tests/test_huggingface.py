"""Pruned transformers models: saved, loaded in a new process, bit for bit; and what does not fit is refused."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from discedit import Edit, Recipe, collect_moments, huggingface, prune, score, unlearn, zoo
from discedit.model.size import count_parameters
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import architecture_of

transformers = pytest.importorskip("transformers")

HERE = Path(__file__).parent
IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    )


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=3, image_size=16)
    return transformers.ConvNextForImageClassification(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        model.train()(IMAGES)  # running statistics that matter
    return model


def bert():
    """Its decoder is the embedding: one tensor under two names, of which one is saved."""
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10
    )
    return transformers.BertForMaskedLM(config)


def pruned(model, images=IMAGES, labels=LABELS, **options):
    scores = score(collect_moments(model, [(images, labels)], int(labels.max()) + 1))
    return prune(model, scores, example_inputs=images[:2], **{"ratio": 0.5, **options})


def unlearned(model):
    return unlearn(model, score(collect_moments(model, [(IMAGES, LABELS)], 3)), classes=[1])


def cut(model, kept, attributes):
    """An edit by hand: `kept` holds (tensor, dim, indices), `attributes` (module, name, before, value)."""
    operations = [Operation("keep", name, dim=dim, index=tuple(index)) for name, dim, index in kept]
    operations += [Operation("attribute", name, 0, (), key, old, new) for name, key, old, new in attributes]
    return Recipe("prune", {}, {}, architecture_of(model), operations).apply(model)


def without_a_head(model, width=8):
    """The second of two heads of 8 goes, from both layers; with width=4, what is left counts as two narrow heads."""
    kept, attributes = [], []
    for layer in (f"vit.layers.{i}.attention" for i in range(2)):
        for name in ("q_proj", "k_proj", "v_proj"):
            kept += [(f"{layer}.{name}.weight", 0, range(8)), (f"{layer}.{name}.bias", 0, range(8))]
            attributes.append((f"{layer}.{name}", "out_features", 16, 8))
        kept.append((f"{layer}.o_proj.weight", 1, range(8)))
        attributes += [(f"{layer}.o_proj", "in_features", 16, 8), (layer, "num_attention_heads", 2, 1)]
        attributes.append((layer, "head_dim", 8, width))
    return cut(model, kept, attributes)


def without_neurons(model):
    layer = "bert.encoder.layer.0"
    kept = [
        (f"{layer}.intermediate.dense.weight", 0, range(4)),
        (f"{layer}.intermediate.dense.bias", 0, range(4)),
        (f"{layer}.output.dense.weight", 1, range(4)),
    ]
    attributes = [
        (f"{layer}.intermediate.dense", "out_features", 10, 4),
        (f"{layer}.output.dense", "in_features", 10, 4),
    ]
    return cut(model, kept, attributes)


@dataclass
class Case:
    """One saved model: what it was, what it became, and whether transformers itself must load it."""

    original: torch.nn.Module
    edit: Edit
    inputs: dict[str, torch.Tensor]
    stock: bool
    found_stock: bool = False
    after: dict[str, torch.Tensor] = field(default_factory=dict)

    def logits(self, model):
        with torch.no_grad():
            return model(**self.inputs).logits


def neurons(layers):
    """The hidden layers of a ViT's MLPs."""
    return [f"vit.layers.{i}.mlp.fc1" for i in range(layers)]


SCRIPT = """
    import sys, torch, transformers
    from pathlib import Path
    from safetensors.torch import load_file, save_file
    from discedit import Recipe
    from discedit import huggingface
    torch.set_num_threads(int(sys.argv[2]))
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        inputs, original = load_file(folder / "inputs"), load_file(folder / "original")
        edit = huggingface.load_pretrained(folder)
        model = edit.model
        assert not model.training
        out = {"loaded": model(**inputs).logits, "undone": edit.recipe.undo(model)(**inputs).logits}
        # The recipe by itself: on a fresh model of the same class with the first one's weights, and undone there.
        config = transformers.AutoConfig.from_pretrained(folder / "whole")
        fresh = type(model)(config).eval()
        fresh.load_state_dict(original)
        again = Recipe.load(folder / "discedit.json").apply(fresh)
        out["applied"] = again.model(**inputs).logits
        restored = again.recipe.undo(again.model)
        out["restored"] = restored(**inputs).logits
        state = restored.state_dict()
        assert state.keys() == original.keys() and all(torch.equal(state[name], original[name]) for name in state)
        if (folder / "stock").exists():
            stock, report = type(model).from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), report
            out["stock"] = stock(**inputs).logits
        save_file({name: tensor.detach().contiguous() for name, tensor in out.items()}, folder / "out")
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    torch.manual_seed(0)
    images = {"pixel_values": IMAGES}
    found = {}

    def add(name, model, edited, inputs, stock):
        found[name] = Case(model, edited(model.eval()), inputs, stock)

    add("vit", vit(), lambda m: pruned(m, layers=neurons(2)), images, stock=True)
    add("vit, all that goes", vit(), pruned, images, stock=True)
    add("vit, one layer", vit(), lambda m: pruned(m, layers=neurons(2)[1:]), images, stock=False)
    add("vit, heads", vit(), without_a_head, images, stock=True)
    # A configuration with one head of 8 has the same shapes, but is another function.
    add("vit, narrow heads", vit(), lambda m: without_a_head(m, width=4), images, stock=False)
    add("convnext", convnext(), pruned, images, stock=False)
    add("resnet", resnet(), pruned, images, stock=False)
    add("resnet, repaired", resnet(), lambda m: pruned(m, data=[IMAGES], repair="mean"), images, stock=False)
    add("resnet, unlearned", resnet(), unlearned, images, stock=True)
    tokens = {"input_ids": torch.arange(10).view(2, 5)}
    add("bert, tied", bert(), without_neurons, tokens, stock=False)
    if (zoo.data_folder() / "vit_fashion").is_dir():
        model = transformers.ViTForImageClassification.from_pretrained(zoo.data_folder() / "vit_fashion")
        x = torch.randn(20, 1, 28, 28)
        labels = torch.arange(20) % 10
        add("vit_fashion", model, lambda m: pruned(m, x, labels, layers=neurons(6)), {"pixel_values": x}, stock=True)
    root = tmp_path_factory.mktemp("saved")
    for name, case in found.items():
        folder = root / name
        case.found_stock = huggingface.save_pretrained(case.edit, folder)
        case.original.config.save_pretrained(folder / "whole")
        # Tied tensors under both names: safetensors wants no shared memory.
        save_file({key: t.clone() for key, t in case.original.state_dict().items()}, folder / "original")
        save_file(case.inputs, folder / "inputs")
        if case.stock:
            (folder / "stock").touch()
    code = "import vision_ops\n" + textwrap.dedent(SCRIPT)
    command = [sys.executable, "-c", code, str(root), str(torch.get_num_threads())]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"})
    for name, case in found.items():
        case.after = load_file(root / name / "out")
    return found, root


NAMES = [
    "vit",
    "vit, all that goes",
    "vit, one layer",
    "vit, heads",
    "vit, narrow heads",
    "convnext",
    "resnet",
    "resnet, repaired",
    "resnet, unlearned",
    "bert, tied",
]


@pytest.mark.parametrize("name", [*NAMES, pytest.param("vit_fashion", marks=pytest.mark.data)])
def test_the_same_logits_in_a_new_process(name, cases):
    if name not in cases[0]:
        pytest.skip(f"no {name} in {zoo.data_folder()} (DISCEDIT_DATA)")
    case = cases[0][name]
    whole, edited = case.logits(case.original), case.logits(case.edit.model)
    assert not torch.equal(whole, edited)
    smaller = case.edit.recipe.edit == "prune"
    assert (count_parameters(case.edit.model) < count_parameters(case.original)) == smaller
    assert torch.equal(case.after["loaded"], edited)
    assert torch.equal(case.after["applied"], edited)
    assert torch.equal(case.after["restored"], whole)
    assert torch.equal(case.after["undone"], whole)


@pytest.mark.parametrize("name", [*NAMES, pytest.param("vit_fashion", marks=pytest.mark.data)])
def test_says_whether_transformers_itself_loads_it(name, cases):
    if name not in cases[0]:
        pytest.skip(f"no {name} in {zoo.data_folder()} (DISCEDIT_DATA)")
    case = cases[0][name]
    assert case.found_stock == case.stock
    config = json.loads((cases[1] / name / "config.json").read_text())
    if case.stock:
        assert torch.equal(case.after["stock"], case.logits(case.edit.model))
        assert count_parameters(type(case.original)(type(case.original.config)(**config))) == case.edit.parameters_after
    else:
        whole = json.loads((cases[1] / name / "whole" / "config.json").read_text())
        assert all(config[key] == value for key, value in whole.items())


def test_trained_saved_over_and_loaded_again(cases, tmp_path):
    shutil.copytree(cases[1] / "vit, one layer", tmp_path / "model")
    edit = huggingface.load_pretrained(tmp_path / "model")
    assert (edit.parameters_before, edit.parameters_after) == (
        cases[0]["vit, one layer"].edit.parameters_before,
        count_parameters(edit.model),
    )
    before = {name: tensor.clone() for name, tensor in edit.model.state_dict().items()}
    optimizer = torch.optim.SGD(edit.model.parameters(), lr=0.1)
    edit.model(pixel_values=IMAGES, labels=LABELS).loss.backward()
    optimizer.step()
    huggingface.save_pretrained(edit, tmp_path / "model")
    again = huggingface.load_pretrained(tmp_path / "model").model.state_dict()
    assert not torch.equal(again["classifier.weight"], before["classifier.weight"])
    assert all(torch.equal(again[name], tensor) for name, tensor in edit.model.state_dict().items())


def test_other_types_are_kept(tmp_path):
    torch.manual_seed(0)
    edit = without_a_head(vit().eval().to(torch.bfloat16))
    assert huggingface.save_pretrained(edit, tmp_path)
    loaded = huggingface.load_pretrained(tmp_path).model
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    x = IMAGES.to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, edit.model(x).logits)


def test_random_state_and_models_are_left_alone(cases, tmp_path):
    case = cases[0]["vit"]
    case.edit.model.train()
    before = {name: tensor.clone() for name, tensor in case.edit.model.state_dict().items()}
    state = torch.get_rng_state()
    huggingface.save_pretrained(case.edit, tmp_path)
    huggingface.load_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert case.edit.model.training
    assert case.edit.model.config.intermediate_size == 24
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.edit.model.state_dict().items())
    case.edit.model.eval()


def test_folders_that_are_not_whole(cases, tmp_path):
    for name in ("config.json", "discedit.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(cases[1] / "resnet", folder)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"save_pretrained wrote, '.*' has no {name}"):
            huggingface.load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        huggingface.load_pretrained(tmp_path / "nowhere")


def test_a_recipe_for_another_architecture(cases, tmp_path):
    shutil.copytree(cases[1] / "resnet", tmp_path / "mixed")
    for name in ("discedit.json", "discedit.values.safetensors"):
        shutil.copy(cases[1] / "convnext" / name, tmp_path / "mixed" / name)
    with pytest.raises(ValueError, match="this recipe was made for another architecture: tensor 'convnext.embeddings"):
        huggingface.load_pretrained(tmp_path / "mixed")


def test_weights_that_do_not_fit(cases, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(cases[1] / "resnet", folder)
    good = load_file(folder / "model.safetensors")
    bias = "classifier.1.bias"
    missing = {name: tensor for name, tensor in good.items() if name != bias}
    for weights, found in (
        (missing, r"of shape \[3\], as the edit leaves it, got none \(absent\)"),
        ({**good, bias: torch.zeros(4)}, r"of shape \[3\], as the edit leaves it, got \[4\]"),
    ):
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"model.safetensors must hold '{bias}' {found}"):
            huggingface.load_pretrained(folder)
    save_file({**good, "more": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"must hold 'more' of shape none \(absent\), .* got \[1\]"):
        huggingface.load_pretrained(folder)
    data = (cases[1] / "resnet" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="model.safetensors' is damaged or cut short"):
        huggingface.load_pretrained(folder)


@pytest.mark.parametrize("architectures", [["NoSuchModel"], ["AutoConfig"], ["set_seed"], None])
def test_a_class_that_is_no_model(architectures, cases, tmp_path):
    shutil.copytree(cases[1] / "resnet", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    with pytest.raises(ValueError, match="config.architectures must name a model class of transformers, got '"):
        huggingface.load_pretrained(tmp_path / "model")


def test_bad_edits(trained, digit_scores, tmp_path):
    with pytest.raises(TypeError, match="save_pretrained: edit must be a discedit.Edit, got DigitsNet"):
        huggingface.save_pretrained(trained[0], tmp_path)
    edit = prune(trained[0], digit_scores, ratio=0.5, example_inputs=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="edit.model must be a model class of transformers, got DigitsNet"):
        huggingface.save_pretrained(edit, tmp_path)
    edit = without_a_head(vit())
    edit.model.classifier = torch.nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"must hold 'classifier.weight' of shape \[3, 16\], .* got \[5, 16\]"):
        huggingface.save_pretrained(edit, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers"):
        huggingface.load_pretrained(tmp_path)
