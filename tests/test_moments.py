import pickle
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import BACKENDS, same_bits

from discedit import Moments, ops, score
from discedit.common import files

KINDS = {
    "quadratic": {},
    "linear": {"statistic": "l2", "witness": "linear"},
    "exp": {"statistic": "max", "witness": "exp", "scale": 0.3},
    "exp by layer": {"witness": "exp", "scale": {"a": 0.25, "b.c": 2, "d": 0.5}},
    "vector": {"statistic": ["mean", "rms", "max"], "witness": "vector"},
}


def filled(seed=0, layers=("a", "b.c"), **settings):
    generator = torch.Generator().manual_seed(seed)
    moments = Moments(4, **settings)
    for layer in layers:
        x = torch.randn(50, 6, 3, 3, generator=generator)
        moments.update(layer, x, torch.randint(0, 4, (50,), generator=generator))
    moments.norms = {"a": "a.norm"}
    return moments


def equal(a, b):
    return list(a) == list(b) and a.settings == b.settings and all(same_bits(a[layer], b[layer]) for layer in a)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_update_is_class_moments_of_every_layer(kind, backend):
    settings = KINDS[kind]
    moments = Moments(4, backend=backend, **settings)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(50, 6, 3, 3, generator=generator), torch.arange(50) % 4) for _ in range(3)]
    expected = {}
    for layer, scale in (("a", 0.25), ("b.c", 2)):
        out = None
        for x, labels in batches:
            moments.update(layer, x, labels)
            options = {**settings, "scale": scale} if kind == "exp by layer" else settings
            out = ops.class_moments(x, labels, 4, out=out, backend=backend, **options)
        expected[layer] = out
    assert list(moments) == ["a", "b.c"]
    assert all(same_bits(moments[layer], state) for layer, state in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_keep_every_bit(tmp_path, kind):
    moments = filled(**KINDS[kind])
    moments.save(tmp_path / "m.safetensors")
    loaded = Moments.load(tmp_path / "m.safetensors")
    assert equal(moments, loaded)
    assert loaded.norms == moments.norms
    assert loaded.num_classes == 4
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    loaded.update("a", torch.ones(4, 6, 2, 2), torch.arange(4))
    assert loaded.samples == 54


@pytest.mark.parametrize("kind", KINDS)
def test_merge_adds_samples_and_layers(kind):
    left, right = filled(0, **KINDS[kind]), filled(1, ("b.c", "d"), **KINDS[kind])
    counts = left["b.c"].count + right["b.c"].count
    merged = left.merge(right)
    assert merged is left
    assert list(merged) == ["a", "b.c", "d"]
    assert torch.equal(merged["b.c"].count, counts)
    assert torch.equal(merged["d"].mean, right["d"].mean)
    right["d"].mean.zero_()
    assert merged["d"].mean.any(), "the merged state must not share memory with its source"


def test_merge_refuses_and_changes_nothing():
    left = filled()
    for settings, wanted, found in (
        ({"num_classes": 5}, "num_classes=4", "num_classes=5"),
        ({"statistic": "max"}, "statistic='mean'", "statistic='max'"),
        ({"witness": "linear"}, "witness='quadratic'", "witness='linear'"),
        ({"witness": "exp", "scale": 2}, "witness='quadratic', scale=None", "witness='exp', scale=2.0"),
        (
            {"num_classes": 5, "statistic": ["mean"], "witness": "vector"},
            "num_classes=4, statistic='mean', witness='quadratic'",
            r"num_classes=5, statistic=\('mean',\), witness='vector'",
        ),
    ):
        with pytest.raises(ValueError, match=f"Moments.merge: other must have {wanted} like this .*, it has {found}"):
            left.merge(Moments(**{"num_classes": 4, **settings}))
    one, two = (Moments(4, witness="exp", scale=scale) for scale in (1.0, {"a": 1.0}))
    with pytest.raises(ValueError, match=r"other must have scale=1.0 like this object, it has scale={'a': 1.0}"):
        one.merge(two)
    other = Moments(4)
    other.update("new", torch.ones(2, 3), torch.tensor([0, 1]))
    other.update("a", torch.ones(2, 3), torch.tensor([0, 1]))
    before = filled()
    with pytest.raises(ValueError, match=r"layer 'a': .* 4 classes and 6 channels on cpu, b is .* 3 channels on cpu"):
        left.merge(other)
    assert equal(left, before)


def test_update_names_the_layer_and_keeps_the_state():
    moments = filled()
    bad = torch.ones(2, 6, 3, 3)
    bad[1, 4, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'a': feature maps must be finite, .* sample 1, channel 4"):
        moments.update("a", bad, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"layer 'a': pooled must have 6 channels on cpu like .* before, got 5 on cpu"):
        moments.update("a", torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"layer 'a': class_moments: labels must lie in 0..3"):
        moments.update("a", torch.ones(2, 6), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"layer 'new': class_moments: labels must lie in 0..3"):
        moments.update("new", torch.ones(2, 6), torch.tensor([0, -1]))
    assert equal(moments, filled())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_is_refused_and_named(kind, backend):
    moments = Moments(4, backend=backend, **KINDS[kind])
    for value in (float("nan"), float("inf")):
        bad = torch.ones(5, 6, 3, 3)
        bad[3, 2, 1, 1] = value
        with pytest.raises(ValueError, match=r"feature maps must be finite, .* the map of sample 3, channel 2"):
            moments.update("a", bad, torch.tensor([0, 1, 2, 3, 0]))
    assert not moments


def test_finite_numbers_whose_sum_is_not_are_fine():
    x = torch.full((4, 3), 1.5e308, dtype=torch.float64)
    moments = Moments(2)
    moments.update("a", x, torch.tensor([0, 0, 1, 1]))
    assert moments["a"].mean.tolist() == [[1.5e308] * 3] * 2
    assert not moments["a"].m2.any()


def test_exp_beyond_float64_is_refused_and_named():
    moments = Moments(2, witness="exp", scale=0.5)
    x = torch.zeros(3, 4)
    x[2, 1] = -701
    message = (
        r"layer 'a': scale must keep exp\(-scale t\) below exp\(350\), scale=0.5 .* the map of sample 2, channel 1"
    )
    with pytest.raises(ValueError, match=message):
        moments.update("a", x, torch.tensor([0, 1, 1]))
    assert not moments
    x[2, 1] = -699
    moments.update("a", x, torch.tensor([0, 1, 1]))
    assert all(tensor.isfinite().all() for tensor in moments["a"].tensors()[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistic": "median"}, "Moments: statistic must be one of 'mean', .* got 'median'"),
        ({"statistic": ("mean", "mean"), "witness": "vector"}, r"each once, got \('mean', 'mean'\)"),
        ({"statistic": ("mean", "max")}, "Moments: statistic must be a tuple .* and one name for every other witness"),
        ({"witness": "vector"}, "Moments: statistic must be a tuple or list of names for witness='vector'"),
        ({"witness": "cubic"}, "Moments: witness must be one of 'linear', 'quadratic', 'exp', 'vector', got 'cubic'"),
        ({"witness": "exp"}, "Moments: scale must be a finite number above 0 for witness='exp', got None"),
        ({"witness": "exp", "scale": {"a": 1, "b": 0}}, "Moments: scale must be a finite number above 0 .* got 0"),
        ({"scale": {"a": 1}}, "Moments: scale must be left out unless witness='exp', got {'a': 1} with .*'quadratic'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Moments(3, **settings)


def test_a_layer_without_a_scale_is_named():
    moments = Moments(3, witness="exp", scale={"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"layer 'c': scale must name every layer, .*'c' is not among \['a', 'b'\]"):
        moments.update("c", torch.ones(1, 2), torch.tensor([0]))


def unsealed(data):
    """A file without its checksum, as discedit 0.1.0 wrote them."""
    data, found = re.subn(rb', \\"sha256\\": \\"[0-9a-f]{64}\\"', lambda match: b" " * len(match[0]), data)
    assert found == 1
    return data


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Moments.load(path)
    filled().save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged, cut short or no safetensors file"):
            Moments.load(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="damaged, cut short or no safetensors file"):
        Moments.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is not a discedit moments file: it is 'a foreign one'"):
        Moments.load(path)
    path.write_bytes(whole.replace(b'version\\": 1', b'version\\": 9'))
    with pytest.raises(ValueError, match="has format version 9; this discedit reads 1"):
        Moments.load(path)
    whole = unsealed(whole)
    path.write_bytes(whole)
    assert equal(Moments.load(path), filled())
    path.write_bytes(whole.replace(b'num_classes\\": 4', b'num_classes\\": 3'))
    with pytest.raises(ValueError, match=r"tensor '0.count' must have shape \(3,\), torch.int64; found shape \(4,\)"):
        Moments.load(path)


def test_damaged_headers_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    filled(**KINDS["vector"]).save(path)
    whole = unsealed(path.read_bytes())
    for old, new, message in (
        (b'"witness\\', b'"witless\\', "header field 'witness' must be str, got None"),
        (b'"vector\\', b'"victor\\', "witness must be one of 'linear', .* got 'victor'"),
        (b'a\\": 6', b'a\\": 7', r"tensor '0.mean' must have shape \(3, 4, 7\), .* found shape \(3, 4, 6\)"),
        (b'a\\": 6', b'a\\": {', "damaged|header"),
        (b'"scale\\": null', b'"scale\\": true', "header field 'scale' must be float or dict or NoneType, got True"),
    ):
        assert whole.count(old) == 1, old
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=message):
            Moments.load(path)


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / "m.safetensors"
    filled().save(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    layer = whole.index(b'layers\\": {\\"') + len(b'layers\\": {\\"')
    for place in (layer, start, start + 100, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="its contents do not fit its checksum"):
            Moments.load(path)


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    filled(0).save(path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        filled(1).save(path)
    assert equal(Moments.load(path), filled(0))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_to_copies(kind):
    moments = filled(**KINDS[kind])
    copy = moments.to("cpu")
    assert equal(moments, copy)
    assert copy.norms == moments.norms
    assert copy.norms is not moments.norms


def test_to_and_scores_share_no_memory():
    moments = filled()
    copy, scores = moments.to("cpu"), score(moments)
    before = scores.counts.clone()
    moments.update("a", torch.ones(4, 6), torch.arange(4))
    assert equal(copy, filled())
    assert torch.equal(scores.counts, before)
    assert moments == moments
    assert moments != copy
    assert len({moments, copy}) == 2


def test_all_reduce_needs_a_group():
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        filled().all_reduce()


def test_all_reduce_gives_every_rank_the_whole(tmp_path):
    script = """
        import sys, torch, torch.distributed as dist
        from discedit import Moments
        rank, folder = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
        x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = torch.arange(90) % 3
        part = slice(0, 0) if rank == 1 else slice(rank * 30, rank * 30 + (60 if rank == 0 else 30))
        for name, settings in (("scalar", {}), ("vector", {"statistic": ("mean", "l2"), "witness": "vector"})):
            moments = Moments(3, **settings)
            if rank != 1:  # a shard without samples
                moments.update("a", x[part], y[part])
            moments.all_reduce().save(f"{folder}/{name}{rank}.safetensors")
        dist.destroy_process_group()
    """
    ranks = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(rank), str(tmp_path)]) for rank in range(3)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, settings in (("scalar", {}), ("vector", {"statistic": ("mean", "l2"), "witness": "vector"})):
        results = [Moments.load(tmp_path / f"{name}{rank}.safetensors") for rank in range(3)]
        whole = Moments(3, **settings)
        whole.update("a", x, torch.arange(90) % 3)
        assert equal(results[0], results[1])
        assert equal(results[0], results[2])
        for ours, exact in zip(results[0]["a"].tensors(), whole["a"].tensors(), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["header field", "tensor"])
def test_a_file_that_holds_more_is_refused(tmp_path, what):
    """It would be lost when the file is saved again."""
    moments = Moments(2)
    moments.update("layer", torch.rand(4, 3), torch.tensor([0, 0, 1, 1]))
    header, tensors = moments.contents()
    more = {"header field": header, "tensor": tensors}[what]
    more["extra"] = torch.ones(1) if what == "tensor" else 1
    files.save_tensors(tmp_path / "m.safetensors", "moments", header, tensors)
    with pytest.raises(ValueError, match=f"holds the unknown {what} 'extra'"):
        Moments.load(tmp_path / "m.safetensors")
