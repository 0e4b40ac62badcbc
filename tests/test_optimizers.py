"""Optimizers that were built before an edit, made over for the edited model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from discedit import collect_moments, prune, score, unlearn

CLASSES = 3
X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % CLASSES

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam with a tensor for lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES))


def pruned(model, inplace=False, **options):
    scores = score(collect_moments(model, [(X, Y)], CLASSES))
    edit = prune(model, scores, ratio=0.5, example_inputs=X[:2], **options)
    return edit.recipe.apply(model, inplace=True) if inplace else edit


def backward(model):
    loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward()
    return loss.item()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def entries_left(edit):
    """Parameter name -> what the edit leaves of a tensor of its old shape, from the components alone."""
    left0, left2 = (
        torch.tensor(sorted(set(range(width)) - set(edit.recipe.components[layer])))
        for layer, width in (("0", 8), ("2", 6))
    )
    return {
        "0.weight": lambda t: t[left0],
        "0.bias": lambda t: t[left0],
        "2.weight": lambda t: t[left2][:, left0],
        "2.bias": lambda t: t[left2],
        "4.weight": lambda t: t[:, left2],
        "4.bias": lambda t: t,
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_old_optimizers_step_on_what_is_left(name, inplace):
    """With the same gradients, entry by entry: state, step counts and hyperparameters must all have come along."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    reference = copy.deepcopy(model)
    reference_optimizer = OPTIMIZERS[name](reference.parameters())
    reference_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    edit = pruned(model, inplace=inplace)
    new = edit.optimizer(optimizer)
    left = entries_left(edit)
    assert type(new) is type(optimizer)
    torch.manual_seed(1)
    for _ in range(2):
        for (key, whole), part in zip(reference.named_parameters(), edit.model.parameters(), strict=True):
            whole.grad = torch.randn(whole.shape)
            part.grad = left[key](whole.grad).clone()
        reference_optimizer.step()
        new.step()
        for (key, whole), part in zip(reference.named_parameters(), edit.model.parameters(), strict=True):
            torch.testing.assert_close(part, left[key](whole), rtol=0, atol=0)


def test_nothing_is_shared_with_the_old_one():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    edit = pruned(model)
    new = edit.optimizer(optimizer)
    new.param_groups[0]["lr"].fill_(7.0)
    train(edit.model, new)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(after["state"][i][key], value)


def test_groups_and_frozen_parameters():
    model = network()
    groups = [
        {"params": list(model[4].named_parameters(prefix="4")), "lr": 0.5, "weight_decay": 0.25},
        {"params": [("0.bias", model[0].bias)], "betas": (0.5, 0.75)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.125)
    train(model, optimizer)
    edit = pruned(model)
    new = edit.optimizer(optimizer)
    for old_group, group in zip(optimizer.param_groups, new.param_groups, strict=True):
        assert {key: value for key, value in group.items() if key != "params"} == {
            key: value for key, value in old_group.items() if key != "params"
        }
    held = [[id(parameter) for parameter in group["params"]] for group in new.param_groups]
    assert held == [[id(edit.model[4].weight), id(edit.model[4].bias)], [id(edit.model[0].bias)]]
    fixed = edit.model[2].weight.clone()
    train(edit.model, new)
    assert torch.equal(edit.model[2].weight, fixed)


@pytest.mark.parametrize("inplace", [False, True])
def test_replaced_values_keep_their_state(inplace):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    edit = pruned(model, data=[X], repair="least_squares", inplace=inplace)
    assert any(operation.kind == "set" for operation in edit.recipe.operations)
    new, left = edit.optimizer(optimizer), entries_left(edit)
    old = [state["momentum_buffer"] for state in optimizer.state.values()]
    for (key, parameter), momentum in zip(edit.model.named_parameters(), old, strict=True):
        assert torch.equal(new.state[parameter]["momentum_buffer"], left[key](momentum))
    losses = [backward(edit.model)]
    train(edit.model, new, steps=20)
    losses.append(backward(edit.model))
    assert losses[1] < losses[0]


def test_unlearning_keeps_shapes_and_state():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    scores = score(collect_moments(model, [(X, Y)], CLASSES))
    for inplace in (False, True):
        edit = unlearn(model, scores, classes=[1])
        edit = edit.recipe.apply(model, inplace=True) if inplace else edit
        new = edit.optimizer(optimizer)
        assert [id(p) for p in new.param_groups[0]["params"]] == [id(p) for p in edit.model.parameters()]
        for mine, theirs in zip(new.state.values(), optimizer.state.values(), strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    train(model, optimizer)  # edited in place, no parameter was replaced


def test_the_copied_model_still_trains():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    edit = pruned(model)  # while the model has gradients, which the copy must not take for its own
    assert all(parameter.grad is None for parameter in edit.model.parameters())
    lone = copy.deepcopy(model)
    lone_optimizer = torch.optim.SGD(lone.parameters(), lr=0.1, momentum=0.9)
    lone_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    new = edit.optimizer(optimizer)
    for _ in range(3):  # both in turns
        train(edit.model, new, steps=1)
        train(model, optimizer, steps=1)
        train(lone, lone_optimizer, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), lone.parameters(), strict=True))


def test_accumulated_gradients_are_one_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edit = pruned(model)
    new = edit.optimizer(optimizer)
    before = copy.deepcopy(edit.model)
    for _ in range(2):
        backward(edit.model)
    expected = [old - 0.1 * now.grad for old, now in zip(before.parameters(), edit.model.parameters(), strict=True)]
    new.step()
    for parameter, value in zip(edit.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_with_the_new_one(name):
    rates = []
    for edited in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for epoch in range(8):
            if edited and epoch == 3:
                edit = pruned(model)
                model = edit.model
                scheduler.optimizer = optimizer = edit.optimizer(optimizer)
            train(model, optimizer, steps=1)
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 3


def test_old_models_are_not_kept_alive():
    model = network()
    edit = pruned(model)
    held = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert held() is None
    assert len(edit._names) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda edit: pickle.loads(pickle.dumps(edit))])
def test_an_edit_can_be_copied_and_pickled(copied):
    model = network()
    edit = pruned(model)
    again = copied(edit)
    assert again.recipe.components == edit.recipe.components
    assert torch.equal(again.model(X), edit.model(X))
    with pytest.raises(ValueError, match="6 of its 6 are not in it"):
        again.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))


def test_bad_input():
    model = network()
    edit = pruned(model)
    with pytest.raises(TypeError, match="Edit.optimizer: optimizer must be a torch.optim.Optimizer, got list"):
        edit.optimizer(list(model.parameters()))
    strange = [*model.parameters(), nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="must hold parameters of the model before the edit, 1 of its 7 are not in it"):
        edit.optimizer(torch.optim.SGD(strange, lr=0.1))
    with pytest.raises(ValueError, match="6 of its 6 are not in it"):
        edit.optimizer(torch.optim.SGD(edit.model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    edit.model[4] = nn.Linear(3, 7)
    with pytest.raises(ValueError, match=r"its parameter '4.weight' is of shape \[7, 3\] instead of \[3, 3\]"):
        edit.optimizer(optimizer)
    edit.model[4] = nn.Identity()
    with pytest.raises(ValueError, match=r"as the edit left it, its parameter '4.weight' is gone"):
        edit.optimizer(optimizer)


def test_state_that_cannot_be_cut_is_refused():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match=r"LBFGS keeps '\w+' of .* for a parameter of shape \(8, 5\); build"):
        pruned(model).optimizer(optimizer)
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, steps=1)
    with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var' of shape \(8, 1\) for a parameter of shape"):
        pruned(model).optimizer(optimizer)
