"""Labelled data split into what is to be forgotten and the rest."""

import pytest
import torch

from discedit import _retain, zoo
from discedit._batches import Quota
from discedit._retain import Classified

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
    parted = Classified("op", MODEL, data, [3, 5], 10)
    for kind, classes in (("forget", [3, 5]), ("retain", [0, 1, 2, 4, 6, 7, 8, 9])):
        labels = torch.cat([labels for _, labels in parted.batches[kind]])
        images = torch.cat([images for images, _ in parted.batches[kind]])
        expected = torch.isin(torch.arange(60) % 10, torch.tensor(classes))
        assert torch.equal(labels, (torch.arange(60) % 10)[expected])
        assert torch.equal(images, x[expected])


def test_keeps_no_more_than_it_says_and_reads_no_further(monkeypatch):
    """Also of a loader that is sorted by class, of which the first samples would be one class."""
    monkeypatch.setattr(_retain, "KEPT", {"forget": 4, "retain": 18})
    data, _ = batches(torch.arange(10).repeat_interleave(20), 16)
    parted = Classified("op", MODEL, data, [3], 10)
    kept = {kind: torch.cat([labels for _, labels in parted.batches[kind]]) for kind in ("forget", "retain")}
    assert torch.bincount(kept["retain"], minlength=10).tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]
    assert len(kept["forget"]) == 4

    def endless():
        while True:
            yield data[0][0], torch.arange(16) % 10

    assert len(Classified("op", MODEL, endless(), [3], 10).batches["forget"]) > 0


def test_few_of_each_class_and_their_accuracy():
    data, _ = batches(torch.arange(200) % 10, 50)
    parted = Classified("op", MODEL, data, [3], 10)
    few = torch.cat([labels for _, labels in parted._first("retain", 18)])
    assert torch.bincount(few, minlength=10).tolist() == [2, 2, 2, 0, 2, 2, 2, 2, 2, 2]
    with torch.no_grad():
        x = torch.cat([x for x, _ in parted.batches["forget"]])
        right = float((MODEL(x).argmax(1) == 3).double().mean())
    assert parted.accuracy(MODEL, "forget") == pytest.approx(right)


@pytest.mark.parametrize(("forget", "message"), [([1], "holds none"), ([0], "classes other than")])
def test_both_kinds_are_needed(forget, message):
    data, _ = batches(torch.zeros(5, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=message):
        Classified("unlearn", MODEL, data, forget, 10)


def test_labels_must_match_samples():
    with pytest.raises(ValueError, match="batch 0 has 5 samples and 4 labels"):
        Classified("unlearn", MODEL, [(torch.rand(5, 1, 8, 8), torch.arange(4))], [1], 10)


def test_head_and_means():
    data, _ = batches(torch.arange(400) % 10, 64)
    parted = Classified("op", MODEL, data, [3], 10)
    assert parted.head == "fc2"
    means = parted.means({"conv2": "bn2", "fc1": "fc1"})
    seen = {}
    handles = [
        MODEL.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, []).append(o))
        for name in ("bn2", "fc1")
    ]
    kept, labels = (torch.cat(parts) for parts in zip(*parted.batches["retain"], strict=True))
    share = -(-_retain.MEANS // 9)
    retained = torch.cat([kept[labels == cls][:share] for cls in range(10) if cls != 3])
    with torch.no_grad():
        MODEL(retained)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(means["conv2"].float(), torch.cat(seen["bn2"]).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means["fc1"].float(), torch.cat(seen["fc1"]).mean(0), rtol=1e-4, atol=1e-5)
