import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from discedit import Moments, score


def filled(seed=0, layers=("a", "b.c")):
    generator = torch.Generator().manual_seed(seed)
    moments = Moments(4)
    for layer in layers:
        x = torch.randn(50, 6, 3, 3, generator=generator)
        moments.update(layer, x, torch.randint(0, 4, (50,), generator=generator))
    moments.norms = {"a": "a.norm"}
    return moments


def equal(a, b):
    return list(a) == list(b) and all(
        torch.equal(x, y) for layer in a for x, y in zip(a[layer].tensors(), b[layer].tensors(), strict=True)
    )


def test_save_and_load_keep_every_bit(tmp_path):
    moments = filled()
    moments.save(tmp_path / "m.safetensors")
    loaded = Moments.load(tmp_path / "m.safetensors")
    assert equal(moments, loaded)
    assert loaded.norms == moments.norms
    assert (loaded.num_classes, loaded.statistic) == (4, "mean")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_merge_adds_samples_and_layers():
    left, right = filled(0), filled(1, ("b.c", "d"))
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
    with pytest.raises(ValueError, match=r"other must have num_classes=4 and statistic='mean', it has num_classes=5"):
        left.merge(Moments(5))
    other = Moments(4)
    other.update("new", torch.ones(2, 3), torch.tensor([0, 1]))
    other.update("a", torch.ones(2, 3), torch.tensor([0, 1]))
    before = filled()
    with pytest.raises(ValueError, match=r"layer 'a': .* a is \(4, 6\) on cpu, b is \(4, 3\) on cpu"):
        left.merge(other)
    assert equal(left, before)


def test_update_names_the_layer_and_keeps_the_state():
    moments = filled()
    bad = torch.ones(2, 6, 3, 3)
    bad[1, 4, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'a': feature maps must be finite, .* sample 1, channel 4"):
        moments.update("a", bad, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"layer 'a': class_moments: out must hold 4 classes and 5 channels"):
        moments.update("a", torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"layer 'a': class_moments: labels must lie in 0..3"):
        moments.update("a", torch.ones(2, 6), torch.tensor([0, 4]))
    assert equal(moments, filled())


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
    path.write_bytes(whole.replace(b'num_classes\\": 4', b'num_classes\\": 3'))
    with pytest.raises(ValueError, match=r"tensor '0.count' must have shape \(3,\), torch.int64; found shape \(4,\)"):
        Moments.load(path)


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    filled(0).save(path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        filled(1).save(path)
    assert equal(Moments.load(path), filled(0))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_to_copies():
    moments = filled()
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
        moments = Moments(3)
        if rank != 1:  # a shard without samples
            moments.update("a", x[part], y[part])
        moments.all_reduce().save(f"{folder}/{rank}.safetensors")
        dist.destroy_process_group()
    """
    ranks = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(rank), str(tmp_path)]) for rank in range(3)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    results = [Moments.load(tmp_path / f"{rank}.safetensors") for rank in range(3)]
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Moments(3)
    whole.update("a", x, torch.arange(90) % 3)
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])
    torch.testing.assert_close(results[0]["a"].mean, whole["a"].mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(results[0]["a"].m4, whole["a"].m4, rtol=1e-12, atol=1e-12)
