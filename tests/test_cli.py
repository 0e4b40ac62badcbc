import re

import pytest
import torch

from discedit import Recipe, Scores, zoo
from discedit.cli import main


def test_demo_does_the_main_job(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--forget", "6"]) == 0
    text = capsys.readouterr().out
    rows = {
        line[:21].strip(): [float(cell.replace(",", "")) for cell in line[21:].split()]
        for line in text.splitlines()
        if re.match(r"\S.*  +[\d.,]+ +[\d.,]+ +[\d.,]+$", line)
    }
    original, _, unlearned = rows["6 (forget)"]
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
        (["--forget", "10"], r"the class to forget must lie in 0..9, got 10"),
        (["--ratio", "1"], r"ratio must be a number in \[0, 1\), got 1.0"),
    ],
)
def test_demo_refuses_bad_arguments(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_demo_refuses_a_model_of_other_data(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--data", "digits", "--model", "resnet20"])
    assert stop.value.code == 2
    assert "--model must be one of ['digitsnet'] for --data digits, got 'resnet20'" in capsys.readouterr().err


def test_doctor_and_version(capsys):
    assert main(["doctor"]) == 0
    assert "reference  runs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("discedit 0.")


def test_training_the_demo_model_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    zoo.train_digits_net(zoo.digits()[1], epochs=1)
    assert torch.equal(before, torch.get_rng_state())
