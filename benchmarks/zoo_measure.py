"""One network of bench_zoo: `python -m benchmarks.zoo_measure NAME` prints each result as JSON, once it is known.

A process of its own, so that a network that hangs or dies takes no other with it; each step has a time limit as well.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import math
import re
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.data import DataLoader, TensorDataset
from torch_pruning.pruner import BasePruner
from torch_pruning.pruner.importance import GroupMagnitudeImportance

import benchmarks._vision  # noqa: F401  (before transformers)
import discedit
from benchmarks.zoo_networks import CLASSES, MARK, NARROWED, NEITHER, NETWORKS
from discedit import Edit, Recipe, Scores
from discedit.selection.importance import KINDS

RATIO = 0.3
STEP_SECONDS = 150
EQUAL = 1e-6  # largest difference over largest logit, in float64, also as a share of what hiding changes
EQUAL_IN_ONNX = 1e-3  # the same in float32, through another library
ATTENTION = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))


def made(name: str) -> nn.Module:
    """A network as if trained: no weight is constant, no norm without effect, so that nothing hides a difference."""
    torch.manual_seed(0)
    net = NETWORKS[name].make().eval()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1 or parameter.numel() < 2 or parameter.std() == 0:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif (spread := parameter.std() * parameter[0].numel() ** 0.5) < 0.2:  # such as 1e-6 in gates and heads
                parameter.mul_(0.5 / spread)
        for norm in norms:  # statistics of what they see, or values explode from layer to layer
            norm.train().momentum = 1.0
        net(torch.randn(8, 3, NETWORKS[name].size, NETWORKS[name].size))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_var.add_(1e-2).mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.5))
                norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
    return net


def logits(net: nn.Module, x: Tensor) -> Tensor:
    out = net(x)
    return out if isinstance(out, Tensor) else out.logits


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def share_removed(before: nn.Module, after: nn.Module) -> float:
    return round(100 * (1 - count(after) / count(before)), 2)


def over_the_ratio(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """Layers of which more outputs went than the ratio asks for, rounded up, and the largest share of one layer's."""
    shares, over = [0.0], 0
    left = dict(after.named_modules())
    for name, module in before.named_modules():
        for width in ("out_channels", "out_features"):
            if isinstance(whole := getattr(module, width, None), int) and whole:
                gone = whole - getattr(left[name], width)
                shares.append(gone / whole)
                over += gone > math.ceil(RATIO * whole - 1e-9)
    return {"layers": over, "most": round(100 * max(shares), 1)}


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    known = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, known)


def told(error: BaseException) -> str:
    """An error, and where it was raised in the library or else in here."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent.name in ("discedit", "integrations")]
    place = (ours or frames)[-1]
    text = " ".join(str(error).split())
    if (start := text.find("no layer can be pruned (")) >= 0:  # which names a reason for each layer
        listed = text[start:].removesuffix(".").partition("). With components=")[0].removesuffix(")")
        reasons = Counter(short(part.partition(": ")[2]) for part in listed.split("; "))
        text = "no layer can be pruned: " + "; ".join(f"{why} ({number})" for why, number in reasons.most_common(6))
    return f"{type(error).__name__}: {text[:600]} ({Path(place.filename).name}:{place.lineno})"


class Steps:
    """Runs one step after the other; what raises is the result of its step."""

    def step(self, name: str, run: Callable[[], dict[str, Any]], seconds: int = STEP_SECONDS) -> bool:
        try:
            with limit(seconds):
                found = run()
        except Exception as error:
            found = {f"{name} error": told(error)}
        print(f"{MARK}{json.dumps(found)}", flush=True)
        return f"{name} error" not in found


def dropped(recipe: Recipe) -> dict[tuple[str, int], list[int]]:
    """(tensor, dim) -> indices that are gone."""
    left: dict[tuple[str, int], list[int]] = {}
    for operation in recipe.operations:
        if operation.kind == "keep":
            key = (operation.target, operation.dim)
            known = left.get(key, range(recipe.architecture[operation.target][operation.dim]))
            left[key] = [known[i] for i in operation.index]
    return {(t, dim): sorted(set(range(recipe.architecture[t][dim])) - set(left[t, dim])) for t, dim in left}


def is_norm(module: nn.Module) -> bool:
    what = type(module).__name__.lower()
    return not isinstance(module, _BatchNorm) and ("norm" in what or "response" in what)


def hidden(net: nn.Module, gone: dict[tuple[str, int], list[int]]) -> tuple[nn.Module, list[str]]:
    """A copy whose layers do not see the channels that a pruned network lost, and norms that it cannot do that for.

    The columns that a layer lost are zeroed in its weights; a convolution that standardises its weights, which columns
    of zeros would change, gets zeros for inputs. Layer norms normalise what is left.
    """
    net = copy.deepcopy(net)
    narrowed = []

    def zeros(channels: Tensor) -> Callable[..., Any]:
        return lambda _, args: (args[0].index_fill(1, channels, 0), *args[1:])

    def normalise(channels: list[int], axis: int) -> Callable[..., Any]:
        def hook(norm: Any, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            x = args[0].movedim(axis, -1)
            left = torch.tensor(sorted(set(range(x.shape[-1])) - set(channels)))
            bias = None if norm.bias is None else norm.bias[left]
            short = functional.layer_norm(x[..., left], left.shape, norm.weight[left], bias, norm.eps)
            return torch.zeros_like(x).index_copy(-1, left, short).movedim(-1, axis)

        return hook

    for (name, dim), channels in gone.items():
        owner, _, leaf = name.rpartition(".")
        module, index = net.get_submodule(owner), torch.tensor(channels, dtype=torch.int64)
        if isinstance(module, nn.LayerNorm):
            first = type(module).__name__ == "LayerNorm2d" or getattr(module, "data_format", "") == "channels_first"
            if leaf == "weight":
                module.register_forward_hook(normalise(channels, 1 if first else -1))
        elif isinstance(module, (_ConvNd, nn.Linear)) and leaf == "weight":
            if dim == 1 and type(module).__name__.endswith(("StdConv2d", "StdConv2dSame")):
                module.register_forward_pre_hook(zeros(index))
            elif dim == (0 if isinstance(module, _ConvTransposeNd) else 1):
                module.weight.data.index_fill_(dim, index, 0)
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and dim == 1:
            getattr(module, leaf).data.index_fill_(1, index, 0)
        elif is_norm(module):
            narrowed.append(owner)
    return net, narrowed


def equality(net: nn.Module, edit: Edit, x: Tensor) -> dict[str, Any]:
    """Whether the pruned network gives in eval mode what the whole one gives with the components hidden."""
    whole, x = copy.deepcopy(net).double(), x.double()
    masked, narrowed = hidden(whole, dropped(edit.recipe))
    if narrowed:  # the library's own check takes those in, and has passed
        return {"equal": NARROWED}
    with torch.no_grad():
        pruned = logits(copy.deepcopy(edit.model).double(), x)
        expected = logits(masked, x)
        changed = difference(expected, logits(whole, x))
    if not changed:
        return {"equal": "nothing hidden"}
    found = difference(pruned, expected)
    equal = found <= EQUAL * min(1.0, changed)
    return {"difference": found, "equal": "yes" if equal else "no", "hiding changes": changed}


def short(reason: str) -> str:
    """A reason without the names in it."""
    reason = re.sub(r" \(torch-pruning may not follow.*", "", reason)
    reason = re.sub(r"in \d+ groups", "in groups", reason)
    reason = re.sub(r"'?\b[\w-]+(\.[\w-]+)+'?", "…", reason)
    return re.sub(r" and \d+ more( layers)?", "", reason)[:160]


def left_whole(net: nn.Module, edit: Edit) -> dict[str, Any]:
    """Reasons -> layers and their parameters, the greatest first; and what became of all parameters, in percent."""
    layers: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for layer, why in edit.skipped.items():
        own = net.get_submodule(layer).parameters(recurse=False)
        layers[short(why)] += 1
        parameters[short(why)] += sum(parameter.numel() for parameter in own)
    sides: Counter[str] = Counter()
    for name, dim in dropped(edit.recipe):
        sides[name] += 1 if dim < 2 else 0
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    total = sum(sizes.values())
    shares = {
        kind: round(100 * sum(size for name, size in sizes.items() if sides[name] in cut) / total, 1)
        for kind, cut in (("cut on both sides", (2,)), ("not cut", (0,)))
    }
    reasons = [[why, layers[why], number] for why, number in parameters.most_common(4)]
    return {"skipped": reasons, "layers skipped": len(edit.skipped), "layers cut": len(edit.recipe.components)} | shares


def prune(net: nn.Module, scores: Scores, x: Tensor, components: Any = None) -> tuple[Edit, float]:
    options = {} if components is None else {"components": components}
    start = time.perf_counter()
    edit = discedit.prune(net, scores, example_inputs=x, ratio=RATIO, criterion="l1", **options)
    return edit, round(time.perf_counter() - start, 2)


def every_kind(net: nn.Module, scores: Scores, x: Tensor) -> tuple[Edit, float]:
    try:
        return prune(net, scores, x, "all")
    except ValueError as error:
        if "components must be" not in str(error):
            raise
        return prune(net, scores, x, KINDS)


def trains(net: nn.Module, x: Tensor) -> None:
    net = copy.deepcopy(net).train()
    out = net(torch.cat([x, x.flip(0)])[:4])
    parts = [out] if isinstance(out, Tensor) else list(out.values() if isinstance(out, dict) else out)
    sum(part.float().square().mean() for part in parts if isinstance(part, Tensor)).backward()
    if not any(parameter.grad is not None for parameter in net.parameters()):
        raise RuntimeError("no gradients")


def in_onnx(net: nn.Module, x: Tensor, dynamo: bool) -> float:
    """How far the exported network is from the network itself."""
    import onnxruntime

    net = copy.deepcopy(net).eval()
    if hasattr(net, "set_attn_implementation"):
        net.set_attn_implementation("eager")  # torch.onnx cannot take all fused attention apart
    file = io.BytesIO()
    if dynamo:
        file.write(torch.onnx.export(net, (x,), dynamo=True, verbose=False).model_proto.SerializeToString())
    else:
        torch.onnx.export(net, (x,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    given = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        return difference(given, logits(net, x))


def onnx(net: nn.Module, pruned: nn.Module, x: Tensor) -> dict[str, Any]:
    """By the faster exporter or else the other; what the whole network cannot do is not asked of the pruned one."""
    why = ""
    for dynamo in (False, True):
        try:
            found = in_onnx(pruned, x, dynamo)
        except TimeoutError:
            raise
        except Exception as error:
            why = told(error)
            continue
        if found <= EQUAL_IN_ONNX:
            return {"onnx": "yes", "onnx difference": found}
        why = f"differs by {found:.1e}"
    for dynamo in (False, True):
        try:
            if in_onnx(net, x, dynamo) <= EQUAL_IN_ONNX:
                return {"onnx": "no", "onnx error": why}
        except TimeoutError:
            raise
        except Exception:
            continue
    return {"onnx": NEITHER}


def torch_pruning(net: nn.Module, x: Tensor) -> dict[str, Any]:
    """torch-pruning's own pruner at the same ratio, told of heads as its examples do."""
    smaller = copy.deepcopy(net)
    modules = list(smaller.modules())
    heads: dict[nn.Module, int] = {}
    attention: list[tuple[nn.Module, str, nn.Linear]] = []  # module, its attribute, a layer that tells the number
    for module in modules:
        number = next(
            (n for n in ("num_heads", "num_attention_heads") if isinstance(getattr(module, n, None), int)), ""
        )
        for names in (("qkv",), *ATTENTION):
            layers = [getattr(module, name, None) for name in names]
            if number and all(isinstance(layer, nn.Linear) for layer in layers):
                heads |= dict.fromkeys(layers, getattr(module, number))
                attention.append((module, names[-1], layers[-1]))
    whole = [m for m in modules if isinstance(m, nn.MultiheadAttention)]  # these must stay divisible
    ends = [m for m in modules if CLASSES in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    start = time.perf_counter()
    pruner = BasePruner(
        smaller,
        x,
        GroupMagnitudeImportance(p=1),
        pruning_ratio=RATIO,
        ignored_layers=ends,
        num_heads=heads,
        round_to=whole[0].num_heads if whole else None,
        output_transform=lambda out: out if isinstance(out, Tensor) else out.logits,
    )
    pruner.step()
    found: dict[str, Any] = {"tp seconds": round(time.perf_counter() - start, 2)}
    for module, name, layer in attention:  # what the forward passes of these classes go by
        width = layer.out_features // (3 if name == "qkv" else 1)
        left = pruner.num_heads[layer]
        for attribute in ("num_heads", "num_attention_heads"):
            if hasattr(module, attribute):
                setattr(module, attribute, left)
        for attribute in ("head_dim", "attention_head_size"):
            if hasattr(module, attribute):
                setattr(module, attribute, width // left)
        for attribute in ("attn_dim", "all_head_size"):
            if hasattr(module, attribute):
                setattr(module, attribute, width)
    if hasattr(smaller, "hidden_dim") and hasattr(smaller, "conv_proj"):
        smaller.hidden_dim = smaller.conv_proj.out_channels
    found["tp removed"] = share_removed(net, smaller)
    found["tp over"] = over_the_ratio(net, smaller)
    try:
        with torch.no_grad():
            found["tp runs"] = tuple(logits(smaller, x).shape) == (len(x), CLASSES)
    except Exception as error:
        found |= {"tp runs": False, "tp error": told(error)}
    return found


def unlearned(net: nn.Module, scores: Scores, x: Tensor, data: Any) -> str:
    """Says yes, or raises."""
    edit = discedit.unlearn(net, scores, classes=[3], data=data)
    with torch.no_grad():
        if torch.equal(logits(edit.model, x), logits(net, x)):
            raise RuntimeError("the logits are what they were")
    return "yes"


def warm_up() -> None:
    """What only the first call in a process costs, such as imports, is not the network's."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2)).eval()
    discedit.prune(net, example_inputs=torch.randn(2, 3, 8, 8), ratio=RATIO, criterion="l1")


def measure(name: str, *, with_onnx: bool) -> None:
    net, size, run = made(name), NETWORKS[name].size, Steps().step
    x = torch.randn(2, 3, size, size)
    labels = torch.arange(24)[torch.randperm(24)] % CLASSES
    loader = DataLoader(TensorDataset(torch.randn(24, 3, size, size), labels), 8)
    layers = sum(isinstance(module, (_ConvNd, nn.Linear)) for module in net.modules())
    print(f"{MARK}{json.dumps({'parameters': count(net), 'layers': layers})}", flush=True)
    kept: dict[str, Any] = {}

    def collect() -> dict[str, Any]:
        kept["moments"] = discedit.collect_moments(net, loader, CLASSES)
        return {"collected": len(kept["moments"])}

    def score() -> dict[str, Any]:
        kept["scores"] = discedit.score(kept["moments"])
        return {"scored": len(kept["scores"])}

    def default() -> dict[str, Any]:
        kept["edit"], seconds = prune(net, scores, x)
        edit = kept["edit"]
        return {"removed": share_removed(net, edit.model), "seconds": seconds} | left_whole(net, edit)

    def everything() -> dict[str, Any]:
        kept["all"], seconds = every_kind(net, scores, x)
        found = {"removed": share_removed(net, kept["all"].model), "seconds": seconds}
        return {f"all {key}": value for key, value in (found | left_whole(net, kept["all"])).items()}

    def training(edit: Edit) -> dict[str, Any]:
        try:
            trains(net, x)
        except Exception:
            return {"trains": NEITHER}
        trains(edit.model, x)
        return {"trains": "yes"}

    scores: Any = None
    if run("collect", collect) and run("score", score):
        scores = kept["scores"]
        for kind, title in ((default, ""), (everything, "all ")):
            if not run(f"{title}prune", kind):
                continue
            edit = kept["all" if title else "edit"]
            run(f"{title}equal", lambda e=edit, t=title: {f"{t}{k}": v for k, v in equality(net, e, x).items()})
            run(f"{title}trains", lambda e=edit, t=title: {f"{t}{k}": v for k, v in training(e).items()})
        for key, data in (("unlearned", None), ("unlearned with data", loader)):
            run(key, lambda k=key, d=data: {k: unlearned(net, scores, x, d)})
    run("tp", lambda: torch_pruning(net, x), 60)
    if with_onnx and (edit := kept.get("edit", kept.get("all"))):
        run("onnx", lambda: onnx(net, edit.model, x), 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(NETWORKS))
    parser.add_argument("--no-onnx", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    warm_up()
    measure(options.name, with_onnx=not options.no_onnx)


if __name__ == "__main__":
    main()
