"""Passes of several processes: the same moments as one alone, whatever the shares, wrappers and failures."""

import multiprocessing
import os
import signal  # noqa: F401  (for the scripts)
import sys
import textwrap
import time
import weakref  # noqa: F401  (for the scripts)
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset, TensorDataset  # noqa: F401  (for the scripts)

from discedit import Moments, collect_blocks, collect_moments, zoo
from discedit.fidelity import SecondMoments, collect_second_moments
from discedit.moments.distributed import MORE, Group, ShardSampler, dropped_samples, own_samples


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4),
    ).eval().double()  # fmt: skip


def dataset(number=101):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(number, 3, 8, 8).double(), torch.arange(number) % 4)


def _process(code, rank, size, folder):
    """What a process runs: the script of a test, in a group of all."""
    sys.stderr.flush()
    os.dup2(os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )

    def keep(moments, name="moments"):
        moments.save(f"{folder}/{name}{rank}.safetensors")

    space = {**globals(), "rank": rank, "size": size, "folder": folder, "keep": keep}
    exec(compile(textwrap.dedent(code), "script", "exec"), space)
    dist.destroy_process_group()


def launch(script, size, folder, *, timeout=240):
    """The exit codes and what went to stderr, by rank. Processes are forked from one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "discedit"])
    processes = [
        context.Process(target=_process, args=(script, rank, size, str(folder)), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, [Path(folder, f"stderr{rank}").read_text() for rank in range(size)]


def results(folder, size, name="moments"):
    return [Moments.load(f"{folder}/{name}{rank}.safetensors") for rank in range(size)]


def assert_same(found, whole):
    """Every process has the same bits, and up to rounding they are those of one process."""
    for other in found:
        assert list(other) == list(whole)
        assert other.norms == whole.norms
        for layer in whole:
            for first, mine, expected in zip(
                found[0][layer].tensors(), other[layer].tensors(), whole[layer].tensors(), strict=True
            ):
                assert torch.equal(first, mine)
                scale = 1 + float(expected.abs().max())
                assert float((mine - expected).abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize("size", [2, 4])
def test_processes_give_what_one_gives(size, tmp_path):
    script = """
        data = dataset()
        loader = DataLoader(data, batch_size=10, sampler=ShardSampler(data))
        keep(collect_moments(network(), loader, 4, group="world"))
        keep(collect_moments(network(), loader, 4, group=dist.group.WORLD, labels="predicted"), "predicted")
        for i, block in enumerate(collect_blocks(network(), loader, 4, blocks=3, group="world")):
            keep(block, f"block{i}-")
        keep(collect_moments(network(), loader, 4), "alone")
    """
    codes, errors = launch(script, size, tmp_path)
    assert codes == [0] * size, errors
    loader = DataLoader(dataset(), batch_size=10)
    assert_same(results(tmp_path, size), collect_moments(network(), loader, 4))
    assert_same(results(tmp_path, size, "predicted"), collect_moments(network(), loader, 4, labels="predicted"))
    assert sum(part.samples for part in results(tmp_path, size, "alone")) == 101
    blocks = [results(tmp_path, size, f"block{i}-") for i in range(3)]
    assert sum(block[0].samples for block in blocks) == 101
    merged = Moments(4)
    for block in blocks:
        merged.merge(block[size - 1])
    assert_same([merged], collect_moments(network(), loader, 4))
    assert max(block[0].samples for block in blocks) - min(block[0].samples for block in blocks) <= 4 * size


def test_uneven_and_empty_shares_and_samplers_that_repeat(tmp_path):
    script = """
        data = dataset(22)
        share = {0: range(0, 3), 1: range(0, 0), 2: range(3, 22)}[rank]
        keep(collect_moments(network(), DataLoader(Subset(data, share), batch_size=5), 4, group="world"), "uneven")
        sampler = DistributedSampler(data)  # 22 samples for 3 processes: 24 are drawn
        assert len(sampler) == 8
        sampler.set_epoch(5)
        keep(collect_moments(network(), DataLoader(data, batch_size=5, sampler=sampler), 4, group="world"), "repeated")
        few = TensorDataset(*(tensor[:2] for tensor in data.tensors))  # the whole share of one is a repetition
        sampler = DistributedSampler(few, shuffle=False)
        keep(collect_moments(network(), DataLoader(few, batch_size=5, sampler=sampler), 4, group="world"), "few")
        try:
            collect_moments(network(), [], 4, group="world")
        except ValueError as error:
            assert "loader must give at least one batch" in str(error)
        else:
            raise SystemExit(7)
    """
    codes, errors = launch(script, 3, tmp_path)
    assert codes == [0, 0, 0], errors
    whole = collect_moments(network(), DataLoader(dataset(22), batch_size=5), 4)
    assert_same(results(tmp_path, 3, "uneven"), whole)
    assert_same(results(tmp_path, 3, "repeated"), whole)
    x, labels = dataset(22).tensors
    assert_same(results(tmp_path, 3, "few"), collect_moments(network(), [(x[:2], labels[:2])], 4))


def test_what_a_sampler_repeats_or_drops():
    data = dataset(22)
    for replicas in (1, 3, 4, 30):
        loaders = [
            DataLoader(data, batch_size=3, sampler=DistributedSampler(data, replicas, rank)) for rank in range(replicas)
        ]
        assert sum(own_samples(loader) for loader in loaders) == 22
        by_batch = DataLoader(data, batch_sampler=BatchSampler(loaders[0].sampler, 4, False))
        assert own_samples(by_batch) == own_samples(loaders[0])
        drops = DataLoader(data, batch_size=3, sampler=DistributedSampler(data, replicas, 0, drop_last=True))
        assert own_samples(drops) is None
        assert dropped_samples(drops) == 22 % replicas
    assert own_samples(DataLoader(data)) is None
    assert own_samples([1]) is None

    class Other(DistributedSampler):
        def __iter__(self):
            return iter(range(4))

    assert own_samples(DataLoader(data, sampler=Other(data, 3, 0))) is None
    drops = DataLoader(data, batch_size=3, sampler=DistributedSampler(data, 3, 0, drop_last=True))
    with pytest.warns(UserWarning, match="left out: 1 samples that the loader's sampler drops") as caught:
        collect_moments(network(), drops, 4)
    assert caught[0].filename == __file__


def test_a_share_counts_once_without_a_group_too():
    data = dataset(22)
    total = Moments(4)
    for rank in range(3):
        loader = DataLoader(data, batch_size=5, sampler=DistributedSampler(data, 3, rank, shuffle=True))
        total.merge(collect_moments(network(), loader, 4))
        blocks = collect_blocks(network(), loader, 4, blocks=2)
        assert sum(block.samples for block in blocks) == own_samples(loader)
    assert_same([total], collect_moments(network(), DataLoader(data, batch_size=5), 4))


def test_shares_are_disjoint_and_whole():
    for number in (0, 1, 7, 100):
        for replicas, block in product((1, 2, 8), (1, 3)):
            options = {"replicas": replicas, "block": block}
            shares = [list(ShardSampler(range(number), rank=rank, **options)) for rank in range(replicas)]
            assert sorted(index for share in shares for index in share) == list(range(number))
            for rank, share in enumerate(shares):
                assert len(ShardSampler(range(number), rank=rank, **options)) == len(share)
    for options in (
        {"rank": 3, "replicas": 3},
        {"rank": -1, "replicas": 3},
        {"rank": 0, "replicas": 0},
        {"rank": 1.5},
        {"block": 0},
    ):
        with pytest.raises(ValueError, match="ShardSampler: (rank|replicas|block) must be"):
            ShardSampler(range(3), **options)
    with pytest.raises(TypeError, match="dataset must have a length, generator has none"):
        ShardSampler(i for i in range(3))


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard"])
def test_wrapped_models_with_uneven_shares(wrapper, tmp_path):
    """Their forward passes wait for each other: without steps in common, uneven shares would hang."""
    script = f"""
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        model = network()
        if {wrapper!r} == "fully_shard":
            mesh = init_device_mesh("cpu", (size,))
            for layer in model:
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = nn.parallel.DistributedDataParallel(model)
        data = dataset(22)
        share = {{0: range(0, 3), 1: range(0, 0), 2: range(3, 22)}}[rank]
        loader = DataLoader(Subset(data, share), batch_size=5)
        keep(collect_moments(model, loader, 4, group="world"))
        keep(collect_moments(model, loader, 4, group="world", labels="predicted"), "predicted")
    """
    codes, errors = launch(script, 3, tmp_path)
    assert codes == [0, 0, 0], errors
    loader = DataLoader(dataset(22), batch_size=5)
    for found, options in (("moments", {}), ("predicted", {"labels": "predicted"})):
        whole = collect_moments(network(), loader, 4, **options)
        for other in results(tmp_path, 3, found):
            assert list(other) == list(whole)
            for layer in whole:
                assert torch.equal(other[layer].count, whole[layer].count)
                torch.testing.assert_close(other[layer].mean, whole[layer].mean, rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.act = nn.GELU()

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head = nn.Linear(4, 6), Block(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.block(self.first(x)).mean(1))


def tokens():
    torch.manual_seed(1)
    return torch.randn(21, 8, 4), torch.arange(21) % 3


def test_tensor_parallel_layers_give_all_their_channels(tmp_path):
    """Two processes with half of the hidden neurons each (and half of the tokens), two shares of the data: four."""
    script = """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel, PrepareModuleInput, PrepareModuleOutput, RowwiseParallel, SequenceParallel,
            parallelize_module,
        )

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        part = slice(0, 16) if mesh["data"].get_local_rank() == 0 else slice(16, 21)
        x, y = tokens()
        loader = [(a, b) for a, b in zip(x[part].split(4), y[part].split(4))]
        columns = parallelize_module(
            Tokens().eval(), mesh["tensor"], {"block.up": ColwiseParallel(), "block.down": RowwiseParallel()}
        )
        by_tokens = parallelize_module(
            Tokens().eval(),
            mesh["tensor"],
            {
                "block": PrepareModuleInput(
                    input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
                ),
                "block.norm": SequenceParallel(use_local_output=True),
                "block.up": ColwiseParallel(input_layouts=Shard(1)),
                "block.down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
        parallelize_module(
            by_tokens,
            mesh["tensor"],
            {"block": PrepareModuleOutput(output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),))},
        )
        for name, model in (("columns", columns), ("tokens", by_tokens)):
            for read in ("consumer", "output"):
                found = collect_moments(model, loader, 3, group=mesh["data"].get_group(), read=read)
                keep(found, f"{name}-{read}-")
    """
    codes, errors = launch(script, 4, tmp_path)
    assert codes == [0] * 4, errors
    for read in ("consumer", "output"):
        whole = collect_moments(Tokens().eval(), [tokens()], 3, read=read)
        assert set(whole) == {"first", "block.up", "block.down"}
        for name in ("columns", "tokens"):
            for found in results(tmp_path, 4, f"{name}-{read}-"):
                assert list(found) == list(whole)
                for layer in whole:
                    if (name, read, layer) == ("tokens", "consumer", "first"):
                        continue  # tokens are dealt between it and its consumer: read at its own output
                    assert torch.equal(found[layer].count, whole[layer].count)
                    torch.testing.assert_close(found[layer].mean, whole[layer].mean, rtol=1e-4, atol=1e-6)
                    torch.testing.assert_close(found[layer].m2, whole[layer].m2, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_error_of_one_process_is_told_to_the_others(wrapped, tmp_path):
    script = f"""
        data = dataset(40)
        batches = [(x[None].expand(5, -1, -1, -1), y[None].expand(5)) for x, y in data]
        if rank == 1:
            batches[3] = (batches[3][0], torch.full((5,), 9))
        model = nn.parallel.DistributedDataParallel(network()) if {wrapped} else network()
        start = time.monotonic()
        try:
            collect_moments(model, batches, 4, group="world")
        except (ValueError, RuntimeError) as error:
            print(type(error).__name__, error, file=sys.stderr)
            assert time.monotonic() - start < 15
        else:
            raise SystemExit(7)
    """
    codes, errors = launch(script, 3, tmp_path)
    assert codes == [0, 0, 0], errors
    assert "ValueError collect_moments: batch 3: " in errors[1]
    assert "labels must lie in 0..3" in errors[1]
    for other in (errors[0], errors[2]):
        assert "OtherFailed collect_moments: process 1 of 3 failed: ValueError: collect_moments: batch 3" in other


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_process_that_dies_is_an_error_of_the_others(wrapped, tmp_path):
    script = f"""
        data = dataset(40)
        def batches():
            for i, (x, y) in enumerate(data):
                if rank == 1 and i == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield x[None], y[None]
        model = nn.parallel.DistributedDataParallel(network()) if {wrapped} else network()
        try:
            collect_moments(model, batches(), 4, group="world")
        except RuntimeError as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(5)
    """
    start = time.monotonic()
    codes, errors = launch(script, 3, tmp_path)
    assert codes == [5, -9, 5], errors
    assert time.monotonic() - start < 60


def test_a_process_that_does_not_come_is_an_error_after_the_timeout(tmp_path):
    script = """
        dist.barrier()
        small = dist.new_group(timeout=timedelta(seconds=3))
        if rank == 1:
            time.sleep(12)
            os._exit(0)
        try:
            collect_moments(network(), DataLoader(dataset(9), batch_size=3), 4, group=small)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            os._exit(5)
    """
    codes, errors = launch(script, 2, tmp_path)
    assert codes == [5, 0], errors
    assert "another process of 2 is gone or does not answer" in errors[0]


def test_nothing_holds_what_was_sent(tmp_path):
    """Else gloo's thread would let go of it when it likes, perhaps while the group ends, and wait for Python's lock."""
    script = """
        sent = []
        def noted(operation):
            def run(*given, **options):
                sent.extend(weakref.ref(x) for one in given for x in (one if isinstance(one, list) else [one]))
                return operation(*given, **options)
            return run
        dist.all_gather, dist.broadcast = noted(dist.all_gather), noted(dist.broadcast)
        group = Group("op", "world")
        for i in range(100):
            assert group.agree(i + rank) == [i, i + 1]
            assert list(group.gather(bytes(range(i * rank)))) == [b"", bytes(range(i))]
            assert not any(tensor() is not None for tensor in sent)
        assert len(sent) > 300
    """
    codes, errors = launch(script, 2, tmp_path)
    assert codes == [0, 0], errors


def test_a_group_must_be_one():
    with pytest.raises(RuntimeError, match="collect_moments: torch.distributed must be initialised first"):
        collect_moments(network(), DataLoader(dataset(4)), 4, group="world")
    alone = Group("op", None)
    assert (alone.agree(1), list(alone.gather(b"x")), list(alone.exchange(b"y"))) == ([1], [b"x"], [b"y"])


def test_a_wrong_group_is_an_error(tmp_path):
    script = """
        for wrong in ("all", 3, [0, 1]):
            try:
                collect_moments(network(), DataLoader(dataset(4)), 4, group=wrong)
            except ValueError as error:
                assert f'group must be "world", a torch.distributed process group or None, got {wrong!r}' in str(error)
            else:
                raise SystemExit(7)
        # Different settings: an error everywhere, no hang.
        try:
            collect_moments(network(), DataLoader(dataset(4)), 4 + rank, group="world")
        except ValueError as error:
            assert "other must have num_classes" in str(error)
        else:
            raise SystemExit(8)
    """
    codes, errors = launch(script, 2, tmp_path)
    assert codes == [0, 0], errors


def test_nests_of_tensors_travel_whole():
    nest = {
        "a": torch.arange(3),
        "b": (torch.ones(2, 2, dtype=torch.bfloat16), [True, None, 2.5, "x"]),
        "c": torch.tensor(7),
    }
    back = Group("op", None).first([MORE], nest)
    assert torch.equal(back["a"], nest["a"])
    assert torch.equal(back["b"][0], nest["b"][0])
    assert back["b"][1] == (True, None, 2.5, "x")
    assert torch.equal(back["c"], nest["c"])


def test_real_images_by_two_processes(cifar, tmp_path):
    """Blocks of a batch: the features are the same bits, and the moments differ by the order of merging alone."""
    model, _, _ = cifar
    script = """
        data = zoo.cifar10("train", limit=500)
        loader = DataLoader(data, 100, sampler=ShardSampler(data, block=100))
        keep(collect_moments(zoo.cifar_resnet("resnet20"), loader, 10, group="world"))
    """
    codes, errors = launch(script, 2, tmp_path)
    assert codes == [0, 0], errors
    whole = collect_moments(model, DataLoader(zoo.cifar10("train", limit=500), 100), 10)
    assert_same(results(tmp_path, 2), whole)


@pytest.mark.parametrize("wrapped", [False, True])
def test_second_moments_are_those_of_one_process(wrapped, tmp_path):
    script = f"""
        data = dataset()
        loader = DataLoader(data, batch_size=10, sampler=ShardSampler(data))
        model = nn.parallel.DistributedDataParallel(network()) if {wrapped} else network()
        options = {{"classes": [0, 2], "num_classes": 4}} if {wrapped} else {{}}
        found = collect_second_moments(model, loader, positions=None, group="world", **options)
        found.save(f"{{folder}}/second{{rank}}.safetensors")
    """
    codes, errors = launch(script, 3, tmp_path)
    assert codes == [0] * 3, errors
    files = [Path(tmp_path, f"second{rank}.safetensors").read_bytes() for rank in range(3)]
    assert files[0] == files[1] == files[2]
    found = SecondMoments.load(tmp_path / "second0.safetensors")
    options = {"classes": [0, 2], "num_classes": 4} if wrapped else {}
    whole = collect_second_moments(network(), DataLoader(dataset(), batch_size=10), positions=None, **options)
    assert found.samples == whole.samples == (51 if wrapped else 101)
    assert list(found) == list(whole)
    for layer, state in whole.items():
        for name, tensor in state.named().items():
            assert torch.allclose(found[layer].named()[name].double(), tensor.double(), rtol=1e-12), (layer, name)
