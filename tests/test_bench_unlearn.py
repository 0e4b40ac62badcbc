"""The benchmark of unlearning measures what it says, resumes, and makes its table from what is kept alone."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import bench_unlearn
from benchmarks.bench_unlearn import MISSING, Bench, Loaded, Log, Row, Setting, Subject
from discedit import zoo

pytestmark = pytest.mark.slow
CLASS = 3


@pytest.fixture
def digits(trained, monkeypatch, tmp_path):
    """The digits as a model of the benchmark, with two settings, two variants and three rivals."""
    model, train, test = trained
    some = TensorDataset(*(tensor[:300] for tensor in train.tensors))
    test, held = (TensorDataset(*(tensor[part] for tensor in test.tensors)) for part in (slice(300), slice(300, None)))

    def load():
        return Loaded(model, list(zoo.batches(train)), list(zoo.batches(test)), list(zoo.batches(some)))

    subject = Subject("Digits", load, lambda: held, list("0123456789"), (CLASS, 8, *range(3), 4, 5, 6, 7, 9), 5, 1)
    monkeypatch.setattr(bench_unlearn, "HERE", tmp_path)
    monkeypatch.setattr(bench_unlearn, "SUBJECTS", {"digits": subject})
    ours = {
        "default": Setting("default, without data", {"fraction": 0.15}),
        "discedit_u": Setting("preset discedit_u", preset="discedit_u"),
    }
    variants = {
        "any": Setting('sign="any"', {"sign": "any", "fraction": 0.1}),
        "half": Setting("last half", {"last": 1 / 2, "fraction": 0.1}),
    }
    few = {"default": Setting("default, 64", {"fraction": 0.15}, few=True)}
    monkeypatch.setattr(bench_unlearn, "OURS", ours)
    monkeypatch.setattr(bench_unlearn, "DEFAULTS", ("default",))
    monkeypatch.setattr(bench_unlearn, "VARIANTS", variants)
    monkeypatch.setattr(bench_unlearn, "FEW", few)
    monkeypatch.setattr(bench_unlearn, "SETTINGS", {"ours": ours, "few": few, "variants": variants})
    methods = {name: bench_unlearn.METHODS[name] for name in ("logit_mask", "finetune", "gradient_ascent")}
    methods["finetune"] = replace(methods["finetune"], grid=({"rate": 0.1}, {"rate": 0.01}))
    methods["gradient_ascent"] = replace(methods["gradient_ascent"], grid=({"rate": 0.01}, {"rate": 0.001}))
    monkeypatch.setattr(bench_unlearn, "METHODS", methods)
    return SimpleNamespace(subject=subject, path=tmp_path / "unlearn.json", folder=tmp_path)


def run(*arguments):
    bench_unlearn.main(["--models", "digits", *map(str, arguments)])


def lines_with(text, *parts):
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def test_measures_resumes_and_writes(digits, monkeypatch):
    pytest.importorskip("matplotlib")
    run("--parts", "ours", "few", "variants", "rivals", "--classes", CLASS, 8, "--rival-classes", 1, "--seeds", 0, 1,
        "--write", "--plot")  # fmt: skip
    entries = json.loads(digits.path.read_text())
    expected = {f"digits|original|original|{cls}|0" for cls in (CLASS, 8)}
    expected |= {f"digits|ours|{name}|{cls}|0" for name in ("default", "discedit_u") for cls in (CLASS, 8)}
    expected |= {f"digits|few|default|{cls}|0" for cls in (CLASS, 8)}
    expected |= {f"digits|variants|{name}|{cls}|0" for name in ("any", "half") for cls in (CLASS, 8)}
    expected |= {f"digits|rivals|{name}|{CLASS}|{seed}" for name in ("finetune", "gradient_ascent") for seed in (0, 1)}
    expected |= {f"digits|rivals|logit_mask|{CLASS}|0", "digits|tuned|finetune", "digits|tuned|gradient_ascent"}
    assert set(entries) == expected
    assert len(digits.path.read_text().splitlines()) == len(expected) + 2  # a line each

    # Of one class by hand, from the accuracies.
    before, found = (entries[f"digits|{part}|{CLASS}|0"] for part in ("original|original", "ours|default"))
    lost = {k: before["accuracy"][k] - found["accuracy"][k] for k in range(10) if k != CLASS}
    assert before["forget"] > 90 > 60 > found["forget"] == pytest.approx(found["accuracy"][CLASS], abs=0.01)
    assert found["drop"] == pytest.approx(sum(lost.values()) / 9, abs=0.02)
    assert found["worst class"] == max(lost, key=lost.get)
    assert found["worst drop"] == pytest.approx(max(lost.values()), abs=0.02)
    assert 0 <= found["recall forget"] <= 100
    assert found["components"] > 0
    assert found["edit seconds"] > 0
    assert "recall forget" not in entries[f"digits|variants|any|{CLASS}|0"]
    assert entries[f"digits|rivals|logit_mask|{CLASS}|0"]["forget"] == 0
    tuning = entries["digits|tuned|finetune"]
    best = max(tuning["tried"], key=lambda one: one["aus"])
    assert tuning["setting"] == best["setting"] == entries[f"digits|rivals|finetune|{CLASS}|1"]["setting"]

    text = (digits.folder / "unlearn.md").read_text()
    mean = sum(entries[f"digits|ours|default|{cls}|0"]["forget"] for cls in (CLASS, 8)) / 2
    assert lines_with(text, "| **default, without data** |", f"| {mean:.1f} (", "| 3, 8 | 1 |")
    assert lines_with(text, "| fine-tuning |", f"| {CLASS} | 2 |")
    assert lines_with(text, "not measured")
    assert "### What is left inside" in text.split("Not measured.")[0]  # no evaluation yet
    assert (digits.folder / "unlearn-digits.png").stat().st_size > 20_000

    # A second run needs neither model nor images.
    stranger = replace(digits.subject, load=lambda: pytest.fail("loaded again"))
    monkeypatch.setitem(bench_unlearn.SUBJECTS, "digits", stranger)
    run("--parts", "ours", "few", "variants", "rivals", "--classes", CLASS, 8, "--rival-classes", 1, "--seeds", 0, 1,
        "--write")  # fmt: skip
    assert json.loads(digits.path.read_text()) == entries
    assert (digits.folder / "unlearn.md").read_text() == text


def test_what_another_commit_measured_is_measured_again_unless_asked(digits):
    log = Log()
    log.measure("digits|ours|default|3|0", lambda: {"forget": 1.0})
    log.machine = "another commit"
    assert log.measure("digits|ours|default|3|0", lambda: {"forget": 2.0})["forget"] == 2.0
    other = Log(any_commit=True)
    assert other.measure("digits|ours|default|3|0", lambda: pytest.fail("measured again"))["forget"] == 2.0


def test_two_processes_keep_what_the_other_wrote(digits):
    one, other = Log(), Log()
    one.measure("a", lambda: {"value": 1})
    other.measure("b", lambda: {"value": 2})
    assert set(json.loads(digits.path.read_text())) == {"a", "b"}


def test_a_failure_does_not_stop_the_others(digits, monkeypatch, capsys):
    broken = {"broken": Setting("broken", {"fraction": 2.0}), **bench_unlearn.OURS}
    monkeypatch.setitem(bench_unlearn.SETTINGS, "ours", broken)
    with pytest.raises(SystemExit, match=r"1 runs failed: digits\|ours\|broken\|3\|0"):
        run("--parts", "ours", "--classes", CLASS, "--write")
    assert "fraction must be" in capsys.readouterr().out
    entries = json.loads(digits.path.read_text())
    assert "digits|ours|default|3|0" in entries
    assert "digits|ours|broken|3|0" not in entries
    assert (digits.folder / "unlearn.md").is_file()


def test_evaluation_of_one_class(digits):
    pytest.importorskip("sklearn")
    for name in ("finetune", "gradient_ascent"):
        del bench_unlearn.METHODS[name]
    del bench_unlearn.OURS["discedit_u"]
    run("--parts", "evaluate", "--write")
    entries = json.loads(digits.path.read_text())
    names = ("original", "ours default", "logit_mask")
    assert set(entries) == {f"digits|evaluate|{name}|{CLASS}|0" for name in names}
    original, ours, mask = (entries[f"digits|evaluate|{name}|{CLASS}|0"] for name in names)
    assert original["relearning"]["steps"] == 0
    assert original["linear_probe"]["forget"] > 0.8
    assert ours["accuracy"]["test"]["forget"] < 0.6
    assert mask["aus"] > 0.95
    assert mask["linear_probe"] == original["linear_probe"]  # the same features
    text = (digits.folder / "unlearn.md").read_text()
    (line,) = lines_with(text, "| logit mask (control) |", f"| {mask['aus']:.3f} |")
    assert line.endswith(f"| {MISSING} |")  # no retrained model to compare with
    assert lines_with(text, "| retrained without the class |", f"| {MISSING} | {MISSING} |")


def run_of(forget, drop, **more):
    return {"forget": forget, "drop": drop, "worst class": 1, "worst drop": 3 * drop, "machine": "x, 1 threads", **more}


def test_the_table_needs_the_entries_alone(monkeypatch):
    """With the models as they are, none of which is loaded; goals are judged by the means."""
    recall = {"recall forget": 8.0, "recall retain": 88.0, "edit seconds": 0.2, "components": 24}
    entries = {f"resnet20|ours|default|{cls}|0": run_of(2.0 + cls % 2, 0.9, **recall) for cls in range(10)}
    entries |= {f"resnet20|few|default|{cls}|0": run_of(4.0, 4.9, **recall) for cls in range(10)}
    nothing = {"recall forget": None, "recall retain": None, "edit seconds": 1.5, "components": 5}
    entries |= {f"vit_fashion|ours|default with data|{cls}|0": run_of(6.0, 0.1, **nothing) for cls in range(10)}
    entries |= {f"resnet20|rivals|salun|{cls}|{seed}": run_of(cls, seed) for cls in (3, 0) for seed in range(3)}
    text = bench_unlearn.markdown(entries)
    head = "| ResNet20 | default, without data |"
    assert lines_with(text, head, "at most 5 %, others lose at most 1 point |", "2.5 %, 0.90 points | met |")
    assert lines_with(text, head, "+1.50 and +4.00 points | missed |")
    assert lines_with(text, head, "recall at most 10 % | 8.0 % | met |")
    assert lines_with(text, head, "0.20 s | met |")
    assert len(lines_with(text, "| ResNet20 | default, with data |", f"| {MISSING} | {MISSING} |")) == 4
    head = "| ViT on Fashion-MNIST | default, with data |"
    assert lines_with(text, head, "| 6.0 %, 0.10 points | missed |")
    assert lines_with(text, head, "| no batch norm | n/a |")
    assert lines_with(text, head, "1.50 s | missed |")
    assert "## ResNet56" not in text
    assert lines_with(text, "| **default, without data** |", "| 2.5 (3.0) | 0.90 (0.90) | 2.7 | 8.0 (8.0) |", "| all |")
    # Rivals, and ours on their classes alone: 0 and 3 have 2.0 and 3.0.
    assert lines_with(text, "| SalUn | 1.5 (3.0) | 1.00 (2.00) | 6.0 |", "| 0, 3 | 3 |")
    assert lines_with(text, "| **default, without data** |", "| 0, 3 | 1 |")
    assert lines_with(text, "| fine-tuning | not measured |")
    assert lines_with(text, "| **default, with data** | 6.0 (6.0) |", "| n/a | n/a |")
    monkeypatch.setattr(bench_unlearn, "SUBJECTS", {})
    assert "Not measured." in bench_unlearn.markdown({})


def test_each_class_counts_the_same_however_many_seeds():
    row = Row("", {(0, 0): {"forget": 1.0}, (0, 1): {"forget": 3.0}, (1, 0): {"forget": 8.0}})
    assert row.values("forget") == [2.0, 8.0]
    assert row.mean("forget") == 5.0
    assert row.worst("forget") == 8.0
    assert row.mean("drop") is None
    assert row.of([1]).mean("forget") == 8.0


def test_the_last_layers_are_those_that_can_be_edited(digits):
    bench = Bench("digits")
    layers = {
        share: bench.unlearn(Setting("", {"last": share, "fraction": 0.2}), CLASS)[0].recipe.settings["layers"]
        for share in (1.0, 1 / 2, 1 / 4)
    }
    assert layers == {1.0: ["conv1", "conv2", "conv3", "fc1"], 1 / 2: ["conv3", "fc1"], 1 / 4: ["fc1"]}


def test_labels_do_not_cover_each_other():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(f"method number {i}", "ours" if i % 3 == 0 else "rival", 0.5 + 0.004 * i, 0.5) for i in range(12)]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    bench_unlearn.place_labels(axes, points)
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_the_models_are_whole():
    for subject in bench_unlearn.SUBJECTS.values():
        assert sorted(subject.order) == list(range(len(subject.names)))
    assert set(bench_unlearn.TITLES) == set(bench_unlearn.METHODS)
    assert isinstance(bench_unlearn.SUBJECTS["resnet56"], Subject)
    for name, setting in bench_unlearn.VARIANTS.items():
        assert name.endswith("with data") == setting.data


@pytest.mark.data
def test_resnet20_loads(cifar):
    loaded = bench_unlearn.SUBJECTS["resnet20"].load()
    assert isinstance(loaded.model, nn.Module)
    sizes = [sum(len(labels) for _, labels in part) for part in (loaded.train, loaded.test, loaded.few)]
    assert sizes == [2500, 5000, 640]
