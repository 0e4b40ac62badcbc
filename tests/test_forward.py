"""What a module does, whatever its class: told by running it. Closed forms leave alone what is not what it seems."""

from __future__ import annotations

import pytest
import torch
from helpers import unlearn_with
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import discedit
from discedit.model.layers import is_affine, takes_constants, why_not_plain


class SamePadding(nn.Conv2d):
    """Pads in its own forward, as TensorFlow does."""

    def forward(self, x):
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class StandardisedKernels(nn.Conv2d):
    """Each kernel by itself, so that input channels can go."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((2, 3), keepdim=True) + 1e-5), self.bias)


class EqualisedRate(nn.Linear):
    """Weights are multiplied by their initial scale at run time."""

    def forward(self, x):
        return functional.linear(x, self.weight * self.in_features**-0.5, self.bias)


class LowRank(nn.Linear):
    """Adds a product of small matrices to its weight."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.a, self.b = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class OnlyNamedOtherwise(nn.Conv2d):
    """Somebody's own forward that does what its parent does."""

    def forward(self, x):
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Overridden(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.abs(), bias)


def with_hook(layer, hook, before=False):
    (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)
    return layer


def replaced():
    layer = nn.Linear(5, 3)
    layer.forward = lambda x: functional.linear(x, layer.weight, layer.bias).relu()
    return layer


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(5, 3))


OTHER = {
    "same padding": lambda: SamePadding(4, 6, 3),
    "standardised": lambda: Standardised(4, 6, 3),
    "equalised learning rate": lambda: EqualisedRate(5, 3),
    "low rank": lambda: LowRank(5, 3),
    "_conv_forward": lambda: Overridden(4, 6, 3),
    "a hook that changes outputs": lambda: with_hook(nn.Linear(5, 3), lambda _, __, y: 2 * y),
    "a hook that changes inputs": lambda: with_hook(nn.Linear(5, 3), lambda _, x: (x[0] + 1,), before=True),
    "a forward of the instance": replaced,
    "in three dimensions": lambda: type("Shifted", (nn.Conv3d,), {"forward": lambda s, x: nn.Conv3d.forward(s, x) + 1})(
        2, 3, 2
    ),
    "needs more than its input": lambda: type("Two", (nn.Linear,), {"forward": lambda s, x, y: x})(5, 3),
}
PLAIN = {
    "convolution": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False),
    "reflecting": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
    "the same by another way": lambda: OnlyNamedOtherwise(4, 6, 3, padding=1),
    "a hook that looks": lambda: with_hook(nn.Conv2d(4, 6, 3), lambda *_: None),
    "a transposed one with a hook": lambda: with_hook(nn.ConvTranspose2d(4, 6, 3), lambda *_: None),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 3)),
    "weight norm by a hook": old_weight_norm,
    "half precision": lambda: OnlyNamedOtherwise(4, 6, 3).bfloat16(),
}


@pytest.mark.parametrize("kind", OTHER)
def test_layers_that_are_not_what_their_class_says(kind):
    layer = OTHER[kind]()
    assert "it is a " in why_not_plain(layer)


@pytest.mark.parametrize("kind", PLAIN)
def test_layers_that_are(kind):
    layer = PLAIN[kind]()
    before = torch.random.get_rng_state()
    assert why_not_plain(layer) == ""
    assert torch.equal(torch.random.get_rng_state(), before)


class WithActivation(nn.BatchNorm2d):
    """A batch norm with its activation inside, as timm has them."""

    def __init__(self, width, act):
        super().__init__(width)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


class Uncentred(nn.BatchNorm2d):
    """Does not use its running mean."""

    def forward(self, x):
        return x * self.weight[:, None, None]


@pytest.mark.parametrize(
    ("norm", "affine", "constants"),
    [
        (nn.BatchNorm2d(3), True, True),
        (WithActivation(3, nn.ReLU()), False, True),
        (WithActivation(3, nn.SiLU()), False, True),
        (WithActivation(3, nn.Identity()), True, True),
        (Uncentred(3), False, False),
        (with_hook(nn.BatchNorm1d(3), lambda _, __, y: y.tanh()), False, True),
    ],
    ids=["plain", "relu", "silu", "identity", "uncentred", "hook"],
)
def test_what_norms_do(norm, affine, constants):
    assert is_affine(norm.eval()) == affine
    assert takes_constants(norm) == constants


X = torch.randn(96, 2, 9, 9, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(96) % 3


def dead_inputs(reader, norm=None):
    """A network whose second layer reads channels of which some are always zero: to prune these costs nothing."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 8, 3)
    with torch.no_grad():
        first.weight[:3] = 0
        first.bias[:3] = -1
    behind = [norm(6)] if norm is not None else []
    return nn.Sequential(
        first, nn.ReLU(), reader, *behind, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()


READERS = {
    "same padding": lambda: SamePadding(8, 6, 3),
    "standardised": lambda: StandardisedKernels(8, 6, 3),
    "_conv_forward": lambda: Overridden(8, 6, 3),
    "a hook": lambda: with_hook(nn.Conv2d(8, 6, 3), lambda _, __, y: y.abs()),
    "plain": lambda: nn.Conv2d(8, 6, 3),
}


@pytest.mark.parametrize("repair", ["mean", "least_squares", "compensation"])
@pytest.mark.parametrize("kind", READERS)
def test_a_removal_that_costs_nothing_costs_nothing_after_the_repair(kind, repair):
    model = dead_inputs(READERS[kind]())
    importance = {"0": torch.tensor([0.0] * 3 + [1.0] * 5)}
    options = {"threshold": 0.5, "example_inputs": X[:2], "data": [X]}
    edit = discedit.prune(model, importance, repair=repair, **options)
    assert edit.model[0].out_channels == 5
    fresh = torch.randn(32, 2, 9, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (edit.model(fresh) - model(fresh)).norm() / model(fresh).norm()
    assert error < 1e-3
    skipped = edit.recipe.settings.get("unrepaired", {})
    assert ("2" in skipped) == (kind != "plain"), skipped


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity])
def test_a_norm_with_an_activation_inside_takes_what_its_layer_has_no_bias_for(act):
    """In a block whose norm's output is added to the stream, only where the norm is affine is the sum the target."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.inner = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 10, 3, padding=1)
            self.outer = nn.Conv2d(10, 6, 3, padding=1, bias=False)
            self.norm, self.head = WithActivation(6, act()), nn.Linear(6, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head((x + self.norm(self.outer(self.inner(x).relu()))).mean((2, 3)))

    model = Block()
    model.train()(X)
    model.eval()
    errors = {}
    for repair in ("none", "mean", "least_squares"):
        options = {"ratio": {"inner": 0.3}, "example_inputs": X[:2], "data": [X], "repair": repair, "criterion": "l1"}
        edit = discedit.prune(model, **options)
        fresh = torch.randn(64, 2, 9, 9, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            errors[repair] = float((edit.model(fresh) - model(fresh)).norm())
        assert "unrepaired" not in edit.recipe.settings
    assert errors["least_squares"] < errors["mean"] < errors["none"]


# ---- ablation -------------------------------------------------------------------------------------------------------


def edited_by_rows(layer, norm=None, **options):
    """A network with some rows of a layer edited, and what these give behind the norm, before and after."""
    torch.manual_seed(0)
    behind = [norm] if norm is not None else []
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), layer, *behind, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    model.train()(X)
    model.eval()
    scores = discedit.score(discedit.collect_moments(model, [(X, LABELS)], 3))
    edit = unlearn_with(model, scores, classes=[1], layers=["2"], fraction=0.4, **options)
    place = 3 if norm is not None else 2
    with torch.no_grad():
        before, after = (net[: place + 1](X) for net in (model, edit.model))
    rows = edit.recipe.components["2"]
    others = [row for row in range(6) if row not in rows]
    torch.testing.assert_close(after[:, others], before[:, others])
    return before[:, rows], after[:, rows]


@pytest.mark.filterwarnings("ignore:unlearn")
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity])
def test_zeroed_rows_give_zero_behind_a_norm_with_an_activation_inside(act):
    before, after = edited_by_rows(nn.Conv2d(8, 6, 3), WithActivation(6, act()), around="zero")
    assert before.abs().max() > 0.1
    assert not after.any()


@pytest.mark.filterwarnings("ignore:unlearn")
@pytest.mark.parametrize("options", [{"factor": 0.5}, {"around": "mean", "data": [(X, LABELS)]}])
def test_what_such_a_norm_cannot_give_is_refused_with_what_to_do(options):
    with pytest.raises(
        ValueError, match=r"layer '2' cannot be edited: its components .* the norm '3' .* EraseDirections"
    ):
        edited_by_rows(nn.Conv2d(8, 6, 3), WithActivation(6, nn.SiLU()), **options)
    if "factor" in options:  # of the outputs that a ReLU leaves, as of all
        before, after = edited_by_rows(nn.Conv2d(8, 6, 3), WithActivation(6, nn.ReLU()), **options)
        torch.testing.assert_close(after, 0.5 * before)
    else:
        with pytest.raises(ValueError, match="do not give the mean behind the norm '3'"):
            edited_by_rows(nn.Conv2d(8, 6, 3), WithActivation(6, nn.ReLU()), **options)
    before, after = edited_by_rows(nn.Conv2d(8, 6, 3), WithActivation(6, nn.Identity()), **options)
    mean = before.mean((0, 2, 3), keepdim=True) if "around" in options else 0.0
    if "factor" in options:
        torch.testing.assert_close(after, 0.5 * before)
    else:
        assert float(after.std((0, 2, 3)).max()) < 1e-5
        assert (after.mean((0, 2, 3)) - mean.flatten()).abs().max() < 0.5


def test_an_activation_with_bounds_is_not_attenuated():
    """Its bounds are reached neither by small random input nor, without data, by anything else."""
    error = "do not give 0.5 times their output .* take scale=0, around='zero', or leave the layer out"
    with pytest.raises(ValueError, match=error):
        edited_by_rows(nn.Conv2d(8, 6, 3), WithActivation(6, nn.ReLU6()), factor=0.5)


@pytest.mark.parametrize("kind", ["standardised", "_conv_forward", "a hook"])
def test_rows_of_layers_that_are_not_what_they_seem_are_not_edited(kind):
    with pytest.raises(
        ValueError, match=r"layer '2' cannot be edited: it is a .*, whose output is not what Conv2d makes"
    ):
        edited_by_rows(READERS[kind](), around="zero")


class GroupNormAct(nn.GroupNorm):
    """As timm's: with the activation inside."""

    def forward(self, x):
        return functional.silu(super().forward(x))


class AroundOne(nn.GroupNorm):
    """Weights count from one, as in Gemma's norms."""

    def forward(self, x):
        return functional.group_norm(x, self.num_groups, 1 + self.weight, self.bias, self.eps)


class OfSmallMaps(nn.BatchNorm2d):
    """By itself, on small maps, a plain norm."""

    def forward(self, x):
        return super().forward(x) + float(x.shape[-1] > 6)


@pytest.mark.filterwarnings("ignore:unlearn")
@pytest.mark.parametrize(
    ("norm", "options", "what"),
    [
        (GroupNormAct(2, 6), {"factor": 0.5}, "0.5 times their output"),
        (GroupNormAct(2, 6), {"around": "mean", "data": [(X, LABELS)]}, "the mean"),
        (AroundOne(2, 6), {"factor": -1}, "-1 times their output"),
    ],
    ids=["activation", "mean", "around one"],
)
def test_other_norms_are_tried_before_rows_are_chosen(norm, options, what):
    with pytest.raises(
        ValueError,
        match=f"layer '2' cannot be edited: its components do not give {what} .*norm '3' when .* EraseDirections",
    ):
        edited_by_rows(nn.Conv2d(8, 6, 3), norm, **options)


def two_normed_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), OfSmallMaps(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    model.train()(X)
    model.eval()
    return model, discedit.score(discedit.collect_moments(model, [(X, LABELS)], 3))


@pytest.mark.filterwarnings("ignore:unlearn")
@pytest.mark.parametrize("options", [{}, {"factor": 0.5}, {"around": "mean"}], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_whose_ablation_does_not_hold_is_left_as_it_was(options, inplace):
    """Seen on data alone: by itself, on small maps, its norm is what it seems."""
    model, scores = two_normed_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"classes": [1], "data": [(X, LABELS)], "sign": "any", "top": 2, **options}
    edit = unlearn_with(model, scores, layers=["0", "3"], inplace=inplace, **options)
    assert list(edit.recipe.components) == ["3"]
    assert list(edit.skipped) == ["0"]
    assert "behind the norm '1' when their weights are made to" in edit.skipped["0"]
    for name, tensor in edit.model.state_dict().items():
        assert name.startswith(("3.", "4.")) or torch.equal(tensor, before[name])
    model, scores = two_normed_layers()
    with pytest.raises(ValueError, match="unlearn: layer '0' cannot be edited: its components do not give"):
        unlearn_with(model, scores, layers=["0"], inplace=inplace, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
