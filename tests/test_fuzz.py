"""Some hundred cases of benchmarks/fuzz.py, and that it finds what is wrong."""

import json

import pytest
import torch

from benchmarks import fuzz
from discedit import Moments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cases"),
    [("moments", 80), ("scores", 80), ("second", 600), ("recipe", 80), ("labels", 60), ("command", 60)],
)
def test_damage_ends_in_a_documented_way(kind, cases):
    ends, faults = fuzz.run(range(cases), seed=1, kinds={kind: 1})
    assert not faults, "\n".join(faults)
    assert sum(ends.values()) == cases
    assert len(ends) > 1  # not all alike


@pytest.mark.slow
def test_cases_repeat():
    assert fuzz.run(range(40), 3, {"labels": 1}) == fuzz.run(range(40), 3, {"labels": 1})


def test_a_change_that_nobody_notices_is_found(tmp_path):
    moments = Moments(2)
    moments.update("layer", torch.rand(4, 3), torch.tensor([0, 0, 1, 1]))
    moments.save(tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    fuzz.must_say(data, data)
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(fuzz.Fault, match="was changed"):
        fuzz.must_say(data, flipped)
    header, rest = fuzz.parted(data)
    own = json.loads(header["__metadata__"]["discedit"])
    header["__metadata__"]["discedit"] = json.dumps({**own, "num_classes": 3})
    text = json.dumps(header).encode()
    with pytest.raises(fuzz.Fault, match="it was taken for"):
        fuzz.must_say(data, len(text).to_bytes(8, "little") + text + rest)


def test_a_case_that_hangs_or_crashes_is_a_fault(monkeypatch):
    def crash(*_):
        raise TypeError("unsupported operand")

    def hang(*_):
        while True:
            pass

    for run, message in ((crash, "TypeError: unsupported operand"), (hang, "took more than 0.2 s")):
        monkeypatch.setitem(fuzz.RUN, "labels", run)
        ends, faults = fuzz.run(range(1), 0, {"labels": 1}, seconds=0.2)
        assert ends == {"labels: FAULT": 1}
        assert message in faults[0]
