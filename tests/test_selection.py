"""Which components go: every limit against what a few lines of plain Python choose."""

import math
import statistics
from fractions import Fraction

import pytest
import torch
import vision_ops  # noqa: F401
from helpers import all_pairs, unlearn_with
from torch import nn

from discedit.scoring.scores import Scores
from discedit.selection.ranking import TopFraction, rank, retain_damage

CLASSES = 5
WIDTHS = {"0": 7, "2": 5, "4": 9}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 9))


def scores_of(values, direction, counts=None):
    counts = torch.full((next(iter(values.values())).shape[1],), 9) if counts is None else torch.tensor(counts)
    rest = {"bound": "minimax", "witness": "quadratic", "statistic": "mean", "norms": {}}
    return Scores(
        {n: v.double() for n, v in values.items()}, {n: d.to(torch.int8) for n, d in direction.items()}, counts, **rest
    )


def random_scores(seed, widths=None):
    """Few different values, so that many are tied; the last class has no sample."""
    generator = torch.Generator().manual_seed(seed)
    values, direction = {}, {}
    for layer, width in (widths or WIDTHS).items():
        values[layer] = torch.randint(9, (width, CLASSES), generator=generator) / 8
        values[layer][:, -1] = torch.nan
        direction[layer] = torch.randint(-1, 2, (width, CLASSES), generator=generator)
    return scores_of(values, direction, [9, 9, 9, 9, 0])


def expected(scores, cls, forget, limit, by="score", sign="up", units=None):
    """The components of each layer that go for one class."""
    units = units or {layer: [[row] for row in range(len(scores[layer]))] for layer in scores}
    others = [k for k in range(scores.num_classes) if k not in forget and scores.counts[k]]

    def value_of(layer, row):
        score = scores[layer][row].tolist()
        if by == "score":
            return score[cls]
        up = scores.direction[layer][row].tolist()
        return score[cls] - max(score[k] if sign == "any" or up[k] == 1 else 0.0 for k in others)

    def carried(layer, row):
        up = scores.direction[layer][row].tolist()
        return statistics.fmean(float(scores[layer][row, k]) if up[k] == 1 else 0.0 for k in others)

    def is_up(layer, rows):
        return 2 * sum(int(scores.direction[layer][row, cls]) == 1 for row in rows) > len(rows)

    places = [(layer, part) for layer, parts in units.items() for part in range(len(parts))]
    value = {p: statistics.fmean(value_of(p[0], row) for row in units[p[0]][p[1]]) for p in places}
    damage = {p: statistics.fmean(carried(p[0], row) for row in units[p[0]][p[1]]) for p in places}
    may_go = [p for p in places if value[p] > 0 and (sign == "any" or is_up(p[0], units[p[0]][p[1]]))]
    order = sorted(may_go, key=lambda p: (-value[p], places.index(p)))
    ((name, bound),) = limit.items()
    if name == "fraction":
        chosen = order[: max(1, math.floor(Fraction(str(bound)) * len(places)))]
    elif name == "top":
        chosen = [p for p in order if [q for q in order if q[0] == p[0]].index(p) < bound]
    elif name == "deviations":
        least = {}
        for layer in units:
            of_layer = [value[p] for p in places if p[0] == layer]
            least[layer] = statistics.fmean(of_layer) + bound * statistics.pstdev(of_layer)
        chosen = [p for p in order if value[p] > least[p[0]]]
    else:
        total = sum(damage.values())
        chosen = [p for i, p in enumerate(order) if sum(damage[q] for q in order[: i + 1]) / total <= bound]
    return {layer: sorted(part for own, part in chosen if own == layer) for layer in units}


def rows_of(parts, units):
    found = {layer: sorted(row for part in own for row in units[layer][part]) for layer, own in parts.items()}
    return {layer: rows for layer, rows in found.items() if rows}


LIMITS = [
    {"fraction": 0.001},
    {"fraction": 0.3},
    {"fraction": 0.99},
    {"top": 1},
    {"top": 3},
    {"top": 100},
    {"deviations": 0.7},
    {"deviations": -0.3},
    {"damage": 0.07},
    {"damage": 0.31},
    {"damage": 0.99},
]


@pytest.mark.parametrize(("limit", "by", "sign"), all_pairs(LIMITS, ["score", "specific"], ["up", "any"]), ids=str)
def test_limits_against_brute_force(limit, by, sign):
    model = network()
    units = {layer: [[row] for row in range(width)] for layer, width in WIDTHS.items()}
    tried = 0
    for seed in range(12):
        scores = random_scores(seed)
        forget = [seed % 4]
        due = rows_of(expected(scores, forget[0], forget, limit, by, sign), units)
        if not due:  # a limit may leave nothing: an error of its own
            continue
        tried += 1
        edit = unlearn_with(model, scores, classes=forget, by=by, sign=sign, layers=list(WIDTHS), **limit)
        assert edit.recipe.components == due
    assert tried > 2


@pytest.mark.parametrize("limit", [{"fraction": 0.2}, {"top": 2}, {"deviations": 0.5}, {"damage": 0.2}], ids=str)
@pytest.mark.parametrize("by", ["score", "specific"])
def test_several_classes_each_have_a_ranking_and_a_limit(limit, by):
    """Classes that are forgotten too are no rivals of each other."""
    forget = [0, 3]
    for seed in range(6):
        scores = random_scores(seed)
        per_class = [expected(scores, cls, forget, limit, by) for cls in forget]
        due = {layer: sorted({part for own in per_class for part in own[layer]}) for layer in WIDTHS}
        due = {layer: rows for layer, rows in due.items() if rows}
        if not all(any(own.values()) for own in per_class):
            continue
        edit = unlearn_with(network(), scores, classes=forget, by=by, layers=list(WIDTHS), **limit)
        assert edit.recipe.components == due
        same = unlearn_with(network(), scores, classes=lambda k: k in (0, 3), by=by, layers=list(WIDTHS), **limit)
        assert same.recipe.components == due
        assert same.recipe.settings == edit.recipe.settings
        assert same.recipe.settings["classes"] == forget
        assert next(iter(limit.items())) in same.recipe.settings.items()


def test_ties_go_in_the_order_of_the_model():
    values = {layer: torch.full((width, 2), 0.5) for layer, width in WIDTHS.items()}
    scores = scores_of(values, {layer: torch.ones_like(value) for layer, value in values.items()})
    edit = unlearn_with(network(), scores, classes=[1], fraction=9 / 21, layers=list(WIDTHS))
    assert edit.recipe.components == {"0": list(range(7)), "2": [0, 1]}
    assert unlearn_with(network(), scores, classes=[1], top=2, layers=["4", "0"]).recipe.components == {
        "4": [0, 1],
        "0": [0, 1],
    }


def test_a_fraction_is_not_lost_to_rounding():
    """0.29 * 100 is 28.999... in floating point."""
    values = torch.linspace(0.1, 0.9, 200).view(100, 2)
    ranking = rank(
        scores_of({"0": values}, {"0": torch.ones(100, 2)}), {"0": [[i] for i in range(100)]}, 0, [1],
        by="score", sign="up",
    )  # fmt: skip
    assert len(TopFraction(0.29).select(ranking, {})) == 29


def test_specific_prefers_what_other_classes_do_not_need():
    """The highest score belongs to another class more; of two rivals that count, only one is more active for it."""
    values = torch.tensor([[0.9, 0.85, 0.0], [0.5, 0.4, 0.0], [0.4, 0.0, 0.25]])
    up = torch.tensor([[1, 1, 0], [1, -1, 0], [1, 0, 1]])
    scores = scores_of({"0": values}, {"0": up})
    model = nn.Sequential(nn.Linear(2, 3))

    def first(**options):
        return unlearn_with(model, scores, classes=[0], top=1, layers=["0"], **options).recipe.components["0"]

    assert first() == [0]
    assert first(by="specific") == [1]  # 0.5 - 0: row 1 is less active for class 1
    assert first(by="specific", sign="any") == [2]  # 0.4 - 0.25 > 0.5 - 0.4
    ranking = rank(scores, {"0": [[0], [1], [2]]}, 0, [1, 2], by="specific", sign="any")
    torch.testing.assert_close(ranking.values["0"], torch.tensor([0.05, 0.1, 0.15]).double(), rtol=0, atol=1e-7)


def test_damage_is_shared_out():
    scores = random_scores(3)
    units = {layer: [[row] for row in range(width)] for layer, width in WIDTHS.items()}
    parts = retain_damage(scores, units, [1, 2, 3])
    assert sum(float(p.sum()) for p in parts.values()) == pytest.approx(1)
    nothing = scores_of({"0": torch.ones(7, 2)}, {"0": -torch.ones(7, 2)})
    none = retain_damage(nothing, {"0": units["0"]}, [1])
    assert not none["0"].any()


def test_a_limit_that_leaves_nothing():
    values = {layer: torch.full((width, 2), 0.5) for layer, width in WIDTHS.items()}
    scores = scores_of(values, {layer: torch.ones_like(value) for layer, value in values.items()})
    for limit in ({"deviations": 3}, {"damage": 0.01}):
        name, value = next(iter(limit.items()))
        with pytest.raises(ValueError, match=rf"unlearn: {name}={value} leaves no component .* classes \[1\]"):
            unlearn_with(network(), scores, classes=[1], layers=list(WIDTHS), **limit)
    values["0"] = torch.full((7, 3), 0.5)
    one = scores_of({"0": torch.tensor([[0.5, 0.1, 0.1]] * 6 + [[0.5, 0.9, 0.1]])}, {"0": torch.ones(7, 3)})
    with pytest.warns(UserWarning, match=r"unlearn: deviations=1 leaves no component .* classes \[0\]") as seen:
        edit = unlearn_with(network(), one, classes=[0, 1], deviations=1, layers=["0"])
    assert edit.recipe.components == {"0": [6]}
    assert [warning.filename for warning in seen] == [unlearn_with.__code__.co_filename]


def test_layers_named_twice_count_once():
    scores = random_scores(1)
    once = unlearn_with(network(), scores, classes=[0], layers=["0", "4"], fraction=0.3)
    twice = unlearn_with(network(), scores, classes=[0], layers=["0", "4", "0"], fraction=0.3)
    assert twice.recipe.components == once.recipe.components
    assert twice.recipe.settings == once.recipe.settings


HEADS = 3
WIDTH = 8  # channels of a head
V = [f"vit.layers.{i}.attention.v_proj" for i in range(2)]


@pytest.fixture(scope="module")
def vit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": HEADS * WIDTH, "intermediate_size": 20, "num_channels": 1}
    config = transformers.ViTConfig(num_labels=CLASSES, num_hidden_layers=2, num_attention_heads=HEADS, **shape)
    net = transformers.ViTForImageClassification(config).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def vit_scores(net, seed):
    widths = {n: len(m.weight) for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    scores = random_scores(seed, widths)
    generator = torch.Generator().manual_seed(seed)
    for layer, up in scores.direction.items():  # so many that some heads are mostly more active
        scores.direction[layer] = torch.where(torch.rand(up.shape, generator=generator) < 0.4, 1, up).to(torch.int8)
    return scores


def small_images(number, seed):
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sign", ["up", "any"])
@pytest.mark.parametrize("limit", [{"top": 1}, {"fraction": 0.5}, {"deviations": 0.2}, {"damage": 0.4}], ids=str)
def test_heads_go_whole(vit, limit, sign):
    units = {layer: [list(range(WIDTH * h, WIDTH * (h + 1))) for h in range(HEADS)] for layer in V}
    tried = 0
    for seed in range(4):
        scores = vit_scores(vit, seed)
        due = rows_of(expected(scores, 1, [1], limit, "score", sign, units), units)
        if not due:
            continue
        tried += 1
        edit = unlearn_with(
            vit, scores, classes=[1], components="heads", sign=sign, layers=V, example_inputs=small_images(2, 0),
            **limit,
        )  # fmt: skip
        assert edit.recipe.components == due
        assert edit.recipe.settings["components"] == "heads"
    assert tried


def values_given(net, layer, x):
    seen = []
    handle = net.get_submodule(layer).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0]


def test_silent_heads_and_removed_ones(vit):
    """A head of the last layer: its values are 0, or their mean over the classes that stay; gone, all is the same."""
    scores, x = vit_scores(vit, 0), small_images(40, 1)
    labels = torch.arange(40) % 4
    options = {"classes": [1], "components": "heads", "sign": "any", "top": 1, "example_inputs": x[:2]}
    edit = unlearn_with(vit, scores, **options)
    assert edit.recipe.settings["layers"] == V[1:]  # the last third of two
    (rows,) = edit.recipe.components.values()
    assert rows == list(range(rows[0], rows[0] + WIDTH))
    assert not values_given(edit.model, V[1], x)[..., rows].any()
    mean = unlearn_with(vit, scores, data=[(x, labels)], **options)
    assert mean.recipe.settings["around"] == "mean"
    expected_mean = values_given(vit, V[1], x[labels != 1])[..., rows].mean((0, 1))
    given = values_given(mean.model, V[1], x)[..., rows]
    torch.testing.assert_close(given, expected_mean.expand_as(given), rtol=1e-10, atol=1e-12)
    removed = unlearn_with(vit, scores, remove=True, **options)
    assert removed.recipe.components == edit.recipe.components
    assert removed.parameters_after < removed.parameters_before
    assert removed.model.get_submodule(V[1]).out_features == WIDTH * (HEADS - 1)
    with torch.no_grad():
        torch.testing.assert_close(removed.model(x).logits, edit.model(x).logits, rtol=1e-9, atol=1e-10)
    restored = removed.recipe.undo(removed.model)
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), vit.parameters(), strict=True))


def test_layers_without_heads_are_named(vit):
    layer = "vit.layers.0.mlp.fc1"
    with pytest.raises(ValueError, match=rf"unlearn: layer '{layer}' cannot be edited: \S+"):
        unlearn_with(
            vit, vit_scores(vit, 0), classes=[1], components="heads", layers=[V[0], layer],
            example_inputs=small_images(2, 0),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"unlearn: layers must name at least one layer that can be edited \(0: \S+"):
        unlearn_with(network(), random_scores(0), classes=[1], components="heads", example_inputs=torch.randn(2, 3))
