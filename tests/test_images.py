"""Image folders, archives and factories as batches: values against torch and NumPy, and hostile files."""

import sys

import click
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from discedit import zoo
from discedit.cli.arguments import size
from discedit.cli.data import fitted, make_loader, number_classes, open_archive, open_data, open_folder
from discedit.cli.errors import InputError
from discedit.cli.models import Preprocessing


def pixels(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(root, images):
    """Writes {class: {name: array or image}}."""
    for cls, files in images.items():
        (root / cls).mkdir(parents=True)
        for name, image in files.items():
            (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(root / cls / name)
    return root


def batches(source, **options):
    return make_loader(source, argument="--data", **{"batch_size": 4, "workers": 0, "dtype": torch.float32, **options})


def all_of(source, **options):
    parts = list(batches(source, **options))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def expected_of(array, mean, std):
    x = torch.from_numpy(array).double() / 255
    return ((x - torch.tensor(mean).double()) / torch.tensor(std).double()).permute(2, 0, 1).float()


def test_a_folder_in_sorted_order(tmp_path):
    images = {cls: {f"{i}.png": pixels(6, 5, seed=10 * k + i) for i in range(3)} for k, cls in enumerate("bca")}
    data = open_folder(folder_of(tmp_path, images))
    data.preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    x, y = all_of(data)
    assert data.class_names == ["a", "b", "c"]
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    expected = [
        expected_of(images[cls][f"{i}.png"], (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)) for cls in "abc" for i in range(3)
    ]
    torch.testing.assert_close(x, torch.stack(expected))
    assert [len(part) for part, _ in batches(data)] == [4, 4, 1]
    again = batches(data)
    assert torch.equal(next(iter(again))[0], next(iter(again))[0])


def test_workers_give_the_same_and_name_what_is_damaged(tmp_path):
    data = open_folder(
        folder_of(tmp_path, {"a": {f"{i}.png": pixels(4, 4, seed=i) for i in range(6)}, "b": {"x.png": pixels(4, 4)}})
    )
    assert torch.equal(all_of(data, workers=2)[0], all_of(data)[0])
    (tmp_path / "b" / "x.png").write_bytes((tmp_path / "b" / "x.png").read_bytes()[:40])
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"^--data: image '.*x\.png' cannot be read") as caught:
            list(batches(data, workers=workers))
        assert "Traceback" not in str(caught.value)


@pytest.mark.data
def test_an_archive_is_what_the_zoo_gives(cifar):
    data = open_data(str(zoo.data_folder() / "cifar10_test_first5000.npz"), "--data")
    data.preprocessing = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channels=3)
    x, y = next(iter(batches(data, batch_size=1000)))
    assert torch.equal(x, cifar[2].tensors[0])
    assert torch.equal(y, cifar[2].tensors[1])


def test_archives_of_every_form(tmp_path, monkeypatch):
    grey, colour, labels = (
        pixels(5, 4, 6).transpose(2, 0, 1),
        np.stack([pixels(5, 4, seed=i) for i in range(6)]),
        np.arange(6),
    )
    floats = np.random.default_rng(0).normal(size=(6, 2, 5, 4))
    for name, images, expected in (
        ("grey", grey, torch.from_numpy(grey)[:, None].float() / 255),
        ("one", grey[..., None], torch.from_numpy(grey)[:, None].float() / 255),
        ("colour", colour, torch.from_numpy(colour).permute(0, 3, 1, 2).float() / 255),
        ("floats", floats, torch.from_numpy(floats).float()),
    ):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
        assert torch.equal(all_of(open_archive(tmp_path / f"{name}.npz"))[0], expected), name
    one = open_archive(tmp_path / "one.npz")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "PIL", None)  # optional, and not needed where images fit
        assert len(all_of(one)[0]) == 6
    one.preprocessing = Preprocessing(channels=3, mean=(0.5,), std=(0.25,))
    expected = ((torch.from_numpy(grey)[:, None].float() / 255 - 0.5) / 0.25).expand(-1, 3, -1, -1)
    torch.testing.assert_close(all_of(one)[0], expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, r"must hold images and labels, it holds \['images'\]"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, "one integer for each of 2 images"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2)}, "one integer for each of 2 images"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, -1])}, "got -1 at position 1"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([1 << 63, 0], np.uint64)}, "at position 0"),
        ({"images": np.zeros((2, 4, 4, 5), np.uint8), "labels": np.zeros(2, int)}, "must hold images, uint8 of shape"),
        ({"images": np.zeros((2, 4, 4), np.float32), "labels": np.zeros(2, int)}, "must hold images, uint8 of shape"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "not empty"),
        ({"images": np.array([{}, {}]), "labels": np.zeros(2, int)}, "cannot be read|can be read"),
    ],
)
def test_archives_that_make_no_sense(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_data(str(tmp_path / "x.npz"), "--data")


def test_archives_that_are_none(tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2, int))
    for name, data in (("cut", whole.read_bytes()[:-30]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / f"{name}.npz").write_bytes(data)
        with pytest.raises(InputError, match=rf"^--test: '.*{name}\.npz' is no \.npz file that can be read"):
            open_data(str(tmp_path / f"{name}.npz"), "--test")
    with pytest.raises(InputError, match="does not exist"):
        open_data(str(tmp_path / "none.npz"), "--data")
    nan = np.zeros((2, 1, 4, 4), np.float32)
    nan[1, 0, 2, 2] = np.nan
    np.savez(whole, images=nan, labels=np.zeros(2, int))
    with pytest.raises(InputError, match=r"image 1 of '.*' must be finite"):
        list(batches(open_data(str(whole), "--data")))


def test_every_mode_of_image(tmp_path):
    """What each gives in colour and in grey, against NumPy where the mode loses nothing."""
    rgb = pixels(6, 6)
    grey = rgb[..., 0]
    deep = grey.astype(np.uint16) * 257
    alpha = np.dstack([rgb, np.full((6, 6), 128, np.uint8)])
    flat = Image.fromarray((grey // 64 * 64).astype(np.uint8)).convert("P")
    names = {
        "L.png": Image.fromarray(grey),
        "LA.png": Image.merge("LA", (Image.fromarray(grey), Image.fromarray(grey))),
        "RGBA.png": Image.fromarray(alpha),
        "P.png": flat,
        "1.png": Image.fromarray(grey).convert("1"),
        "I16.png": Image.fromarray(deep),
        "I16.tif": Image.fromarray(deep),
        "CMYK.jpg": Image.fromarray(rgb).convert("CMYK"),
        "RGB.bmp": Image.fromarray(rgb),
    }
    data = open_folder(folder_of(tmp_path, {"a": names}))
    order = [path.name for path in data.items]
    for channels in (1, 3):
        data.preprocessing = Preprocessing(channels=channels)
        x = all_of(data)[0]
        assert x.shape == (len(names), channels, 6, 6)
        exact = torch.from_numpy(grey).float() / 255
        for name in ("L.png", "LA.png", "I16.png", "I16.tif"):
            assert torch.equal(x[order.index(name)], exact.expand(channels, 6, 6)), name
    colour = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255
    for name in ("RGB.bmp", "RGBA.png"):
        assert torch.equal(x[order.index(name)], colour), name
    palette = torch.from_numpy(np.array(flat.convert("RGB"))).permute(2, 0, 1).float() / 255
    assert torch.equal(x[order.index("P.png")], palette)
    assert set(x[order.index("1.png")].unique().tolist()) <= {0.0, 1.0}


def test_floating_point_images_are_refused(tmp_path):
    data = open_folder(folder_of(tmp_path, {"a": {"x.tif": Image.fromarray(np.ones((4, 4), np.float32))}}))
    with pytest.raises(InputError, match=r"x\.tif' has pixels of floating-point numbers"):
        list(batches(data))


def test_resize_then_crop():
    array = pixels(40, 60)
    image = Image.fromarray(array)
    same = fitted(image, Preprocessing(size=(40, 60)))
    assert np.array_equal(np.asarray(same), array)
    cropped = fitted(image, Preprocessing(size=(20, 30), resize=40))  # no resize, the centre
    assert np.array_equal(np.asarray(cropped), array[10:30, 15:45])
    halved = fitted(image, Preprocessing(size=(20, 20)))
    by_hand = image.resize((30, 20), Image.Resampling.BILINEAR).crop((5, 0, 25, 20))
    assert np.array_equal(np.asarray(halved), np.asarray(by_hand))
    assert fitted(Image.new("RGB", (3, 7)), Preprocessing(size=(16, 32))).size == (32, 16)
    with pytest.raises(InputError, match="too elongated"):
        fitted(Image.new("L", (60_000, 1)), Preprocessing(size=(224, 224)))


def test_sizes_that_differ_need_a_size(tmp_path):
    data = open_folder(folder_of(tmp_path, {"a": {"x.png": pixels(4, 4), "y.png": pixels(4, 5)}}))
    with pytest.raises(InputError, match=r"--size be given: .*x\.png' has 4 x 4, .*y\.png' 4 x 5"):
        list(batches(data))
    data.preprocessing = Preprocessing(size=(4, 4))
    assert all_of(data)[0].shape == (2, 3, 4, 4)


def test_folders_that_make_no_sense(tmp_path):
    with pytest.raises(InputError, match="must hold a folder for each class"):
        open_data(str(tmp_path), "--data")
    folder_of(tmp_path, {"Käfer 虫": {"ä.png": pixels(4, 4)}})
    (tmp_path / "Käfer 虫" / "readme.txt").write_text("no image")
    (tmp_path / "Käfer 虫" / ".hidden.png").write_text("no image")
    data = open_data(str(tmp_path), "--data")
    assert (data.class_names, len(data), data.ignored) == (["Käfer 虫"], 1, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="class folder '.*empty' holds no image"):
        open_data(str(tmp_path), "--data")
    with pytest.raises(InputError, match="is neither"):
        open_data(__file__, "--data")


def test_folders_get_the_models_numbers(tmp_path):
    data = open_folder(folder_of(tmp_path / "named", {"cat": {"x.png": pixels(2, 2)}, "ant": {"x.png": pixels(2, 2)}}))
    assert "by name" in number_classes(data, ["dog", "cat", "bee", "ant"])
    assert data.labels.tolist() == [3, 1]  # ant, cat
    with pytest.raises(InputError, match="found 'ant'"):
        number_classes(open_folder(tmp_path / "named"), ["cat", "dog"])
    data = open_folder(folder_of(tmp_path / "numbered", {n: {"x.png": pixels(2, 2)} for n in ("2", "10", "0")}))
    assert "by the numbers" in number_classes(data, [f"class {k}" for k in range(11)])
    assert data.labels.tolist() == [0, 10, 2]  # sorted as text: 0, 10, 2


def test_so_many_of_each_class_and_no_more():
    labels = torch.tensor([0, 1, 0, 0, 2, 1, 1, 0])
    dataset = TensorDataset(torch.arange(8.0)[:, None], labels)
    for source in (dataset, DataLoader(dataset, batch_size=3), [(dataset.tensors[0], labels)]):
        x, y = all_of(source, limit_per_class=2, num_classes=3)
        assert x.flatten().tolist() == [0, 1, 2, 4, 5]
        assert torch.equal(y, labels[x.flatten().long()])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_samples(ranks):
    dataset = TensorDataset(torch.arange(13.0)[:, None], torch.zeros(13, dtype=torch.int64))
    whole = dataset.tensors[0].split(4)
    for source in (DataLoader(dataset, batch_size=4), list(DataLoader(dataset, batch_size=4))):
        for rank in range(ranks):
            given = [x for x, _ in batches(source, rank=rank, ranks=ranks)]
            assert len(given) == len(whole[rank::ranks])
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, whole[rank::ranks], strict=True))


def test_inputs_have_the_models_type_and_labels_keep_theirs():
    dataset = TensorDataset(torch.arange(4.0)[:, None], torch.arange(4))
    x, y = all_of(dataset, dtype=torch.bfloat16)
    assert (x.dtype, y.dtype) == (torch.bfloat16, torch.int64)
    with pytest.raises(InputError, match="can be gone through again, it gives a generator"):
        batches(x for x in ())


def test_sizes():
    assert [size(text) for text in ("7", "8x9", "8X9")] == [(7, 7), (8, 9), (8, 9)]
    for text in ("", "x", "0", "-1", "1x2x3", "²", "70000", "1.5"):
        with pytest.raises(click.BadParameter):
            size(text)
