"""Models as people have them when they come to the library: compiled, wrapped, in inference mode, with modules that
learn in eval mode. What is found is what the plain model gives, and the model comes back as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import Net, same_bits
from torch import Tensor, nn
from torch.nn import functional

import discedit
from discedit.model.forward import frozen_eval
from discedit.moments.second_moments import collect_second_moments

CLASSES = 4
X = torch.randn(48, 2, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % CLASSES
X[Y == 1] += 1.0
DATA = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 48, 16)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, CLASSES),
    ).eval()  # fmt: skip


def everything(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """Numbers of everything that runs a model: by name."""
    moments = discedit.collect_moments(model, DATA, CLASSES)
    scores = discedit.score(moments)
    second = collect_second_moments(model, DATA)
    pruned = discedit.prune(model, ratio=0.4, example_inputs=x[:2], data=[x])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network that was not trained names classes by chance
        erased = discedit.unlearn(model, scores, classes=[1], data=DATA)
        zeroed = discedit.unlearn(
            model, scores, classes=[1], method=discedit.AblateComponents(discedit.TopFraction(0.2))
        )
    seen = discedit.evaluate(
        erased.model, classes=[1], num_classes=CLASSES, test=DATA, original=model, metrics="accuracy"
    )
    found = {f"mean of {layer}": state.mean for layer, state in moments.items()}
    found |= {f"score of {layer}": scores[layer] for layer in scores}
    found |= {f"second moments of {layer}": state.scatter for layer, state in second.items()}
    for name, edit in (("pruned", pruned), ("erased", erased), ("zeroed", zeroed)):
        plain = copy.deepcopy(edit.model)
        found |= {f"{name} {key}": tensor.detach().clone() for key, tensor in plain.state_dict().items()}
    found["accuracy"] = torch.tensor([seen.accuracy[name]["test"].retain for name in ("original", "edited")])
    return found


@pytest.fixture(scope="module")
def expected():
    return everything(network())


def assert_same(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=rtol, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


# ---- compiled and wrapped -------------------------------------------------------------------------------------------


def compiled(model):
    """As in training: it has run before."""
    made = torch.compile(model, backend="eager")
    made(X[:4])
    return made


def compiled_in_place(model):
    model.compile(backend="eager")
    model(X[:4])
    return model


def parts_compiled_in_place(model):
    for part in (model[0], model[3], model[6]):
        part.compile(backend="eager")
    model(X[:4])
    return model


WRAPPED = {
    "torch.compile": compiled,
    "Module.compile": compiled_in_place,
    "parts compiled": parts_compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DataParallel of a compiled one": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_compiled_and_wrapped_models_are_what_is_inside(expected, kind):
    assert_same(everything(WRAPPED[kind](network())), expected)


def test_a_compiled_part_is_followed(expected):
    """Its layers keep the names that they have there."""
    model = network()
    model[6] = compiled_part = torch.compile(model[6], backend="eager")
    with torch.no_grad():
        model(X[:4])
    moments = discedit.collect_moments(model, DATA, CLASSES)
    assert list(moments) == ["0", "3", "6._orig_mod"]
    torch.testing.assert_close(moments["6._orig_mod"].mean, expected["mean of 6"])
    assert model[6] is compiled_part


def test_compiled_functions_inside_do_not_hide_layers(expected):
    body = torch.compile(lambda net, x: net.inner(x), backend="eager")
    model = Net(body, inner=network()).eval()
    model(X[:4])
    moments = discedit.collect_moments(model, DATA, CLASSES)
    assert list(moments) == ["inner.0", "inner.3", "inner.6"]
    torch.testing.assert_close(moments["inner.3"].mean, expected["mean of 3"])


def test_the_compiled_model_runs_compiled_again():
    calls = []

    def backend(graph, examples):
        calls.append(graph)
        return graph.forward

    model = torch.compile(network(), backend=backend)
    discedit.collect_moments(model, DATA, CLASSES)
    assert not calls
    model(X[:4])
    assert len(calls) == 1


# ---- inference mode -------------------------------------------------------------------------------------------------


def test_inside_inference_mode_all_is_as_outside(expected):
    model = network()
    with torch.inference_mode():
        found = everything(model, X.clone())
        edit = discedit.prune(model, ratio=0.4, example_inputs=X[:2])
        undone = edit.recipe.undo(edit.model)
    assert_same(found, expected)
    for made in (edit.model, undone):
        functional.cross_entropy(made.train()(X), Y).backward()  # what is made there can be trained
        assert all(parameter.grad is not None for parameter in made.parameters())


def test_gradients_that_the_caller_has_turned_off_stay_off():
    """In what the loader does, too."""
    seen = []

    def loader():
        for batch in DATA:
            seen.append(torch.is_grad_enabled())
            yield batch

    with torch.no_grad():
        discedit.collect_moments(network(), loader(), CLASSES)
        discedit.prune(network(), ratio=0.4, example_inputs=X[:2], data=loader())
    assert seen
    assert not any(seen)


def test_a_model_made_in_inference_mode(expected):
    with torch.inference_mode():
        model = copy.deepcopy(network())
    assert next(model.parameters()).is_inference()
    assert_same(everything(model), expected)


def test_inputs_made_in_inference_mode(expected):
    with torch.inference_mode():
        x = X.clone()
    model = Net(lambda net, x: net.inner(x.sub_(0.0)), inner=network()).eval()
    moments = discedit.collect_moments(model, [(x, Y)], CLASSES)
    torch.testing.assert_close(moments["inner.3"].mean, expected["mean of 3"], rtol=1e-5, atol=1e-6)


def test_a_part_that_runs_in_inference_mode():
    """Nothing tells there whether a tensor was changed in place, so layers are read where they are certain."""

    def forward(net, x):
        with torch.inference_mode():
            x = net.body(x)
        return net.head(x.clone())

    layers = network()
    model = Net(forward, body=layers[:-1], head=layers[-1]).eval()
    moments = discedit.collect_moments(model, DATA, CLASSES)
    assert list(moments) == ["body.0", "body.3", "body.6"]
    assert not moments.norms
    with torch.no_grad():
        own = {"body.0": layers[:1](X), "body.3": layers[:4](X), "body.6": layers[:7](X)}
    for layer, maps in own.items():
        pooled = maps.flatten(2).mean(2) if maps.ndim > 2 else maps
        torch.testing.assert_close(moments[layer].mean[2].float(), pooled[Y == 2].mean(0), rtol=1e-5, atol=1e-6)


# ---- precision -------------------------------------------------------------------------------------------------------


def test_under_autocast_edits_are_made_in_full_precision(expected):
    with torch.autocast("cpu", torch.bfloat16):
        scores = discedit.score(discedit.collect_moments(network(), DATA, CLASSES))
        found = discedit.prune(network(), ratio=0.4, example_inputs=X[:2], data=[X]).model.state_dict()
    assert_same({f"pruned {name}": tensor for name, tensor in found.items()}, of_kind(expected, "pruned"))
    for layer in scores:
        assert (scores[layer] - expected[f"score of {layer}"]).abs().max() < 0.05


def test_second_moments_under_autocast_are_those_of_what_the_layers_read():
    with torch.autocast("cpu", torch.bfloat16):
        found = collect_second_moments(network(), DATA, layers=["0"])["0"]
    plain = collect_second_moments(network(), DATA, layers=["0"])["0"]
    torch.testing.assert_close(found.scatter, plain.scatter)  # the first layer reads the same either way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(expected, dtype):
    model = network().to(dtype)
    edit = discedit.prune(model, ratio=0.4, example_inputs=X[:2].to(dtype), data=[X.to(dtype)])
    for name, tensor in of_kind(expected, "pruned").items():
        ours = edit.model.state_dict()[name.removeprefix("pruned ")]
        assert ours.dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
        assert (ours - tensor).abs().max() <= 0.03 * max(1, tensor.abs().max()), name


def of_kind(found, kind):
    return {name: tensor for name, tensor in found.items() if name.startswith(kind)}


# ---- modules that learn in eval mode --------------------------------------------------------------------------------


class Counts(nn.Module):
    """Counts its calls in place, keeps the last map under a new tensor, and a list of sizes in one that grows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("sizes", torch.zeros(0))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean().view(1)
        with torch.no_grad():
            self.sizes.resize_(len(self.sizes) + 1).fill_(len(x))
        return x


def observed():
    import torch.ao.quantization as quantization

    model = network()
    stub = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).eval()
    stub.qconfig = quantization.get_default_qconfig("fbgemm")
    model = quantization.prepare(stub)
    model(X[:4])
    return model


def counting():
    layers = network()
    model = nn.Sequential(layers[0], Counts(), *layers[1:]).eval()
    model(X[:4])
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [observed, counting])
def test_modules_that_learn_in_eval_mode_are_left_as_they_were(make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    data = [(100 * x, y) for x, y in DATA]
    scores = discedit.score(discedit.collect_moments(model, data, CLASSES))
    collect_second_moments(model, data)
    edits = [discedit.prune(model, ratio=0.4, example_inputs=X[:2], data=[X], criterion="l1")]
    edits.append(discedit.unlearn(model, scores, classes=[1], data=data))
    discedit.evaluate(edits[-1].model, classes=[1], num_classes=CLASSES, test=data, original=model, metrics="accuracy")
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    learned = [name for name in before if "calls" in name or "last" in name or "sizes" in name or "_val" in name]
    assert learned
    for edit in edits:
        for name in learned:
            assert torch.equal(edit.model.state_dict()[name], before[name]), name
    for name, tensor in model.state_dict().items():
        assert tensor.shape == before[name].shape, name
        assert torch.equal(tensor, before[name]), name


def test_a_buffer_that_requires_gradients_is_put_back():
    module = nn.Module()
    module.register_buffer("learned", torch.zeros(2, requires_grad=True))
    with frozen_eval(module):
        module.learned.add_(1)
    assert module.learned.tolist() == [0, 0]


# ---- inputs and labels ----------------------------------------------------------------------------------------------


class Image(Tensor):
    """A tensor that says what it is, as those of vision libraries do, and hands that on."""


def test_a_subclass_of_tensor_is_the_tensor(expected):
    found = everything(network(), X.as_subclass(Image))
    assert_same(found, expected)
    data = [(x.as_subclass(Image), y.as_subclass(Image)) for x, y in DATA]
    moments = discedit.collect_moments(network(), data, CLASSES)
    plain = discedit.collect_moments(network(), DATA, CLASSES)
    assert all(same_bits(moments[layer], plain[layer]) for layer in plain)
    assert {type(tensor) for layer in moments for tensor in moments[layer].tensors()} == {Tensor}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["cat", "dog", "cat"], "got a list that begins with 'cat'"),
        ("cat", "got a str that begins with 'cat'"),
        ({"boxes": X[:3], "labels": Y[:3]}, "got a dict with 'boxes', 'labels'"),
        ([{"boxes": X[0]}] * 3, "got a list that begins with {'boxes'"),
    ],
)
def test_labels_that_are_no_class_indices(labels, said):
    with pytest.raises(ValueError, match="batch 0: labels must hold one class index") as caught:
        discedit.collect_moments(network(), [(X[:3], labels)], CLASSES)
    assert said in str(caught.value)


# ---- a call that fails ----------------------------------------------------------------------------------------------


def everything_of(model):
    """What a failed call must leave: modes, hooks, and the very tensors with their values."""
    modules = [
        (name, part.training, list(part._forward_hooks), list(part._forward_pre_hooks))
        for name, part in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return repr(model), modules, [(name, id(t), t.requires_grad, t.clone(), t.grad) for name, t in tensors]


def assert_left(model, before):
    text, modules, tensors = everything_of(model)
    assert (text, modules) == before[:2]
    for (*ours, value, grad), (*theirs, expected, other) in zip(tensors, before[2], strict=True):
        assert ours == theirs
        assert grad is other
        assert torch.equal(value, expected)


def ending_early():
    yield DATA[0]
    raise OSError("the disk is gone")


FAILING = {
    "ends early": (ending_early, OSError, "the disk is gone"),
    "NaN at the end": (lambda: [*DATA[:2], (X[:16] * torch.nan, Y[:16])], ValueError, "finite"),
}
CALLS = {
    "least_squares": lambda model, scores, data: discedit.prune(
        model, ratio=0.4, example_inputs=X[:2], data=data, criterion="l1"
    ),
    "compensation": lambda model, scores, data: discedit.prune(
        model, criterion="fidelity", repair="compensation", ratio=0.4, example_inputs=X[:2], data=data
    ),
    "batchnorm": lambda model, scores, data: discedit.prune(
        model, ratio=0.4, example_inputs=X[:2], data=data, repair="batchnorm", criterion="l1"
    ),
    "directions": lambda model, scores, data: discedit.unlearn(
        model, scores, classes=[1], method="erase_directions", data=data
    ),
    "rows": lambda model, scores, data: discedit.unlearn(
        model,
        scores,
        classes=[1],
        method=discedit.AblateComponents(discedit.TopFraction(0.2), repair="least_squares"),
        data=data,
    ),
}


@pytest.mark.filterwarnings("ignore:unlearn")
@pytest.mark.filterwarnings("ignore:prune")
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("failing", FAILING)
def test_a_call_that_fails_leaves_the_model_as_it_was(kind, failing):
    model = network().train()
    model[1].eval()
    model[3].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[6].register_forward_hook(lambda *_: None)
    scores = discedit.score(discedit.collect_moments(model, DATA, CLASSES))
    before = everything_of(model)
    make, error, message = FAILING[failing]
    with pytest.raises(error, match=message):
        CALLS[kind](model, scores, make())
    assert_left(model, before)


def test_a_push_that_fails_leaves_the_stack_as_it_was(monkeypatch):
    model = network()
    edit = discedit.prune(model, ratio=0.4, example_inputs=X[:2], criterion="l1")
    stack = discedit.Stack(model)
    held = stack.model
    before = everything_of(held)

    def failing(*_):
        raise MemoryError("no more")

    monkeypatch.setattr("discedit.recipes.recipe.apply_operation", failing)
    with pytest.raises(MemoryError):
        stack.push("pruned", edit)
    assert stack.names == []
    assert stack.model is held
    assert_left(held, before)


NO_MODELS = {
    "a function": (lambda: lambda x: x, TypeError, "model must be a torch.nn.Module, got function"),
    "a class": (lambda: nn.Linear, TypeError, "model must be a torch.nn.Module, got type Linear"),
    "scripted": (
        lambda: torch.jit.script(network()), ValueError, "must be a module in Python, got a RecursiveScriptModule: give"
    ),
    "on meta": (
        lambda: network().to("meta"), ValueError, r"must hold values, '0\.weight' is on the meta device: move it"
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(4, 3)), ValueError, r"hold values, '0\.weight' has none yet: run it once"
    ),
}  # fmt: skip
ASKED = {
    "collect": lambda model: discedit.collect_moments(model, DATA, CLASSES),
    "second moments": lambda model: collect_second_moments(model, DATA),
    "prune": lambda model: discedit.prune(model, ratio=0.3, example_inputs=X[:2]),
    "importances": lambda model: discedit.importances(model, {}, "l1", example_inputs=X[:2]),
    "evaluate": lambda model: discedit.evaluate(model, test=DATA, classes=[1], num_classes=CLASSES),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model_with_values(kind, ask):
    make, error, said = NO_MODELS[kind]
    with pytest.raises(error, match=said):
        ASKED[ask](make())


@pytest.mark.parametrize(
    ("inputs", "said"),
    [(X[:2, :1], "RuntimeError: Given groups=1"), (X[:2].numpy(), "TypeError"), (DATA, "TypeError: .* arguments")],
)
def test_example_inputs_that_the_model_does_not_run_on(inputs, said):
    model = network()
    with pytest.raises(
        ValueError, match=rf"(?s)prune: example_inputs must be .* the model can run on; it raised {said}"
    ):
        discedit.prune(model, ratio=0.3, example_inputs=inputs)
    assert all(torch.equal(tensor, network().state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"pixel_values": X, "label": Y}, "a dict with 'pixel_values', 'label'"),
        ((X, Y, Y), "a tuple of 3"),
    ],
)
def test_batches_without_labels_where_they_are_looked_for(batch, said):
    with pytest.raises(ValueError, match=f"or dicts of arguments with 'labels', batch 0 is {said}"):
        discedit.collect_moments(network(), [batch], CLASSES)


WRONG = {
    "prune: scores must be a discedit.Scores, or importances by layer, got list": lambda m, s: discedit.prune(
        m, [1.0], ratio=0.5, example_inputs=X[:2]
    ),
    "prune: layers must be a list of names, got '0'": lambda m, s: discedit.prune(
        m, ratio=0.5, example_inputs=X[:2], layers="0"
    ),
    "prune: ignore must be a list of names, got 5": lambda m, s: discedit.prune(
        m, ratio=0.5, example_inputs=X[:2], ignore=5
    ),
    "prune: components must be a list of names, got None": lambda m, s: discedit.prune(
        m, ratio=0.5, example_inputs=X[:2], components=None
    ),
    "prune: criterion must be one of": lambda m, s: discedit.prune(
        m, ratio=0.5, example_inputs=X[:2], criterion={"l1": 1}
    ),
    "prune: data must give batches, got int": lambda m, s: discedit.prune(m, ratio=0.5, example_inputs=X[:2], data=5),
    "prune: data must give .inputs, labels. pairs": lambda m, s: discedit.prune(
        m, ratio=0.5, example_inputs=X[:2], data=[5]
    ),
    "iterative_prune: rescore must be a function of a model, got int": lambda m, s: discedit.iterative_prune(
        m, ratio=0.5, steps=2, example_inputs=X[:2], rescore=5
    ),
    "unlearn: scores must be a discedit.Scores, got dict": lambda m, s: discedit.unlearn(m, {}, classes=[1]),
    "unlearn: layers must be a list of names, got 5": lambda m, s: discedit.unlearn(m, s, classes=[1], layers=5),
    "unlearn: data must give batches, got int": lambda m, s: discedit.unlearn(m, s, classes=[1], data=5),
    "importances: scores must be a discedit.Scores, got list": lambda m, s: discedit.importances(
        m, [1.0], "l1", example_inputs=X[:2]
    ),
    "collect_moments: layers must be a list of names, got .1.": lambda m, s: discedit.collect_moments(
        m, DATA, CLASSES, layers=[1]
    ),
    "collect_moments: loader must give batches, got int": lambda m, s: discedit.collect_moments(m, 5, CLASSES),
    "collect_second_moments: layers must be a list of names, got 5": lambda m, s: collect_second_moments(
        m, DATA, layers=5
    ),
    "Stack: model must be a torch.nn.Module, got int": lambda m, s: discedit.Stack(5),
    "preset: name must be one of": lambda m, s: discedit.preset({}),
}


@pytest.mark.parametrize("said", WRONG)
def test_an_argument_of_a_wrong_type_is_named(said):
    model = network()
    scores = discedit.score(discedit.collect_moments(model, DATA, CLASSES))
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        WRONG[said](model, scores)


def test_an_empty_first_batch_shows_nothing():
    expected = discedit.collect_moments(network(), DATA, CLASSES)
    got = discedit.collect_moments(network(), [(X[:0], Y[:0]), *DATA], CLASSES)
    assert all(same_bits(got[layer], state) for layer, state in expected.items())
