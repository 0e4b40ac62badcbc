"""Budgets by divergence: trials against what they stand for, and the spending against brute force."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

import discedit
from discedit import DivergenceTable, GlobalRatio, MaxMacs, MaxParameters, MeasureDivergence, prune
from discedit.editing import divergence
from discedit.model.forward import frozen_eval
from discedit.model.replay import Replay
from discedit.model.trace import ModelTrace
from discedit.moments import calibration
from discedit.moments.calibration import HeldOut
from discedit.recipes.divergences import LayerDivergence
from discedit.selection.divergence import least_divergence


class Block(nn.Module):
    def __init__(self, width, *, inplace):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return functional.relu_(out + x)


class Two(nn.Module):
    """Gives a pair, and takes one."""

    def forward(self, x):
        return x, x.mean((2, 3))


class Net(nn.Module):
    def __init__(self, *, inplace=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=inplace))
        self.blocks = nn.Sequential(Block(8, inplace=inplace), Block(8, inplace=inplace))
        self.two = Two()
        self.hidden, self.head = nn.Linear(16, 10), nn.Linear(10, 5)

    def forward(self, x):
        maps, vector = self.two(self.blocks(self.stem(x).mul_(1.0)))
        return self.head(functional.relu(self.hidden(torch.cat([maps.amax((2, 3)), vector], 1))))


def trained(model, seed=0):
    """Weights and statistics that differ from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor + 0.3 * torch.randn(tensor.shape, generator=generator).abs() * (tensor.abs().mean()))
    return model.eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return trained(Net())


@pytest.fixture
def images():
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ran(model):
    """Names of the modules that compute, in a list that fills as the model runs."""
    names, forwards = [], {}
    for name, module in model.named_modules():
        if not list(module.children()):
            forwards[name] = type(module).forward

            def forward(*args, name=name, module=module):
                names.append(name)
                return forwards[name](module, *args)

            module.forward = forward
    return names


STARTS = ["stem.0", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "two", "hidden", "head"]


@pytest.mark.parametrize("inplace", [True, False])
def test_a_replay_gives_what_the_model_does_and_computes_only_what_follows(images, inplace):
    torch.manual_seed(0)
    model = trained(Net(inplace=inplace))
    trace = ModelTrace.of(model, images)
    before = copy.deepcopy(model.state_dict())
    expected = model(images).detach()
    names = ran(model)
    with frozen_eval(model):
        replay = Replay(trace, images)
        for start in STARTS:  # each from the one before
            replay.start_at(start)
            for _ in range(2):
                names.clear()
                assert torch.equal(replay.run(), expected)
                assert names[0] == start
        model.head.weight.mul_(2)
        torch.testing.assert_close(replay.run() - model.head.bias, 2 * (expected - model.head.bias))
        model.head.weight.div_(2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    names.clear()
    assert torch.equal(model(images), expected)
    assert "stem.0" in names  # nothing is left behind


def test_a_replay_leaves_modules_alone_that_somebody_hooks(net, images):
    net.stem.register_forward_hook(lambda module, args, output: output + 1)
    expected = net(images)
    replay = Replay(ModelTrace.of(net, images), images)
    with frozen_eval(net):
        replay.start_at("hidden")
        assert torch.equal(replay.run(), expected)


def trials(net, images, layers, **options):
    graph = discedit.graph.pruning_graph.Graph("prune", net, images)
    trace = ModelTrace.of(net, images)
    held_out = HeldOut(images[:1], 1, apart=False)
    parts = [images[:16], images[16:]]
    return divergence._Trials("prune", graph, layers, parts, held_out, trace, options.get("samples", 24))


def test_trials_run_on_samples_that_no_fit_has_seen(net, monkeypatch):
    """Also where there are more samples than memory has room for at once."""
    x = torch.randn(160, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(calibration, "MEMORY", 30 * calibration.MAPS * ModelTrace.of(net, x).largest)
    fitted, ran, fits_of, replay = [], [], divergence.fits_of, divergence.Replay

    def fits(model, names, inputs, trace):
        fitted.extend(inputs)
        return fits_of(model, names, inputs, trace)

    monkeypatch.setattr(divergence, "fits_of", fits)
    monkeypatch.setattr(divergence, "Replay", lambda trace, inputs: ran.append(inputs) or replay(trace, inputs))
    edit = prune(net, example_inputs=x[:1], data=x.split(40), budget=MaxMacs(0.7, across=MeasureDivergence(samples=10)))
    assert edit.recipe.settings["budget"]["met"]
    samples = calibration.ROOMS * 30
    assert torch.equal(torch.cat(fitted), x[:samples])
    assert torch.equal(torch.cat(ran), x[samples : samples + 10])


def test_a_trial_is_the_model_with_its_consumer_fitted_to_what_is_left(net, images):
    """Against the formula, for a linear layer: every row is looked at."""
    found = trials(net, images, ["hidden"])
    given = []
    net.head.register_forward_hook(lambda module, args, output: given.append((args[0].double(), output.double())))
    with torch.no_grad():
        net(images)
    [(x, z)] = given
    gone = [1, 4, 7]
    kept = [i for i in range(10) if i not in gone]
    weight, mean = net.head.weight.detach().double(), x.mean(0)
    s = torch.cov(x.T, correction=0)
    ridge = divergence.RIDGE * s[kept][:, kept].diagonal().mean() * torch.eye(len(kept))
    change = (weight @ s[:, kept] - weight[:, kept] @ s[kept][:, kept]) @ torch.linalg.inv(s[kept][:, kept] + ridge)
    fitted = weight[:, kept] + change
    y = (x[:, kept] - mean[kept]) @ fitted.T + z.mean(0)
    around = z - z.mean(1, keepdim=True)
    error = (y - z) - (y - z).mean(1, keepdim=True)
    expected = float(error.square().sum() / around.square().sum())
    assert found.divergence("hidden", gone) == pytest.approx(expected, rel=1e-3)
    assert 0 < expected < found.divergence("hidden", [*gone, 0, 2])


def test_trials_change_nothing_and_agree_with_a_run_of_the_whole(net, images):
    before = copy.deepcopy(net.state_dict())
    layers = ["blocks.0.conv1", "blocks.1.conv1", "hidden"]
    found = trials(net, images, layers)
    first = {layer: found.divergence(layer, [0, 3, 5]) for layer in layers}
    assert all(0 < value < 1 for value in first.values())
    whole = trials(net, images, layers)
    whole.replays = [Replay(ModelTrace(whole.model), replay.inputs) for replay in whole.replays]  # keep nothing
    again = {layer: whole.divergence(layer, [0, 3, 5]) for layer in reversed(layers)}
    assert again == pytest.approx(first, rel=1e-6)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_channels_under_a_layer_norm_are_removed_not_hidden():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    x = torch.randn(20, 6)
    found = trials(net, x, ["0"], samples=20)
    kept = [0, 2, 3, 5, 6, 7]
    with torch.no_grad():
        hidden = functional.layer_norm(net[0](x)[:, kept], (6,), net[1].weight[kept], net[1].bias[kept])
        change = hidden @ net[2].weight[:, kept].T + net[2].bias - net(x)
        around = net(x) - net(x).mean(1, keepdim=True)
    expected = (change - change.mean(1, keepdim=True)).square().sum() / around.square().sum()
    assert found.divergence("0", [1, 4]) == pytest.approx(float(expected), rel=1e-4)


def curves_and_cost(seed, layers=3, width=6):
    """Divergences that grow faster and faster, and a cost that multiplies neighbours."""
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for i in range(layers):
        steps = torch.rand(width - 1, generator=generator, dtype=torch.float64).sort().values
        curves[str(i)] = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    weights = torch.rand(layers + 1, generator=generator).add(0.2).tolist()

    def cost(gone):
        left = [4, *(width - gone.get(str(i), 0) for i in range(layers)), 4]
        return sum(w * a * b for w, a, b in zip(weights, left, left[1:], strict=False))

    return curves, cost


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_spending_is_near_the_best_there_is(seed, share):
    curves, cost = curves_and_cost(seed)
    permitted = {layer: list(range(len(curve))) for layer, curve in curves.items()}
    permitted["1"] = [0, 2, 4]  # such as a multiple asks for
    room = share * cost({})
    found = least_divergence(curves, permitted, cost, room)
    assert cost(found) <= room
    assert all(number in permitted[layer] for layer, number in found.items())

    def lost(gone):
        return sum(float(curves[layer][number]) for layer, number in gone.items())

    every = [dict(zip(permitted, numbers, strict=True)) for numbers in itertools.product(*permitted.values())]
    best = min(lost(gone) for gone in every if cost(gone) <= room)
    assert lost(found) <= 1.25 * best + 1e-9
    for layer, number in found.items():  # nothing can be given back
        fewer = max((n for n in permitted[layer] if n < number), default=None)
        assert fewer is None or cost({**found, layer: fewer}) > room


def test_spending_where_nothing_fits_or_nothing_has_to_go():
    curves, cost = curves_and_cost(0)
    permitted = {layer: list(range(4)) for layer in curves}
    assert least_divergence(curves, permitted, cost, 0.0) == dict.fromkeys(curves, 3)
    assert least_divergence(curves, permitted, cost, cost({})) == dict.fromkeys(curves, 0)
    free = {layer: torch.zeros(6, dtype=torch.float64) for layer in curves}
    assert cost(least_divergence(free, permitted, cost, 0.5 * cost({}))) <= 0.5 * cost({})
    endless = {layer: torch.tensor([0.0, torch.inf, torch.inf, torch.inf]) for layer in curves}
    assert cost(least_divergence(endless, permitted, cost, 0.5 * cost({}))) <= 0.5 * cost({})


def test_a_curve_goes_through_its_trials_and_never_falls():
    layer = LayerDivergence(torch.rand(9), torch.tensor([2, 4, 6]), torch.tensor([0.04, 0.01, 0.16]).double())
    curve = layer.curve()
    assert curve.tolist() == pytest.approx([0, 0.01, 0.04, 0.04, 0.04, 0.09, 0.16, 0.36, 0.64])
    assert LayerDivergence(torch.rand(1), torch.tensor([]).long(), torch.tensor([]).double()).curve().tolist() == [0.0]


def test_prune_spends_by_divergence_where_it_repairs_and_keeps_the_table(net, images, tmp_path):
    data = [images[:12], images[12:]]
    edit = prune(net, example_inputs=images[:2], data=data, macs=0.6)
    table = edit.divergences
    assert set(table) == {"blocks.0.conv1", "blocks.1.conv1", "hidden"}
    assert edit.recipe.settings["across"] == "divergence"
    assert edit.recipe.settings["criterion"] == table.settings["criterion"] == "l2"
    assert edit.macs_after <= 0.6 * edit.macs_before
    json.dumps(edit.recipe.settings)
    by_rank = prune(net, example_inputs=images[:2], data=data, budget=MaxMacs(0.6, across="rank"))
    assert by_rank.divergences is None
    none = prune(net, example_inputs=images[:2], data=data, macs=0.6, repair="none")
    assert none.divergences is None

    def spent(edit):
        return sum(float(table[layer].curve()[len(rows)]) for layer, rows in edit.recipe.components.items())

    assert spent(edit) <= spent(by_rank)
    # For another budget, without data; the same components go for the same one.
    table.save(tmp_path / "table.safetensors")
    loaded = DivergenceTable.load(tmp_path / "table.safetensors")
    assert repr(loaded) == repr(table)
    again = prune(net, example_inputs=images[:2], budget=MaxMacs(0.6, across=loaded))
    assert again.recipe.components == edit.recipe.components
    for budget in (MaxParameters(0.5, across=loaded, round_to=2), GlobalRatio(0.3, across=loaded, floor=4)):
        other = prune(net, example_inputs=images[:2], budget=budget)
        assert other.recipe.settings["budget"]["met"] or budget.round_to == 2
        assert all(len(rows) % budget.round_to == 0 for rows in other.recipe.components.values())
    assert sum(map(len, other.recipe.components.values())) == 11  # ceil(0.3 * 34)
    assert "1/2" in table.summary()
    figure = table.plot(tmp_path / "table.png", removed={k: len(v) for k, v in edit.recipe.components.items()})
    assert [line.get_label() for line in figure.axes[0].lines if len(line.get_xdata()) > 1] == list(table)
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_a_table_is_refused_for_another_model_and_other_components(net, images):
    table = prune(net, example_inputs=images, data=[images], macs=0.8).divergences
    options = {"example_inputs": images, "budget": MaxMacs(0.6, across=table)}
    smaller = prune(net, example_inputs=images, ratio=0.5).model
    with pytest.raises(ValueError, match="prune: across must be a table of this model"):
        prune(smaller, **options)
    edit = prune(net, components="all", **options)  # what it does not have stays whole
    assert edit.skipped["stem.0"] == "the table of divergences does not have it"
    with pytest.raises(ValueError, match="layer 'stem.0' cannot be pruned: the table of divergences does not have it"):
        prune(net, components="all", layers=["stem.0", "hidden"], **options)
    other = copy.deepcopy(table)
    other.layers["hidden"] = other["blocks.0.conv1"]
    with pytest.raises(ValueError, match="a table of the same components, layer 'hidden' has 10, in the table 12"):
        prune(net, example_inputs=images, budget=MaxMacs(0.6, across=other))
    with pytest.raises(ValueError, match="criterion and importances must be left out .* got criterion='l1'"):
        prune(net, criterion="l1", **options)
    with pytest.raises(ValueError, match="must be left out .* got importances as scores"):
        prune(net, {"hidden": torch.rand(10)}, **options)


def test_trials_are_bounded_and_a_file_goes_on(net, images, tmp_path, monkeypatch):
    path, calls = tmp_path / "table.safetensors", []
    measure = divergence._Trials.divergence

    def counted(self, layer, gone):
        calls.append(layer)
        if stop and len(calls) > stop:
            raise KeyboardInterrupt
        return measure(self, layer, gone)

    monkeypatch.setattr(divergence._Trials, "divergence", counted)
    how = MeasureDivergence(samples=10, trials=7, path=path)
    options = {"example_inputs": images, "data": [images], "budget": MaxMacs(0.6, across=how)}
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        prune(net, **options)
    stop, done = 0, len(calls) - 1
    assert done == 3
    calls.clear()
    edit = prune(net, **options)
    assert len(calls) == 4  # of the two layers that were not in the file: 7 // 3 levels for each
    assert (edit.divergences.settings["samples"], edit.divergences.settings["levels"]) == (10, 2)
    calls.clear()
    assert prune(net, **options).recipe.components == edit.recipe.components
    assert not calls
    given = {layer: torch.rand(width) for layer, width in (("blocks.0.conv1", 12), ("hidden", 10))}
    for changed in ({"data": [images + 1]}, {"criterion": "l1"}, {"scores": given}):
        with pytest.raises(ValueError, match="MeasureDivergence.path must name a new file, or one of the same model"):
            prune(net, **{**options, **changed})
    with pytest.raises(ValueError, match="across must allow one trial for each layer, .* trials=2 for 3 layers"):
        prune(net, example_inputs=images, data=[images], budget=MaxMacs(0.6, across=MeasureDivergence(trials=2)))


@pytest.mark.parametrize(("arguments", "rule"), [({"samples": 0}, "samples"), ({"trials": 1.5}, "trials")])
def test_bad_arguments_of_the_measure(arguments, rule):
    with pytest.raises(ValueError, match=f"MeasureDivergence: {rule} must be an integer of at least 1, got"):
        MeasureDivergence(**arguments)


def test_divergence_needs_data_that_gives_finite_outputs(net, images):
    with pytest.raises(
        ValueError, match="prune: across=MeasureDivergence.* needs data to run trials on, got data=None"
    ):
        prune(net, example_inputs=images, budget=MaxMacs(0.6, across="divergence"))
    bad = images.clone()
    bad[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        prune(net, example_inputs=images, data=[bad], macs=0.6)


def test_damaged_tables_are_refused(net, images, tmp_path):
    path = tmp_path / "table.safetensors"
    prune(net, example_inputs=images, data=[images], macs=0.8).divergences.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        DivergenceTable.load(path)
    with pytest.raises(FileNotFoundError):
        DivergenceTable.load(tmp_path / "none")
