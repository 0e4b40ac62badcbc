"""The console command: each command against the library called by hand, its exit codes and its hostile inputs."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import operations_of
from safetensors.torch import load_file, save_file

import discedit
from discedit import (
    AblateComponents,
    GlobalRatio,
    LatencyTable,
    LeastSquares,
    MaxMacs,
    ModHiFiU,
    Moments,
    Random,
    Recipe,
    Scores,
    Stack,
    TopK,
    zoo,
)
from discedit.cli import data as _images
from discedit.cli.errors import InputError, explained
from discedit.cli.main import main
from discedit.cli.models import load_weights
from discedit.evaluation.evaluate import accuracy_per_class
from discedit.evaluation.relearning import Relearning
from discedit.integrations import huggingface

MODEL = ["--model", "discedit.zoo:DigitsNet"]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """Trained weights and the digits as .npz files, in a folder of their own."""
    model, train, test = trained
    folder = tmp_path_factory.mktemp("cli")
    save_file(model.state_dict(), folder / "weights.safetensors")
    for name, data in (("train", train), ("test", test)):
        images, labels = (tensor.numpy() for tensor in data.tensors)
        np.savez(folder / f"{name}.npz", images=images, labels=labels, class_names=np.array(NAMES))
    return folder


@pytest.fixture(scope="module")
def scored(place):
    """The run folder of `score`, which other commands take scores from."""
    assert main(["score", *with_data(place), "--out", str(place / "scored"), "--quiet"]) == 0
    return place / "scored"


def with_data(place, data="train.npz"):
    return [*MODEL, "--weights", str(place / "weights.safetensors"), "--data", str(place / data)]


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def same_scores(one, other):
    return list(one) == list(other) and all(torch.equal(one[layer], other[layer]) for layer in one)


def test_score_is_that_of_the_library(place, scored, digit_moments, digit_scores):
    assert same_scores(Scores.load(scored / "scores.safetensors"), digit_scores)
    moments = Moments.load(scored / "moments.safetensors")
    assert all(torch.equal(moments[layer].m4, digit_moments[layer].m4) for layer in digit_moments)
    record = record_of(scored)
    assert record["results"]["samples_per_class"] == digit_scores.counts.tolist()
    best = record["results"]["layers"]["conv3"]["best"]
    assert best["score"] == float(digit_scores["conv3"].max())
    assert float(digit_scores["conv3"][best["component"], best["class"]]) == best["score"]


def test_run_json_says_what_ran(place, scored, monkeypatch):
    record = record_of(scored)
    assert (record["kind"], record["version"], record["command"], record["seed"]) == ("run", 1, "score", 0)
    assert record["arguments"]["statistic"] == ["mean"]
    assert record["arguments"]["out"] == str(scored)
    assert record["versions"]["torch"] == torch.__version__
    assert (record["device"], record["dtype"], record["ranks"]) == ("cpu", "float32", 1)
    assert record["model"]["parameters"] == sum(p.numel() for p in zoo.DigitsNet().parameters())
    assert record["model"]["class_names"] == NAMES
    assert record["data"]["data"]["samples"] == 1200
    assert record["seconds"] > 0
    assert {file["name"] for file in record["files"]} == {"moments.safetensors", "scores.safetensors"}
    for file in record["files"]:
        assert (scored / file["name"]).stat().st_size == file["bytes"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert record["commit"] == (head or None)


def test_score_options_reach_the_library(place, tmp_path, trained):
    model, train, _ = trained
    arguments = ["score", *with_data(place), "--batch-size", "100", "--limit-per-class", "30"]
    arguments += ["--out", str(tmp_path / "run")]
    arguments += ["--blocks", "5", "--statistic", "max,mean", "--layers", "conv2,fc1", "--read", "output"]
    arguments += ["--bound", "robust", "--bound-option", "radius=1.5", "--pairs", "--backend", "reference", "--quiet"]
    assert main(arguments) == 0
    x, y = train.tensors
    first = torch.cat([(y == cls).nonzero()[:30, 0] for cls in range(10)]).sort().values
    loader = list(zip(x[first].split(100), y[first].split(100), strict=True))
    options = {"statistic": ["max", "mean"], "witness": "vector", "layers": ["conv2", "fc1"], "read": "output"}
    blocks = discedit.collect_blocks(model, loader, 10, blocks=5, backend="reference", **options)
    expected = discedit.score(blocks, bound="robust", radius=1.5, pairs=True, backend="reference")
    found = Scores.load(tmp_path / "run" / "scores.safetensors")
    assert same_scores(found, expected)
    assert torch.equal(found.errors["fc1"], expected.errors["fc1"])
    assert torch.equal(found.pairs["conv2"], expected.pairs["conv2"])
    assert found.counts.tolist() == [30] * 10


def test_score_by_the_models_own_answers(place, tmp_path, trained):
    model, train, _ = trained
    assert main(["score", *with_data(place), "--labels", "predicted", "--out", str(tmp_path), "--quiet"]) == 0
    expected = discedit.score(discedit.collect_moments(model, zoo.batches(train), 10, labels="predicted"))
    assert same_scores(Scores.load(tmp_path / "scores.safetensors"), expected)


def test_prune_is_that_of_the_library(place, scored, tmp_path, trained, digit_scores, capsys):
    model, train, test = trained
    arguments = ["prune", *with_data(place), "--test", str(place / "test.npz"), "--scores", str(scored)]
    arguments += ["--ratio", "conv2=0.5,conv3=0.25", "--floor", "conv2=20", "--round-to", "2", "--ignore", "fc1"]
    assert main([*arguments, "--out", str(tmp_path), "--quiet"]) == 0
    edit = discedit.prune(
        model,
        digit_scores,
        budget=discedit.Ratio({"conv2": 0.5, "conv3": 0.25}, round_to=2, floor={"conv2": 20}),
        ignore=["fc1"],
        example_inputs=train.tensors[0][:1],
        data=zoo.batches(train),
    )
    weights = load_file(tmp_path / "model.safetensors")
    for name, tensor in edit.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    recipe = Recipe.load(tmp_path / "prune.json")
    assert recipe.components == edit.recipe.components
    results = record_of(tmp_path)["results"]
    assert results["before"]["parameters"] == edit.parameters_before
    assert results["after"]["parameters"] == edit.parameters_after
    assert (results["before"]["macs"], results["after"]["macs"]) == (edit.macs_before, edit.macs_after)
    for when, one in (("before", model), ("after", edit.model)):
        assert results[when]["accuracy"] == accuracy_per_class(one, zoo.batches(test), 10).tolist()
    assert results["layers"]["conv2"] == {"edited": 32, "of": 64}
    text = capsys.readouterr().out
    assert f"{edit.parameters_before:,} -> {edit.parameters_after:,}" in text
    assert "mean of classes" in text


def test_prune_by_divergence_leaves_a_table_for_other_budgets(place, scored, tmp_path, trained, digit_scores, capsys):
    model, train, _ = trained
    arguments = ["prune", *with_data(place), "--scores", str(scored), "--quiet"]
    assert main([*arguments, "--macs", "0.6", "--trials", "10", "--out", str(tmp_path / "first")]) == 0
    options = {"example_inputs": train.tensors[0][:1], "data": zoo.batches(train)}
    how = discedit.MeasureDivergence(trials=10)
    edit = discedit.prune(model, digit_scores, budget=MaxMacs(0.6, across=how), **options)
    assert Recipe.load(tmp_path / "first" / "prune.json").components == edit.recipe.components
    table = tmp_path / "first" / "divergences.safetensors"
    assert main([*arguments, "--macs", "0.4", "--across", str(table), "--out", str(tmp_path / "second")]) == 0
    edit = discedit.prune(model, digit_scores, budget=MaxMacs(0.4, across=edit.divergences), **options)
    assert Recipe.load(tmp_path / "second" / "prune.json").components == edit.recipe.components
    for wrong, message in (
        (["--across", "sum"], "or a file of divergences that exists, got 'sum'"),
        (["--across", "rank", "--trials", "3"], "--trials: goes with --across divergence"),
    ):
        assert main([*arguments, "--macs", "0.4", *wrong, "--out", str(tmp_path / "third")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (["--parameters", "0.6"], {"parameters": 0.6}),
        (["--parameters", "40000"], {"parameters": 40000}),
        (["--macs", "0.5"], {"macs": 0.5}),
        (["--latency", "0.7"], {"latency": 0.7}),
        (["--global-ratio", "0.2", "--across", "mean"], {"budget": GlobalRatio(0.2, across="mean")}),
        (["--threshold", "0.1", "--criterion", "max"], {"threshold": 0.1, "criterion": "max"}),
        (["--ratio", "0.3", "--criterion", "random", "--seed", "5"], {"ratio": 0.3, "criterion": Random(5)}),
    ],
)
def test_budgets_reach_the_library(place, scored, tmp_path, trained, digit_scores, budget, expected, monkeypatch):
    model, train, _ = trained
    monkeypatch.setattr("discedit.editing.latency.stopwatch", operations_of)
    arguments = [
        "prune",
        *MODEL,
        "--weights",
        str(place / "weights.safetensors"),
        "--size",
        "8",
        "--scores",
        str(scored),
    ]
    assert main([*arguments, *budget, "--out", str(tmp_path), "--quiet"]) == 0
    edit = discedit.prune(model, digit_scores, example_inputs=train.tensors[0][:1], **expected)
    assert Recipe.load(tmp_path / "prune.json").components == edit.recipe.components
    assert any(edit.recipe.components.values())
    if "latency" in expected:
        results = record_of(tmp_path)["results"]["latency"]
        assert results == {"before": edit.latency_before, "after": edit.latency_after}
        assert LatencyTable.load(tmp_path / "latencies.safetensors").layers == edit.latencies.layers


def test_prune_in_steps_scores_anew(place, tmp_path, trained):
    model, train, _ = trained
    arguments = ["prune", *with_data(place), "--ratio", "0.4", "--criterion", "min", "--repair", "none"]
    arguments += ["--components", "filters", "--steps", "2", "--rescore", "--out", str(tmp_path), "--quiet"]
    assert main(arguments) == 0

    def scores_of(one):
        return discedit.score(discedit.collect_moments(one, zoo.batches(train), 10))

    options = {"ratio": 0.4, "criterion": "min", "repair": "none", "components": "filters", "steps": 2}
    example = train.tensors[0][:1]
    edit = discedit.iterative_prune(model, scores_of(model), example_inputs=example, rescore=scores_of, **options)
    assert Recipe.load(tmp_path / "prune.json").components == edit.recipe.components
    assert same_scores(Scores.load(tmp_path / "scores.safetensors"), scores_of(model))


def test_prune_for_some_classes_and_protecting_others(place, tmp_path, trained, capsys):
    model, train, test = trained
    given = ["prune", *with_data(place), "--test", str(place / "test.npz"), "--ratio", "0.5"]
    assert main([*given, "--classes", "eight,3", "--criterion", "max", "--out", str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert "seven (left out)" in shown
    assert "eight (left out)" not in shown
    options = {"example_inputs": train.tensors[0][:1], "data": list(zoo.batches(train)), "ratio": 0.5}
    moments = discedit.collect_moments(model, zoo.batches(train), 10)
    scores = discedit.score(moments.of_classes([8, 3]))
    edit = discedit.specialise(model, scores, classes=[8, 3], criterion="max", head="mask", **options)
    again = Recipe.load(tmp_path / "two" / "prune.json").apply(model).model
    assert torch.equal(again(test.tensors[0]), edit.model(test.tensors[0]))
    assert main([*given, "--protect", "eight=3,5=2.5", "--out", str(tmp_path / "held")]) == 0
    assert Recipe.load(tmp_path / "held" / "prune.json").settings["protect"] == {"8": 3.0, "5": 2.5}
    assert "answers that change" in capsys.readouterr().out
    for more, message in {
        ("--classes", "8,twelve"): "--classes: must be names",
        ("--protect", "ten=2"): "--protect: must be names",
        ("--protect", "ten"): "must be CLASS=NUMBER",
        ("--classes", "8,3", "--scores", str(place)): "--classes: needs --data",
    }.items():
        assert main([*given, *more, "--out", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err


def test_prune_by_fidelity_needs_no_scores(place, tmp_path, trained):
    model, train, _ = trained
    arguments = [
        "prune",
        *with_data(place),
        "--ratio",
        "0.4",
        "--criterion",
        "fidelity",
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    arguments += ["--repair", "compensation"]
    assert main(arguments) == 0
    options = {"example_inputs": train.tensors[0][:1], "data": zoo.batches(train)}
    edit = discedit.prune(model, criterion="fidelity", repair="compensation", ratio=0.4, **options)
    assert Recipe.load(tmp_path / "prune.json").components == edit.recipe.components
    assert not (tmp_path / "scores.safetensors").exists()


def test_unlearn_is_that_of_the_library(place, scored, tmp_path, trained, digit_scores, capsys):
    model, train, test = trained
    arguments = ["unlearn", *with_data(place), "--test", str(place / "test.npz"), "--classes", "three,7", "--json"]
    assert main([*arguments, "--scores", str(scored), "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record == record_of(tmp_path)
    assert "classes: 3 (three), 7 (seven)" in captured.err
    edit = discedit.unlearn(model, digit_scores, classes=[3, 7], data=zoo.batches(train))
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in edit.model.state_dict().items())
    assert record["results"]["classes"] == [3, 7]
    assert record["results"]["after"]["accuracy"] == accuracy_per_class(edit.model, zoo.batches(test), 10).tolist()


def test_unlearn_from_scores_alone(place, scored, tmp_path, trained, digit_scores):
    model = trained[0]
    weights = ["--weights", str(place / "weights.safetensors")]
    options = ["--classes", "3", "--top", "4", "--scale", "0.5", "--sign", "any", "--by", "specific"]
    options += ["--method", "ablate_components"]
    assert main(["unlearn", *MODEL, *weights, "--scores", str(scored), *options, "--out", str(tmp_path / "a")]) == 0
    method = AblateComponents(TopK(4), by="specific", sign="any", scale=0.5)
    expected = discedit.unlearn(model, digit_scores, classes=[3], method=method).recipe
    assert Recipe.load(tmp_path / "a" / "unlearn.json").operations == expected.operations
    assert main(["unlearn", *with_data(place), "--no-data", *options, "--out", str(tmp_path / "b")]) == 0
    assert Recipe.load(tmp_path / "b" / "unlearn.json").operations == expected.operations


def test_a_protection_of_nothing_is_an_option_like_others(place, tmp_path, trained, digit_scores):
    options = ["--method", "ablate_components", "--top", "4", "--repair", "least_squares", "--protection", "0"]
    assert main(["unlearn", *with_data(place), "--classes", "3", *options, "--out", str(tmp_path)]) == 0
    method = AblateComponents(TopK(4), repair=LeastSquares(0.0))
    edit = discedit.unlearn(trained[0], digit_scores, classes=[3], method=method, data=zoo.batches(trained[1]))
    assert Recipe.load(tmp_path / "unlearn.json").settings == edit.recipe.settings
    assert edit.recipe.settings["protection"] == 0


def test_unlearn_by_modhifi(place, scored, tmp_path, trained, digit_scores, capsys):
    model, train, _ = trained
    arguments = ["unlearn", *MODEL, "--scores", str(scored), "--classes", "3", "--method", "modhifi"]
    weights = ["--weights", str(place / "weights.safetensors")]
    assert main([*arguments, *weights, "--out", str(tmp_path / "a")]) == 2
    assert "by='fidelity' needs data" in capsys.readouterr().err
    data = [*with_data(place), "--scores", str(scored), "--classes", "3", "--method", "modhifi", "--top", "4"]
    assert main(["unlearn", *data, "--out", str(tmp_path / "b")]) == 0
    found = Recipe.load(tmp_path / "b" / "unlearn.json")
    chosen = {"classes": [3], "method": ModHiFiU(TopK(4)), "data": zoo.batches(train)}
    expected = discedit.unlearn(model, digit_scores, **chosen).recipe
    assert found.components == expected.components
    assert found.operations == expected.operations
    assert found.settings["by"] == "fidelity"
    assert main(["unlearn", *data, "--by", "contrast", "--scale", "-1", "--out", str(tmp_path / "c")]) == 0
    negated = Recipe.load(tmp_path / "c" / "unlearn.json").settings
    assert (negated["by"], negated["scale"]) == ("contrast", -1.0)


@pytest.fixture(scope="module")
def edited(place, scored):
    """Run folders of a pruning and of an unlearning of what it left."""
    common = [*with_data(place), "--test", str(place / "test.npz"), "--quiet"]
    pruned, forgetful = place / "pruned", place / "forgetful"
    assert main(["prune", *common, "--scores", str(scored), "--ratio", "0.3", "--out", str(pruned)]) == 0
    recipe = ["--recipe", str(pruned / "prune.json")]
    assert main(["unlearn", *common, *recipe, "--classes", "3", "--out", str(forgetful)]) == 0
    return pruned, forgetful


def test_recipes_apply_one_on_the_other(place, edited, tmp_path, trained):
    model, train, test = trained
    arguments = ["evaluate", *with_data(place), "--test", str(place / "test.npz"), "--out", str(tmp_path), "--quiet"]
    for folder, name in zip(edited, ("prune", "unlearn"), strict=True):
        arguments += ["--recipe", str(folder / f"{name}.json")]
    assert main([*arguments, "--metrics", "accuracy,aus,linear_probe,relearning", "--max-steps", "3"]) == 0
    stack = Stack(model)
    for folder, name in zip(edited, ("prune", "unlearn"), strict=True):
        stack.push(name, Recipe.load(folder / f"{name}.json"))
    weights = load_file(edited[1] / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in stack.model.state_dict().items())
    report = discedit.evaluate(
        stack.model,
        classes=[3],
        num_classes=10,
        test=zoo.batches(test),
        train=zoo.batches(train),
        original=model,
        metrics=["accuracy", "aus", "linear_probe", Relearning(max_steps=3)],
    )
    assert record_of(tmp_path)["results"]["evaluation"] == json.loads(json.dumps(report.to_dict()))


def test_evaluate_other_weights_of_the_same_model(place, tmp_path, trained, capsys):
    torch.manual_seed(1)
    save_file(zoo.DigitsNet().state_dict(), tmp_path / "random.safetensors")
    arguments = ["evaluate", *MODEL, "--weights", str(tmp_path / "random.safetensors"), "--classes", "3"]
    arguments += ["--test", str(place / "test.npz"), "--metrics", "accuracy", "--out", str(tmp_path / "run")]
    weights = str(place / "weights.safetensors")
    assert main([*arguments, "--original", weights, "--retrained", weights]) == 0
    accuracy = record_of(tmp_path / "run")["results"]["evaluation"]["accuracy"]
    assert accuracy["original"]["test"]["forget"] > 0.9 > 0.5 > accuracy["edited"]["test"]["retain"]
    assert accuracy["retrained"]["test"]["per_class"] == accuracy["original"]["test"]["per_class"]
    assert "linear probe" not in capsys.readouterr().out
    assert main([*arguments, "--original", str(place / "nothing.pt")]) == 2


def test_report_hands_over_what_the_runs_hold(place, scored, edited, tmp_path, monkeypatch, digit_scores):
    seen = {}

    def report(path, scores, **options):
        seen.update(options, scores=scores)
        path.parent.mkdir()
        path.write_text("<html>")
        return path

    monkeypatch.setattr("discedit.cli.commands.report", report)
    runs = [str(folder) for folder in (*edited, scored)]
    assert main(["report", *runs, "--title", "Digits", "--out", str(tmp_path / "page"), "--quiet"]) == 0
    assert same_scores(seen["scores"], digit_scores)
    assert seen["edits"]["pruned"].components == Recipe.load(edited[0] / "prune.json").components
    assert list(seen["edits"]) == ["pruned", "forgetful"]
    after = record_of(edited[1])["results"]["after"]["accuracy"]
    assert seen["accuracy"]["forgetful"].tolist() == after
    before = record_of(edited[0])["results"]["before"]["accuracy"]
    assert seen["accuracy"]["original"].tolist() == before  # not that of the pruned model, from which the other began
    start, point = seen["curve"]
    results = record_of(edited[0])["results"]
    title = f"{results['settings']['criterion']}, {results['settings']['repair']}"
    assert (start["title"], start["ratio"], start["parameters"], start["macs"]) == (title, 0, 1, 1)
    assert (point["title"], point["ratio"]) == (title, 0.3)
    assert point["parameters"] == results["after"]["parameters"] / results["before"]["parameters"] < 0.8
    assert point["accuracy"] == pytest.approx(np.mean(results["after"]["accuracy"]))
    assert (seen["class_names"], seen["title"]) == (NAMES, "Digits")
    assert {file["name"] for file in record_of(tmp_path / "page")["files"]} == {"report.html"}


def test_the_page_of_real_runs(scored, edited, tmp_path):
    """With the report itself: title, classes by name, both edits and the curve are on the page."""
    runs = [str(folder) for folder in (scored, *edited)]
    assert main(["report", *runs, "--title", "Digits & more", "--out", str(tmp_path / "page"), "--quiet"]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    for words in ("Digits &amp; more", *NAMES, "pruned", "forgetful", "Trade-off", "conv3"):
        assert words in page, words
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert main(["report", str(scored), "--out", str(tmp_path / "scores"), "--quiet"]) == 0
    page = (tmp_path / "scores" / "report.html").read_text()
    assert "Trade-off" not in page
    assert "conv3" in page


# ---- run folders ----------------------------------------------------------------------------------------------------


def test_another_run_is_not_overwritten_unasked(place, scored, tmp_path, capsys):
    before = (scored / "run.json").read_bytes()
    arguments = ["score", *with_data(place), "--limit-per-class", "5", "--quiet", "--out"]
    assert main([*arguments, str(scored)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (scored / "run.json").read_bytes() == before
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert main([*arguments, str(tmp_path)]) == 2
    assert "holds model.safetensors" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*arguments, str(tmp_path), "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "moments.safetensors", "notes.txt", "run.json", "scores.safetensors",
    ]  # fmt: skip


def test_a_run_that_fails_leaves_nothing(place, tmp_path):
    arguments = ["score", *with_data(place), "--layers", "nowhere", "--out", str(tmp_path / "deep" / "run")]
    assert main(arguments) == 2
    assert not (tmp_path / "deep").exists()
    assert main([*arguments[:-1], str(place / "weights.safetensors")]) == 2


# ---- exit codes and streams -----------------------------------------------------------------------------------------


def test_nothing_to_do_is_3(place, scored, tmp_path, capsys):
    arguments = ["prune", *MODEL, "--size", "8", "--scores", str(scored), "--out", str(tmp_path / "run"), "--json"]
    assert main([*arguments, "--threshold", "0", "--criterion", "max"]) == 3
    captured = capsys.readouterr()
    assert "changes nothing" in json.loads(captured.out)["error"]
    assert not (tmp_path / "run").exists()
    run = tmp_path / "empty"
    run.mkdir()
    record = {
        "kind": "run",
        "version": 1,
        "command": "evaluate",
        "arguments": {},
        "results": {},
        "files": [],
        "data": {},
    }
    (run / "run.json").write_text(json.dumps(record))
    assert main(["report", str(run), "--out", str(tmp_path / "page")]) == 3
    assert "none of the runs holds scores" in capsys.readouterr().err


def test_warnings_are_said_and_kept(place, scored, tmp_path, capsys):
    arguments = ["prune", *MODEL, "--size", "8", "--scores", str(scored), "--out", str(tmp_path), "--quiet"]
    assert main([*arguments, "--parameters", "0.0001"]) == 0
    [warning] = record_of(tmp_path)["results"]["warnings"]
    assert capsys.readouterr().err == f"discedit prune: warning: {warning}\n"


def test_json_is_all_there_is_on_stdout(place, tmp_path, capsys):
    arguments = ["score", *with_data(place), "--limit-per-class", "5", "--json", "--quiet", "--out", str(tmp_path)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == record_of(tmp_path)
    assert captured.err == ""
    assert main([*arguments, "--limit-per-class", "none"]) == 2
    captured = capsys.readouterr()
    message = json.loads(captured.out)["error"]
    assert "'--limit-per-class': 'none' is not a valid integer" in message
    assert captured.err == f"discedit score: {message}\n"


def test_what_was_inferred_is_said(place, tmp_path, capsys):
    arguments = ["score", *with_data(place), "--limit-per-class", "5", "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "10 classes" in said
    assert "50 images" in said
    assert "size as they are, in [0, 1], not normalised (from nothing: no option, no configuration)" in said


def test_interrupted_is_130_and_a_bug_is_an_exception(place, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("discedit.cli.commands.collect_moments", interrupt)
    assert main(["score", *with_data(place), "--out", str(tmp_path / "run")]) == 130

    def fail(*_, **__):
        raise AssertionError("of our own making")

    monkeypatch.setattr("discedit.cli.commands.collect_moments", fail)
    with pytest.raises(AssertionError):
        main(["score", *with_data(place), "--out", str(tmp_path / "run"), "--json"])
    assert "of our own making" in json.loads(capsys.readouterr().out)["error"]


def test_a_failing_group_is_4(place, scored, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr("discedit.cli.commands.collect_moments", fail)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["score", *with_data(place), "--out", str(tmp_path / "run")]) == 4
    assert "another process of the group failed" in capsys.readouterr().err
    assert main(["prune", *with_data(place), "--ratio", "0.3", "--out", str(tmp_path / "run")]) == 2
    assert "only score takes several" in capsys.readouterr().err
    assert main(["report", str(scored), "--out", str(tmp_path / "report")]) == 2
    assert "report runs on one rank, torchrun started 2" in capsys.readouterr().err

    # Rank 0 alone writes, perhaps on another machine: what the others have there does not matter.
    assert main(["score", *with_data(place), "--out", str(scored)]) == 2
    assert "holds another run" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["score", *with_data(place), "--out", str(scored)]) == 4


def test_every_sample_goes_to_one_rank(place, tmp_path, monkeypatch):
    """What each rank hands to the pass, with the pass itself recorded."""
    shares = []

    def collect(model, loader, num_classes, **options):
        assert options["group"] == "world"
        shares.append(torch.cat([x for x, _ in loader]))
        raise RuntimeError("gloo ends here")

    monkeypatch.setattr("discedit.cli.commands.collect_moments", collect)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for data in (str(place / "train.npz"), "discedit.zoo:digits()[0]"):
        shares.clear()
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            assert main(["score", *MODEL, "--data", data, "--batch-size", "64", "--out", str(tmp_path / "run")]) == 4
        whole = zoo.digits()[0].tensors[0].split(64)
        assert all(torch.equal(share, torch.cat(whole[rank::3])) for rank, share in enumerate(shares))
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_gives_what_one_rank_gives(place, scored, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "discedit"]
    run = subprocess.run(
        [*command, "score", *with_data(place), "--out", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    record = json.loads(run.stdout)  # of rank 0 alone
    assert record["ranks"] == 2
    ours, whole = (Scores.load(folder / "scores.safetensors") for folder in (tmp_path / "run", scored))
    assert torch.equal(ours.counts, whole.counts)
    for layer in whole:
        torch.testing.assert_close(ours[layer], whole[layer], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_rank_that_dies_makes_the_others_end_with_4(place, tmp_path):
    (tmp_path / "dying.py").write_text(
        "import os, signal\nfrom discedit import zoo\n"
        "class Batches:\n"
        "    def __iter__(self):\n"
        "        for index, batch in enumerate(zoo.batches(zoo.digits()[0], 100)):\n"
        "            if os.environ['RANK'] == '1' and index == 4:\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            yield batch\n"
        "def data():\n    return Batches()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["score", *MODEL, "--data", "dying:data", "--timeout", "60"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "discedit", *arguments, "--out", str(tmp_path / "run")],
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **{"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{Path(discedit.__file__).parent.parent}"},
                **{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [4, -9], errors
    assert "another process of the group failed or is late" in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_its_checkpoint(place, scored, tmp_path, monkeypatch, capsys):
    """Images that were seen are not read again."""
    read = []
    original = _images.Images.__getitems__

    def reading(self, indices):
        read.append(list(indices))
        if len(read) == stop:
            raise OSError("the disk is gone")
        return original(self, indices)

    command = ["score", *with_data(place), "--checkpoint", str(tmp_path / "state"), "--checkpoint-every", "0"]
    command += ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(_images.Images, "__getitems__", reading)
    stop = 6
    assert main(command) == 2
    assert "the disk is gone" in capsys.readouterr().err
    seen, stop = read[1:5], 0  # the first shows what an image looks like
    read.clear()
    assert main(command) == 0
    assert not {index for batch in read[1:] for index in batch} & {index for batch in seen for index in batch}
    assert same_scores(*(Scores.load(folder / "scores.safetensors") for folder in (tmp_path / "run", scored)))


def test_a_broken_pipe_is_quiet():
    command = f"{sys.executable} -m discedit doctor | true"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("command", ["score", "prune", "unlearn", "evaluate", "report", "doctor", "demo"])
def test_help_names_every_option_and_the_exit_codes(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "another process of the group failed" in text
    assert "--json" in text


def test_options_of_the_document_are_those_of_the_parser(capsys):
    known = set()
    for command in ("score", "prune", "unlearn", "evaluate", "report", "doctor", "demo"):
        main([command, "--help"])
        known |= set(re.findall(r"^  (--[a-z][a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    documented = set(re.findall(r"`(--[a-z][a-z-]+)", (Path(__file__).parent.parent / "docs" / "cli.md").read_text()))
    assert documented - {"--version"} == known - {"--help"}


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["paint"], "No such command"),
        (["score"], "--model"),
        (["score", *MODEL], "--data"),
        (["score", *MODEL, "--data", "no/where"], "'no/where' does not exist"),
        (["score", *MODEL, "--data", "{place}/weights.safetensors"], "is neither"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--recipe", "{place}/no.json"], "does not exist"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--device", "abacus"], "'--device': must be auto, cpu, cuda"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--device", "meta"], "'--device': must be auto, cpu, cuda"),
        (
            ["score", *MODEL, "--data", "{place}/train.npz", "--bound-option", "radius=2"],
            "--bound-option: score: 'radius' is no option of bound='minimax', which takes no options",
        ),
        (
            ["score", *MODEL, "--data", "{place}/train.npz", "--bound", "certified", "--witness", "linear"],
            "value_range must be given",
        ),
        (["score", *MODEL, "--data", "{place}/train.npz", "--checkpoint-every", "5"], "needs --checkpoint"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--layers", "conv9"], "conv9"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--mean", "0.5"], "goes together with --std"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--mean", "0,0", "--std", "1,1"], "must be 1 number or 1"),
        (
            ["score", *MODEL, "--data", "{place}/train.npz", "--mean", "0", "--std", "0"],
            "0.0 is not in the range x>0",
        ),
        (["score", *MODEL, "--data", "{place}/train.npz", "--mean", "nan", "--std", "1"], "'--mean': 'nan' is not fin"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--timeout", "inf"], "'--timeout': 'inf' is not finite"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--device", "cuda:99"], "--device: torch finds"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--size", "9"], "the model takes 9 x 9"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--size", "0x4"], "0 is not in the range"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--num-classes", "5"], "names 10"),
        (["score", *MODEL, "--data", "{place}/train.npz", "--class-names", "a,b"], "must be those of the model"),
        (["score", *MODEL, "--data", "discedit.zoo:digits()[0]", "--size", "8"], "not a factory"),
        (["score", *MODEL, "--data", "discedit.zoo:digits"], "it gives a tuple"),
        (["prune", *MODEL, "--size", "8", "--ratio", "0.3"], "--scores: must be given"),
        (["prune", *MODEL, "--data", "{place}/train.npz"], "exactly one budget must be given"),
        (["prune", *MODEL, "--data", "{place}/train.npz", "--ratio", "1.5"], "ratio must be"),
        (["prune", *MODEL, "--data", "{place}/train.npz", "--ratio", "conv1=x"], "'x' is not a valid float"),
        (["prune", *MODEL, "--scores", "{scored}", "--ratio", "0.3"], "--data: must be given, or --size"),
        (["prune", *MODEL, "--scores", "{place}", "--ratio", "0.3"], "does not exist"),
        (["prune", *MODEL, "--scores", "{scored}/moments.safetensors", "--ratio", "0.3"], "is not a discedit scores"),
        (["unlearn", *MODEL, "--scores", "{scored}", "--classes", "ten"], "got 'ten'"),
        (["unlearn", *MODEL, "--scores", "{scored}", "--classes", "10"], "indices in 0..9, got '10'"),
        (
            ["unlearn", *MODEL, "--scores", "{scored}", "--classes", "3", "--top", "4"],
            "--top: goes with a --method that is named",
        ),
        (
            ["unlearn", *MODEL, "--scores", "{scored}", "--classes", "3", "--method", "erase_directions", "--remove"],
            "--remove: does not go with --method erase_directions",
        ),
        (
            ["unlearn", *MODEL, "--scores", "{scored}", "--classes", "3", "--method", "modhifi", "--protection", "0"],
            "--protection: goes with --repair least_squares",
        ),
        (["evaluate", *MODEL, "--test", "{place}/test.npz"], "--classes: must be given"),
        (["evaluate", *MODEL, "--test", "{place}/test.npz", "--classes", "3", "--metrics", "taste"], "'taste'"),
        (["report", "{place}"], "has no run.json"),
    ],
)
def test_bad_input_is_2_and_named(place, scored, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(place=place, scored=scored) for argument in arguments]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("load_pretrained: 'a' is damaged."), "--model: cannot load 'a': load_pretrained: 'a' is damaged."),
        (TypeError("score: 'b' is no option."), "--model: cannot load 'a': score: 'b' is no option."),
        (ValueError("invalid literal"), "--model: cannot load 'a': ValueError: invalid literal"),
        (KeyError("weight"), "--model: cannot load 'a': KeyError: 'weight'"),
    ],
    ids=str,
)
def test_the_librarys_own_sentences_are_shown_as_they_are(error, said):
    with pytest.raises(InputError) as shown, explained("--model: cannot load 'a'"):
        raise error
    assert shown.value.message == said


def test_a_sentence_about_a_file_of_weights_names_no_type(tmp_path):
    (tmp_path / "weights.txt").touch()
    with pytest.raises(InputError, match=r"weights.txt' cannot be read: it must be a .safetensors, .pt or .pth file$"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "weights.txt")


def test_of_tied_weights_one_name_is_enough():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert huggingface.unfilled(model, ["b.weight"]) == ["b.bias"]
    assert huggingface.unfilled(model, ["a.weight", "b.bias", "c"]) == []


@pytest.mark.data
def test_files_of_another_model_are_refused(place, scored, edited, cifar, tmp_path, capsys):
    model = ["--model", "discedit.zoo:CifarResNet(3)"]
    data = ["--data", "discedit.zoo:cifar10('train', limit=50)", "--out", str(tmp_path / "run")]
    assert main(["score", *model, *data, "--weights", str(place / "weights.safetensors")]) == 2
    assert "does not fit the model: missing" in capsys.readouterr().err
    assert main(["score", *model, *data, "--recipe", str(edited[0] / "prune.json")]) == 2
    assert "prune.json' cannot be applied: Recipe: this recipe was made for another" in capsys.readouterr().err
    assert main(["prune", *model, *data, "--scores", str(scored), "--ratio", "0.3"]) == 2
    assert "scores must come from this model" in capsys.readouterr().err
    own = ["--weights", str(zoo.data_folder() / "resnet20_cifar10.safetensors")]
    assert main(["score", *model, *data, *own]) == 0  # a state dict without the batch norms' counters


# ---- demo and doctor -----------------------------------------------------------------------------------------------


def test_demo_does_the_main_job(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--forget", "6"]) == 0
    text = capsys.readouterr().out
    rows = {
        line[:21].strip(): [float(cell.replace(",", "")) for cell in line[21:].split()]
        for line in text.splitlines()
        if re.match(r"\S.*  +[\d.,]+ +[\d.,]+ +[\d.,]+$", line)
    }
    original, _, unlearned = rows["6 (forgotten)"]
    assert original > 90
    assert unlearned < 60
    assert rows["mean of the others"][2] > rows["mean of the others"][0] - 5
    assert rows["mean of classes"][1] > 85
    assert rows["parameters"][1] < 0.6 * rows["parameters"][0]
    assert rows["multiply-accumulates"][1] < 0.6 * rows["multiply-accumulates"][0]
    assert rows["parameters"][2] == rows["parameters"][0]
    assert {path.name for path in tmp_path.iterdir()} == {
        "moments.safetensors", "scores.safetensors", "scores.png",
        "prune.json", "prune.values.safetensors", "unlearn.json", "unlearn.values.safetensors",
    }  # fmt: skip
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    assert len(Scores.load(tmp_path / "scores.safetensors")) == 4
    model = zoo.train_digits_net(zoo.digits()[0])
    assert Recipe.load(tmp_path / "prune.json").apply(model).parameters_after == rows["parameters"][1]


def test_demo_explains_missing_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DISCEDIT_DATA", str(tmp_path))
    assert main(["demo", "--data", "cifar10"]) == 2
    message = capsys.readouterr().err
    assert "cifar10_train_batch1.npz is not in" in message
    assert "DISCEDIT_DATA" in message
    assert "torchvision.datasets.CIFAR10" in message
    assert "resnet20_cifar10.safetensors" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "10"], r"'--forget': 10 is not in the range 0<=x<=9"),
        (["--ratio", "1"], r"ratio must be a number in \[0, 1\), got 1.0"),
    ],
)
def test_demo_refuses_bad_arguments(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_demo_refuses_a_model_of_other_data(capsys):
    assert main(["demo", "--data", "digits", "--model", "resnet20"]) == 2
    assert "--model must be one of ['digitsnet'] for --data digits, got 'resnet20'" in capsys.readouterr().err


def test_doctor_and_version(capsys):
    assert main(["doctor"]) == 0
    assert "reference  runs" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["reference"]["runs"] is True
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("discedit 0.")


def test_training_the_demo_model_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    zoo.train_digits_net(zoo.digits()[1], epochs=1)
    assert torch.equal(before, torch.get_rng_state())
