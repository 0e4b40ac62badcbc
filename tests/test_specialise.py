"""`specialise`: a network for some of its classes; `protect`; what an edit does to each class."""

import copy

import pytest
import torch
from torch import nn

import discedit
from discedit import ClassDamage, class_damage, prune, score, specialise, zoo
from discedit.moments.class_samples import class_samples


@pytest.fixture(scope="module")
def digits(trained):
    """The network, its training batches, and test images with labels."""
    model, training, test = trained
    return model, list(zoo.batches(training)), test.tensors


def test_samples_of_other_classes_do_not_matter_and_the_rest_is_one_recipe(digits):
    model, data, test = digits
    classes, options = [8, 3, 5], {"example_inputs": test[0][:1]}
    before = copy.deepcopy(model.state_dict())
    budget = discedit.MaxMacs(0.12, across=discedit.MeasureDivergence(samples=64, trials=12))
    edit = specialise(model, classes=classes, data=data, budget=budget, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert edit.macs_after <= 0.12 * edit.macs_before
    x, y = test
    among = torch.isin(y, torch.tensor(classes))
    with torch.no_grad():
        answers = torch.tensor(classes)[edit.model(x[among]).argmax(1)]
    assert float((answers == y[among]).double().mean()) > 0.9
    others = [(x + 9 * ~torch.isin(y, torch.tensor(classes))[:, None, None, None], y) for x, y in data]
    budget = discedit.MaxMacs(0.12, across=edit.divergences)  # spent again
    same = specialise(model, classes=classes, data=others, budget=budget, **options)
    assert same.recipe.components == edit.recipe.components
    assert torch.equal(same.model(x), edit.model(x))
    # One recipe for both, on the whole model, and back.
    again = edit.recipe.apply(model)
    assert torch.equal(again.model(x), edit.model(x))
    back = again.recipe.undo(again.model)
    assert all(torch.equal(value, before[name]) for name, value in back.state_dict().items())
    assert edit.recipe.settings["specialised"] == classes


def test_the_masked_head_gives_the_same_logits_and_never_another_class(digits):
    model, data, test = digits
    options = {"classes": [8, 3, 5], "example_inputs": test[0][:1], "data": data, "ratio": 0.5}
    narrow, whole = (specialise(model, head=head, **options) for head in ("remove", "mask"))
    logits = whole.model(test[0])
    assert logits.shape[1] == 10
    assert torch.equal(logits[:, [8, 3, 5]], narrow.model(test[0]))
    assert set(logits.argmax(1).tolist()) <= {3, 5, 8}
    others = [0, 1, 2, 4, 6, 7, 9]
    assert bool((logits[:, others] == -1e4).all())
    assert whole.damage.samples[[8, 3, 5]].tolist() == narrow.damage.samples.tolist()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert sum(len(group["params"]) for group in whole.optimizer(optimizer).param_groups) == len(
        list(model.parameters())
    )
    back = whole.recipe.undo(whole.model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in back.state_dict().items())


def test_nothing_pruned_it_is_the_model_with_fewer_logits(digits):
    model, data, test = digits
    with pytest.warns(UserWarning, match="nothing has to go"):
        edit = specialise(model, classes=[1, 0], example_inputs=test[0][:1], data=data, macs=10**9)
    torch.testing.assert_close(edit.model(test[0]), model(test[0])[:, [1, 0]])


def test_scores_are_of_the_classes_alone(digits, digit_moments):
    model, data, test = digits
    classes = [3, 8]
    among = digit_moments.of_classes(classes)
    layer = next(iter(among))
    assert torch.equal(among[layer].mean, digit_moments[layer].mean[classes])
    options = {"classes": classes, "example_inputs": test[0][:1], "data": data, "ratio": 0.3, "criterion": "max"}
    edit = specialise(model, score(among), **options)
    assert edit.recipe.components[layer]
    with pytest.raises(ValueError, match=r"specialise: scores must be of the 2 classes alone, .* got scores of 10"):
        specialise(model, score(digit_moments), **options)
    with pytest.raises(ValueError, match=r"Moments.of_classes: classes must be indices in 0..9, got 10"):
        digit_moments.of_classes([10])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": [3]}, "classes must name at least two classes, and not all 10, got \\[3\\]"),
        ({"classes": range(10)}, "classes must name at least two classes, and not all 10"),
        ({"classes": [3, 10]}, "classes must be indices in 0..9, got 10"),
        ({"head": "keep"}, "head must be one of .*got 'keep'"),
        (
            {"data": [(torch.zeros(4, 1, 8, 8), torch.full((4,), 3))]},
            "data must hold samples of class 5, it holds none",
        ),
        ({"macs": 0.5}, "exactly one of"),
        ({"example_inputs": torch.zeros(1, 5)}, "example_inputs must be .* that the model can run on"),
    ],
)
def test_bad_input_is_named(digits, given, message):
    model, data, test = digits
    options = {"classes": [3, 5], "example_inputs": test[0][:1], "data": data, "ratio": 0.3} | given
    with pytest.raises(ValueError, match=f"^specialise: {message}"):
        specialise(model, **options)


def test_a_head_that_is_not_one_layer_is_refused():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            features = self.body(x).relu()
            return (self.one(features) + self.two(features)) / 2

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.body(x).relu()).view(-1, 4)

    x = torch.randn(40, 6)
    options = {"classes": [0, 2], "example_inputs": x[:2], "data": [x], "ratio": 0.2}
    with pytest.raises(ValueError, match="specialise: model must have one layer whose output are the logits"):
        specialise(Mean(), **options)
    with pytest.raises(ValueError, match="specialise: model must give the logits of a class by its row"):
        specialise(Scaled(), **options)
    no_bias = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))
    with torch.no_grad():  # it takes samples for each class
        no_bias[0].weight.copy_(torch.eye(5, 6))
        no_bias[2].weight.copy_(torch.eye(4, 5))
    with pytest.raises(ValueError, match="head='mask' needs a head with a bias, '2' has none"):
        specialise(no_bias, head="mask", **options)
    assert specialise(no_bias, **options).model(x).shape == (40, 2)  # by its own answers, without labels


def test_samples_come_by_weight_however_the_data_are_sorted():
    y = torch.arange(4).repeat_interleave(100)
    x = y[:, None].float() + torch.linspace(0, 0.5, 400)[:, None]
    model = nn.Linear(1, 4)
    weights = torch.tensor([1.0, 3.0, 0.0, 0.5]).double()
    found = class_samples("test", model, zip(x.split(64), y.split(64), strict=True), weights, [1])
    labels = torch.cat([labels for _, labels in found])
    inputs = torch.cat([inputs for inputs, _ in found])
    assert torch.equal(inputs.floor().long()[:, 0], labels)
    assert torch.bincount(labels, minlength=4).tolist() == [100, 300, 0, 50]
    assert len(inputs[labels == 1].unique()) == 100  # each three times
    few = torch.bincount(labels[:45], minlength=4).tolist()  # any beginning has the same shares
    assert all(abs(number - share) <= 2 for number, share in zip(few, [10, 30, 0, 5], strict=True))


def test_a_protected_class_loses_less(digits):
    model, data, test = digits
    options = {"example_inputs": test[0][:1], "data": data}
    plain = prune(model, ratio=0.8, **options)
    batches = [test]
    lost = class_damage(model, plain.model, batches)
    worst = lost.worst_class
    held = prune(model, protect={worst: 8.0}, ratio=0.8, **options)
    assert held.recipe.components == plain.recipe.components  # what differs is the repair
    after = class_damage(model, held.model, batches)
    assert float(after.loss[worst]) < float(lost.loss[worst])
    assert held.recipe.settings["protect"] == {str(worst): 8.0}
    assert "class" in plain.summary().splitlines()[-1]
    assert int(plain.damage.samples.sum()) == 128


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ({}, "protect must give classes a number above 0, got {}"),
        ([3], "protect must give classes a number above 0"),
        ({3: 0.0}, "finite number above 0, got 3: 0.0"),
        ({"3": 2.0}, "must give class indices"),
        ({10: 2.0}, "protect must name classes in 0..9, got 10"),
    ],
)
def test_bad_protection_is_named(digits, protect, message):
    model, data, test = digits
    with pytest.raises(ValueError, match=f"^prune: .*{message}"):
        prune(model, example_inputs=test[0][:1], data=data, ratio=0.3, protect=protect)
    with pytest.raises(ValueError, match="^prune: protect needs data"):
        prune(model, example_inputs=test[0][:1], ratio=0.3, protect={3: 2.0})


def test_damage_counts_by_hand():
    before = torch.tensor([[3.0, 0], [3, 0], [0, 3], [0, 3], [0, 3]])
    after = torch.tensor([[3.0, 0], [0, 3], [0, 3], [3, 0], [3, 0]])
    damage = ClassDamage.of(before, after)
    assert damage.samples.tolist() == [2, 3] == damage.right_before.tolist()
    assert damage.right_after.tolist() == [1, 1]
    assert damage.changed.tolist() == [1, 2]
    assert damage.loss.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert damage.worst_class == 1
    assert damage.flips == pytest.approx(3 / 5)
    assert damage.spread == pytest.approx(1 / 12)
    labelled = ClassDamage.of(before, after, torch.tensor([0, 1, 1, 1, 1]))
    assert labelled.right_before.tolist() == [1, 3]
    assert labelled.right_after.tolist() == [1, 2]
    both = labelled.merged(labelled)
    assert both.samples.tolist() == [2, 8]
    assert both.flips == labelled.flips
    assert "class 1 loses most, 2 of 3" in str(damage)
    assert damage.summary(["cat", "dog"]).splitlines()[1].startswith("dog")


def test_damage_of_other_models_is_refused(digits):
    model, _, test = digits
    with pytest.raises(ValueError, match="class_damage: edited must give logits of shape"):
        class_damage(model, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), [test])
    with pytest.raises(ValueError, match="class_damage: data must give at least one sample"):
        class_damage(model, model, [])
    same = class_damage(model, model, [test])
    assert same.flips == same.spread == 0
    assert str(same).endswith("(0.0 %); no class loses any")
