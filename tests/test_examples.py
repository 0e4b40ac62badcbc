"""The example scripts run and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("by", [[], ["--distill"]], ids=["labels", "distillation"])
def test_finetune(by):
    command = [sys.executable, "-W", "error", str(EXAMPLES / "finetune.py"), "--parameters", "0.1", *by]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    before, pruned, tuned = (float(number) for number in re.findall(r": ([\d.]+)%", result.stdout))
    assert before > 95
    assert tuned > pruned - 4  # of a network that small, an epoch of eleven steps gains little or nothing
    assert "(90.0 % less)" in result.stdout


def test_forget_and_finetune():
    path = EXAMPLES / "forget_and_finetune.py"
    command = [sys.executable, "-W", "error", str(path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    before, edited, tuned = (
        tuple(float(number) for number in re.findall(r"([\d.]+) %", line)) for line in result.stdout.splitlines()
    )
    assert min(before) > 90
    assert edited[0] < 30  # the digit is forgotten
    assert edited[1] > 85
    assert tuned[0] <= edited[0] + 5  # and stays so
    assert tuned[1] > edited[1] - 1
