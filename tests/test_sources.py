"""Models from specifications, and their weights."""

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from discedit import zoo
from discedit.cli.errors import InputError
from discedit.cli.models import load_weights, open_model, resolve


def test_factories_with_literal_arguments(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def build(*sizes, bias=True):\n"
        "    return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in zip(sizes, sizes[1:])))\n"
        "class Shelf:\n"
        "    READY = nn.Linear(2, 3)\n"
        "def both():\n"
        "    return nn.Linear(1, 1), nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    model = open_model("my_models:build(4, 3, 2, bias=False)").model
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [(3, 4), (2, 3)]
    assert not model.training
    assert open_model("my_models:Shelf.READY").model.out_features == 3
    assert open_model("my_models:both()[1]").model.out_features == 2
    assert open_model("my_models:both()[-2]").model.out_features == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "must be MODULE:FACTORY"),
        ("zoo", "must be MODULE:FACTORY"),
        ("/tmp/x:y", "must be MODULE:FACTORY"),
        ("no_such_module:build", "failed: ModuleNotFoundError"),
        ("discedit.zoo:", "must be MODULE:FACTORY"),
        ("discedit.zoo:NoNet", "failed: AttributeError: .*NoNet"),
        ("discedit.zoo:CifarResNet(__import__('os'))", "must be MODULE:FACTORY"),
        ("discedit.zoo:CifarResNet(*[3])", "must be MODULE:FACTORY"),
        ("discedit.zoo:CifarResNet(**{'blocks': 3})", "must be MODULE:FACTORY"),
        ("discedit.zoo:CifarResNet(3) or 1", "must be MODULE:FACTORY"),
        ("discedit.zoo:CifarResNet(3).eval()", "must be MODULE:FACTORY"),
        ("discedit.zoo:CifarResNet(" + "(" * 500, "must be MODULE:FACTORY"),
        ("discedit.zoo:CifarResNet('three')", "failed: TypeError"),
        ("discedit.zoo:cifar_resnet('resnet18')", "failed: cifar_resnet: name must be one of"),
        ("discedit.zoo:CIFAR10_CLASSES", "must give a torch.nn.Module, it gives a list"),
        ("discedit.zoo:CIFAR10_CLASSES[99]", "failed: IndexError"),
        ("timm:", "timm cannot make ''"),
        ("timm:no_such_net", "timm cannot make 'no_such_net'"),
        ("hf:", "must be followed by a local folder"),
        ("hf:google/vit-base-patch16-224", "must be followed by a local folder"),
    ],
)
def test_specifications_that_make_no_sense(spec, message):
    with pytest.raises(InputError, match=f"^--model: .*{message}"):
        open_model(spec)


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('on purpose')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="failed: RuntimeError: on purpose"):
        resolve("--data", "broken_module:build")


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_what_to_install_is_said(package, vit, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}.*, which is not installed: pip install 'discedit\[cli\]'"):
        open_model({"timm": "timm:resnet10t", "transformers": f"hf:{vit[0]}"}[package])


def test_timm_knows_its_images():
    source = open_model("timm:resnet10t")
    known = source.preprocessing
    assert (known.size, known.resize, known.channels) == ((176, 176), 201, 3)  # crop_pct 0.875
    assert known.mean == (0.485, 0.456, 0.406)
    assert (known.interpolation, source.packages) == ("bicubic", ("timm",))


@pytest.fixture
def vit(tmp_path):
    """A folder with a tiny transformers classifier with random weights."""
    labels = {0: "cat", 1: "dog", 2: "owl"}
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1, id2label=labels,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_transformers_know_their_classes_and_images(vit):
    folder, model = vit
    source = open_model(f"hf:{folder}")
    assert source.class_names == ["cat", "dog", "owl"]
    assert (source.preprocessing.size, source.preprocessing.channels, source.preprocessing.mean) == ((8, 8), 1, None)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(source.model(x).logits, model.eval()(x).logits)
    processor = {"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 6}, "resample": 3,
                 "image_mean": [0.5], "image_std": [0.25], "rescale_factor": 1 / 127.5}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    known = open_model(f"hf:{folder}").preprocessing
    assert (known.size, known.resize, known.interpolation) == ((8, 6), 10, "bicubic")
    assert known.mean == pytest.approx((0.25,))  # (x / 127.5 - 0.5) / 0.25 = (x / 255 - 0.25) / 0.125
    assert known.std == pytest.approx((0.125,))
    (folder / "preprocessor_config.json").write_text('{"size": {"height": "tall"}}')
    with pytest.raises(InputError, match="is no image processor's configuration"):
        open_model(f"hf:{folder}")


def test_transformers_folders_that_are_not_whole(vit):
    folder, model = vit
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "classifier.bias"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys: classifier\.bias"):
        open_model(f"hf:{folder}")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot load"):
        open_model(f"hf:{folder}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_of_every_kind(tmp_path, suffix):
    model, other = zoo.DigitsNet(), zoo.DigitsNet()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict(), "epoch": 3} if suffix == ".pth" else model.state_dict(), path)
    load_weights(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight


def test_tied_weights_need_one_name(tmp_path):
    state = {"one.weight": torch.ones(3, 3), "one.bias": torch.ones(3), "other.bias": torch.ones(3)}
    save_file(state, tmp_path / "tied.safetensors")
    model = Tied()
    load_weights(model, tmp_path / "tied.safetensors")
    assert bool((model.other.weight == 1).all())


def test_weights_that_do_not_fit(tmp_path):
    model = zoo.DigitsNet()
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    path = tmp_path / "weights.pt"

    def refused(weights, message):
        torch.save(weights, path)
        with pytest.raises(InputError, match=message):
            load_weights(model, path)

    refused({**state, "extra": torch.ones(1)}, "does not fit the model: unexpected extra")
    refused({name: tensor for name, tensor in state.items() if name != "fc2.bias"}, r"missing fc2\.bias")
    refused({**state, "fc2.bias": torch.ones(9)}, r"size mismatch for fc2\.bias: .*\[9\].*\[10\]")
    refused({"module." + name: tensor for name, tensor in state.items()}, r"missing conv1\.weight, .* and \d+ more")
    refused([1, 2], "must hold a state dict")
    refused(nn.Linear(1, 1), "cannot be read")  # a pickle of code
    path.write_bytes(b"\x80nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        load_weights(model, path)
    for wrong in (tmp_path, tmp_path / "nothing.pt"):
        with pytest.raises(InputError, match="cannot be read"):
            load_weights(model, wrong)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"must be a \.safetensors, \.pt or \.pth file"):
        load_weights(model, tmp_path / "weights.bin")
