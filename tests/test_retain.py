"""Labelled data split into what is to be forgotten and the rest."""

import pytest
import torch
from torch import nn

from discedit import zoo
from discedit.model.forward import Quota
from discedit.moments import calibration, forget_retain
from discedit.moments.forget_retain import ForgetRetainSplit

MODEL = zoo.DigitsNet().eval()


def batches(labels, size):
    torch.manual_seed(0)
    x = torch.rand(len(labels), 1, 8, 8)
    return [(x[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)], x


def test_the_first_samples_of_each_class():
    quota = Quota({0: 1, 2: 3})
    assert quota.take(torch.tensor([2, 1, 2, 0, 0])).tolist() == [0, 2, 3]
    assert not quota.full()
    none = quota.take(torch.tensor([0, 1], dtype=torch.uint8))
    assert none.tolist() == torch.arange(5)[none].tolist() == []
    assert quota.take(torch.tensor([1, 2, 2])).tolist() == [1]
    assert quota.full()


def test_every_sample_is_of_one_kind():
    data, x = batches(torch.arange(60) % 10, 7)
    parted = ForgetRetainSplit("op", MODEL, data, [3, 5], 10)
    for kind, classes in (("forget", [3, 5]), ("retain", [0, 1, 2, 4, 6, 7, 8, 9])):
        labels = torch.cat([labels for _, labels in parted.batches[kind]])
        images = torch.cat([images for images, _ in parted.batches[kind]])
        expected = torch.isin(torch.arange(60) % 10, torch.tensor(classes))
        assert torch.equal(labels, (torch.arange(60) % 10)[expected])
        assert torch.equal(images, x[expected])


def test_keeps_no_more_than_it_says_and_reads_no_further(monkeypatch):
    """Also of a loader that is sorted by class, of which the first samples would be one class."""
    monkeypatch.setattr(forget_retain, "KEPT", {"forget": 4, "retain": 18})
    data, _ = batches(torch.arange(10).repeat_interleave(20), 16)
    parted = ForgetRetainSplit("op", MODEL, data, [3], 10)
    kept = {kind: torch.cat([labels for _, labels in parted.batches[kind]]) for kind in ("forget", "retain")}
    assert torch.bincount(kept["retain"], minlength=10).tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]
    assert len(kept["forget"]) == 4

    def endless():
        while True:
            yield data[0][0], torch.arange(16) % 10

    assert len(ForgetRetainSplit("op", MODEL, endless(), [3], 10).batches["forget"]) > 0


def test_few_of_each_class_and_their_accuracy():
    data, _ = batches(torch.arange(200) % 10, 50)
    parted = ForgetRetainSplit("op", MODEL, data, [3], 10)
    few = torch.cat([labels for _, labels in parted._first("retain", 18)])
    assert torch.bincount(few, minlength=10).tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]
    with torch.no_grad():
        x = torch.cat([x for x, _ in parted.batches["forget"]])
        right = float((MODEL(x).argmax(1) == 3).double().mean())
    assert parted.accuracy(MODEL, "forget") == pytest.approx(right)


def numbered(labels, sizes):
    """Images that hold their own place in the data, in batches of these sizes, over and over."""
    x = torch.arange(len(labels)).float()[:, None, None, None].expand(-1, 1, 8, 8)
    found, start = [], 0
    while start < len(labels):
        end = start + sizes[len(found) % len(sizes)]
        found.append((x[start:end], labels[start:end]))
        start = end
    return found


def places(parts):
    return torch.cat([x[:, 0, 0, 0] for x, _ in parts]).long()


@pytest.mark.parametrize("sizes", [[50], [7], [1, 13, 40, 2], [200]], ids=str)
@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_labels_go_with_their_samples(sizes, order):
    """The first of each class, as many of each, in the order of the data: whatever its batches are."""
    torch.manual_seed(0)
    labels = torch.arange(10).repeat_interleave(20)
    labels = labels[torch.randperm(200)] if order == "mixed" else labels
    parted = ForgetRetainSplit("op", MODEL, numbered(labels, sizes), [3, 5], 10)
    for kind, classes, most, each in (
        ("retain", [0, 1, 2, 4, 6, 7, 8, 9], 40, 5),
        ("retain", [0, 1, 2, 4, 6, 7, 8, 9], 33, 5),  # rounded up: as many of each
        ("forget", [3, 5], 9999, 20),
    ):
        parts = parted.labelled(kind, most)
        assert all(len(x) == len(given) for x, given in parts)
        given = torch.cat([given for _, given in parts])
        found = places(parts)
        assert torch.equal(given, labels[found])
        due = torch.cat([(labels == cls).nonzero()[:each, 0] for cls in classes])
        assert sorted(found.tolist()) == sorted(due.tolist())
        assert torch.bincount(given, minlength=10)[classes].tolist() == [each] * len(classes)


def test_labels_go_with_their_samples_in_several_parts(monkeypatch):
    labels = torch.arange(200) % 10
    monkeypatch.setattr(calibration, "MAP", 64 * 64 * 4 * 30)  # of 30 samples, in this network
    parted = ForgetRetainSplit("op", MODEL, numbered(labels, [7, 30]), [3], 10)
    parts = parted.labelled("retain", 90)
    assert len(parts) > 1
    given = torch.cat([given for _, given in parts])
    assert torch.equal(given, labels[places(parts)])
    assert len(given) == 90
    assert all(len(x) == len(part) for x, part in parts)


def cut_short(cut, order, monkeypatch):
    """Labels of 45 of 180 samples, all that a limit allows, and whether they are their own."""
    if cut == "samples":
        monkeypatch.setattr(calibration, "SAMPLES", 45)
    else:
        monkeypatch.setattr(calibration, "MEMORY", calibration.MAPS * 64 * 64 * 4 * 45 // calibration.ROOMS)
    labels = torch.arange(200) % 10 if order == "mixed" else torch.arange(10).repeat_interleave(20)
    parts = ForgetRetainSplit("op", MODEL, numbered(labels, [7, 30]), [3], 10).labelled("retain", 180)
    given = torch.cat([given for _, given in parts])
    return given, torch.equal(given, labels[places(parts)])


ENDS = pytest.mark.parametrize("cut", ["samples", "memory"])
ORDERS = pytest.mark.parametrize("order", ["mixed", "sorted"])


@ORDERS
@ENDS
def test_labels_go_with_their_samples_where_memory_ends(cut, order, monkeypatch):
    given, own = cut_short(cut, order, monkeypatch)
    assert len(given) == 45
    assert own


@ORDERS
@ENDS
def test_as_many_of_each_class_where_memory_ends(cut, order, monkeypatch):
    """Fewer than were asked for, and not the first classes alone, also of data that is sorted by class."""
    given, _ = cut_short(cut, order, monkeypatch)
    counts = torch.bincount(given, minlength=10)[[cls for cls in range(10) if cls != 3]]
    assert int(counts.max() - counts.min()) <= 1


def test_labels_of_images_of_other_sizes():
    """Only what can be one batch is looked at, with its own labels."""
    labels = torch.arange(60) % 10
    data = numbered(labels, [20])
    data[1] = (data[1][0][..., :6], data[1][1])
    for first, due in ((data, range(20)), (data[1:], range(20, 40))):
        parted = ForgetRetainSplit("op", MODEL, first, [3], 10)
        parts = parted.labelled("retain", 54)
        found = places(parts)
        assert torch.equal(torch.cat([given for _, given in parts]), labels[found])
        assert sorted(found.tolist()) == [i for i in due if labels[i] != 3]


def test_labels_of_inputs_that_are_named():
    """Also where a tensor belongs to no sample."""
    labels = torch.arange(60) % 10

    class Named(nn.Module):
        def forward(self, places, table):
            return MODEL(places) + table.sum()

    table = torch.ones(3, 2)
    batches = [{"places": x, "table": table, "labels": given} for x, given in numbered(labels, [7, 11])]
    parts = ForgetRetainSplit("op", Named(), batches, [3], 10).labelled("retain", 27)
    assert all(torch.equal(inputs["table"], table) for inputs, _ in parts)
    given = torch.cat([given for _, given in parts])
    assert torch.equal(given, labels[places([(inputs["places"], None) for inputs, _ in parts])])
    assert torch.bincount(given, minlength=10).tolist() == [3, 3, 3, 0, 3, 3, 3, 3, 3, 3]


def test_labels_are_looked_for_once():
    data, _ = batches(torch.arange(100) % 10, 20)
    parted = ForgetRetainSplit("op", MODEL, data, [3], 10)
    assert parted.labelled("forget", 8) is parted.labelled("forget", 8)
    assert parted.labelled("forget", 8) is not parted.labelled("forget", 9)
    assert sum(len(labels) for _, labels in parted.labelled("forget", 9)) == 9


@pytest.mark.parametrize(("forget", "message"), [([1], "holds none"), ([0], "classes other than")])
def test_both_kinds_are_needed(forget, message):
    data, _ = batches(torch.zeros(5, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=message):
        ForgetRetainSplit("unlearn", MODEL, data, forget, 10)


def test_labels_must_match_samples():
    with pytest.raises(ValueError, match="batch 0 has 5 samples and 4 labels"):
        ForgetRetainSplit("unlearn", MODEL, [(torch.rand(5, 1, 8, 8), torch.arange(4))], [1], 10)


@pytest.mark.parametrize(
    ("last", "head"),
    [(lambda y: y, "fc2"), (lambda y: y.clone(), "fc2"), (lambda y: (y, 0), "fc2"), (torch.exp, None)],
    ids=["as it is", "copied", "in a tuple", "exponentials"],
)
def test_the_head_gives_what_the_model_gives(last, head):
    class Other(zoo.DigitsNet):
        def forward(self, x):
            return last(super().forward(x))

    data, _ = batches(torch.arange(40) % 10, 20)
    assert ForgetRetainSplit("op", Other().eval(), data, [3], 10).trace.head == head


def test_head_and_means():
    data, _ = batches(torch.arange(400) % 10, 64)
    parted = ForgetRetainSplit("op", MODEL, data, [3], 10)
    assert parted.trace.head == "fc2"
    means = parted.means({"conv2": "bn2", "fc1": "fc1"})
    seen = {}
    handles = [
        MODEL.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, []).append(o))
        for name in ("bn2", "fc1")
    ]
    kept, labels = (torch.cat(parts) for parts in zip(*parted.batches["retain"], strict=True))
    share = -(-forget_retain.MEANS // 9)
    retained = torch.cat([kept[labels == cls][:share] for cls in range(10) if cls != 3])
    with torch.no_grad():
        MODEL(retained)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(means["conv2"].float(), torch.cat(seen["bn2"]).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means["fc1"].float(), torch.cat(seen["fc1"]).mean(0), rtol=1e-4, atol=1e-5)
