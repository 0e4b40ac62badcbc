"""Each metric finds what was put there, finds nothing where there is nothing, and leaves the models alone."""

import copy
import json
import math
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Net
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import discedit
from discedit import zoo
from discedit.evaluation import Relearning
from discedit.evaluation.evaluate import METRICS, accuracy_per_class, adaptive_unlearning_score
from discedit.evaluation.membership import (
    Attack,
    attack_of,
    entropy_attack,
    learned_attack,
    loss_attack,
    quantile_attack,
)
from discedit.evaluation.outputs import Outputs, gather
from discedit.evaluation.probes import linear_cka

CLASS = 3


def masked(model):
    """The same features; only the head never names the class."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc2.bias[CLASS] -= 100
    return other


def fresh():
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        return zoo.DigitsNet().eval()


def report(edited, train_set, test_set, **options):
    loaders = {"test": zoo.batches(test_set, 100), "train": zoo.batches(train_set, 100)}
    return discedit.evaluate(edited, **{"classes": [CLASS], "num_classes": 10, **loaders, **options})


@pytest.fixture(scope="module")
def full(trained, digit_scores):
    model, train, test = trained
    edited = discedit.unlearn(
        model, digit_scores, classes=[CLASS], method=discedit.AblateComponents(discedit.TopFraction(0.15))
    ).model
    retrained = zoo.train_digits_net(without(train, CLASS), epochs=4)
    return report(edited, train, test, original=model, retrained=retrained), edited


def without(data, cls):
    x, y = data.tensors
    return TensorDataset(x[y != cls], y[y != cls])


def some_outputs(samples, seed, classes=2, width=5):
    """Samples of one law, with their labels."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, width, generator=random)
    weight = torch.randn(width, classes, generator=torch.Generator().manual_seed(99))
    logits = features @ weight + torch.randn(samples, classes, generator=random)
    return Outputs(logits, features, torch.arange(samples) % classes)


def leaking(outputs, by):
    """The true logit is higher by so much than it should be."""
    return Outputs(outputs.logits + by * F.one_hot(outputs.labels), outputs.features, outputs.labels)


def attacks(members, others):
    return {
        "loss": loss_attack(members, others),
        "entropy": entropy_attack(members, others, [0, 1]),
        "quantile": quantile_attack(members, others, [0, 1], seed=0),
        "learned": learned_attack(members, others, seed=0),
    }


def test_attacks_find_a_leak():
    for name, attack in attacks(leaking(some_outputs(400, 1), 12.0), some_outputs(400, 2)).items():
        assert attack.auc > 0.95, name
        assert attack.tpr > 0.5, name
        assert (attack.members, attack.non_members, attack.false_positives) == (400, 400, 4)


def test_attacks_find_nothing_among_equals():
    """Over eight draws the mean is chance, also of those attacks that were trained, and errors are what they say."""
    draws = [attacks(some_outputs(200, seed), some_outputs(200, 100 + seed)) for seed in range(8)]
    for name in draws[0]:
        aucs = torch.tensor([draw[name].auc for draw in draws])
        assert abs(float(aucs.mean()) - 0.5) < 0.035, name  # three standard errors of the mean
        assert float(aucs.std()) < 3 * draws[0][name].standard_error, name


def test_quantile_attack_sees_past_how_hard_a_sample_is():
    """The margin is all but given by the features; members lie a little higher, which one threshold cannot see."""
    sets = []
    for seed, by in ((1, 2.0), (2, 0.0)):
        random = torch.Generator().manual_seed(seed)
        features = torch.randn(600, 3, generator=random)
        own = 10 * features[:, 0] + torch.randn(600, generator=random) + by
        labels = torch.zeros(600, dtype=torch.int64)
        sets.append(Outputs(torch.stack([own, torch.zeros(600)], 1), features, labels))
    assert loss_attack(*sets).auc < 0.6
    assert quantile_attack(*sets, [0], seed=0).auc > 0.75


def test_learned_attack_finds_a_difference_of_either_direction():
    members, others = leaking(some_outputs(300, 1), -12.0), some_outputs(300, 2)
    assert loss_attack(members, others).auc < 0.1
    assert learned_attack(members, others, seed=0).auc > 0.9


def test_thresholds_by_class_see_what_one_threshold_does_not():
    """Two forgotten classes, one of them easy: its non-members have lower losses than the members of the other."""
    labels = torch.arange(400) % 2
    random = torch.Generator().manual_seed(0)
    own = torch.where(labels == 0, 8.0, 0.0) + 0.3 * torch.randn(400, generator=random)
    sets = [
        Outputs(torch.stack([own + by, torch.zeros(400)], 1).where(labels[:, None] == 0, torch.stack(
            [torch.zeros(400), own + by], 1)), torch.empty(400, 0), labels) for by in (1.0, 0.0)
    ]  # fmt: skip
    assert entropy_attack(*sets, [0, 1]).auc > 0.95 > 0.85 > loss_attack(*sets).auc


def test_figures_of_an_attack_are_scikit_learns():
    random = torch.Generator().manual_seed(0)
    members = torch.randn(300, generator=random).round(decimals=1) + 0.4
    others = torch.randn(250, generator=random).round(decimals=1)
    truth = torch.cat([torch.ones(300), torch.zeros(250)])
    scores = torch.cat([members, others])
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    attack = attack_of(members, others)
    assert attack.auc == pytest.approx(roc_auc_score(truth, scores))
    assert attack.tpr == pytest.approx(tpr[fpr <= 0.01].max())
    shuffles = torch.stack([
        torch.tensor(attack_of(
            members[torch.randint(300, (300,), generator=random)], others[torch.randint(250, (250,), generator=random)]
        ).auc) for _ in range(300)
    ])  # fmt: skip
    assert attack.standard_error == pytest.approx(float(shuffles.std()), rel=0.15)  # the bootstrap


def test_equal_scores_are_chance_and_find_nobody():
    assert attack_of(torch.ones(20), torch.ones(30)) == Attack(0.5, 0.0, 0.0, 0, 20, 30)


def test_cka_knows_rotation_and_scale_and_nothing_else():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=random, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=random, dtype=torch.float64)).Q
    unrelated = torch.randn(500, 8, generator=random, dtype=torch.float64)
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    assert linear_cka(x, unrelated) < 0.05
    half = torch.cat([x[:, :4], unrelated[:, :4]], 1)
    assert 0.3 < linear_cka(x, half) < 0.7
    assert linear_cka(x[:6], half[:6]) == pytest.approx(_by_kernels(x[:6], half[:6]))  # fewer samples than columns
    assert linear_cka(x, half) == pytest.approx(_by_kernels(x, half))
    assert math.isnan(linear_cka(x, torch.ones(500, 3)))


def _by_kernels(x, y):
    """HSIC of linear kernels, with the centring matrix: the definition."""
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, m = x @ x.T, y @ y.T

    def hsic(a, b):
        return torch.trace(a @ centre @ b @ centre)

    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def test_accuracies_are_those_of_accuracy_per_class(trained, full):
    model, train, test = trained
    found, edited = full
    others = [cls for cls in range(10) if cls != CLASS]
    for part, data in (("test", test), ("train", train)):
        before, after = (accuracy_per_class(one, zoo.batches(data), 10) for one in (model, edited))
        one = found.accuracy["edited"][part]
        assert one.per_class == tuple(after.tolist())
        assert one.forget == after[CLASS]
        assert one.retain == pytest.approx(float(after[others].mean()))
        assert one.drop == pytest.approx(float((before - after)[others].mean()))
        assert one.worst_class == others[int((before - after)[others].argmax())]
        assert one.worst_loss == pytest.approx(float((before - after)[others].max()))
        assert found.accuracy["original"][part].drop is None
        assert found.samples[part]["forget"] == int((data.tensors[1] == CLASS).sum())
    drop, forget = found.accuracy["edited"]["test"].drop, found.accuracy["edited"]["test"].forget
    assert found.aus["edited"] == pytest.approx((1 - drop) / (1 + forget))
    assert adaptive_unlearning_score(0, 0) == 1
    assert adaptive_unlearning_score(0.2, 0.6) == pytest.approx(0.5)


def test_every_metric_for_every_model(full):
    found, _ = full
    names = {"edited", "original", "retrained"}
    for metric in METRICS:
        expected = {"edited-original", "edited-retrained", "original-retrained"} if metric == "cka" else names
        assert set(getattr(found, metric)) == expected, metric
    assert found.not_measured == {}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    assert found.to_dict()["membership"]["edited"]["quantile"]["auc"] == found.membership["edited"].quantile.auc
    text = str(found)
    for words in (
        "forgotten: class 3 of 10",
        "quantile auc",
        "relearning",
        "edited-retrained",
        "no guarantee of privacy",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120
    assert f"{found.accuracy['retrained']['test'].retain:.3f}" in text
    frame = found.to_dataframe().set_index(["metric", "model", "figure"])["value"]
    assert frame["membership", "original", "loss auc"] == found.membership["original"].loss.auc
    assert frame["accuracy", "edited", "test per_class 4"] == found.accuracy["edited"]["test"].per_class[4]
    assert frame["aus", "edited", ""] == found.aus["edited"]


def test_a_probe_finds_a_class_that_only_the_head_hides(trained):
    model, train, test = trained
    found = report(masked(model), train, test, original=model, metrics=["accuracy", "linear_probe", "knn", "cka"])
    assert found.accuracy["edited"]["test"].forget == 0
    assert found.linear_probe["edited"].forget > 0.9
    assert found.knn["edited"].forget > 0.9
    assert found.linear_probe["edited"] == found.linear_probe["original"]
    assert found.cka["edited-original"].forget == pytest.approx(1)


def test_a_probe_does_not_find_what_features_do_not_hold(trained):
    model, train, test = trained
    blind = copy.deepcopy(model)
    with torch.no_grad():
        blind.fc1.weight.zero_()
        blind.fc1.bias.uniform_(0.5, 1, generator=torch.Generator().manual_seed(0))
    found = report(blind, train, test, original=model, metrics=["linear_probe", "cka"])
    assert found.linear_probe["edited"].forget + found.linear_probe["edited"].retain < 1.2
    assert math.isnan(found.cka["edited-original"].forget)
    assert found.to_dict()["cka"]["edited-original"]["forget"] is None


def test_batch_norm_statistics_bring_back_what_they_took(trained):
    model, train, test = trained
    shifted = copy.deepcopy(model)
    for norm in (shifted.bn1, shifted.bn2, shifted.bn3):
        norm.running_mean += 4 * norm.running_var.sqrt()
    found = report(shifted, train, test, original=model, metrics=["accuracy", "batchnorm_recall"])
    assert found.accuracy["edited"]["test"].forget < 0.6
    assert found.batchnorm_recall["edited"].forget > 0.85
    assert found.batchnorm_recall["edited"] == found.batchnorm_recall["original"]  # nothing else was edited
    hidden = report(masked(model), train, test, metrics="batchnorm_recall")
    assert hidden.batchnorm_recall["edited"].forget == 0
    assert hidden.batchnorm_recall["edited"].retain > 0.85


def test_batch_norm_recall_reads_retained_samples_alone(trained):
    """Samples of the forgotten class may be anything: they leave no trace in the statistics."""
    model, train, test = trained
    x, y = train.tensors
    wild = TensorDataset(torch.where((y == CLASS)[:, None, None, None], 1e4 * x, x), y)
    one, other = (report(model, data, test, metrics="batchnorm_recall").batchnorm_recall for data in (train, wild))
    assert one == other


def test_relearning_is_faster_the_less_was_forgotten(trained):
    model, train, test = trained
    little = copy.deepcopy(model)
    with torch.no_grad():
        little.fc2.bias[CLASS] -= 12
    steps = [
        report(one, train, test, original=model, metrics=Relearning(learning_rate=0.02)).relearning
        for one in (little, fresh())
    ]
    assert steps[0]["original"].steps == 0
    assert 0 < steps[0]["edited"].steps < (steps[1]["edited"].steps or 51)
    assert steps[0]["edited"].accuracy >= steps[0]["edited"].target
    few = report(fresh(), train, test, original=model, metrics=Relearning(max_steps=2))
    assert few.relearning["edited"].steps is None
    assert few.settings["relearning"] == {"learning_rate": 0.001, "batch_size": 64, "max_steps": 2}


@pytest.mark.slow
def test_same_seed_same_figures_and_nothing_of_the_caller_changes(trained):
    model, train, test = trained
    model = copy.deepcopy(model).train()
    model.bn2.eval()
    model.fc1.weight.requires_grad_(False)
    edited = masked(model)
    F.cross_entropy(edited(train.tensors[0][:10]), train.tensors[1][:10]).backward()
    shuffled = {
        "test": DataLoader(test, batch_size=100, shuffle=True),
        "train": DataLoader(train, batch_size=100, shuffle=True),
    }
    before = [_state(one) for one in (model, edited)]
    torch.manual_seed(11)
    expected = torch.rand(3)
    found, metrics = [], ["all", Relearning(max_steps=3)]
    for _ in range(2):
        torch.manual_seed(11)
        found.append(report(edited, train, test, original=model, metrics=metrics, **shuffled).to_dict())
        assert torch.equal(torch.rand(3), expected)
    assert found[0] == found[1]
    assert found[0] != report(edited, train, test, original=model, metrics=metrics, seed=1, **shuffled).to_dict()

    def breaks():
        yield from zoo.batches(test, 100)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        report(edited, train, test, original=model, **{**shuffled, "test": breaks()})
    for one, (tensors, grads, modes, flags) in zip((model, edited), before, strict=True):
        after = _state(one)
        assert all(torch.equal(tensors[name], after[0][name]) for name in tensors)
        assert all(
            (g is None) == (h is None) and (g is None or torch.equal(g, h))
            for g, h in zip(grads, after[1], strict=True)
        )
        assert (modes, flags) == after[2:]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())


def _state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return tensors, grads, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_what_is_not_given_is_left_out_and_said(trained):
    model, train, test = trained
    found = report(model, train, test, train=None)
    assert set(found.accuracy["edited"]) == {"test"}
    assert set(found.not_measured) == set(METRICS) - {"accuracy"}
    assert "not measured: membership: needs train, it was not given." in str(found)
    no_forgotten = report(model, without(train, CLASS), test)
    assert no_forgotten.membership is None
    assert no_forgotten.linear_probe is None
    assert no_forgotten.batchnorm_recall is not None
    assert "class 3 in train" in no_forgotten.not_measured["linear_probe"]
    assert math.isnan(no_forgotten.accuracy["edited"]["train"].forget)
    json.dumps(no_forgotten.to_dict(), allow_nan=False)


def test_without_batch_norms_their_recall_is_not_applicable(trained):
    model, train, test = trained
    frozen = copy.deepcopy(model)
    for norm in (frozen.bn1, frozen.bn2, frozen.bn3):
        norm.track_running_stats = False  # what is there is used, and never taken anew
    for without_norms in (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), frozen):
        found = report(without_norms, train, test, metrics=["batchnorm_recall", "accuracy"])
        assert found.batchnorm_recall is None
        assert "not applicable" in found.not_measured["batchnorm_recall"]
        assert "not applicable" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["accuracy", "speed"]}, r"metrics must be one of .*'speed'"),
        ({"metrics": []}, "metrics must name at least one metric"),
        ({"metrics": "membership", "train": None}, "metrics='membership' needs train, it was not given"),
        ({"metrics": "aus"}, "metrics='aus' needs original, it was not given"),
        ({"metrics": "cka"}, "metrics='cka' needs original or retrained"),
        ({"classes": [10]}, r"classes must be indices in 0\.\.9, got 10"),
        ({"classes": lambda cls: True}, "classes must leave at least one class to retain"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1"),
        (
            {"num_classes": 12},
            r"edited must give finite logits of shape \(samples, num_classes\).*\(100, 12\).*\(100, 10\)",
        ),
        ({"features": "fc9"}, "features must name a layer of the models, edited has none called 'fc9'"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"test": []}, "test must give at least one sample"),
    ],
)
def test_errors_say_what_is_wrong(trained, options, message):
    with pytest.raises(ValueError, match=f"^evaluate: {message}"):
        report(*trained, **options)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"max_steps": 0}, {"learning_rate": -1}])
def test_options_out_of_range(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"Relearning: {name} must be .* of at least ., got {value}"):
        Relearning(**wrong)


def test_options_are_numbers_as_json_has_them():
    options = asdict(Relearning(np.float32(0.5), np.int64(8), np.int64(3)))
    assert json.loads(json.dumps(options)) == {"learning_rate": 0.5, "batch_size": 8, "max_steps": 3}


def test_empty_batches_count_for_nothing(trained):
    model, train, test = trained
    batches, (x, y) = list(zoo.batches(test, 100)), test.tensors
    found, expected = (
        report(model, train, test, test=loader, metrics=["accuracy", "knn"]).to_dict()
        for loader in ([batches[0], (x[:0], y[:0]), *batches[1:]], batches)
    )
    assert found == expected


def test_samples_that_are_missing(trained):
    model, train, test = trained
    with pytest.raises(
        ValueError, match="test must have samples of the classes to forget and to retain, none of class 3"
    ):
        report(model, train, without(test, CLASS))
    x, y = train.tensors
    few = torch.cat([(y == CLASS).nonzero()[:4, 0], (y != CLASS).nonzero()[:, 0]])
    with pytest.raises(ValueError, match=r"metrics='membership' needs at least 10 samples of class 3 in train.*are 4"):
        report(model, TensorDataset(x[few], y[few]), test, metrics="membership")


def test_logits_that_are_not_numbers(trained):
    model, train, test = trained
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.fc2.bias[0] = torch.nan
    with pytest.raises(ValueError, match="edited must give finite logits .*in batch 0 of test it gave NaN or Inf"):
        report(broken, train, test)


def test_without_scikit_learn_the_error_says_what_to_install(trained, monkeypatch):
    monkeypatch.setattr(sys.modules["discedit.evaluation.evaluate"], "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'discedit\[evaluate\]'"):
        report(*trained)
    report(*trained, metrics="accuracy")


def test_features_are_the_input_of_the_head_or_the_output_of_a_layer(trained):
    model, _, test = trained
    loader = zoo.batches(test, 100)
    x = test.tensors[0]
    with torch.no_grad():
        hidden = F.max_pool2d(F.relu(model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x)))))), 2)
        maps = model.conv3(hidden)
        before_head = F.relu(model.fc1(F.relu(model.bn3(maps)).mean((2, 3))))
    found = gather("test", loader, {"edited": model}, 10, features=True)[0]["edited"]
    torch.testing.assert_close(found.features, before_head)
    found = gather("test", loader, {"edited": model}, 10, features="conv3")[0]["edited"]
    torch.testing.assert_close(found.features, maps.mean((2, 3)))


def test_a_head_that_is_no_longer_the_end_must_be_named(trained):
    model, train, test = trained
    scaled = Net(lambda net, x: 2 * net.inner(x), inner=copy.deepcopy(model)).eval()
    with pytest.raises(ValueError, match="edited: the features are the input of the last linear layer.*features="):
        report(scaled, train, test, metrics="knn")
    named = report(scaled, train, test, metrics="knn", features="inner.fc1")
    assert named.knn["edited"].forget > 0.9
    assert report(scaled, train, test, metrics="accuracy").accuracy["edited"]["test"].forget > 0.9


def test_models_of_transformers():
    """Batches are dicts, outputs have logits, the head reads one token, there are no batch norms."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=2,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    labels = torch.arange(120) % 2
    x = torch.randn(120, 1, 8, 8) + labels[:, None, None, None]
    loader = [{"pixel_values": x[i : i + 40], "labels": labels[i : i + 40]} for i in (0, 40, 80)]
    found = discedit.evaluate(
        model,
        classes=[1],
        num_classes=2,
        test=loader,
        train=loader,
        original=model,
        metrics=["all", Relearning(max_steps=2, learning_rate=0.1)],
    )
    assert set(found.not_measured) == {"batchnorm_recall"}
    assert found.linear_probe["edited"].forget > 0.9
    assert found.membership["edited"].loss.auc == 0.5  # the same samples
    assert found.cka["edited-original"].forget == pytest.approx(1)


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, scale):
        return self.inner(x) * scale


def test_inputs_without_a_sample_axis_are_kept_as_they_are(trained):
    model, train, test = trained
    plain = report(model, train, test, metrics="batchnorm_recall")
    loaders = {
        part: [{"x": x, "scale": torch.ones(10), "labels": labels} for x, labels in zoo.batches(data, 100)]
        for part, data in (("train", train), ("test", test))
    }
    found = report(Scaled(model), train, test, metrics="batchnorm_recall", **loaders)
    assert found.batchnorm_recall == plain.batchnorm_recall


def test_several_classes_and_a_predicate(trained):
    model, train, test = trained
    metrics = ["accuracy", "membership", "relearning"]
    found = [
        report(model, train, test, classes=classes, original=model, metrics=metrics)
        for classes in ([1, 4], lambda cls: cls in (1, 4))
    ]
    assert found[0] == found[1]
    assert found[0].classes == (1, 4)
    per_class = found[0].accuracy["edited"]["test"].per_class
    assert found[0].accuracy["edited"]["test"].forget == pytest.approx((per_class[1] + per_class[4]) / 2)
    assert found[0].membership["edited"].entropy.members == found[0].samples["train"]["forget"]


@pytest.mark.slow
@pytest.mark.data
def test_on_real_images(cifar, cifar_scores):
    """Zeroed components hide a class from the head; nearest neighbours and a few steps bring much of it back."""
    model, train, test = cifar
    edited = discedit.unlearn(model, cifar_scores, classes=[CLASS]).model
    found = report(edited, train, test, original=model)
    assert found.accuracy["edited"]["test"].forget < 0.3 < 0.7 < found.accuracy["original"]["test"].forget
    assert found.linear_probe["edited"].forget > 0.5
    assert 0 < found.relearning["edited"].steps <= 50
    assert found.aus["edited"] > found.aus["original"]
    assert found.cka["edited-original"].forget < found.cka["edited-original"].retain


def test_features_in_another_order_than_the_samples_are_refused():
    """A sequence that is as long as the batch, and samples that are sorted."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(5, 6), "head": nn.Linear(6, 2)}
    loader = [(torch.randn(8, 8, 5), torch.arange(8) % 2)]
    first = Net(lambda net, x: net.head(net.a(x).relu().mean(1)), **layers).eval()
    assert gather("test", loader, {"model": first}, 2, features="a")[0]["model"].features.shape == (8, 6)
    second = Net(lambda net, x: net.head(net.a(x.transpose(0, 1)).relu().mean(0)), **layers).eval()
    turned = Net(lambda net, x: net.head(net.a(x.mean(1).flip(0)).relu()).flip(0), **layers).eval()
    for net in (second, turned):
        with pytest.raises(
            ValueError, match="layer 'a' must give one row of features for each sample, in the order of"
        ):
            gather("test", loader, {"model": net}, 2, features="a")
