"""Published ways to make a network forget classes, so that ours is compared with them on the same samples.

    edited = METHODS["salun"].run(model, retain, forget, rate=0.1, share=0.5, seed=0)
    best = tuned("salun", model, retain, forget, validate, classes=[3])  # best.setting, best.tried, best.model
    python -m benchmarks.unlearning_rivals --retrain resnet20 --classes 3 --epochs 7 --threads 1 --out out/retrained

Every method takes a model and training samples, `retain` and `forget`, lists of (inputs, labels) batches in which the
classes to forget are those of `forget`. It returns an edited copy in the mode of the model, which stays as it was, and
so does torch's random state; the same seed gives the same weights. These are our own short implementations from the
papers' formulas; what the authors' public scripts do was looked up for FT, GA, random labels, SalUn and l1
(OPTML-Group/Unlearn-Saliency), NegGrad+ (meghdadk/SCRUB) and SSD (if-loops/selective-synaptic-dampening).

The protocol, the same for all methods that train:

Budget: the number of samples whose gradient is taken, by default that of the samples given (one epoch), in steps of
    64. What a method spends on preparations (SalUn's mask) counts. The papers train for 1 to 10 epochs on all
    training data.
Optimiser: SGD with momentum 0.9 and weight decay 5e-4 where the model has batch norms, else AdamW with weight decay
    0.01, learning rate falling to 0 as a cosine. `rate` is the first as a share of the one that such networks are
    trained with (`PEAK`), so that one grid serves both.
Modes: train mode in every step, so that batch norms use and update the statistics of what they see, as the scripts
    named above do, ascent on the forget samples alone included; eval mode for the gradients that SalUn's mask and SSD
    rest on, likewise. No augmentation.
Hyper-parameters: a grid of `SETTINGS` for each method that has any, ours included; `tuned` takes the best of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import TensorDataset

import benchmarks._vision  # noqa: F401  (before transformers)
from benchmarks import held_out
from discedit import zoo
from discedit.evaluation.evaluate import accuracy_per_class, adaptive_unlearning_score
from discedit.model.forward import call, device_of, first_tensor, frozen_eval, unpack_batch
from discedit.model.trace import width_of
from discedit.presets import preset
from discedit.recipes.operations import Operation
from discedit.recipes.recipe import Edit, Recipe, architecture_of
from discedit.scoring.scores import Scores

Batches = Sequence[tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]

BATCH = 64
SETTINGS = 6
PEAK = {"sgd": 0.1, "adamw": 1e-3}
MASKED = -1e4


def logit_mask(model: nn.Module, retain: Batches, forget: Batches, *, seed: int = 0) -> nn.Module:
    """The head never says the classes: `MASKED` is their bias. Nothing is forgotten; what any method must beat.

    The head is the last linear layer with as many outputs as the model has logits; one without bias gets one.

    Raises:
        ValueError: there is no such layer, or as `finetune`.
    """
    x, labels = _samples("logit_mask", model, forget)
    width = _logits(model, x[:1]).shape[1]
    with _copied(model, seed) as edited:
        heads = [part for part in edited.modules() if isinstance(part, nn.Linear) and part.out_features == width]
        if not heads:
            raise ValueError(f"logit_mask: model must have a linear layer with {width} outputs, it has none.")
        head = heads[-1]
        with torch.no_grad():
            if head.bias is None:
                head.bias = nn.Parameter(head.weight.new_zeros(width), requires_grad=head.weight.requires_grad)
            head.bias[labels.unique()] = MASKED
    return edited


def random_components(
    model: nn.Module, retain: Batches, forget: Batches, *, edit: Edit | Recipe, seed: int = 0
) -> nn.Module:
    """As many components of each layer zeroed as an edit by `discedit.unlearn` does, but chosen by chance.

    Chosen among all components of the layer, those of the edit too, and zeroed in the same way.

    Raises:
        ValueError: the edit does more than to zero components.
    """
    recipe = edit.recipe if isinstance(edit, Edit) else edit
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, list[int]] = {}
    operations: list[Operation] = []
    layer = ""
    for operation in recipe.operations:
        if operation.kind != "fill":
            raise ValueError(f"random_components: edit must only zero components, it has a {operation.kind!r}.")
        # A layer's operations follow each other, its weights first; its norm is named differently.
        if operation.target.removesuffix(".weight") in recipe.components:
            layer = operation.target.removesuffix(".weight")
        if layer not in places:
            width = width_of(model.get_submodule(layer))
            assert width is not None, layer
            places[layer] = torch.randperm(width, generator=generator).tolist()
        operations.append(replace(operation, index=tuple(sorted(places[layer][i] for i in operation.index))))
    components = {name: sorted(places[name][i] for i in chosen) for name, chosen in recipe.components.items() if chosen}
    settings = {**recipe.settings, "components": "by chance", "seed": seed}
    return Recipe("unlearn", settings, components, architecture_of(model), operations).apply(model).model


def discedit_u(
    model: nn.Module,
    retain: Batches,
    forget: Batches,
    *,
    fraction: float | None = None,
    scores: Scores | None = None,
    seed: int = 0,
) -> nn.Module:
    """DISCEDIT-U as published: in each of the last layers the components that tell the classes best are masked.

    The preset "discedit_u", by default with its share of each layer (3 of 64) and its layers, the last third.

    Raises:
        ValueError: as `Preset.unlearn`.
    """
    _, labels = _samples("discedit_u", model, forget)
    scores = published_scores(model, retain, forget) if scores is None else scores
    return preset("discedit_u").unlearn(model, scores, classes=labels.unique().tolist(), fraction=fraction).model


def published_scores(model: nn.Module, retain: Batches, forget: Batches) -> Scores:
    """The scores of the preset "discedit_u" on all samples; any class may be forgotten by them."""
    width = _logits(model, _samples("discedit_u", model, forget)[0][:1]).shape[1]
    return preset("discedit_u").score(model, [*retain, *forget], width)


def finetune(
    model: nn.Module, retain: Batches, forget: Batches, *, rate: float = 0.1, budget: int | None = None, seed: int = 0
) -> nn.Module:
    """Further training on the retain samples alone, in the hope that the network forgets the rest.

    Args:
        model: a classifier; a copy is trained, frozen parameters as well.
        retain, forget: (inputs, labels) batches of training samples.
        rate: the first learning rate as a share of `PEAK`.
        budget: samples whose gradient is taken; by default as many as are given.
        seed: of the order of samples.

    Raises:
        ValueError: there are no samples, or the model gives no logits.
    """
    kept = _samples("finetune", model, retain)
    with _copied(model, seed) as edited:
        stream = _stream(*kept)
        _train(edited, _steps(budget, retain, forget), lambda _: _loss(edited, *next(stream)), rate=rate)
    return edited


def gradient_ascent(
    model: nn.Module, retain: Batches, forget: Batches, *, rate: float = 0.01, budget: int | None = None, seed: int = 0
) -> nn.Module:
    """NegGrad: ascent on the loss of the forget samples. Arguments as for `finetune`."""
    gone = _samples("gradient_ascent", model, forget)
    with _copied(model, seed) as edited:
        stream = _stream(*gone)
        _train(edited, _steps(budget, retain, forget), lambda _: -_loss(edited, *next(stream)), rate=rate)
    return edited


def neg_grad_plus(
    model: nn.Module,
    retain: Batches,
    forget: Batches,
    *,
    rate: float = 0.1,
    keep: float = 0.95,
    budget: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """NegGrad+: keep times the loss on retain samples minus (1 - keep) times that on forget samples goes down.

    Each step has half a batch of each, in two forward passes, so that batch norms see one kind at a time. Arguments as
    for `finetune`.
    """
    kept, gone = _samples("neg_grad_plus", model, retain), _samples("neg_grad_plus", model, forget)
    with _copied(model, seed) as edited:
        first, second = _stream(*kept, BATCH // 2), _stream(*gone, BATCH // 2)

        def loss(_: float) -> Tensor:
            return keep * _loss(edited, *next(first)) - (1 - keep) * _loss(edited, *next(second))

        _train(edited, _steps(budget, retain, forget), loss, rate=rate)
    return edited


def random_labels(
    model: nn.Module, retain: Batches, forget: Batches, *, rate: float = 0.1, budget: int | None = None, seed: int = 0
) -> nn.Module:
    """Amnesiac unlearning: training on all samples, the forget samples with labels of other classes.

    Each forget sample gets one label by chance, once, among the classes that are not to be forgotten. Arguments as for
    `finetune`.
    """
    with _copied(model, seed) as edited:
        stream = _stream(*_mixed("random_labels", edited, retain, forget))
        _train(edited, _steps(budget, retain, forget), lambda _: _loss(edited, *next(stream)), rate=rate)
    return edited


def l1_sparse(
    model: nn.Module,
    retain: Batches,
    forget: Batches,
    *,
    rate: float = 0.1,
    penalty: float = 1e-3,
    budget: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Fine-tuning on the retain samples with an l1 penalty on all parameters that falls linearly to 0.

    Arguments as for `finetune`.
    """
    kept = _samples("l1_sparse", model, retain)
    with _copied(model, seed) as edited:
        stream = _stream(*kept)

        def loss(done: float) -> Tensor:
            size = torch.stack([parameter.abs().sum() for parameter in edited.parameters()]).sum()
            return _loss(edited, *next(stream)) + penalty * (1 - done) * size

        _train(edited, _steps(budget, retain, forget), loss, rate=rate)
    return edited


def salun(
    model: nn.Module,
    retain: Batches,
    forget: Batches,
    *,
    rate: float = 0.1,
    share: float = 0.5,
    saliency: Tensors | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """SalUn: `random_labels` on the parameters alone to which the loss on the forget samples is most sensitive.

    Args:
        share: of all parameters, ranked together, that may change. Batch norms' running statistics change as well.
        saliency: from `forget_saliency`, which is otherwise computed. Its cost counts towards the budget either way.
        model, retain, forget, rate, budget, seed: as for `finetune`.
    """
    saliency = forget_saliency(model, retain, forget) if saliency is None else saliency
    values = torch.cat([value.flatten() for value in saliency.values()])
    salient = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    salient[values.topk(round(share * len(values))).indices] = True
    parts = salient.split([value.numel() for value in saliency.values()])
    frozen = {name: ~part.view_as(saliency[name]) for name, part in zip(saliency, parts, strict=True)}
    with _copied(model, seed) as edited:
        stream = _stream(*_mixed("salun", edited, retain, forget))
        before = {name: parameter.detach().clone() for name, parameter in edited.named_parameters()}

        def restore() -> None:
            for name, parameter in edited.named_parameters():
                parameter.data[frozen[name]] = before[name][frozen[name]]

        steps = _steps(budget, retain, forget, spent=_number(forget))
        _train(edited, steps, lambda _: _loss(edited, *next(stream)), rate=rate, after=restore)
    return edited


def forget_saliency(model: nn.Module, retain: Batches, forget: Batches) -> Tensors:
    """Size of each parameter's gradient of the loss on the forget samples, in eval mode: what SalUn's mask rests on."""
    x, labels = _samples("forget_saliency", model, forget)
    with _copied(model, 0) as edited:
        edited.eval()
        for inputs, classes in zip(x.split(BATCH), labels.split(BATCH), strict=True):
            (_loss(edited, inputs, classes) * len(classes) / len(labels)).backward()  # type: ignore[no-untyped-call]
        return {name: _gradient(parameter).abs() for name, parameter in edited.named_parameters()}


def ssd(
    model: nn.Module,
    retain: Batches,
    forget: Batches,
    *,
    selection: float = 10.0,
    dampening: float = 1.0,
    importances: tuple[Tensors, Tensors] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Selective synaptic dampening: parameters that matter much more to the forget samples than to all are shrunk.

    With F the diagonal of the empirical Fisher information, a parameter with F_forget > selection F_all is multiplied
    by min(1, dampening F_all / F_forget). All others, and batch norms' running statistics, stay. It takes as many
    gradients as one epoch and does not train, but takes them sample by sample. F_all counts the forget samples in, so
    where their share of all samples is p, F_forget <= F_all / p, and no `selection` of 1 / p or more selects anything;
    hence the grid, for one class of ten. What serves depends on the class: one on which the network errs more has a
    larger F_forget throughout.

    Args:
        selection, dampening: the paper's alpha and lambda, positive.
        importances: from `fishers`, which are otherwise computed.
        model, retain, forget: as for `finetune`.
    """
    of_all, of_forget = fishers(model, retain, forget) if importances is None else importances
    with _copied(model, seed) as edited, torch.no_grad():
        for name, parameter in edited.named_parameters():
            mine, everyone = of_forget[name], of_all[name]
            factor = (dampening * everyone / mine).clamp(max=1)
            parameter.copy_(torch.where(mine > selection * everyone, factor * parameter, parameter))
    return edited


def fishers(model: nn.Module, retain: Batches, forget: Batches) -> tuple[Tensors, Tensors]:
    """Mean squares of each parameter's gradient over all samples and over the forget samples, in eval mode.

    Of each sample's own gradient; the authors' script squares those of mini-batches.
    """
    of_retain, of_forget = _squares(model, retain), _squares(model, forget)
    kept, gone = _number(retain), _number(forget)
    return (
        {name: (of_retain[name] + of_forget[name]) / (kept + gone) for name in of_retain},
        {name: value / gone for name, value in of_forget.items()},
    )


@dataclass(frozen=True)
class Method:
    """One way to forget.

    Attributes:
        run: the function, `run(model, retain, forget, **setting, seed=seed)`.
        grid: settings to choose from; one, empty, where there is nothing to choose.
        needs: of data and of the model.
        source: who published it.
        prepare: an argument of `run` and what computes it from (model, retain, forget), the same for all settings.
    """

    run: Callable[..., nn.Module]
    grid: tuple[dict[str, Any], ...]
    needs: str
    source: str
    prepare: tuple[str, Callable[..., Any]] | None = None


def _grid(**values: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Every combination of the values."""
    settings: list[dict[str, Any]] = [{}]
    for name, choices in values.items():
        settings = [{**setting, name: choice} for setting in settings for choice in choices]
    return tuple(settings)


RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
METHODS: dict[str, Method] = {
    "logit_mask": Method(logit_mask, _grid(), "nothing but the head", "a control"),
    "random_components": Method(random_components, _grid(), "an edit by discedit (`edit`)", "a control"),
    "discedit_u": Method(
        discedit_u,
        _grid(fraction=(1 / 64, 3 / 64, 6 / 64, 12 / 64, 20 / 64, 28 / 64)),
        "forward passes over retain and forget samples",
        preset("discedit_u").paper,
        ("scores", published_scores),
    ),
    "finetune": Method(
        finetune,
        _grid(rate=RATES),
        "gradients on retain samples",
        "in Golatkar, Achille and Soatto, Eternal Sunshine of the Spotless Net, CVPR 2020, and since",
    ),
    "gradient_ascent": Method(
        gradient_ascent,
        _grid(rate=(0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)),
        "gradients on forget samples",
        "Golatkar, Achille and Soatto, Eternal Sunshine of the Spotless Net, CVPR 2020",
    ),
    "neg_grad_plus": Method(
        neg_grad_plus,
        _grid(rate=(0.1, 0.01), keep=(0.8, 0.95, 0.99)),
        "gradients on retain and forget samples",
        "Kurmanji, Triantafillou, Hayes and Triantafillou, Towards Unbounded Machine Unlearning, NeurIPS 2023",
    ),
    "random_labels": Method(
        random_labels,
        _grid(rate=RATES),
        "gradients on retain and forget samples",
        "Graves, Nagisetty and Ganesh, Amnesiac Machine Learning, AAAI 2021",
    ),
    "l1_sparse": Method(
        l1_sparse,
        _grid(rate=(1.0, 0.1), penalty=(1e-4, 1e-3, 1e-2)),
        "gradients on retain samples",
        "Jia, Liu, Ram, Yao, Liu, Liu, Sharma and Liu, Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023",
    ),
    "salun": Method(
        salun,
        _grid(rate=(0.3, 0.1, 0.03), share=(0.5, 0.1)),
        "gradients on retain and forget samples",
        "Fan, Liu, Zhang, Wong, Wei and Liu, SalUn: Empowering Machine Unlearning via Gradient-based Weight "
        "Saliency, ICLR 2024",
        ("saliency", forget_saliency),
    ),
    "ssd": Method(
        ssd,
        _grid(selection=(1.0, 3.0, 9.0), dampening=(1.0, 0.1)),
        "gradients on each retain and forget sample, no training",
        "Foster, Schoepf and Brintrup, Fast Machine Unlearning Without Retraining Through Selective Synaptic "
        "Dampening, AAAI 2024",
        ("importances", fishers),
    ),
}


@dataclass
class Tuned:
    """What `tuned` found.

    Attributes:
        setting: the best one.
        figures: its entry in `tried`.
        tried: for each setting of the grid "setting", "retain" and "forget" (accuracies), "drop" (of the retain
            accuracy), "aus", and "seconds" of the run, without what is prepared once for all settings.
        prepared: seconds of that.
        model: the model that the best setting gave.
    """

    setting: dict[str, Any]
    figures: dict[str, Any]
    tried: list[dict[str, Any]]
    prepared: float
    model: nn.Module


def measured(model: nn.Module, edited: nn.Module, validate: Iterable[Any], classes: Sequence[int]) -> dict[str, float]:
    """What an edit costs and does on labelled batches: "retain", "drop", "forget", "aus".

    Accuracies are means over classes. Every class must have samples.
    """
    validate = list(validate)
    width = _logits(model, unpack_batch("measured", validate[0], 0, device_of(model), labels_needed=True)[0]).shape[1]
    before, after = (accuracy_per_class(one, validate, width) for one in (model, edited))
    if not bool(before.isfinite().all()):
        empty = before.isnan().nonzero().flatten().tolist()
        raise ValueError(f"measured: validate must have samples of all {width} classes, it has none of {empty}.")
    kept = [cls for cls in range(width) if cls not in classes]
    retain, forget = float(after[kept].mean()), float(after[list(classes)].mean())
    drop = float(before[kept].mean()) - retain
    return {"retain": retain, "drop": drop, "forget": forget, "aus": adaptive_unlearning_score(drop, forget)}


def tuned(
    method: str,
    model: nn.Module,
    retain: Batches,
    forget: Batches,
    validate: Iterable[Any],
    classes: Sequence[int],
    *,
    seed: int = 0,
    **fixed: Any,
) -> Tuned:
    """Tries a method's grid on one choice of classes and takes the setting with the highest AUS on `validate`.

    Of settings that are equally good the first of the grid is taken; a model whose score is not a number loses.

    Args:
        method: a name in `METHODS`.
        model, retain, forget, seed: as for the method.
        validate: labelled batches that neither training nor any table uses, such as `held_out.cifar10_validation`.
        classes: those to forget, all that `forget` has.
        fixed: further arguments of the method, the same for all settings.

    Raises:
        ValueError: classes are not those of `forget`, a class has no sample in `validate`, or as the method.
    """
    found = sorted({int(label) for _, labels in forget for label in labels})
    if found != sorted(classes):
        raise ValueError(f"tuned: classes must be those of forget, {found}, got {sorted(classes)}.")
    chosen, validate = METHODS[method], list(validate)
    start = time.perf_counter()
    if chosen.prepare is not None and chosen.prepare[0] not in fixed:
        fixed = {**fixed, chosen.prepare[0]: chosen.prepare[1](model, retain, forget)}
    prepared = time.perf_counter() - start
    tried: list[dict[str, Any]] = []
    best: tuple[float, int, nn.Module] | None = None
    for setting in chosen.grid:
        start = time.perf_counter()
        edited = chosen.run(model, retain, forget, **{**fixed, **setting}, seed=seed)
        seconds = time.perf_counter() - start
        tried.append({"setting": setting, **measured(model, edited, validate, classes), "seconds": seconds})
        if best is None or tried[-1]["aus"] > best[0]:
            best = tried[-1]["aus"], len(tried) - 1, edited
    assert best is not None
    return Tuned(dict(chosen.grid[best[1]]), tried[best[1]], tried, prepared, best[2])


@contextmanager
def _copied(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """A copy to be trained inside; outside the random state, and the copy's modes, as they were, and no gradients."""
    edited = copy.deepcopy(model)
    modes = [(module, module.training) for module in edited.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in edited.parameters()]
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        edited.requires_grad_(True).zero_grad()
        yield edited
    edited.zero_grad()
    for parameter, needed in wanted:
        parameter.requires_grad_(needed)
    for module, mode in modes:
        module.training = mode


def _samples(op: str, model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """All inputs and labels, on the model's device."""
    device = device_of(model)
    pairs = [unpack_batch(op, batch, index, device, labels_needed=True) for index, batch in enumerate(batches)]
    if not pairs:
        raise ValueError(f"{op}: retain and forget must give samples, one gave none.")
    return torch.cat([x for x, _ in pairs]), torch.cat([torch.as_tensor(y, device=device) for _, y in pairs])


def _number(batches: Batches) -> int:
    return sum(len(labels) for _, labels in batches)


def _steps(budget: int | None, retain: Batches, forget: Batches, spent: int = 0) -> int:
    """How many steps a budget allows, at least one."""
    budget = _number(retain) + _number(forget) if budget is None else budget
    return max(1, round((budget - spent) / BATCH))


def _stream(x: Tensor, labels: Tensor, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, all of one size: pass after pass over the samples, each in a new order."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(x))])
        index, order = order[:size].to(x.device), order[size:]
        yield x[index], labels[index]


def _mixed(op: str, model: nn.Module, retain: Batches, forget: Batches) -> tuple[Tensor, Tensor]:
    """All samples, those to forget with labels of the other classes by chance."""
    (kept, kept_labels), (gone, gone_labels) = _samples(op, model, retain), _samples(op, model, forget)
    width = _logits(model, gone[:1]).shape[1]
    others = torch.tensor([cls for cls in range(width) if cls not in gone_labels.unique().tolist()])
    if not len(others):
        raise ValueError(f"{op}: forget must leave at least one of {width} classes, it has samples of all.")
    drawn = others[torch.randint(len(others), (len(gone),))].to(gone_labels)
    return torch.cat([kept, gone]), torch.cat([kept_labels, drawn])


def _train(
    model: nn.Module,
    steps: int,
    loss: Callable[[float], Tensor],
    *,
    rate: float,
    after: Callable[[], None] | None = None,
) -> None:
    """Steps down `loss`, which is given the share of them that is done."""
    model.train()
    kind = "sgd" if any(isinstance(module, _BatchNorm) for module in model.modules()) else "adamw"
    optimizer = _optimizer(kind, model, rate * PEAK[kind], {"sgd": 5e-4, "adamw": 0.01}[kind])
    schedule = CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step / steps).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if after is not None:
            after()


def _optimizer(kind: str, model: nn.Module, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=weight_decay)
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=weight_decay)


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    logits = first_tensor(call(model, x))
    if logits is None or logits.ndim != 2:
        raise ValueError("unlearning: model must return logits of shape (samples, classes), it does not.")
    return logits


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """In eval mode, without gradients or a trace in the model."""
    with frozen_eval(model):
        return _forward(model, x)


def _loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(_forward(model, x), labels)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def _squares(model: nn.Module, batches: Batches) -> Tensors:
    """Sums over samples of the squared gradients of each sample's loss, in eval mode."""
    x, labels = _samples("fishers", model, batches)
    with _copied(model, 0) as edited:
        edited.eval()
        sums = {name: torch.zeros_like(parameter) for name, parameter in edited.named_parameters()}
        for inputs, classes in zip(x.split(1), labels.split(1), strict=True):
            edited.zero_grad()
            _loss(edited, inputs, classes).backward()  # type: ignore[no-untyped-call]
            for name, parameter in edited.named_parameters():
                sums[name] += _gradient(parameter) ** 2
    return {name: value.detach() for name, value in sums.items()}


@dataclass(frozen=True)
class Training:
    """How a network is trained from scratch: one cycle of the learning rate, both ways as a cosine.

    Attributes:
        optimizer: "sgd" (momentum 0.9) or "adamw".
        rate: the highest learning rate.
        weight_decay: of all parameters.
        rise: share of the steps until the highest rate.
        shift: images are shifted by up to so many pixels, and flipped half of the time.
        batch: samples of a step; what is left at the end of an epoch is left out.
    """

    optimizer: str
    rate: float
    weight_decay: float
    rise: float
    shift: int
    batch: int = 128


@dataclass(frozen=True)
class Network:
    """A network that can be retrained: how to build it, its images and its training."""

    build: Callable[[], nn.Module]
    train: Callable[[], TensorDataset]
    validate: Callable[[], TensorDataset]
    training: Training


def _resnet20() -> nn.Module:
    model = zoo.CifarResNet(zoo.RESNET_BLOCKS["resnet20"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    # Convolutions on a CPU are a quarter faster that way.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _vit_fashion() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    model: nn.Module = ViTForImageClassification(ViTConfig.from_pretrained(zoo.data_folder() / "vit_fashion"))
    return model


NETWORKS = {
    "resnet20": Network(
        _resnet20, held_out.cifar10_training, held_out.cifar10_validation, Training("sgd", 0.1, 5e-4, 0.25, 4)
    ),
    "vit_fashion": Network(
        _vit_fashion, held_out.fashion_training, held_out.fashion_validation, Training("adamw", 1e-3, 0.05, 0.1, 2)
    ),
}


def retrain(
    build: Callable[[], nn.Module],
    train: TensorDataset,
    classes: Sequence[int],
    *,
    epochs: int,
    training: Training,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> nn.Module:
    """Training from scratch without the samples of the classes: what unlearning is to come close to.

    The network keeps an output for each class, those without samples included.

    Args:
        build: gives a network with random weights; called with torch's random state set to `seed`.
        train: all training images (n, channels, height, width) and their labels.
        classes: those to leave out; none trains on all, the network that others are to be compared with.
        epochs: passes over what is left.
        training: optimizer, schedule, augmentation.
        seed: of weights, order and augmentation.
        report: is told how each epoch went.

    Returns:
        The network in eval mode.
    """
    x, labels = train.tensors
    kept = torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype), invert=True).nonzero().flatten()
    if epochs < 1 or not len(kept):
        raise ValueError(f"retrain: epochs must be positive and samples be left, got {epochs} and {len(kept)}.")
    size = min(training.batch, len(kept))
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)
        model = build().train()
        optimizer = _optimizer(training.optimizer, model, training.rate, training.weight_decay)
        steps = epochs * (len(kept) // size)
        schedule = OneCycleLR(
            optimizer, training.rate, total_steps=steps + 1, pct_start=training.rise, cycle_momentum=False
        )
        for epoch in range(epochs):
            start, total = time.perf_counter(), 0.0
            order = kept[torch.randperm(len(kept))]
            for i in range(len(kept) // size):
                index = order[i * size : (i + 1) * size]
                optimizer.zero_grad()
                loss = _loss(model, augmented(x[index], training.shift), labels[index])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                total += loss.item()
            if report is not None:
                mean, seconds = total / (len(kept) // size), time.perf_counter() - start
                report(f"epoch {epoch + 1} of {epochs}: loss {mean:.3f}, {seconds:.0f} s")
    return model.eval()


def augmented(x: Tensor, shift: int) -> Tensor:
    """Images (n, channels, height, width), each shifted by up to `shift` pixels and half of them flipped.

    What comes in from outside has the darkest value of its channel in these images.
    """
    samples, _, height, width = x.shape
    dark = x.amin((0, 2, 3), keepdim=True)
    padded = functional.pad(x - dark, [shift] * 4) + dark
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * shift + 1, (2, samples))
    moved = windows[torch.arange(samples), :, down, right]
    return torch.where(torch.rand(samples, 1, 1, 1) < 0.5, moved.flip(3), moved)


def retrained_file(network: str, classes: Sequence[int], folder: Path) -> Path:
    """Where the weights of a network retrained without the classes are; a file .json beside it says how."""
    left = "-".join(str(cls) for cls in sorted(classes))
    return folder / (f"{network}-without-{left}.safetensors" if left else f"{network}-all.safetensors")


def retrained(network: str, classes: Sequence[int], folder: Path) -> nn.Module:
    """A network retrained without the classes, in eval mode.

    Raises:
        FileNotFoundError: it was not; the message says how to.
    """
    path = retrained_file(network, classes, folder)
    if not path.is_file():
        chosen = " ".join(str(cls) for cls in sorted(classes))
        raise FileNotFoundError(
            f"retrained: {path} must exist. To make it: python -m benchmarks.unlearning_rivals --retrain {network} "
            f"--classes {chosen} --epochs N --out {folder}"
        )
    with torch.random.fork_rng([]):
        model = NETWORKS[network].build()
    model.load_state_dict(load_file(path))
    return model.eval()


def retrain_to_file(
    name: str, classes: Sequence[int], folder: Path, *, epochs: int, seed: int, limit: int | None
) -> None:
    """Retrains a network of `NETWORKS` and writes weights and how they came about; skips what is there."""
    path = retrained_file(name, classes, folder)
    facts = path.with_suffix(".json")
    if path.is_file() and facts.is_file():
        print(f"{path} is there", flush=True)
        return
    network = NETWORKS[name]
    train = network.train()
    if limit is not None:
        train = TensorDataset(*(tensor[:limit] for tensor in train.tensors))
    validate = list(zoo.batches(network.validate()))
    start = time.perf_counter()
    model = retrain(
        network.build,
        train,
        classes,
        epochs=epochs,
        training=network.training,
        seed=seed,
        report=lambda line: print(f"{path.name}: {line}", flush=True),
    )
    seconds = time.perf_counter() - start
    accuracy = accuracy_per_class(model, validate, 10).tolist()
    kept = [accuracy[cls] for cls in range(10) if cls not in classes]
    left = ~torch.isin(train.tensors[1], torch.tensor(list(classes), dtype=torch.int64))
    found = {
        "network": name,
        "without classes": sorted(classes),
        "training images": int(left.sum()),
        "epochs": epochs,
        "seed": seed,
        **asdict(network.training),
        "seconds": round(seconds),
        "torch": torch.__version__,
        "accuracy per class, last 5,000 test images": [round(value, 4) for value in accuracy],
        "retain accuracy": round(sum(kept) / len(kept), 4),
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: weights under another name until they are written, the facts last.
    unfinished = path.with_suffix(".part")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, unfinished)
    unfinished.replace(path)
    facts.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path}: retain accuracy {found['retain accuracy']:.4f}, {seconds:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--retrain", choices=list(NETWORKS), required=True, help="the network to train from scratch")
    parser.add_argument("--classes", nargs="*", type=int, default=[], help="to leave out; none: train on all")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="training images to use, the first so many; by default all")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("out/retrained"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    retrain_to_file(
        options.retrain, options.classes, options.out, epochs=options.epochs, seed=options.seed, limit=options.limit
    )


if __name__ == "__main__":
    main()
