"""The comparison inside torch-pruning's pruner runs, and the table says what was measured."""

import pytest
import torch

from benchmarks import bench_embed
from benchmarks._common import Log
from benchmarks.bench_prune import Bench

pytestmark = pytest.mark.slow


@pytest.mark.data
def test_compares_and_writes(cifar, monkeypatch, tmp_path):
    small = Bench("resnet20", 200, 200)
    monkeypatch.setattr(bench_embed, "Bench", lambda name: small)
    monkeypatch.setattr(bench_embed, "MODELS", ("resnet20",))
    for ratios in ("RATIOS", "IN_TURN"):
        monkeypatch.setattr(bench_embed, ratios, (0.3,))
    monkeypatch.setattr(bench_embed, "OURS", ("energy", "max"))
    monkeypatch.setattr(bench_embed, "THEIRS", {k: bench_embed.THEIRS[k] for k in ("magnitude l2", "lamp", "taylor")})
    monkeypatch.setattr(bench_embed, "EXAMPLES", tmp_path / "none.json")
    log = Log(tmp_path / "embed.json")
    bench_embed.compare(["resnet20"], log)
    assert not log.failed
    assert len(log.entries) == 5
    assert log.entries["resnet20|max|0.3"] != log.entries["resnet20|taylor|0.3"]
    assert log.entries["resnet20|lamp|0.3"] == log.entries["resnet20|magnitude l2|0.3"]
    before = {name: parameter.clone() for name, parameter in small.model.named_parameters()}
    kept = bench_embed.pruned(small, "max", 0.3).layer1[0].conv1.weight
    lowest = small.scores()["layer1.0.conv1"].amax(1).argsort()[: 16 - 11]
    left = [i for i in range(16) if i not in lowest.tolist()]
    assert torch.equal(kept, before["layer1.0.conv1.weight"][left])
    text = bench_embed.markdown(log)
    entry = log.entries["resnet20|max|0.3"]
    assert f"| resnet20 | **ours, max** | {entry['none']:.1f} | {entry['batchnorm']:.1f} |" in text
    ours = log.entries["resnet20|energy|0.3"]["none"]
    worse = sum(log.entries[f"resnet20|{name}|0.3"]["none"] < ours for name in bench_embed.THEIRS)
    assert f"{worse} of 3 |" in next(line for line in text.splitlines() if line.startswith("| resnet20 | none | 0.3 |"))
    assert text.count("Not measured.") == 1  # the scripts


SCRIPT = """
import torch, torch_pruning as tp
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
importance = tp.importance.MagnitudeImportance(p=1)
pruner = tp.pruner.BasePruner(model, torch.rand(1, 3, 8, 8), importance, pruning_ratio=0.5, ignored_layers=[model[2]])
pruner.step()
assert model[0].out_channels == 4
"""


def test_scripts_of_others(tmp_path):
    texts = {
        "good.py": SCRIPT,
        "download.py": SCRIPT + "import urllib.request\nurllib.request.urlopen('http://localhost/importance')",
        "broken.py": SCRIPT + "assert isinstance(importance.p, int)",
        "other.py": "raise ValueError('asks nothing of the kind')",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = bench_embed.run_examples(tmp_path, 200, [])
    assert found["good.py"] == {"ours": "ran, 1 calls"}
    assert found["download.py"] == {"ours": "not run: needs a download"}
    assert found["broken.py"]["ours"].startswith("failed: AttributeError")
    assert found["broken.py"]["as it is"] == "ran"
    assert set(found) == {"good.py", "download.py", "broken.py"}
