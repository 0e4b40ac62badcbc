"""Seeded fuzzing of what users hand over: moments, scores, second moments and recipe files, labels and command lines.

    python -m benchmarks.fuzz --cases 20000

Each case damages something valid and hands it on. Files must be refused with a ValueError or FileNotFoundError, or
hold what their bytes say, read here by other code; what loads must also go on working or be refused. Labels must be
refused or counted as NumPy counts them. Commands must end with exit code 0, 2 or 3, and with --json print one JSON
object. Other exceptions and cases over the time limit are faults. A fault names its case: `--only NUMBER` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import discedit
from discedit import Moments, Recipe, Scores
from discedit.cli.main import main as command
from discedit.fidelity import SecondMoments, collect_second_moments, singleton_fidelity, subset_fidelity
from discedit.moments.moments import READ_ONCE
from discedit.recipes.operations import Operation

CLASSES = 3
SECONDS = 20.0  # that a case may take
KINDS = {"moments": 6, "scores": 5, "second": 4, "recipe": 6, "labels": 2, "command": 1}  # how often
REFUSED = (ValueError, FileNotFoundError)
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 63, 1 << 70, 10**400, 0.5, -0.0, 1e-320, 1e308, math.inf,
    math.nan, "", "x", "mean", "linear", "exp", "vector", "fisher", "consumer", "\x00", "ü" * 9, [], [0], [1, 0],
    ["mean", "max"], {}, {"x": 1}, [[]], [None], {"conv": 0.5},
]  # fmt: skip
WORDS = [
    "", "-1", "0", "1", "2", "0.3", "1e309", "nan", "inf", "a", "conv", "conv,conv", "conv=0.5", "=", ",", "ü", " ",
    "given", "none", "auto", "mean", "max", "data.npz", "scores", "scores/scores.safetensors", "recipe.json", ".",
    "images", "nowhere", "-", "--", "--json", "--out", "--quiet", "tiny", "0,1", "@data.npz", "linear", "heads",
]  # fmt: skip


class Fault(Exception):
    """Something that is documented nowhere."""


class Tiny(nn.Module):
    """Two convolutions and a head, for 1 x 6 x 6 images."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 6, 3, bias=False)
            self.norm = nn.BatchNorm2d(6)
            self.more = nn.Conv2d(6, 8, 3)
            self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.more(self.norm(self.conv(x)).relu()).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Place:
    """A folder with valid files of every kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Tiny().eval()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 1, 6, 6, generator=generator)
        self.y = torch.arange(60) % CLASSES
        np.savez(folder / "data.npz", images=self.x.numpy(), labels=self.y.numpy())
        loader = [(self.x, self.y)]
        moments = discedit.collect_moments(self.model, loader, CLASSES)
        blocks = discedit.collect_blocks(
            self.model, loader, CLASSES, blocks=5, statistic=["mean", "max"], witness="vector"
        )
        moments.save(folder / "moments.safetensors")
        blocks[0].save(folder / "vector.safetensors")
        scores = discedit.score(moments)
        discedit.score(blocks, pairs=True, bound="fisher").save(folder / "errors.safetensors")
        (folder / "scores").mkdir()
        scores.save(folder / "scores" / "scores.safetensors")
        scores.save(folder / "plain.safetensors")
        collect_second_moments(self.model, loader).save(folder / "full.safetensors")
        options: dict[str, Any] = {"kind": "singleton", "classes": [1, 2], "num_classes": CLASSES}
        collect_second_moments(self.model, loader, **options).save(folder / "singleton.safetensors")
        discedit.prune(self.model, scores, ratio=0.4, example_inputs=self.x[:1], data=loader).recipe.save(
            folder / "recipe.json"
        )
        discedit.unlearn(
            self.model, scores, classes=[1], method=discedit.AblateComponents(discedit.TopK(1)), data=loader
        ).recipe.save(folder / "rows.json")


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, pick: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(pick.choice((1, 1, 1, 2, 5))):
        at = pick.randrange(len(found) + 1)
        if pick.random() < 0.5:  # where the structure is
            at = min(at, pick.randrange(400))
        size = pick.choice((1, 1, 2, 8, 100))
        how = pick.randrange(6)
        if how == 0 and at < len(found):
            found[at] ^= 1 << pick.randrange(8)
        elif how == 1:
            found[at : at + size] = pick.randbytes(size)
        elif how == 2:
            del found[at : at + size]
        elif how == 3:
            found[at:at] = pick.randbytes(size)
        elif how == 4:
            del found[at:]
        else:
            found[at:at] = found[at : at + size]
    return bytes(found)


def damaged_json(value: Any, pick: random.Random) -> Any:
    """The same with one value somewhere replaced, removed, added, renamed or doubled."""
    whole = {"": copy.deepcopy(value)}
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(whole)
    node, key = places[pick.randrange(len(places))]
    how = pick.randrange(4)
    if how == 1 and node is not whole:
        del node[key]
    elif how == 2 and isinstance(node, dict) and node is not whole:
        node[pick.choice(("", "x", "0", f"{key}x", "ü"))] = pick.choice(
            (node[key], node.pop(key), pick.choice(HOSTILE))
        )
    elif how == 3 and isinstance(node, list):
        node.insert(key, pick.choice((node[key], pick.choice(HOSTILE))))
    else:
        node[key] = copy.deepcopy(pick.choice(HOSTILE))
    return whole[""]


def parted(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors' bytes of safetensors, as their specification has them."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def formatted(header: dict[str, Any], rest: bytes) -> bytes:
    """The reverse of `parted`."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def unsealed(data: bytes) -> bytes:
    """Without the checksum, as discedit 0.1.0 wrote files: so damage gets further than to that."""
    header, rest = parted(data)
    own = json.loads(header["__metadata__"]["discedit"])
    del own["sha256"]
    header["__metadata__"]["discedit"] = json.dumps(own)
    return formatted(header, rest)


def damaged_tensors(data: bytes, pick: random.Random) -> bytes:
    """Safetensors that are damaged anywhere, or well-formed ones that say something else; most without a checksum."""
    if pick.random() < 0.8:
        data = unsealed(data)
    if pick.random() < 0.4:
        return damaged_bytes(data, pick)
    header, rest = parted(data)
    if pick.random() < 0.7:
        own = json.loads(header["__metadata__"]["discedit"])
        for _ in range(pick.choice((1, 1, 2))):
            own = damaged_json(own, pick)
        header["__metadata__"]["discedit"] = json.dumps(own)
    else:
        header = damaged_json(header, pick)
    return formatted(header, rest)


# ---- what the bytes say, by other code -------------------------------------------------------------------------------

TYPES = {"F64": np.float64, "I64": np.int64, "I8": np.int8, "F32": np.float32, "BOOL": np.bool_, "U8": np.uint8}


def read(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    header, rest = parted(data)
    own = json.loads(header.pop("__metadata__")["discedit"])
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(rest[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return own, tensors


def text_of(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def must_say(saved: bytes, given: bytes) -> None:
    """What was loaded and saved again must hold what was in the file: no more, no less, nothing changed."""
    (header, tensors), (own, arrays) = read(given), read(saved)
    # What files of earlier versions leave out.
    absent = {"pairs": False, "errors": False, "scale": None, "options": None, "read": READ_ONCE}
    for one in (header, own):
        one.pop("sha256", None)
        for name, value in absent.items():
            one[name] = one.get(name) or value if name != "read" else one.get(name, value)
    if text_of(header) != text_of(own):
        raise Fault(f"the file says {text_of(header)[:300]}, it was taken for {text_of(own)[:300]}")
    if tensors.keys() != arrays.keys():
        raise Fault(f"the file holds {sorted(tensors)}, {sorted(arrays)} were taken")
    for name, array in tensors.items():
        if array.dtype != arrays[name].dtype or array.shape != arrays[name].shape:
            raise Fault(f"tensor {name} was taken for another form")
        if array.tobytes() != arrays[name].tobytes():
            raise Fault(f"tensor {name} was changed")


Run = Callable[[Place, random.Random, Path], str]


# ---- cases -----------------------------------------------------------------------------------------------------------


def _of_file(
    names: tuple[str, ...], load: Callable[[Path], Any], use: Callable[[Any, Place, random.Random], object]
) -> Run:
    """Cases of files that `save` writes whole: what loads must hold what the bytes say, and go on working."""

    def run(place: Place, pick: random.Random, scratch: Path) -> str:
        data = damaged_tensors((place.folder / pick.choice(names)).with_suffix(".safetensors").read_bytes(), pick)
        file, again = scratch / "damaged.safetensors", scratch / "again.safetensors"
        file.write_bytes(data)
        try:
            loaded = load(file)
        except REFUSED:
            return "refused"
        loaded.save(again)
        must_say(again.read_bytes(), data)
        try:
            use(loaded, place, pick)
        except REFUSED:
            return "loaded, refused later"
        return "loaded"

    return run


def _use_moments(moments: Moments, _: Place, pick: random.Random) -> None:
    discedit.score(moments, bound=pick.choice(("minimax", "fisher", "hellinger")))


def _use_scores(scores: Scores, place: Place, pick: random.Random) -> None:
    scores.reduce(pick.choice(("max", "min", "mean", "pairwise_min")))
    discedit.unlearn(place.model, scores, classes=[0], method=discedit.AblateComponents(discedit.TopK(1)))


def _use_second(second: SecondMoments, _: Place, pick: random.Random) -> None:
    layer = pick.choice([*second, "conv"])
    singleton_fidelity(second, layer)
    subset_fidelity(second, layer, [0])


of_moments = _of_file(("moments", "vector"), Moments.load, _use_moments)
of_scores = _of_file(("plain", "errors"), Scores.load, _use_scores)
of_second = _of_file(("full", "singleton"), SecondMoments.load, _use_second)


def of_recipe(place: Place, pick: random.Random, scratch: Path) -> str:
    name = pick.choice(("recipe", "rows"))
    values = (place.folder / f"{name}.values.safetensors").read_bytes()
    text = (place.folder / f"{name}.json").read_bytes()
    part = pick.randrange(10)
    if part == 0:
        values = damaged_bytes(values, pick)
    elif part < 4:
        text = damaged_bytes(text, pick)
    else:
        text = json.dumps(damaged_json(json.loads(text), pick)).encode()
    file = scratch / f"{name}.json"
    file.write_bytes(text)
    file.with_suffix(".values.safetensors").write_bytes(values)
    try:
        recipe = Recipe.load(file)
    except REFUSED:
        return "refused"
    says, header = json.loads(text), json.loads(recipe.save(scratch / "again.json").read_text())
    for one in (says, header):
        one["operations"] = [{**asdict(Operation("", "")), **operation} for operation in one["operations"]]
        del one["tensors"]
    if text_of(says) != text_of(header):
        raise Fault(f"the recipe says {text_of(says)[:300]}, it was taken for {text_of(header)[:300]}")
    try:
        edit = recipe.apply(place.model)
        edit.summary()
        restored = edit.recipe.undo(edit.model)
    except REFUSED:
        return "loaded, refused later"
    pairs = zip(restored.state_dict().items(), place.model.state_dict().values(), strict=True)
    for (tensor, mine), theirs in pairs:
        if not torch.equal(mine, theirs):
            raise Fault(f"undoing did not restore {tensor}")
    return "loaded"


def of_labels(place: Place, pick: random.Random, scratch: Path) -> str:
    size = pick.choice((0, 1, 9, 10, 10, 10, 10, 11))
    values: Any = [pick.choice((0, 1, 2, 2, 1, 0, 1, 0, 2, 0, 1, -1, 3, 255, 1 << 40)) if pick.random() < 0.15
                   else pick.randrange(CLASSES) for _ in range(size)]  # fmt: skip
    form = pick.randrange(8)
    labels: Any = values
    with contextlib.suppress(OverflowError, RuntimeError):
        if form < 5:
            dtype = (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool)[form]
            labels = torch.tensor(values, dtype=dtype)
        elif form == 5:
            labels = torch.tensor([values])
        elif form == 6:
            labels = np.array(values)
    if pick.random() < 0.05:
        labels = pick.choice((None, "labels", [None] * size, [[0]] * size, object()))
    try:
        moments = discedit.collect_moments(place.model, [(place.x[:10], labels)], CLASSES)
    except REFUSED:
        return "refused"
    counted = np.bincount(np.asarray(labels), minlength=CLASSES)
    if moments["more"].count.tolist() != counted.tolist():
        raise Fault(f"labels {labels} were counted as {moments['more'].count.tolist()}")
    return "counted"


MODEL = ["--model", "benchmarks.fuzz:Tiny", "--data", "data.npz", "--batch-size", "16"]
LINES = [
    ["score", *MODEL, "--out", "out", "--layers", "conv,more", "--statistic", "mean,max", "--bound", "fisher"],
    ["score", *MODEL, "--out", "out", "--blocks", "4", "--labels", "predicted", "--limit-per-class", "9", "--json"],
    ["score", *MODEL, "--out", "out", "--witness", "exp", "--scale", "0.5", "--dtype", "bfloat16", "--read", "norm"],
    ["prune", *MODEL, "--out", "out", "--scores", "scores", "--ratio", "0.3", "--repair", "mean", "--json"],
    ["prune", *MODEL, "--out", "out", "--macs", "0.7", "--criterion", "max", "--test", "data.npz", "--floor", "2"],
    ["unlearn", *MODEL, "--out", "out", "--classes", "1", "--scores", "scores", "--test", "data.npz", "--json"],
    [
        "unlearn",
        *MODEL,
        "--out",
        "out",
        "--classes",
        "0,2",
        "--no-data",
        "--method",
        "ablate_components",
        "--fraction",
        "0.2",
        "--sign",
        "any",
    ],
    ["evaluate", *MODEL, "--out", "out", "--test", "data.npz", "--recipe", "rows.json", "--metrics", "accuracy,aus"],
    ["doctor", "--json"],
]


# Options that lines get, with values that make sense somewhere.
EXTRAS = {
    "--limit-per-class": ["1", "2", "5", "1000"],
    "--class-names": ["a,b,c", "a,b", "ü,b,0", "c,b,a,d"],
    "--num-classes": ["3", "2", "5"],
    "--mean": ["0.5 --std 0.5", "0,0,0 --std 1,1,1"],
    "--labels": ["given", "predicted"],
    "--layers": ["conv", "more", "more,conv", "head", "norm", "conv,conv"],
    "--components": ["filters", "rows", "neurons", "heads", "directions", "stream"],
    "--seed": ["0", "7", "9223372036854775807"],
    "--test": ["data.npz", "discedit.zoo:digits()[1]", "images"],
    "--scores": ["scores", "plain.safetensors", "errors.safetensors", "moments.safetensors"],
    "--recipe": ["rows.json", "recipe.json", "scores"],
    "--weights": ["plain.safetensors", "data.npz"],
    "--device": ["cpu", "cuda", "cpu:0", "auto"],
    "--dtype": ["bfloat16", "float16", "float32"],
    "--statistic": ["mean", "cls", "l2,max", "absmax,absmax"],
    "--witness": ["exp", "linear", "vector", "quadratic"],
    "--scale": ["1", "1e-300", "1e300"],
    "--bound": ["fisher", "robust", "certified", "hellinger", "witness", "witness_published", "minimax_published"],
    "--bound-option": ["radius=1", "alpha=0.5", "value_range=0,1", "comparisons=3", "rho=-1"],
    "--blocks": ["2", "3", "50"],
    "--backend": ["reference", "cpp", "cuda", "triton"],
    "--read": ["output", "norm", "consumer"],
    "--ratio": ["0", "0.9", "conv=0.5", "conv=0.1,more=0.9", "nowhere=0.5", "1"],
    "--criterion": ["l2", "random", "pairwise_min", "combined", "energy"],
    "--repair": ["none", "batchnorm", "least_squares", "mean"],
    "--steps": ["2", "3 --rescore", "5"],
    "--round-to": ["2", "100"],
    "--floor": ["3", "conv=2", "9"],
    "--ignore": ["conv", "more", "conv,more"],
    "--around": ["mean", "zero"],
    "--top": ["1", "3", "9223372036854775807"],
    "--forget-accuracy": ["0", "0.3", "1"],
    "--metrics": ["all", "knn", "cka,accuracy", "relearning"],
    "--classes": ["0,1,2", "2", "c", "3"],
}


def of_command(place: Place, pick: random.Random, scratch: Path) -> str:
    line = list(pick.choice(LINES))
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        if pick.random() < 0.6:
            option = pick.choice(list(EXTRAS))
            value = pick.choice(EXTRAS[option] if pick.random() < 0.8 else WORDS)
            line += [option, *value.split(" ")]
            continue
        at = pick.randrange(len(line))
        how = pick.randrange(6)
        if how == 0 and len(line) > 1:
            del line[at]
        elif how == 1:
            line.insert(at, line[pick.randrange(len(line))])
        elif how == 2:
            line[at] = pick.choice(WORDS)
        elif how == 3:
            line.insert(at, pick.choice(WORDS))
        elif how == 4 and line[at]:
            place_in = pick.randrange(len(line[at]))
            line[at] = line[at][:place_in] + pick.choice("a0-=,x9ü \x00(\"'[") + line[at][place_in + 1 :]
        else:
            other = pick.randrange(len(line))
            line[at], line[other] = line[other], line[at]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command(line)
        except SystemExit as stop:
            raise Fault(f"{line} left by SystemExit({stop.code})") from stop
        except BaseException as error:
            raise Fault(f"{line} left by {type(error).__name__}: {error}") from error
    if code not in (0, 2, 3):
        raise Fault(f"{line} ended with {code}")
    if code and not err.getvalue().strip():
        raise Fault(f"{line} ended with {code} and said nothing")
    if "Traceback" in err.getvalue():
        raise Fault(f"{line} printed a traceback: {err.getvalue()[-500:]}")
    helped = any(word in line for word in ("-h", "--help", "--version"))
    if "--json" in line and not helped:
        found = json.loads(out.getvalue())
        if ("error" in found) != bool(code):
            raise Fault(f"{line} ended with {code} and printed {out.getvalue()[:200]}")
    for folder in place.folder.iterdir():  # what a changed --out made
        if folder.is_dir() and folder.name not in ("scores", "images"):
            shutil.rmtree(folder)
    return f"exit {code}"


RUN: dict[str, Callable[[Place, random.Random, Path], str]] = {
    "moments": of_moments,
    "scores": of_scores,
    "second": of_second,
    "recipe": of_recipe,
    "labels": of_labels,
    "command": of_command,
}


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what takes longer, where the platform can."""

    def late(*_: Any) -> None:
        raise Fault(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(numbers: range, seed: int, kinds: dict[str, int], seconds: float = SECONDS) -> tuple[Counter[str], list[str]]:
    """How the cases ended, and the faults among them."""
    ends: Counter[str] = Counter()
    faults = []
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(folder) / "place"
        scratch = Path(folder) / "scratch"
        for path in (root, scratch):
            path.mkdir()
        place = Place(root)
        os.chdir(root)
        try:
            for number in numbers:
                pick = random.Random(f"{seed}/{number}")
                kind = pick.choices(list(kinds), list(kinds.values()))[0]
                try:
                    with within(seconds):
                        ends[f"{kind}: {RUN[kind](place, pick, scratch)}"] += 1
                except Exception as error:
                    ends[f"{kind}: FAULT"] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    at = f"{Path(where.filename).name}:{where.lineno}"
                    faults.append(f"case {number} ({kind}): {type(error).__name__}: {error} [{at}]")
        finally:
            os.chdir(home)
    return ends, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, by its number")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    numbers = range(options.cases) if options.only is None else range(options.only, options.only + 1)
    start = time.perf_counter()
    ends, faults = run(numbers, options.seed, {kind: KINDS[kind] for kind in options.kinds})
    for end, count in sorted(ends.items()):
        print(f"{end:32} {count:7,}")
    print(f"{sum(ends.values()):,} cases, {len(faults)} faults, {time.perf_counter() - start:.0f} s")
    for fault in faults[:50]:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
