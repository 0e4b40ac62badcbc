import json
import warnings

import pytest
import torch

from discedit import Moments, Scores, ops, score


def moments_of(x, labels, classes, **settings):
    moments = Moments(classes, **settings)
    moments.update("layer", x, labels)
    return moments


def test_is_one_vs_rest_of_every_layer(digit_moments, digit_scores):
    assert list(digit_scores) == list(digit_moments)
    for layer, values in digit_scores.items():
        assert torch.equal(values, ops.one_vs_rest(digit_moments[layer]))
        assert values.shape == (digit_moments[layer].channels, 10)
    assert torch.equal(digit_scores.counts, digit_moments["conv1"].count)


def test_direction_is_the_side_of_the_class_mean():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    x = torch.tensor(
        [[1.0, 0.1, -3.0], [1.0, 0.1, -3.0], [0.0, 0.1, 9.0], [0.0, 0.1, 9.0], [0.0, 0.1, 1.0], [0.0, 0.1, 1.0]]
    )
    direction = score(moments_of(x, labels, 3)).direction["layer"]
    assert direction.tolist() == [[1, -1, -1], [0, 0, 0], [-1, 1, -1]]


VECTOR = {"statistic": ["max", "mean"], "witness": "vector"}


def test_direction_of_exp_is_that_of_the_statistic():
    """exp(-scale t) falls as t grows: its mean is smaller where the component is more active."""
    labels = torch.arange(60) % 3
    x = torch.rand(60, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 2.0, 1.0])[labels][:, None]
    x[:, 0] = 0.3
    plain = score(moments_of(x, labels, 3)).direction["layer"]
    assert torch.equal(score(moments_of(x, labels, 3, witness="exp", scale=1e-3)).direction["layer"], plain)
    assert plain.tolist() == [[0, 0, 0], *([-1, 1, row[2]] for row in plain[1:].tolist())]


def test_direction_of_a_vector_is_that_of_its_first_statistic():
    labels = torch.arange(60) % 3
    x = torch.randn(60, 8, 5, 5, generator=torch.Generator().manual_seed(0)) * (1 + labels)[:, None, None, None]
    vector = score(moments_of(x, labels, 3, **VECTOR)).direction["layer"]
    assert torch.equal(vector, score(moments_of(x, labels, 3, statistic="max")).direction["layer"])
    assert not torch.equal(vector, score(moments_of(x, labels, 3, statistic="mean")).direction["layer"])


@pytest.mark.parametrize(
    ("settings", "serves"),
    [
        ({}, ("quadratic", "linear")),
        ({"statistic": "max", "witness": "linear"}, ("quadratic", "linear")),
        ({"witness": "exp", "scale": 0.5}, ("exp",)),
        ({"witness": "exp", "scale": {"layer": 0.5}}, ("exp",)),
        (VECTOR, ("vector",)),
    ],
)
def test_the_witness_is_one_that_the_moments_serve(settings, serves, tmp_path):
    generator = torch.Generator().manual_seed(0)
    moments = moments_of(torch.rand(60, 4, 3, 3, generator=generator), torch.arange(60) % 3, 3, **settings)
    default = score(moments)
    assert (default.witness, default.statistic, default.scale) == (serves[0], moments.statistic, moments.scale)
    for witness in ("quadratic", "linear", "exp", "vector"):
        if witness in serves:
            ours = score(moments, witness=witness, bound="fisher")
            assert torch.equal(ours["layer"], ops.one_vs_rest(moments["layer"], bound="fisher", witness=witness))
            ours.save(tmp_path / "s.safetensors")
            loaded = Scores.load(tmp_path / "s.safetensors")
            assert loaded.settings == ours.settings
            assert (loaded.statistic, loaded.scale) == (ours.statistic, ours.scale)
            assert json.loads(json.dumps(ours.settings)) == ours.settings
        else:
            message = rf"score: witness must be one of {', '.join(map(repr, serves))} for moments .* got '{witness}'"
            with pytest.raises(ValueError, match=message):
                score(moments, witness=witness)


def test_reduce():
    values = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.2, 0.2]], dtype=torch.float64)
    scores = Scores(
        {"a": values}, {}, torch.tensor([3, 3, 3]), bound="fisher", witness="linear", statistic="mean", norms={}
    )
    assert scores.reduce("max")["a"].tolist() == [0.5, 0.2]
    assert scores.reduce("min")["a"].tolist() == [0.1, 0.2]
    torch.testing.assert_close(scores.reduce("mean")["a"], torch.tensor([0.3, 0.2], dtype=torch.float64))
    with pytest.raises(
        ValueError, match="reduction must be one of 'max', 'mean', 'min', 'pairwise_min', 'pairwise_mean', got 'sum'"
    ):
        scores.reduce("sum")


def test_a_plain_dictionary_holds_the_same_tensors(digit_scores):
    plain = dict(digit_scores)
    assert type(plain) is dict
    assert list(plain) == list(digit_scores)
    assert all(type(values) is torch.Tensor and values is digit_scores[layer] for layer, values in plain.items())


def test_a_class_without_samples_is_reported_once_and_ignored():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    moments = moments_of(x, labels + (labels == 2), 5)  # classes 0, 1, 3
    moments.update("second", x, labels + (labels == 2))
    with pytest.warns(UserWarning, match="without samples") as caught:
        scores = score(moments)
    assert [str(w.message) for w in caught] == [
        "score: classes without samples: [2, 4]. Their scores are NaN and they are never chosen."
    ]
    assert scores["layer"][:, [2, 4]].isnan().all()
    assert not scores.direction["layer"][:, [2, 4]].any()
    for reduction in ("min", "mean", "max"):
        assert not scores.reduce(reduction)["layer"].isnan().any()


def test_a_class_with_one_sample_is_reported():
    x, labels = torch.randn(21, 4), torch.tensor([0] * 10 + [1] * 10 + [2])
    with pytest.warns(UserWarning, match=r"classes with one sample: \[2\]. One sample shows no spread"):
        scores = score(moments_of(x, labels, 3))
    assert not scores["layer"].isnan().any()


def test_one_class_alone_cannot_be_reduced():
    with pytest.warns(UserWarning, match="fewer than two classes|classes without samples"):
        scores = score(moments_of(torch.randn(9, 4), torch.zeros(9, dtype=torch.int64), 3))
    with pytest.raises(ValueError, match="at least two classes must have samples .* layer .layer. has 1 of 3"):
        scores.reduce("max")


def test_bad_input(digit_moments):
    with pytest.raises(ValueError, match="moments must hold at least one layer, it is empty"):
        score(Moments(3))
    with pytest.raises(ValueError, match="bound must be one of"):
        score(digit_moments, bound="tv")
    with pytest.raises(ValueError, match="^score: backend must be one of 'auto', .* got 'abacus'"):
        score(digit_moments, backend="abacus")


def test_save_and_load_keep_every_bit(digit_scores, tmp_path):
    digit_scores.save(tmp_path / "s.safetensors")
    loaded = Scores.load(tmp_path / "s.safetensors")
    assert list(loaded) == list(digit_scores)
    for layer in loaded:
        assert torch.equal(loaded[layer], digit_scores[layer])
        assert torch.equal(loaded.direction[layer], digit_scores.direction[layer])
    assert repr(loaded) == repr(digit_scores)
    assert loaded.norms == digit_scores.norms == {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
    whole = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="scores file .* is damaged, cut short"):
        Scores.load(tmp_path / "s.safetensors")


def test_moments_are_no_scores(digit_moments, tmp_path):
    digit_moments.save(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="is not a discedit scores file: it is 'moments'"):
        Scores.load(tmp_path / "m.safetensors")


def test_dataframe_rows_are_the_scores(digit_scores):
    frame = digit_scores.to_dataframe()
    assert len(frame) == sum(values.numel() for values in digit_scores.values())
    row = frame[(frame["layer"] == "conv2") & (frame["channel"] == 5) & (frame["class"] == 7)].iloc[0]
    assert row["score"] == digit_scores["conv2"][5, 7].item()
    assert row["direction"] == digit_scores.direction["conv2"][5, 7].item()
    assert row["samples"] == digit_scores.counts[7].item()


def test_plot_draws_the_scores(digit_scores, tmp_path):
    figure = digit_scores.plot(tmp_path / "scores.png", class_names=[f"digit {k}" for k in range(10)])
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    axes = figure.axes[0]
    drawn = torch.from_numpy(axes.images[0].get_array().data)
    assert drawn.shape == (10, sum(len(values) for values in digit_scores.values()))
    strongest = digit_scores["conv1"].amax(1).argmax()
    assert torch.equal(drawn[:, 0], digit_scores["conv1"][strongest])
    assert [label.get_text() for label in axes.get_yticklabels()][3] == "digit 3"
    with pytest.raises(ValueError, match="class_names must name 10 classes, got 1 names"):
        digit_scores.plot(class_names=["zero"])


def test_real_features_find_the_digit(trained, digit_scores):
    """The best component for each digit tells it from the rest; in the first layer none does as well."""
    best = digit_scores["fc1"].amax(0)
    assert bool((best > 0.6).all())
    assert bool((digit_scores["conv1"].amax(0) < best).all())


def test_no_warning_when_every_class_is_there(digit_moments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(digit_moments)


def selected(seed=0):
    """Scores with all that they can hold, of two layers."""
    moments = Moments(3)
    labels = torch.arange(60) % 3
    for index, (layer, width) in enumerate((("a", 6), ("b", 4))):
        x = torch.randn(60, width, generator=torch.Generator().manual_seed(seed + index)) + labels[:, None]
        moments.update(layer, x, labels)
    moments.norms = {"a": "norm"}
    return moments, score(moments, witness="linear", pairs=True, errors=True)


@pytest.mark.parametrize("kept", [[4, 0, 3], torch.tensor([4, 0, 3]), torch.tensor([4, 0, 3], dtype=torch.int32)])
def test_select_keeps_the_components_in_the_order_given(kept, tmp_path):
    moments, whole = selected()
    before = {layer: values.clone() for layer, values in whole.items()}
    fewer = whole.select({"a": kept})
    assert list(fewer) == ["a", "b"]
    for layer, index in (("a", [4, 0, 3]), ("b", [0, 1, 2, 3])):
        assert torch.equal(fewer[layer], whole[layer][index])
        assert torch.equal(fewer.direction[layer], whole.direction[layer][index])
        assert torch.equal(fewer.standard_error()[layer], whole.standard_error()[layer][index])
        for reduction in ("max", "mean", "min", "pairwise_min", "pairwise_mean"):
            assert torch.equal(fewer.reduce(reduction)[layer], whole.reduce(reduction)[layer][index])
        assert torch.equal(whole[layer], before[layer])
    assert torch.equal(fewer.counts, whole.counts)
    assert fewer.settings == whole.settings
    assert fewer.norms == whole.norms == {"a": "norm"}
    # As if the others had never been there.
    alone = Moments(3)
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) + (torch.arange(60) % 3)[:, None]
    alone.update("a", x[:, [4, 0, 3]], torch.arange(60) % 3)
    torch.testing.assert_close(fewer["a"], score(alone, witness="linear")["a"], rtol=1e-12, atol=0)
    fewer.save(tmp_path / "fewer.safetensors")
    loaded = Scores.load(tmp_path / "fewer.safetensors")
    assert torch.equal(loaded["a"], fewer["a"])
    assert torch.equal(loaded.pairs["a"], fewer.pairs["a"])
    again = fewer.select({"a": [1], "b": []})
    assert torch.equal(again["a"], whole["a"][:1])
    assert again["b"].shape == (0, 3)
    assert moments["a"].channels == 6


def test_select_of_nothing_is_the_same():
    whole = selected()[1]
    same = whole.select({})
    assert repr(same) == repr(whole)
    for layer, values in whole.items():
        assert torch.equal(same[layer], values)


@pytest.mark.parametrize("wrong", [[6], [-1], [[0, 1]], 3, [0, 6, 2]], ids=str)
def test_select_of_bad_indices(wrong):
    whole = selected()[1]
    with pytest.raises(ValueError, match=r"Scores.select: components\['a'\] must be indices in 0..5, got "):
        whole.select({"a": wrong})
    with pytest.raises(ValueError, match=r"components must name layers of the scores, 'c' is none of \['a', 'b'\]"):
        whole.select({"c": [0]})


@pytest.mark.parametrize("wrong", [[True, False, True, False, False, False], torch.zeros(6).bool(), [0.5, 1.5]])
def test_select_takes_no_masks_or_fractions_for_indices(wrong):
    with pytest.raises((TypeError, ValueError), match=r"Scores.select: components\['a'\] must be indices"):
        selected()[1].select({"a": wrong})
