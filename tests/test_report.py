import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import browser as chromium
import numpy as np
import pytest
import torch
from PIL import Image

from discedit import (
    AblateComponents,
    ClassDamage,
    Moments,
    Recipe,
    Scores,
    TopFraction,
    prune,
    report,
    score,
    unlearn,
    zoo,
)
from discedit.model.size import accuracy_per_class
from discedit.reporting import sections

TEMPLATES = [Path(sections.__file__).with_name(f"report.{suffix}") for suffix in ("html", "css")]
SECTIONS = ["about", "scores", "edits", "accuracy", "curve", "classes", "settings"]
VOID = {"meta", "link", "br", "path", "use", "line", "rect", "circle", "polyline"}
HOSTILE = [
    "<script>document.title='owned'</script>",
    "\"quotes' & <b onmouseover=alert(1)>",
    "long " + "x" * 400,
    "日本語のクラス名",
    "שלום \u202e reversed",
    "a\nb\tc",
    "</style></title><h1>",
    "{{ 7 * 7 }}{% raw %}",
    "]]><!-- ${x}",
    "&lt;i&gt;",
]


class Page(HTMLParser):
    """The elements of a page, each with its attributes and all text in it; refuses what is not nested well."""

    def __init__(self, path):
        super().__init__()
        self.elements, self._open, self.text = [], [], ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "within": [each["tag"] for each in self._open], **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", "within": [], **dict(attributes)})

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open[-1]["tag"] == tag, f"</{tag}> closes <{self._open[-1]['tag']}>"
            self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1]["tag"] != "style":
            self.text += data
            for element in self._open:
                element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in attributes.items())]

    def section(self, name):
        [found] = self.all("section", id=name)
        return re.sub(r"\s+", " ", found["text"])

    def maps(self):
        """Cells of the two heat maps: (class of the style, text, title) by layer."""
        cells = [e for e in self.all("td") if re.fullmatch(r"v(\d+|n)", e.get("class", ""))]
        return [(e["class"], e["text"], e["title"]) for e in cells]


def made(values, counts=None, **settings):
    """Scores of given values."""
    values = {layer: torch.as_tensor(v, dtype=torch.float64) for layer, v in values.items()}
    classes = next(iter(values.values())).shape[1]
    direction = {layer: torch.ones(v.shape, dtype=torch.int8) for layer, v in values.items()}
    counts = torch.full((classes,), 50) if counts is None else torch.tensor(counts)
    return Scores(
        values,
        direction,
        counts,
        **{"bound": "minimax", "witness": "quadratic", "statistic": "mean"} | settings,
        norms={},
    )


def random_scores(widths, classes, **settings):
    generator = torch.Generator().manual_seed(0)
    return made({f"layer{i}": torch.rand(w, classes, generator=generator) for i, w in enumerate(widths)}, **settings)


@pytest.fixture(scope="module")
def run(trained, digit_scores):
    """All that a report can hold, of a real network."""
    model, train, test = trained
    loader = zoo.batches(train)
    edits = {
        "pruned": prune(model, digit_scores, ratio=0.3, example_inputs=train[0][0][None], data=loader),
        "rows": unlearn(model, digit_scores, classes=[3], method=AblateComponents(TopFraction(0.1))),
        "directions": unlearn(model, digit_scores, classes=[3], data=loader),
    }
    models = {"before": model, **{title: edit.model for title, edit in edits.items()}}
    accuracy = {title: accuracy_per_class(each, zoo.batches(test), 10) for title, each in models.items()}
    curve = [
        {"title": "l1", "ratio": 0.0, "parameters": 1.0, "macs": 1.0, "accuracy": 0.95},
        {"title": "l1", "ratio": 0.3, "parameters": 0.62, "macs": 0.55, "accuracy": 0.91},
        {"title": "random", "ratio": 0.3, "parameters": 0.64, "accuracy": 0.7},
    ]
    settings = {"seed": 0, "versions": {"torch": "2.13", "python": "3.11"}, "layers": ["a", "b"]}
    names = [f"digit {k}" for k in range(10)]
    return {
        "scores": digit_scores, "edits": edits, "accuracy": accuracy, "curve": curve, "class_names": names,
         "title": "Digits", "settings": settings,
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    return report(tmp_path_factory.mktemp("report") / "digits.html", **run)


@pytest.fixture(scope="module")
def page(written):
    return Page(written)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Hostile names wherever a name can be."""
    layers = {name: torch.rand(4, 10, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(HOSTILE)}
    scores = made(layers, counts=[50, 0, 1, 7, *[50] * 6])
    for values in scores.values():
        values[:, 1] = torch.nan
    recipe = Recipe(
        "unlearn", {"classes": [0, 2], **{name: name for name in HOSTILE}}, {name: [1, 2] for name in HOSTILE}, {}, []
    )
    accuracy = {name: torch.linspace(0, 1, 10) for name in HOSTILE}
    return report(
        tmp_path_factory.mktemp("hostile") / "page.html",
        scores,
        edits=dict.fromkeys(HOSTILE, recipe),
        accuracy=accuracy,
        curve=[{"title": name, "accuracy": 0.1 * i, "macs": 0.1 * i} for i, name in enumerate(HOSTILE)],
        class_names=HOSTILE,
        title=HOSTILE[0],
        settings={name: {name: [name]} for name in HOSTILE} | {"no text": "\udc80"},
    )


def test_says_what_was_scored(page, run):
    about = page.section("about")
    for word in ("minimax", "quadratic", "mean", "consumer", "lower bound on the total variation"):
        assert word in about
    [facts] = page.all("ul", **{"class": "facts"})
    channels = sum(map(len, run["scores"].values()))
    assert re.findall(r"[\d,]+", facts["text"]) == ["4", str(channels), "10", "1,200"]
    assert page.all("title")[0]["text"] == page.all("h1")[0]["text"] == "Digits"


def test_heat_map_shows_best_and_mean_of_every_layer(page, run):
    cells = page.maps()
    layers = list(run["scores"])
    assert len(cells) == 2 * len(layers) * 10
    for which, reduce in enumerate((lambda v: v.amax(0), lambda v: v.mean(0))):
        for i, layer in enumerate(layers):
            for k, value in enumerate(reduce(run["scores"][layer]).tolist()):
                style, text, title = cells[(which * len(layers) + i) * 10 + k]
                assert abs(float(text) - value) <= 0.00501
                assert style == f"v{round(20 * value)}"
                assert title.startswith(f"{layer}, digit {k}: best {float(run['scores'][layer][:, k].max()):.2f} ")


def pixels(svg_paths, width, height):
    """What the paths of a picture of components paint: place in the scale, by row and column; -1 where nothing."""
    found = np.full((height, width), -1)
    for path in svg_paths:
        for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)", path["d"]):
            part = found[int(y), int(x) : int(x) + int(length)]
            assert (part == -1).all()
            part[:] = 99 if path["class"] == "vn" else int(path["class"][1:])
    return found


def pictures(page):
    """The picture of each layer, in order: its pixels and what hovering over its columns shows."""
    found, current = [], None
    for element in page.elements:
        if element["tag"] == "svg":
            is_picture = element.get("aria-label", "").startswith("Scores of the components")
            current = (tuple(map(int, element["viewbox"].split()[2:])), [], []) if is_picture else None
            found += [current] if is_picture else []
        elif current and element["tag"] == "path":
            current[1].append(element)
        elif current and element["tag"] == "title":
            current[2].append(element["text"])
    return [(pixels(paths, *size), titles) for size, paths, titles in found]


def test_pictures_of_components_are_the_scores_sorted(page, run):
    drawn = pictures(page)
    assert len(drawn) == len(run["scores"])
    for values, (picture, titles) in zip(run["scores"].values(), drawn, strict=True):
        order = values.amax(1).argsort(descending=True, stable=True)
        assert (picture == (20 * values[order].T).round().int().numpy()).all()
        for component, title in zip(order.tolist(), titles, strict=True):
            best = int(values[component].argmax())
            assert title.startswith(f"component {component}: digit {best} {float(values[component, best]):.2f}, ")


def test_edits_show_which_components_went_where(page, run):
    text = page.section("edits")
    edit = run["edits"]["pruned"]
    gone = sum(map(len, edit.recipe.components.values()))
    whole = sum(edit.widths[layer] for layer in edit.recipe.components)
    assert f"{gone} of {whole} components in {len(edit.recipe.components)} layers removed" in text
    assert f"{edit.parameters_after:,} of {edit.parameters_before:,}" in text
    assert f"{edit.macs_after:,} of {edit.macs_before:,}" in text
    strips = [e for e in page.all("svg") if e.get("aria-label", "").startswith("removed: ")]
    for strip, (layer, channels) in zip(strips, edit.recipe.components.items(), strict=True):
        assert strip["viewbox"] == f"0 -.5 {edit.widths[layer]} 1"
        spelled = []
        for part in strip["aria-label"].removeprefix("removed: ").split(", "):
            first, _, last = part.partition("\u2013")
            spelled += range(int(first), int(last or first) + 1)
        assert spelled == sorted(channels)
    ablated = run["edits"]["rows"].recipe
    assert f"{sum(map(len, ablated.components.values()))} of " in text.partition("rows unlearn")[2]
    assert "ablated" in text
    for layer, bounds in run["edits"]["directions"].recipe.settings["directions"].items():
        assert re.search(rf"{layer} ?{len(bounds)} .*{bounds[0]:.2f}", text), layer
    assert "To forget: digit 3" in text
    assert "no guarantee of privacy" in page.text


def test_accuracy_names_who_lost_most(page, run):
    text = page.section("accuracy")
    before = run["accuracy"]["before"]
    for title, values in run["accuracy"].items():
        away = {"rows": [3], "directions": [3]}.get(title, [])
        kept = [k for k in range(10) if k not in away]
        of = " of the other classes" if away else ""
        mean = f"mean{of} {100 * float(values[kept].mean()):.1f} %"
        assert re.search(rf"{title}: .*{mean}".replace(" ", r"\s"), text), title
        loss = (values - before)[kept]
        if title != "before" and float(loss.min()) < 0:
            worst = kept[int(loss.argmin())]
            after = text[text.index(mean) :]
            assert re.match(rf".*?Hit hardest: digit {worst}, \u2212{-100 * float(loss.min()):.1f} points", after), (
                title
            )
    assert f"digit 3, to forget, {100 * float(before[3]):.1f} %" in text
    marked = [e for e in page.all("div") if e.get("class") == "row forget"]
    assert [e["text"].strip()[:7] for e in marked] == ["digit 3"]


def test_dots_are_where_the_accuracies_are(page, run):
    dots, current = [], None
    for element in page.elements:
        if element["tag"] == "svg":
            current = [] if element.get("role") == "img" and "before" in element.get("aria-label", "") else None
            dots += [current] if current is not None else []
        elif element["tag"] == "use" and current is not None:
            current.append((int(element["href"].removeprefix("#mark")), float(element["x"].rstrip("%"))))
    assert len(dots) == 10
    for k, row in enumerate(dots):
        assert [i for i, _ in row] == [0, 1, 2, 3]
        for (_, x), values in zip(row, run["accuracy"].values(), strict=True):
            assert x == pytest.approx(100 * float(values[k]), abs=0.006)


def test_curve_points_are_where_the_numbers_are(run):
    found = sections.curve(run["curve"])
    assert [chart["label"] for chart in found["charts"]] == ["parameters left", "multiply-accumulates left"]
    for chart, key in zip(found["charts"], ("parameters", "macs"), strict=True):
        (x0, low), (x1, high) = chart["across"][0], chart["across"][-1]
        (y0, bottom), (y1, top) = chart["up"][0], chart["up"][-1]
        read = [
            (
                float(low) + (x - x0) / (x1 - x0) * (float(high) - float(low)),
                float(bottom) + (y - y0) / (y1 - y0) * (float(top) - float(bottom)),
            )
            for line in chart["lines"]
            for x, y, _ in line
        ]
        wanted = sorted((100 * p[key], 100 * p["accuracy"]) for p in run["curve"] if p.get(key) is not None)
        assert sorted(read) == [pytest.approx(point, abs=0.2) for point in wanted]


@pytest.mark.parametrize("values", [[0.5], [0.0], [1.0], [0.0, 1.0], [0.913, 0.914], [0.2, 0.85], [0.41, 1.0]], ids=str)
def test_ticks_hold_the_values(values):
    ticks = sections._ticks(values)
    assert 2 <= len(ticks) <= 7
    assert 0 <= ticks[0] <= min(values) <= max(values) <= ticks[-1] <= 1
    assert np.ptp(np.diff(ticks)) < 1e-9


def test_a_section_only_where_there_is_something_to_say(tmp_path, run, page):
    assert [e["id"] for e in page.all("section")] == SECTIONS
    path = report(tmp_path / "bare.html", run["scores"])
    bare = Page(path)
    assert [e["id"] for e in bare.all("section")] == ["about", "scores", "classes"]
    assert bare.all("title")[0]["text"] == "What tells the classes apart"
    assert "class 7" in bare.text
    assert "privacy" not in bare.text
    for anchor in (e["href"] for e in [*bare.all("a"), *page.all("a")]):
        assert anchor.startswith("#")
    assert {e["href"][1:] for e in page.all("a")} == set(SECTIONS)


def test_a_recipe_serves_as_well_as_an_edit(tmp_path, run):
    recipe = run["edits"]["pruned"].recipe
    path = report(tmp_path / "recipe.html", run["scores"], edits={"pruned": recipe})
    text = Page(path).section("edits")
    gone = sum(map(len, recipe.components.values()))
    assert f"{gone} of {sum(recipe.architecture[f'{k}.weight'][0] for k in recipe.components)} components" in text
    assert "multiply-accumulates" not in text


def test_answers_that_change_are_told_class_by_class(tmp_path):
    edit = Recipe("prune", {}, {}, {"weight": [2, 2]}, []).apply(torch.nn.Linear(2, 2, bias=False))
    before = torch.eye(2)[[0, 0, 0, 1, 1]]
    edit.damage = ClassDamage.of(before, torch.eye(2)[[0, 1, 1, 1, 0]])
    scores = random_scores([3], 2)
    path = report(tmp_path / "r.html", scores, edits={"pruned": edit}, class_names=["cat", "dog"])
    text = re.sub(r"\s+", " ", Page(path).section("edits"))
    assert re.search(r"3 of 5 answers change, .*; most of what was ?cat 2 of 3, ?dog 1 of 2", text)


def test_a_recipe_without_components_says_so(tmp_path):
    path = report(tmp_path / "r.html", random_scores([3], 2), edits={"nothing": Recipe("unlearn", {}, {}, {}, [])})
    assert "No components and no directions: 0 tensors changed." in Page(path).section("edits")


def test_a_recipe_of_foreign_settings(tmp_path):
    recipe = Recipe("unlearn", {"directions": "up", "unrepaired": [1], "classes": "all"}, {"layer0": [9]}, {}, [])
    path = report(tmp_path / "r.html", random_scores([3], 2), edits={"foreign": recipe})
    text = Page(path).section("edits")
    assert re.search(r"directions ?up", text)
    assert re.search(r"unrepaired ?\[1\]", text)
    assert "To forget" not in text


def test_settings_are_flat_rows():
    settings = {"seed": 0, "of": {"deep": {"x": None, "empty": {}}, "list": [1, "é"]}, "text": "as it is"}
    assert sections.table(settings) == [
        ("seed", "0"), ("of.deep.x", "null"), ("of.deep.empty", "{}"), ("of.list", '[1, "é"]'), ("text", "as it is"),
    ]  # fmt: skip


def test_the_same_input_gives_the_same_bytes(tmp_path, run, written):
    again = report(tmp_path / "new" / "digits.html", **run)
    assert again.read_bytes() == written.read_bytes()


def test_standard_errors_by_layer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    moments = Moments(3, witness="linear")
    for layer in ("first", "second"):
        moments.update(layer, torch.randn(90, 7, generator=generator) + labels[:, None], labels)
    scores = score(moments, witness="linear", errors=True)
    path = report(tmp_path / "e.html", scores)
    text = Page(path).section("classes")
    for layer, error in scores.standard_error().items():
        ranked = error.flatten().sort().values
        assert re.search(rf"{layer} ?{ranked[10]:.3f} ?{ranked[19]:.3f}", text)  # of 21: the 11th and the 20th


@pytest.mark.parametrize(
    ("bound", "says"),
    [("hellinger", "no bound"), ("certified", "probability of 99 % over the samples"), ("fisher", "90 times")],
)
def test_words_fit_the_bound(tmp_path, bound, says):
    options = {"alpha": 0.01, "value_range": (0, 1)} if bound == "certified" else {}
    path = report(tmp_path / "b.html", random_scores([3], 3, bound=bound, witness="linear", options=options))
    text = Page(path).section("about")
    assert says in text
    assert ("lower bound on the total variation" in text) == (bound != "hellinger")


def test_classes_with_few_samples_are_named(tmp_path):
    values = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    values[:, 1] = torch.nan
    scores = made({"conv": values}, counts=[50, 0, 1, 19, 20, 2])
    path = report(tmp_path / "few.html", scores, class_names=list("abcdef"))
    page = Page(path)
    [warning] = page.all("div", role="note")
    text = re.sub(r"\s+", " ", warning["text"])
    assert "Without samples (1): b." in text
    assert "With one sample (1): c." in text
    assert "With fewer than 20 samples (2): d and f. So few flatter a score" in text
    assert [style for style, _, _ in page.maps()].count("vn") == 2
    assert (pictures(page)[0][0][1] == 99).all()
    assert not Page(report(tmp_path / "all.html", random_scores([4], 3))).all("div", role="note")


ODD = {
    "all zero": made({"conv": torch.zeros(5, 3)}),
    "all NaN": made({"conv": torch.full((5, 3), math.nan)}, counts=[9, 0, 0]),
    "one pair of classes": random_scores([4], 2),
    "one class": made({"conv": torch.full((2, 1), math.nan)}, counts=[9]),
    "one channel": random_scores([1], 3),
    "no channel": made({"conv": torch.rand(3, 3), "empty": torch.empty(0, 3)}),
    "nothing but an empty layer": made({"empty": torch.empty(0, 3)}),
    "one": made({"conv": torch.ones(3, 4)}),
    "200 layers": random_scores([3] * 200, 4),
    "41 classes": random_scores([3, 300], 41),
    "129 components": random_scores([129], 3),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_scores(name, tmp_path):
    scores = ODD[name]
    accuracy = torch.full((scores.num_classes,), math.nan)
    path = report(tmp_path / "odd.html", scores, accuracy={"none": accuracy, "full": torch.ones_like(accuracy)})
    page = Page(path)
    assert not re.search(r"\b(nan|inf|None)\b", page.text.replace("None given", ""))
    assert not re.search(r'="-?(nan|inf)', page.html)
    columns = -(-scores.num_classes // 2) if scores.num_classes > 40 else scores.num_classes
    assert len(page.maps()) == 2 * len(scores) * columns
    for picture, titles in pictures(page):
        assert (picture >= 0).all()
        assert picture.shape == (columns, len(titles))


def test_groups_of_classes_and_components_are_means(tmp_path):
    scores = random_scores([300], 90)
    path = report(tmp_path / "groups.html", scores)
    page = Page(path)
    assert page.text.count("Aggregated:") == 2
    best = scores["layer0"].amax(0)
    for k, (_, text, title) in enumerate(page.maps()[:30]):
        assert float(text) == pytest.approx(float(best[3 * k : 3 * k + 3].mean()), abs=0.00501)
        assert title.startswith(f"layer0, classes {3 * k} to {3 * k + 2}: ")
    [(picture, titles)] = pictures(page)
    values = scores["layer0"][scores["layer0"].amax(1).argsort(descending=True, stable=True)]
    wanted = torch.stack([part.mean(0) for part in values.split(3)]).T
    wanted = torch.stack([part.mean(0) for part in wanted.split(3)])
    assert (abs(picture - 20 * wanted.numpy()) <= 0.5001).all()
    assert titles[1].startswith("ranks 4 to 6 of 300: ")


def test_only_the_extremes_of_many_classes_are_drawn(tmp_path):
    before = torch.linspace(0.5, 0.9, 200)
    after = before.clone()
    after[[17, 150]] -= torch.tensor([0.3, 0.4])
    after[99] = 0.0
    edits = {"after": Recipe("unlearn", {"classes": [99]}, {"layer0": [0]}, {}, [])}
    accuracy = {"before": before, "after": after}
    path = report(tmp_path / "many.html", random_scores([4], 200), accuracy=accuracy, edits=edits)
    page = Page(path)
    rows = [e["text"] for e in page.all("div") if e.get("class") in ("row", "row forget")]
    assert [int(re.match(r"\s*class (\d+)", row)[1]) for row in rows[:3]] == [99, 150, 17]
    assert len(rows) == 40
    assert "40 of 200" in page.section("accuracy")
    assert "Hit hardest: class 150, \u221240.0 points" in page.section("accuracy")
    assert "24 of 200" in page.section("classes")


def test_size_of_a_resnet56(tmp_path):
    widths = [16] * 19 + [32] * 18 + [64] * 18
    path = report(tmp_path / "resnet56.html", random_scores(widths, 10))
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
def test_size_of_a_resnet50_with_1000_classes(tmp_path):
    widths = [64]
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            widths += [width, width, 4 * width] + [4 * width] * (block == 0)
    assert sum(widths) == 26_560
    scores = random_scores(widths, 1000)
    recipe = Recipe("prune", {}, {layer: list(range(0, len(v), 3)) for layer, v in scores.items()}, {}, [])
    accuracy = {"before": torch.rand(1000), "after": torch.rand(1000)}
    path = report(tmp_path / "resnet50.html", scores, edits={"third": recipe}, accuracy=accuracy)
    assert path.stat().st_size < 5_000_000


def test_what_comes_from_outside_is_text(hostile):
    page = Page(hostile)
    assert {e["tag"] for e in page.elements}.isdisjoint({"script", "img", "b onmouseover", "iframe", "object", "form"})
    assert not any(name.startswith("on") for e in page.elements for name in e)
    assert [e["text"] for e in page.all("h1")] == [HOSTILE[0]]
    assert [e["text"] for e in page.all("title") if "head" in e["within"]] == [HOSTILE[0]]
    titles = {e["text"].strip().removesuffix(" unlearn") for e in page.all("h3")}
    settings = page.section("settings")
    for name in HOSTILE:
        assert name in titles, name
        assert re.sub(r"\s+", " ", name) in settings
    assert "no text?" in settings


def test_the_page_asks_for_nothing(written, hostile):
    for path in (written, hostile):
        page = Page(path)
        for element in page.elements:
            for attribute in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
                assert element.get(attribute, "#").startswith(("#", "data:,")), element
        assert not re.search(r"@import|@font-face|url\((?!#)", page.html[: page.html.index("</style>")])
        [policy] = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
        assert policy["content"].startswith("default-src 'none'; ")


def test_templates_escape_everything():
    for path in TEMPLATES:
        text = path.read_text()
        assert not re.search(r"\|\s*safe|autoescape|Markup", text.split("#}", 1)[1]), path
        assert not re.search(r"=\{\{", text), "an attribute without quotes"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": 5}, TypeError, r"path must be a path, got int"),
        ({"edits": [1]}, TypeError, r"edits must be a mapping of titles to edits, got list"),
        ({"edits": {"a": 1}}, TypeError, r"edits\['a'\] must be a discedit.Edit or a discedit.Recipe, got int"),
        ({"accuracy": [1]}, TypeError, r"accuracy must be a mapping of titles to accuracies, got list"),
        ({"accuracy": {"a": "high"}}, TypeError, r"accuracy\['a'\] must hold numbers, got 'high'"),
        ({"curve": 5}, TypeError, r"curve must be a list of points, got int"),
        ({"curve": [1]}, TypeError, r"curve\[0\] must be a mapping, got int"),
        ({"class_names": 3}, TypeError, r"class_names must be a list of names, got int"),
        ({"settings": [1]}, TypeError, r"settings must be a mapping of names to settings, got list"),
        ({"path": "page.pdf"}, ValueError, r"path must end in .html, got 'page.pdf'"),
        ({"scores": {}}, TypeError, r"scores must be a discedit.Scores, got dict"),
        ({"scores": Scores({}, {}, torch.ones(3), bound="", witness="", statistic="", norms={})}, ValueError,
         r"scores must hold at least one layer"),
        ({"accuracy": {"a": torch.ones(2)}}, ValueError, r"one share for each of 3 classes, got shape \(2,\)"),
        ({"accuracy": {"a": [0.5, 91.0, 1]}}, ValueError, r"must lie in \[0, 1\], got 91 for class 1"),
        ({"curve": [{"title": "a", "macs": 0.5}]}, ValueError, r"curve\[0\] must have 'title', 'accuracy'"),
        ({"curve": [{"title": "a", "accuracy": 0.5}]}, ValueError, r"curve\[0\] must have .*'parameters' or 'macs'"),
        ({"curve": [{"title": "a", "accuracy": 0.5, "macs": 40e6}]}, ValueError,
         r"curve\[0\]\['macs'\] must be a share in \[0, 1\], got 40000000.0"),
        ({"curve": [{"title": "a", "accuracy": math.nan, "macs": 1}]}, ValueError, r"\['accuracy'\] must be a share"),
        ({"curve": [{"title": "a", "flops": 1}]}, ValueError, r"must have keys out of 'title', .* got 'flops'"),
        ({"class_names": "abc"}, ValueError, r"class_names must name 3 classes, got 'abc'"),
        ({"class_names": ["a"]}, ValueError, r"class_names must name 3 classes, got \['a'\]"),
        ({"settings": {"a": {1, 2}}}, ValueError, r"settings must be what JSON has, got \{'a': \{1, 2\}\}"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"^report: .*{message}"):
        report(**{"path": "page.html", "scores": random_scores([4], 3), **arguments})
    assert not list(tmp_path.iterdir())


def test_numbers_serve_as_names(tmp_path):
    def page(kind):
        accuracy = {kind(0.3): [0.5, 1.0, 1.0], kind(0.5): [0.5, 0.9, 1.0]}
        curve = [{"title": kind(0.3), "accuracy": 0.8, "macs": 0.7}]
        names = [kind(k) for k in range(3)]
        scores = random_scores([4], 3)
        return report(tmp_path / "page.html", scores, accuracy=accuracy, curve=curve, class_names=names).read_bytes()

    assert page(lambda number: number) == page(str)


def test_names():
    names = sections.Names(["vit.layers.0.fc", "vit.layers.1.fc", "vit.layers.1.attention.query"], ["a"])
    assert names.prefix == "vit.layers."
    assert names.layer("vit.layers.1.fc") == "1.fc"
    assert sections.Names(["conv1", "layer1.conv"], ["a"]).prefix == ""
    assert sections.Names(["only.one"], ["a"]).prefix == ""
    short = sections.shortened("a" * 50 + "b" * 50, 30)
    assert (len(short), short[0], short[10], short[-1]) == (30, "a", "…", "b")
    assert sections.ranges([7, 1, 2, 3, 9]) == [(1, 3), (7, 7), (9, 9)]
    assert [list(group) for group in sections.groups(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert sections.groups(0, 3) == []
    assert sections.listed(list("abc")) == "a, b and c"
    assert sections.listed(list("abcd"), 2) == "a, b and 2 more"
    assert sections.points(-0.00001) == "0.0"


def luminance(colour):
    """Relative luminance of WCAG 2."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(
        np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)
    )


def scale_of(page):
    """The colours of the page and of the numbers on them, on a light screen."""
    found = re.findall(r"--v(\d+): (#\w{6}); --i\1: (#\w{3});", page.html)[: sections.STEPS]
    assert [int(place) for place, _, _ in found] == list(range(sections.STEPS))
    return [(colour, "#" + 2 * ink[1:]) for _, colour, ink in found]


def test_the_scale_is_in_order_of_lightness_and_numbers_on_it_can_be_read(page):
    """So it survives colour blindness and a grey printer."""
    grounds = [luminance(colour) for colour, _ in scale_of(page)]
    assert (np.diff(np.cbrt(grounds)) < -0.01).all()
    for ground, (_, ink) in zip(grounds, scale_of(page), strict=True):
        light, dark = sorted([ground, luminance(ink)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert [sections.step(value) for value in (0.0, 0.024, 0.026, 1.0, math.nan)] == [0, 0, 1, 20, "n"]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    executable = chromium.find()
    if executable is None:
        pytest.skip(f"needs a browser: $CHROME or one of {', '.join(chromium.NAMES)}")
    tab = chromium.Browser(executable, tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.mark.parametrize(("width", "dark"), [(360, False), (1280, True)], ids=["phone", "desk, dark"])
@pytest.mark.parametrize("which", ["written", "hostile"])
def test_in_a_browser(tab, which, width, dark, request):
    path = request.getfixturevalue(which)
    tab.open(path, width=width, dark=dark)
    tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert tab.evaluate("[...document.querySelectorAll('section')].map(e => e.id)") == SECTIONS
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing but what stands in a box that scrolls or cuts is wider than the page.
    outside = tab.evaluate(
        """[...document.querySelectorAll('main *')].filter(e => {
            if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
            for (let a = e.parentElement; a; a = a.parentElement)
                if (a != document.documentElement && getComputedStyle(a).overflowX != 'visible') return false;
            return true;
        }).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert outside == []
    assert tab.evaluate("document.scripts.length") == 0
    tab.evaluate("document.getElementById('scores').scrollIntoView({behavior: 'instant'})")
    picture = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"))
    assert picture.shape == (900, width, 3)
    paper = picture[0, 0].astype(int)
    assert (paper.sum() < 150) == dark
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    different = (abs(picture.astype(int) - paper).sum(-1) > 60).mean()
    assert 0.02 < different < 0.9
    assert tab.complaints() == []
    assert tab.requests() == [path.resolve().as_uri()]
    if which == "hostile":
        assert tab.evaluate("document.title") == HOSTILE[0]


def test_on_paper_it_is_light_whatever_the_screen(tab, written):
    tab.open(written, width=794, dark=True, media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).printColorAdjust") == "exact"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_colours_in_the_browser_are_those_of_the_scale(tab, written, page):
    """From pale to dark on a light screen, the other way round on a dark one."""
    wanted = page.maps()[0][0]
    for dark in (False, True):
        tab.open(written, width=1280, dark=dark)
        found = tab.evaluate(f"getComputedStyle(document.querySelector('td.{wanted}')).backgroundColor")
        colour = scale_of(page)[:: -1 if dark else 1][int(wanted[1:])][0]
        assert json.loads(found.replace("rgb(", "[").replace(")", "]")) == [
            int(colour[i : i + 2], 16) for i in (1, 3, 5)
        ]


def test_few_samples_do_not_flatter_what_is_certified(tmp_path):
    settings = {"bound": "certified", "witness": "exp", "scale": 1.0, "options": {"alpha": 0.05}}
    scores = made({"conv": torch.zeros(4, 3)}, counts=[50, 1, 5], **settings)
    path = report(tmp_path / "few.html", scores)
    [warning] = Page(path).all("div", role="note")
    assert "flatter" not in Page(path).text
    assert "too high" not in warning["text"]
    assert "So few can certify very little." in warning["text"]
