"""Importances of components: weights by hand, and what readers lose by brute force on the same rows."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from discedit import Random, Scores, importances, prune
from discedit.editing.prune import BEST_WITH
from discedit.model.trace import ModelTrace
from discedit.moments import positions
from discedit.moments.covariances import LayerMoments
from discedit.selection import importance
from discedit.selection.importance import RIDGE, ConsumerStatistics

KINDS = ("filters", "neurons")
SETTINGS = {"bound": "minimax", "witness": "linear", "statistic": "mean", "norms": {}}


@pytest.fixture(autouse=True)
def _every_position(monkeypatch):
    """Then what is computed here, on all of them, must be what comes out."""
    monkeypatch.setattr(positions, "ROWS_PER_UNKNOWN", 10**6)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores_of(model, layers, seed=None):
    """Scores of two classes, random or, without a seed, all 0.5."""
    values = {}
    generator = torch.Generator().manual_seed(seed or 0)
    for layer in layers:
        width = len(model.get_submodule(layer).weight)
        values[layer] = torch.rand(width, 2, generator=generator, dtype=torch.float64)
        if seed is None:
            values[layer].fill_(0.5)
    return Scores(values, {}, torch.tensor([20, 20]), **SETTINGS)


def judged(model, inputs, criterion, layers, scores=None, seed=0):
    scores = scores_of(model, layers) if scores is None else scores
    options = {"example_inputs": inputs[:2], "data": [inputs], "components": KINDS}
    return importances(model, scores, Random(seed) if criterion == "random" else criterion, **options)


class Branches(nn.Module):
    """Two layers read the same one."""

    def __init__(self):
        super().__init__()
        self.one, self.left, self.right = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Conv2d(5, 3, 1, bias=False)

    def forward(self, x):
        x = self.one(x).relu()
        return torch.cat([self.left(x).flatten(1), self.right(x).flatten(1)], 1)


class Joined(nn.Module):
    """One layer reads two others side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.reader = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Conv2d(9, 4, 2)

    def forward(self, x):
        return self.reader(torch.cat([self.one(x).relu(), self.two(x).tanh()], 1)).flatten(1)


def normed():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten())
    with torch.no_grad():
        net[3].weight.copy_(torch.tensor([3.0, 0.1, 1.0, -2.0]))
        net[3].running_var.copy_(torch.tensor([0.5, 1.0, 4.0, 0.1]))
        net[3].running_mean.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0]))
    return net


# The net, its input, and for each layer its readers, with the first channel and the channels of each component.
NETS = {
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.Flatten()),
        (3, 8, 8),
        {"0": {"2": (0, 1)}},
    ),
    "batch norm": (normed, (3, 7, 7), {"0": {"2": (0, 1)}}),
    "two readers": (Branches, (3, 6, 6), {"one": {"left": (0, 1), "right": (0, 1)}}),
    "side by side": (Joined, (3, 6, 6), {"one": {"reader": (0, 1)}, "two": {"reader": (4, 1)}}),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 7)),
        (3, 6, 6),
        {"0": {"4": (0, 4)}},
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4)), (9, 5), {"0": {"2": (0, 1)}}),
}


@pytest.fixture(params=NETS, scope="module")
def case(request):
    make, shape, readers = NETS[request.param]
    torch.manual_seed(0)
    return make().eval(), seeded(60, *shape), readers


def rows_of(model, inputs, reader):
    """Everything that a layer reads, centred: (rows, columns) float64."""
    read = []
    layer = model.get_submodule(reader)
    handle = layer.register_forward_hook(lambda _, args, __: read.append(args[0].double()))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    x = read[0]
    if isinstance(layer, nn.Conv2d):
        x = functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
    x = x.flatten(0, -2)
    return x - x.mean(0)


class Reader:
    """What a layer loses without some of the channels that it reads: least squares on all rows."""

    def __init__(self, model, inputs, name, first, each, worth=None):
        layer = model.get_submodule(name)
        self.rows = rows_of(model, inputs, name)
        self.weights = layer.weight.detach().flatten(1).double()
        channels = layer.weight.shape[1]
        self.columns = torch.arange(len(self.weights[0])).view(channels, -1)[first:]
        self.each = each
        self.worth = torch.ones(len(self.weights)).double() if worth is None else worth
        if name in (norms := ModelTrace.of(model, inputs).norms):
            norm = model.get_submodule(norms[name])
            self.worth = self.worth * norm.weight.detach().double() ** 2 / (norm.running_var.double() + norm.eps)
        self.total = ((self.rows @ self.weights.T).square().mean(0) * self.worth).sum()

    def of(self, component):
        return self.columns[component * self.each : (component + 1) * self.each].flatten()

    def energy(self, component):
        columns = self.of(component)
        part = self.rows[:, columns] @ self.weights[:, columns].T
        return float(part.var(0, correction=0) @ self.worth / self.total)

    def loss(self, components):
        """Without these, the others having new weights, which cost a ridge where they move."""
        gone = torch.cat([self.of(component) for component in components])
        kept = [column for column in range(len(self.weights[0])) if column not in gone.tolist()]
        pull = (RIDGE * self.rows.square().mean() * len(self.rows)).sqrt()
        rows = torch.cat([self.rows, pull * torch.eye(len(self.weights[0]), dtype=torch.float64)])
        target = rows @ self.weights.T
        ours = rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], target, driver="gelsd").solution if kept else 0.0
        return float((target - ours).square().sum(0) @ self.worth / len(self.rows) / self.total)


def readers_of(model, inputs, readers, worth=None):
    worth = {} if worth is None else worth
    return [Reader(model, inputs, name, *block, worth.get(name)) for name, block in readers.items()]


def assert_cheapest_first(values, readers):
    """Whichever goes next costs least, and importance is what all that went so far cost."""
    order = values.argsort().tolist()
    for length in range(1, len(order) + 1):
        before = order[: length - 1]
        costs = {c: sum(r.loss([*before, c]) for r in readers) for c in range(len(order)) if c not in before}
        last = order[length - 1]
        assert costs[last] <= min(costs.values()) + 1e-6
        assert float(values[last]) == pytest.approx(costs[last], rel=1e-3, abs=1e-6)
    assert bool((values[order].diff() >= 0).all())


def test_energy_is_the_variance_of_a_components_own_part(case):
    model, inputs, layers = case
    values = judged(model, inputs, "energy", list(layers))
    assert values.keys() == layers.keys()
    for layer, blocks in layers.items():
        readers = readers_of(model, inputs, blocks)
        expected = [sum(r.energy(c) for r in readers) for c in range(len(values[layer]))]
        torch.testing.assert_close(values[layer], torch.tensor(expected).double(), rtol=1e-4, atol=1e-7)
        assert min(expected) > 1e-4


def test_reconstruction_is_what_new_weights_cannot_make_up_for(case):
    model, inputs, layers = case
    values = judged(model, inputs, "reconstruction", list(layers))
    assert values.keys() == layers.keys()
    for layer, blocks in layers.items():
        assert_cheapest_first(values[layer], readers_of(model, inputs, blocks))


def test_combined_counts_an_output_by_its_best_class(case):
    model, inputs, layers = case
    names = {reader for blocks in layers.values() for reader in blocks}
    scores = scores_of(model, [*layers, *names], seed=1)
    values = judged(model, inputs, "combined", list(layers), scores)
    worth = {name: scores[name].max(1).values for name in names}
    for layer, blocks in layers.items():
        assert_cheapest_first(values[layer], readers_of(model, inputs, blocks, worth))
    plain = judged(model, inputs, "reconstruction", list(layers), scores)
    assert any(not torch.allclose(values[layer], plain[layer], rtol=1e-3) for layer in layers)


def test_combined_with_equal_scores_is_reconstruction(case):
    model, inputs, layers = case
    scores = scores_of(model, [*layers, *{reader for blocks in layers.values() for reader in blocks}])
    combined = judged(model, inputs, "combined", list(layers), scores)
    plain = judged(model, inputs, "reconstruction", list(layers), scores)
    for layer in layers:
        ratio = combined[layer] / plain[layer]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


def test_nan_scores_of_a_class_without_samples_count_nothing():
    torch.manual_seed(0)
    model, inputs = NETS["tokens"][0]().eval(), seeded(60, 9, 5)
    scores = scores_of(model, ["0", "2"], seed=1)
    some = {
        layer: torch.cat([values, torch.full_like(values[:, :1], torch.nan)], 1) for layer, values in scores.items()
    }
    missing = Scores(some, {}, torch.tensor([20, 20, 0]), **SETTINGS)
    ours, expected = (judged(model, inputs, "combined", ["0"], given)["0"] for given in (missing, scores))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_dead_and_duplicated_components():
    torch.manual_seed(0)
    model, inputs = NETS["convolution"][0]().eval(), seeded(60, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
        model[0].weight[4], model[0].bias[4] = model[0].weight[2], model[0].bias[2]
    (energy,), (lost,) = (
        judged(model, inputs, criterion, ["0"]).values() for criterion in ("energy", "reconstruction")
    )
    assert float(energy[1]) == 0
    assert float(lost[1]) < 1e-4 * float(lost.max())  # the ridge, which holds its weights
    alive = [index for index in range(6) if index != 1]
    assert float(energy[[2, 4]].min()) > 0.3 * float(energy[alive].mean())
    free, dear = sorted(lost[[2, 4]].tolist())
    assert free < 1e-3 * float(lost.max())  # one of the two, thanks to the other
    assert dear > 0.05 * float(lost.max())
    assert float(lost.max()) == pytest.approx(1, rel=1e-3)  # with the last one all is lost


def cancelling(x):
    return torch.cat([x[:, :54], x[:, 54:] / 100 - x[:, :54]], 1)


ROWS = {
    "random": lambda x: x,
    "few": lambda x: x[:9],
    "scales": lambda x: x * torch.logspace(-6, 3, 108, dtype=torch.float64),
    "duplicated": lambda x: torch.cat([x[:, :54], x[:, :54]], 1),
    "cancelling": cancelling,
    "some are 0": lambda x: x * (torch.arange(108) % 36 > 8),
    "all are 0": torch.zeros_like,
}


def consumer_of(rows, outputs, seed):
    rows = rows - rows.mean(0)
    xx, weights = rows.T @ rows / len(rows), seeded(outputs, rows.shape[1] // 2, seed=seed).double()
    weights = torch.cat([weights, weights], 1)  # the same for both of two that are duplicates or cancel out
    fit = LayerMoments(rows.mean(0), torch.empty(0), xx, torch.empty(0), ((weights @ xx) * weights).sum(1))
    worth = torch.rand(outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ConsumerStatistics(fit, 12, weights, worth)


def costs_along(parts, order):
    """At each step what each component that is left would cost, by updates of the whole inverse and all weights."""
    states = []
    for consumer, blocks in parts:
        xx = consumer.fit.xx
        ridge = RIDGE * max(float(xx.diagonal().mean()), importance.TINY)
        inverse = torch.linalg.inv(xx + ridge * torch.eye(len(xx), dtype=torch.float64))
        worth = consumer.output_weight / consumer.total
        states.append((inverse, consumer.weights.clone(), worth, consumer.columns(blocks)))
    steps, left = [], set(range(len(order)))
    for index in order:
        steps.append(dict.fromkeys(left, 0.0))
        for inverse, weights, worth, columns in states:
            for other in left:
                at = columns[other]
                solved = torch.linalg.solve(inverse[at][:, at], weights[:, at].T)
                steps[-1][other] += float((weights[:, at] * solved.T).sum(1) @ worth)
            at = columns[index]
            gain = torch.linalg.solve(inverse[at][:, at], inverse[at])
            weights -= weights[:, at] @ gain
            inverse -= inverse[:, at] @ gain
        left.remove(index)
    return steps


@pytest.mark.parametrize("delayed", [1, 20, importance.DELAYED])
@pytest.mark.parametrize("readers", [[(9, 5)], [(9, 130)], [(1, 4)], [(9, 5), (1, 30)]], ids=str)
@pytest.mark.parametrize("kind", ROWS)
def test_elimination_takes_the_cheapest_at_each_step(kind, readers, delayed, monkeypatch):
    monkeypatch.setattr(importance, "DELAYED", delayed)
    rows = ROWS[kind](seeded(300, 108).double() @ seeded(108, 108, seed=1).double())
    blocks = [[index] for index in range(12)]
    parts = [
        (consumer_of(rows.view(-1, 12, 9)[:, :, :each].flatten(1), outputs, seed), blocks)
        for seed, (each, outputs) in enumerate(readers, 2)
    ]
    lost = importance.REDUCTION_OF["reconstruction"](parts)
    order = lost.argsort(stable=True).tolist()
    steps, total = costs_along(parts, order), 0.0
    for index, costs in zip(order, steps, strict=True):
        assert costs[index] <= min(costs.values()) * (1 + 1e-9)
        total += costs[index]
        assert float(lost[index]) == pytest.approx(total, rel=1e-9)
    if kind == "cancelling":  # why all that are left are asked at each step
        assert any(later[c] < earlier[c] / 10 for earlier, later in pairwise(steps) for c in later)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten()), (3, 5, 5)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 1), nn.Flatten()), (3, 5)),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten()), (3, 5, 5)),
        (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (3,)),
    ],
    ids=["Conv2d", "Conv1d", "ConvTranspose2d", "Linear"],
)
def test_norms_of_weights_by_hand(model, shape):
    weight = model[0].weight.detach().double()
    weight = weight.transpose(0, 1) if isinstance(model[0], nn.ConvTranspose2d) else weight
    scores = scores_of(model, ["0"])
    if isinstance(model[0], nn.ConvTranspose2d):
        scores = Scores({"0": torch.zeros(8, 2).double()}, {}, torch.ones(2), **SETTINGS)
    for criterion, power in (("l1", 1), ("l2", 2)):
        values = judged(model, seeded(2, *shape), criterion, ["0"], scores)
        expected = torch.stack([filter_.abs().pow(power).sum().pow(1 / power) for filter_ in weight])
        torch.testing.assert_close(values["0"], expected, rtol=1e-12, atol=0)


def test_random_is_reproducible_by_seed():
    torch.manual_seed(0)
    model, inputs = Joined().eval(), seeded(2, 3, 6, 6)
    before = torch.get_rng_state()
    one, again, other = (judged(model, inputs, "random", ["one", "two"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for layer in ("one", "two"):
        assert torch.equal(one[layer], again[layer])
        assert not torch.equal(one[layer], other[layer])
        assert len(set(one[layer].tolist())) == len(one[layer])
    assert not torch.equal(one["one"], one["two"][:4])
    edits = [
        prune(model, scores_of(model, ["one", "two"]), criterion=Random(seed), ratio=0.5, example_inputs=inputs)
        for seed in (1, 1, 2)
    ]
    assert edits[0].recipe.components == edits[1].recipe.components != edits[2].recipe.components
    assert [edit.recipe.settings["seed"] for edit in edits] == [1, 1, 2]
    lowest = {layer: sorted(values.argsort()[: -(-len(values) // 2)].tolist()) for layer, values in one.items()}
    assert edits[0].recipe.components == lowest


@pytest.mark.parametrize(
    ("model", "shape", "reader"),
    [
        (
            nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
            (3, 12),
            "it is a Conv1d",
        ),
        (
            nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), nn.Flatten()
            ),
            (3, 6, 6),
            "does not pad with zeros",
        ),
    ],
    ids=["Conv1d", "circular"],
)
def test_a_reader_that_cannot_be_read_is_named(model, shape, reader):
    torch.manual_seed(0)
    model = model.eval()
    batches = [seeded(20, *shape, seed=seed) for seed in range(3)]
    layers = ["0", "2"] if isinstance(model[2], nn.Conv1d) else ["0"]
    lowest = model[0].weight.detach().flatten(1).norm(dim=1).argsort()[:4].tolist()
    options = {"example_inputs": batches[0], "data": batches, "repair": "none"}
    for criterion in ("reconstruction", "energy", "combined"):
        edit = prune(model, scores_of(model, layers), ratio=0.5, criterion=criterion, **options)
        assert "0" not in judged(model, torch.cat(batches), criterion, layers)
        assert edit.recipe.settings["ranked_by_l2"].keys() == {"0"}
        assert reader in edit.recipe.settings["ranked_by_l2"]["0"]
        assert edit.recipe.components["0"] == sorted(lowest)
    if len(layers) == 2:  # its reader can be read
        options["criterion"] = "reconstruction"
        edit = prune(model, scores_of(model, layers), global_ratio=0.5, **options)
        assert edit.recipe.settings["across"] == "rank"  # norms and shares of a variance do not compare
        edit = prune(model, scores_of(model, layers), threshold=0.9, **options)
        assert edit.recipe.components.keys() == {"2"}
        assert "'reconstruction' cannot judge it, because it is read by 2" in edit.skipped["0"]
        edit = prune(model, scores_of(model, layers), ratio=0.5, **{**options, "criterion": "combined"})
        values = judged(model, torch.cat(batches), "combined", ["2"])
        assert edit.recipe.components["2"] == sorted(values["2"].argsort()[:2].tolist())


class Grouped(nn.Module):
    """A convolution in groups reads a layer, and one without groups reads another."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.grouped, self.head = nn.Conv2d(8, 4, 3, groups=4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.grouped(self.two(self.one(x).relu()).relu()).relu()).flatten(1)


def test_a_reader_in_groups_keeps_what_it_reads():
    """Its inputs cannot go one by one: there is nothing to judge."""
    torch.manual_seed(0)
    model, batches = Grouped().eval(), [seeded(20, 3, 6, 6, seed=seed) for seed in range(3)]
    options = {"ratio": 0.5, "criterion": "reconstruction", "example_inputs": batches[0], "data": batches}
    edit = prune(model, scores_of(model, ["one", "two"]), **options)
    assert edit.skipped.keys() == {"two"}
    assert "a Conv2d from 8 to 4 channels in 4 groups" in edit.skipped["two"]
    assert "ranked_by_l2" not in edit.recipe.settings
    values = judged(model, torch.cat(batches), "reconstruction", ["one"])
    assert edit.recipe.components["one"] == sorted(values["one"].argsort()[:3].tolist())


class Again(nn.Module):
    """The only reader runs twice."""

    def __init__(self):
        super().__init__()
        self.one, self.again = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.one(x).relu()
        return self.again(x) * self.again(-x)


def test_a_reader_that_runs_twice_is_not_read():
    torch.manual_seed(0)
    model, inputs = Again().eval(), seeded(40, 5)
    assert judged(model, inputs, "energy", ["one"]) == {}
    options = {"ratio": 0.5, "criterion": "energy", "example_inputs": inputs, "data": [inputs]}
    edit = prune(model, scores_of(model, ["one"]), **options)
    assert edit.recipe.settings["ranked_by_l2"] == {
        "one": "it is read by again: it does not run just once per forward pass"
    }
    assert edit.recipe.components["one"] == sorted(model.one.weight.detach().norm(dim=1).argsort()[:3].tolist())


def test_importances_are_scores_for_pruning(case):
    """The same components go, whether a criterion is named or its importances are given."""
    model, inputs, layers = case
    scores = scores_of(model, list(layers), seed=2)
    for criterion in ("max", "random", "reconstruction"):
        options = {"ratio": 0.4, "example_inputs": inputs[:2], "data": [inputs], "repair": "none"}
        named = prune(model, scores, criterion=Random(3) if criterion == "random" else criterion, **options)
        given = prune(model, judged(model, inputs, criterion, [], scores, seed=3), **options)
        assert named.recipe.components == given.recipe.components
        assert given.recipe.settings["criterion"] == "given"


def test_bad_input():
    torch.manual_seed(0)
    model, inputs = Joined().eval(), seeded(2, 3, 6, 6)
    scores = scores_of(model, ["one", "two"])
    for criterion, more, message in (
        ("taylor", {}, "criterion must be one of .* got 'taylor'"),
        ("auto", {}, "criterion must be one of .* got 'auto'"),
        ("energy", {}, "criterion='energy' needs data to estimate statistics on, got data=None"),
        ("energy", {"data": []}, "data must give at least one sample"),
        ("l1", {"components": "rows"}, "components must be one of .* got 'rows'"),
        ("l1", {"components": ()}, r"components must name at least one of .* got \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            importances(model, scores, criterion, example_inputs=inputs, **more)


def test_the_default_is_what_is_best_with_the_repair():
    torch.manual_seed(0)
    model = NETS["convolution"][0]().eval()
    batches = [seeded(20, 3, 8, 8, seed=seed) for seed in range(3)]
    scores, options = scores_of(model, ["0"], seed=1), {"ratio": 0.5, "example_inputs": batches[0]}
    lowest = sorted(model[0].weight.square().sum((1, 2, 3)).argsort()[:3].tolist())
    edit = prune(model, scores, **options)
    assert edit.recipe.settings["criterion"] == "l2"
    assert edit.recipe.components["0"] == lowest
    for repair, criterion in BEST_WITH.items():
        edit = prune(model, scores, data=batches, repair=repair, **options)
        assert edit.recipe.settings["criterion"] == criterion
        values = judged(model, torch.cat(batches), criterion, ["0"])
        assert edit.recipe.components["0"] == sorted(values["0"].argsort()[:3].tolist())
    given = {"scores": scores, "example_inputs": batches[0]}
    edit = prune(model, data=batches, threshold=0.2, **given)
    assert edit.recipe.settings["criterion"] == "reconstruction"
    for budget in ({"global_ratio": 0.5}, {"parameters": 0.7}, {"macs": 0.7}):
        expected = {"least_squares": ("l2", "divergence"), "mean": ("reconstruction", "none"), "none": ("l2", "rank")}
        for repair, settings in expected.items():
            data = {} if repair == "none" else {"data": batches}
            edit = prune(model, repair=repair, **given, **data, **budget)
            assert (edit.recipe.settings["criterion"], edit.recipe.settings["across"]) == settings
    values = judged(model, torch.cat(batches), "reconstruction", ["0"])
    edit = prune(model, scores, criterion="reconstruction", data=batches, **options)
    assert edit.recipe.components["0"] == sorted(values["0"].argsort()[:3].tolist())
    for criterion in ("energy", "reconstruction", "combined"):
        with pytest.raises(ValueError, match=f"criterion='{criterion}' needs data to estimate statistics on, got data"):
            prune(model, scores, criterion=criterion, **options)
