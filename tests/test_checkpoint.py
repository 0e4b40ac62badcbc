"""Passes that end before their time, and go on to the same bits."""

import math
import multiprocessing
import os
import re
import time
import warnings

import pytest
import torch
from test_distributed import assert_same, dataset, launch, network, results
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from discedit import Moments, collect_blocks, collect_moments
from discedit.common import files as _files
from discedit.moments import checkpoint


class Stop(Exception):
    """What ends a pass."""


def until(loader, batches):
    """The loader, up to an end in the middle of the pass."""
    for index, batch in enumerate(loader):
        if index == batches:
            raise Stop
        yield batch


class Counting(Dataset):
    """Notes which samples are loaded; ends the pass at one of them."""

    def __init__(self, last=None):
        self.data, self.last, self.seen = dataset(), last, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == self.last:
            raise Stop
        self.seen.append(index)
        return self.data[index]


def same(one, other):
    assert list(one) == list(other)
    assert one.settings == other.settings
    assert one.norms == other.norms
    for layer in one:
        for a, b in zip(one[layer].tensors(), other[layer].tensors(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": "predicted"},
        {"statistic": ("mean", "max"), "witness": "vector"},
        {"witness": "exp", "scale": 0.5, "read": "norm"},
        {"layers": ["0", "7"]},
    ],
    ids=str,
)
def test_a_pass_goes_on_to_the_same_bits(options, tmp_path):
    batches = list(DataLoader(dataset(), batch_size=10))
    whole = collect_moments(network(), batches, 4, **options)
    for end in (3, 0, 7, 8):
        with pytest.raises(Stop):
            collect_moments(network(), until(batches, end), 4, checkpoint=tmp_path, checkpoint_every=0, **options)
    same(collect_moments(network(), batches, 4, checkpoint=tmp_path, **options), whole)
    again = collect_moments(network(), batches, 4, checkpoint=str(tmp_path), **options)
    same(again, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["process-0-of-1.safetensors"]


def test_blocks_go_on_too(tmp_path):
    batches = list(DataLoader(dataset(), batch_size=7))
    whole = collect_blocks(network(), batches, 4, blocks=3)
    for end in (2, 9):
        with pytest.raises(Stop):
            collect_blocks(network(), until(batches, end), 4, blocks=3, checkpoint=tmp_path, checkpoint_every=0)
    for one, other in zip(whole, collect_blocks(network(), batches, 4, blocks=3, checkpoint=tmp_path), strict=True):
        same(one, other)
    with pytest.raises(ValueError, match=r"is another run's: (num_classes|blocks) was"):
        collect_blocks(network(), batches, 4, blocks=4, checkpoint=tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_seen_is_not_loaded_again(workers, tmp_path):
    with pytest.raises(Stop):
        collect_moments(network(), DataLoader(Counting(65), batch_size=10), 4, checkpoint=tmp_path, checkpoint_every=0)
    data = Counting()
    loader = DataLoader(data, batch_size=10, num_workers=workers)
    found = collect_moments(network(), loader, 4, checkpoint=tmp_path)
    if not workers:
        assert data.seen == list(range(60, 101))
    same(found, collect_moments(network(), DataLoader(dataset(), batch_size=10), 4))


def test_shuffled_data_needs_a_seed(tmp_path):
    def loader(seed, data=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        data = data or dataset()
        return DataLoader(data, batch_size=10, sampler=RandomSampler(data, generator=generator))

    with pytest.raises(Stop):
        collect_moments(network(), loader(3, Counting(50)), 4, checkpoint=tmp_path, checkpoint_every=0)
    for seed in (4, None):
        with pytest.raises(ValueError, match="loader must give the batches that it gave before the checkpoint"):
            collect_moments(network(), loader(seed), 4, checkpoint=tmp_path)
    same(collect_moments(network(), loader(3), 4, checkpoint=tmp_path), collect_moments(network(), loader(3), 4))


class Rows(IterableDataset):
    def __init__(self, number):
        self.number = number

    def __iter__(self):
        return iter(list(dataset())[: self.number])


@pytest.mark.parametrize("kind", ["list", "stream", "lists of labels"])
def test_other_batches_are_found(kind, tmp_path):
    def batches(number=101, seed=0):
        if kind == "stream":
            return DataLoader(Rows(number), batch_size=10)
        found = list(DataLoader(dataset(), batch_size=10))[: -(-number // 10)]
        if seed:
            found[1], found[2] = found[2], found[1]
        return found if kind == "list" else [(x, y.tolist()) for x, y in found]

    with pytest.raises(Stop):
        collect_moments(network(), until(batches(), 6), 4, checkpoint=tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="at least 6, it ends after 3"):
        collect_moments(network(), batches(30), 4, checkpoint=tmp_path)
    if kind != "stream":
        with pytest.raises(ValueError, match="the first 6 are others"):
            collect_moments(network(), batches(seed=1), 4, checkpoint=tmp_path)
    same(collect_moments(network(), batches(), 4, checkpoint=tmp_path), collect_moments(network(), batches(), 4))


def test_another_run_is_refused(tmp_path):
    batches = list(DataLoader(dataset(), batch_size=10))
    collect_moments(network(), batches, 4, checkpoint=tmp_path)
    trained = network()
    with torch.no_grad():
        trained[3].weight[0, 0, 0, 0] += 1e-6
    others = [
        ("num_classes was 4, not 5", network(), {"num_classes": 5}),
        ("labels was 'given', not 'predicted'", network(), {"labels": "predicted"}),
        ("read was 'consumer', not 'norm'", network(), {"read": "norm"}),
        ("statistic was 'mean', not 'max'", network(), {"statistic": "max"}),
        ("layers was", network(), {"layers": ["0"]}),
        ("model was", trained, {}),
    ]
    for message, model, options in others:
        with pytest.raises(ValueError, match=f"is another run's: {message}.* delete it to begin anew"):
            collect_moments(model, batches, **{"num_classes": 4, **options}, checkpoint=tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    batches = list(DataLoader(dataset(), batch_size=10))
    with pytest.raises(Stop):
        collect_moments(network(), until(batches, 6), 4, checkpoint=tmp_path, checkpoint_every=0)
    (file,) = tmp_path.iterdir()
    state = file.read_bytes()
    leftover = tmp_path / f".{file.name}.123.tmp"
    leftover.write_bytes(b"half a fi")
    for damage in (b"", state[:100], state[:-1], state[:-9] + b"x" + state[-8:]):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="is damaged"):
            collect_moments(network(), batches, 4, checkpoint=tmp_path)
        assert not leftover.exists()
    file.write_bytes(state)
    same(collect_moments(network(), batches, 4, checkpoint=tmp_path), collect_moments(network(), batches, 4))


class Stateful:
    """A loader that says where it stands, as torchdata's does."""

    def __init__(self):
        self.batches, self.place, self.drawn = list(DataLoader(dataset(), batch_size=10)), 0, 0

    def state_dict(self):
        return {"place": self.place, "rng": torch.zeros(2), "workers": [None, {"a": 1.5}]}

    def load_state_dict(self, state):
        self.place = state["place"]

    def __iter__(self):
        for batch in self.batches[self.place :]:
            self.place, self.drawn = self.place + 1, self.drawn + 1
            yield batch


def test_a_loader_with_a_state_goes_on_where_it_was(tmp_path):
    first = Stateful()
    first.batches[6] = (first.batches[6][0], torch.full((10,), 9))
    for _ in range(2):  # the second time from its own state
        with pytest.raises(ValueError, match="labels must lie in"):
            collect_moments(network(), first, 4, checkpoint=tmp_path, checkpoint_every=0)
    last = Stateful()
    found = collect_moments(network(), last, 4, checkpoint=tmp_path)
    assert last.drawn == 5
    same(found, collect_moments(network(), Stateful(), 4))


def test_a_full_disk_loses_no_earlier_state(tmp_path, monkeypatch):
    batches = list(DataLoader(dataset(), batch_size=10))
    with pytest.raises(Stop):
        collect_moments(network(), until(batches, 3), 4, checkpoint=tmp_path, checkpoint_every=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(_files.os, "fsync", full)
        found = collect_moments(network(), batches, 4, checkpoint=tmp_path, checkpoint_every=0)
    assert len(caught) >= 8
    assert re.search("could not be written .*No space left.*; the one of batch 3 stays", str(caught[0].message))
    same(found, collect_moments(network(), batches, 4))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    same(collect_moments(network(), batches, 4, checkpoint=tmp_path), found)


def test_states_are_as_far_apart_as_asked(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    batches = list(DataLoader(dataset(), batch_size=10))
    saved = []
    monkeypatch.setattr(_files, "write_atomically", lambda path, data: saved.append((path.name, clock[0], len(data))))

    def ticking():
        for batch in batches:
            clock[0] += 1
            yield batch

    collect_moments(network(), ticking(), 4, checkpoint=tmp_path, checkpoint_every=4)
    assert [(name, when) for name, when, _ in saved] == [
        ("process-0-of-1.safetensors", 4),
        ("process-0-of-1.safetensors", 8),
        ("process-0-of-1.safetensors", 11),
    ]
    saved.clear()
    collect_moments(network(), ticking(), 4, checkpoint=tmp_path, checkpoint_every=math.inf)
    assert [when for _, when, _ in saved] == [22]  # at the end alone


def test_bad_arguments(tmp_path):
    batches = list(DataLoader(dataset(), batch_size=10))
    (tmp_path / "file").write_text("x")
    for options, message in (
        ({"checkpoint": 3}, "checkpoint must be a folder's path, got 3"),
        ({"checkpoint": tmp_path / "file"}, "checkpoint must be a folder, .* is a file"),
        ({"checkpoint": tmp_path / "a", "checkpoint_every": -1}, "checkpoint_every must be a number of seconds"),
        ({"checkpoint": tmp_path / "a", "checkpoint_every": "1"}, "checkpoint_every must be a number of seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_moments(network(), batches, 4, **options)


def _killed(folder, out):
    """A slow pass, whose batches take about as long as its states."""
    torch.set_num_threads(1)

    def batches():
        for batch in DataLoader(dataset(), batch_size=2):
            time.sleep(0.005)
            yield batch

    collect_moments(network(), batches(), 4, checkpoint=folder, checkpoint_every=0).save(out)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_at_any_moment(tmp_path):
    """Ten kills at moments spread over the pass, then to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "discedit"])
    out = tmp_path / "out.safetensors"
    delays = iter(0.05 + 0.07 * i for i in range(10))
    kills = 0
    while not out.exists():
        process = context.Process(target=_killed, args=(str(tmp_path / "run"), str(out)))
        process.start()
        delay = next(delays, None)
        process.join(120 if delay is None else delay)
        if process.exitcode is None:
            process.kill()
            kills += 1
            process.join()
        else:
            assert process.exitcode == 0
    assert kills >= 3
    same(Moments.load(out), collect_moments(network(), DataLoader(dataset(), batch_size=2), 4))


def test_processes_go_on_from_where_each_was(tmp_path):
    """One died early, its neighbour went on to the end of its share; the model needs both in every step."""
    script = """
        model = nn.parallel.DistributedDataParallel(network()) if {wrapped} else network()
        data = dataset()
        batches = list(DataLoader(data, batch_size=7, sampler=ShardSampler(data)))
        stop = {stop}
        def some():
            for i, batch in enumerate(batches):
                if i == stop and rank == 1:
                    raise ValueError("stop")
                yield batch
        try:
            keep(collect_moments(model, some(), 4, group="world", checkpoint=folder + "/run", checkpoint_every=0))
        except (ValueError, RuntimeError) as error:
            assert "stop" in str(error)
            os._exit(3)
    """
    whole = collect_moments(network(), DataLoader(dataset(), batch_size=7), 4)
    for wrapped in (False, True):
        folder = tmp_path / str(wrapped)
        folder.mkdir()
        codes, errors = launch(script.format(wrapped=wrapped, stop=2), 2, folder)
        assert codes == [3, 3], errors
        (folder / "store").unlink(missing_ok=True)
        codes, errors = launch(script.format(wrapped=wrapped, stop=-1), 2, folder)
        assert codes == [0, 0], errors
        assert_same(results(folder, 2), whole)
    with pytest.raises(ValueError, match="must be of as many processes as go on, it is of 2, not of 1"):
        collect_moments(network(), DataLoader(dataset(), batch_size=7), 4, checkpoint=folder / "run")
