"""What only a GPU can show: the kernels compiled and run, against the reference in float64 on the same device.

`python -m benchmarks.gpu` runs these; compute-sanitizer repeats some of those named `small`. Where that gate is
rehearsed they run on the CPU, with the CUDA kernels as host code, but for what needs CUDA itself.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from helpers import all_pairs, hostile_maps, labels_for, poisoned_state, poisoned_vector, same_bits
from test_patch_moments import WINDOWS, assert_right, batch
from torch import nn

import discedit
from discedit import backends, ops
from discedit.moments.second_moments import collect_second_moments

# Asked for before the first product on the device: torch looks once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = torch.device("cpu" if "DISCEDIT_REHEARSAL" in os.environ else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
on_cuda = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA itself")
TIMEOUT = 120  # seconds of a process of a test's own

CLASSES = 6
KERNELS = ("cuda", "triton")
MAPS = hostile_maps()
NAMES = ("mean", "sum", "l2", "rms", "absmax", "max", "positive_fraction")
VECTOR = {"statistic": ("mean", "max", "l2"), "witness": "vector"}


def needs(backend, op, large=False):
    reason = backends.why_not(backend, op, DEVICE)
    if large and not reason and backend == "triton" and DEVICE.type == "cpu":
        reason = "too large for its interpreter"
    if reason:
        pytest.skip(f"{op}: backend {backend!r} cannot run: {reason}")


def close(ours, theirs, rtol, atol=0.0):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


@pytest.fixture(autouse=True)
def full_float32():
    """No TF32: results are compared with the CPU's."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def poison():
    """Memory from torch.empty starts as NaN; that some op of the reference is not deterministic does not matter."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*deterministic")
        yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def nobody_waits():
    """An error where the host waits for the device. torch warns, once, that this does not see all of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", MAPS)
def test_pool_small(poison, backend, name):
    needs(backend, "pool")
    x = on_device(MAPS[name])
    ours = ops.pool(x, layout="nchw", statistic=NAMES, backend=backend)
    exact = ops.pool(x, layout="nchw", statistic=NAMES, backend="reference")
    size = ops.pool(x.abs(), layout="nchw", statistic=("mean", "sum"), backend="reference")
    # float16 may be summed in fours in float32.
    share = 2.0**-22 if x.dtype == torch.float16 else 1e-13
    assert bool(((ours - exact)[..., :2].abs() <= share * size).all())
    close(ours[..., 2:4], exact[..., 2:4], share)
    close(ours[..., 4:], exact[..., 4:], 1e-15)


def on_device(x):
    """The same view of a copy of its memory."""
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    storage.untyped_storage().copy_(x.untyped_storage())
    return storage.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", ["plain", "channels_last", "bfloat16", "float16 channels_last", "features"])
@pytest.mark.parametrize("options", [{}, {"witness": "exp", "scale": 0.3}, VECTOR], ids=["quadratic", "exp", "vector"])
def test_class_moments_small(poison, backend, name, options):
    needs(backend, "class_moments")
    x = on_device(MAPS[name])
    labels = labels_for(len(x)).to(DEVICE)
    make = (
        (lambda: poisoned_vector(3, CLASSES, x.shape[1]))
        if "vector" in str(options)
        else (lambda: poisoned_state(CLASSES, x.shape[1]))
    )
    ours, exact = (make().to(DEVICE) for _ in range(2))
    for _ in range(2):
        ops.class_moments(x, labels, CLASSES, layout="nchw", out=ours, backend=backend, **options)
        ops.class_moments(x, labels, CLASSES, layout="nchw", out=exact, backend="reference", **options)
    seen = exact.count > 0
    assert torch.equal(ours.count, exact.count)
    for mine, theirs in zip(ours.tensors()[1:], exact.tensors()[1:], strict=True):
        scale = float(theirs[..., seen, :].abs().max())
        close(
            mine[..., seen, :], theirs[..., seen, :], 1e-9, 1e-6 * scale if x.dtype == torch.float16 else 1e-9 * scale
        )
        assert bool(mine[..., ~seen, :].isnan().all())  # untouched


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 8, 11])
@pytest.mark.parametrize("bound", ["fisher", "minimax"])
def test_bounds_small(poison, backend, dimension, bound):
    op = f"{bound}_bound"
    reason = backends.why_not(backend, op, DEVICE, dimension)
    if reason:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    mean1, mean2 = torch.randn(2, 300, dimension, generator=generator, dtype=torch.float64).to(DEVICE)
    factors = torch.randn(2, 300, dimension, dimension, generator=generator, dtype=torch.float64).to(DEVICE)
    cov1, cov2 = factors @ factors.mT
    cov1[::7] = 0
    cov2[::5] = 0
    function = getattr(ops, op)
    ours = function(mean1, cov1, mean2, cov2, backend=backend)
    close(ours.cpu(), function(*(t.cpu() for t in (mean1, cov1, mean2, cov2)), backend="cpp"), 1e-9, 1e-12)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bound", ["fisher", "minimax"])
def test_pairwise_min_small(poison, backend, bound):
    needs(backend, "pairwise_min")
    x = torch.randn(400, 37, 3, dtype=torch.float64)
    labels = torch.arange(400) % 23
    labels[labels == 4] = 3
    moments = ops.class_moments(x, labels, 23, layout="nchw")
    values, pairs = ops.pairwise_min(moments.to(DEVICE), bound=bound, backend=backend)
    expected = ops.pairwise_min(moments, bound=bound, backend="reference")
    close(values.cpu(), expected[0], 1e-9, 1e-12)
    assert torch.equal(pairs.cpu(), expected[1])


@pytest.mark.parametrize(
    ("backend", "name", "dtype", "memory_format"),
    all_pairs(KERNELS, WINDOWS, [torch.bfloat16, torch.float32], [torch.contiguous_format, torch.channels_last]),
)
def test_patch_moments_small(poison, backend, name, dtype, memory_format):
    needs(backend, "patch_moments")
    (kernel_size, options), shape = WINDOWS[name]
    x = batch(shape, dtype, memory_format)
    ours = ops.patch_moments(x.to(DEVICE), kernel_size, backend=backend, **options)
    assert_right([ours[0], *(t.cpu() for t in ours[1:])], x.double(), kernel_size, **options)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", [name for name, x in MAPS.items() if x.ndim == 4])
def test_patch_moments_of_hostile_maps_small(poison, backend, name):
    needs(backend, "patch_moments")
    ours = ops.patch_moments(on_device(MAPS[name]), 3, padding=1, backend=backend)
    assert_right([ours[0], *(t.cpu() for t in ours[1:])], MAPS[name].double(), 3, padding=1)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("places", [None, [0, 3135, 57, 57, 1600]])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_patch_moments_of_whole_layers(poison, backend, kernel_size, places, memory_format):
    """Cut into spans, and to the same bits each time."""
    needs(backend, "patch_moments", large=True)
    x = batch((64, 56, 56), torch.bfloat16, memory_format, samples=32).to(DEVICE)
    positions = None if places is None else torch.tensor(places, device=DEVICE)
    options = {"padding": kernel_size // 2, "positions": positions}
    first, again = (ops.patch_moments(x, kernel_size, backend=backend, **options) for _ in range(2))
    exact = ops.patch_moments(x, kernel_size, backend="reference", **options)
    for ours, repeated, theirs in zip(first[1:], again[1:], exact[1:], strict=True):
        assert torch.equal(ours, repeated)
        close(ours, theirs, 1e-9, 1e-9 * float(theirs.abs().max()))


@on_cuda
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_maps_of_more_than_2_to_the_31_elements(backend, layout):
    needs(backend, "pool")
    shape = (3, 1 << 10, (1 << 20) + 5)
    if torch.cuda.mem_get_info()[0] < 3 * 2 * shape[0] * shape[1] * shape[2]:
        pytest.skip("needs 20 GB of GPU memory")
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    x[-1, -1, -1] = 3.0
    x[1, 5, 77] = -2.0
    total, most = ops.pool(x, layout=layout, statistic=("sum", "absmax"), backend=backend).unbind(-1)
    axis = 2 if layout == "nchw" else 1
    assert torch.equal(total, x.sum(axis).double())
    assert torch.equal(most, x.abs().amax(axis).double())


@pytest.mark.parametrize("backend", KERNELS)
def test_the_same_batch_gives_the_same_bits(backend):
    needs(backend, "class_moments", large=True)
    x = torch.randn(256, 300, 13, 13, device=DEVICE)
    labels = torch.randint(0, CLASSES, (256,), device=DEVICE)
    states = [ops.class_moments(x, labels, CLASSES, backend=backend) for _ in range(5)]
    assert all(same_bits(states[0], state) for state in states[1:])


@on_cuda
@pytest.mark.parametrize("backend", KERNELS)
def test_nothing_waits_and_the_current_stream_is_used(backend):
    needs(backend, "class_moments")
    x = torch.randn(64, 30, 9, 9, device=DEVICE)
    labels = torch.arange(64, device=DEVICE) % CLASSES
    expected = ops.class_moments(x, labels, CLASSES, backend="reference")
    state = ops.class_moments(x, labels, CLASSES, backend=backend)  # compiles
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        with nobody_waits():
            state = ops.class_moments(late, labels, CLASSES, backend=backend)
    stream.synchronize()
    for ours, theirs in zip(state.tensors(), expected.tensors(), strict=True):
        close(ours, theirs, 1e-9, 1e-9)


@on_cuda
@pytest.mark.parametrize("backend", KERNELS)
def test_captures_into_a_graph(backend):
    needs(backend, "class_moments")
    x = torch.randn(64, 30, 9, 9, device=DEVICE)
    labels = torch.arange(64, device=DEVICE) % CLASSES
    # The very call that is captured, on the same kind of stream: kernels are loaded and compiled when first launched,
    # which a capture does not survive.
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            state = ops.class_moments(x, labels, CLASSES, backend=backend)
            ops.class_moments(x, labels, CLASSES, out=state, backend=backend)
    torch.cuda.synchronize()
    state = ops.class_moments(x, labels, CLASSES, backend=backend)
    expected = ops.class_moments(x, labels, CLASSES, backend="reference")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.class_moments(x, labels, CLASSES, out=state, backend=backend)
    assert int(state.count.sum()) == 64
    x.normal_()
    graph.replay()
    graph.replay()
    assert int(state.count.sum()) == 3 * 64
    for _ in range(2):
        ops.class_moments(x, labels, CLASSES, out=expected, backend="reference")
    for ours, theirs in zip(state.tensors(), expected.tensors(), strict=True):
        close(ours, theirs, 1e-9, 1e-9)


@on_cuda
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("label", [-1, 2])
def test_labels_out_of_range_are_asserted_on_the_device(backend, label):
    """In a process of its own, which ends with it."""
    needs(backend, "class_moments")
    script = (
        f"import torch; from discedit import ops; labels = torch.tensor([0, {label}, 1]).cuda(); "
        f"ops.class_moments(torch.ones(3, 4).cuda(), labels, 2, backend={backend!r}); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert done.returncode != 0
    assert "device-side assert triggered" in done.stderr


@on_cuda
def test_other_devices_are_refused():
    x = torch.randn(4, 3, 2, 2, device=DEVICE)
    with pytest.raises(ValueError, match="labels must be on the device of x, cuda:0, got cpu"):
        ops.class_moments(x, torch.zeros(4, dtype=torch.int64), 2)


def watched(data):
    """Batches, from the third of which on nobody may wait for the device: kernels are compiled, layers are known."""
    yield from data[:2]
    with nobody_waits() if DEVICE.type == "cuda" else contextlib.nullcontext():
        yield from data[2:]


def test_a_pass_does_not_wait_for_the_device_between_batches():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    model = nn.Sequential(model, nn.Linear(4 * 16, 5)).to(DEVICE).eval()
    data = [(torch.randn(20, 3, 8, 8), torch.arange(20) % 5) for _ in range(6)]
    moved = [(x.to(DEVICE), y) for x, y in data]
    ours = discedit.collect_moments(model, watched(moved), 5)
    exact = discedit.collect_moments(model.double(), [(x.double(), y.to(DEVICE)) for x, y in moved], 5)
    for layer in exact:
        assert ours[layer].device.type == DEVICE.type
        close(ours[layer].mean, exact[layer].mean, 1e-4, 1e-5)


@pytest.mark.parametrize("kind", ["singleton", "full"])
def test_the_pass_for_second_moments_does_not_wait_either(kind):
    model = small_network().to(DEVICE)
    data = [torch.randn(20, 3, 12, 12, device=DEVICE) for _ in range(6)]
    ours = collect_second_moments(model, watched(data), kind=kind)
    exact = collect_second_moments(model.double(), [x.double() for x in data], kind=kind)
    for layer in exact:
        close(ours[layer].scatter, exact[layer].scatter, 1e-4, 1e-4 * float(exact[layer].scatter.abs().max()))


def test_a_pass_over_maps_that_are_not_finite_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)).to(DEVICE)
    x = torch.randn(4, 3, 8, 8)
    bad = x.clone()
    bad[2] = float("nan")
    labels = torch.arange(4)
    with pytest.raises(ValueError, match="layer '0', batch 1: feature maps must be finite"):
        discedit.collect_moments(model, [(x, labels), (bad, labels), (x, labels)], 5)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("criterion", ["l1", "combined"])
def test_pruning_and_repair_are_those_of_the_cpu(criterion):
    pytest.importorskip("torch_pruning", reason="needs torch_pruning")
    model = small_network()
    x, labels = torch.randn(64, 3, 12, 12), torch.arange(64) % 4
    outputs = {}
    for device in ("cpu", DEVICE.type):
        model.to(device)
        scores = discedit.score(discedit.collect_moments(model, [(x, labels)], 4))
        edit = discedit.prune(model, scores, ratio=0.4, example_inputs=x[:2], data=[x], criterion=criterion)
        assert next(edit.model.parameters()).device.type == device
        outputs[device] = edit.recipe.components, edit.model(x.to(device)).detach().cpu()
    assert outputs["cpu"][0] == outputs[DEVICE.type][0]
    torch.testing.assert_close(outputs["cpu"][1], outputs[DEVICE.type][1], rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:unlearn")  # a random network names nothing rightly anyway, or all
def test_erased_directions_are_those_of_the_cpu():
    model = small_network()
    labels = torch.arange(64) % 4
    x = torch.randn(64, 3, 12, 12) + labels[:, None, None, None]
    found = {}
    for device in ("cpu", DEVICE.type):
        model.to(device)
        scores = discedit.score(discedit.collect_moments(model, [(x, labels)], 4))
        edit = discedit.unlearn(model, scores, classes=[1], method="erase_directions", data=[(x, labels)])
        assert next(edit.model.parameters()).device.type == device
        found[device] = {name: tensor.detach().cpu() for name, tensor in edit.model.state_dict().items()}
    for name, tensor in found["cpu"].items():
        torch.testing.assert_close(tensor, found[DEVICE.type][name], rtol=1e-3, atol=1e-3)


@on_cuda
def test_a_group_of_nccl_gives_what_one_process_gives():
    """A group of one talks to itself: what travels is on the device that NCCL wants."""
    code = """
        import torch, torch.distributed as dist, discedit
        from test_gpu import small_network
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        model = small_network().to(DEVICE)
        batches = [(torch.randn(16, 3, 12, 12), torch.arange(16) % 4) for _ in range(3)]
        alone = discedit.collect_moments(model, batches, 4)
        for wrapped in (model, torch.nn.parallel.DistributedDataParallel(model)):
            together = discedit.collect_moments(wrapped, batches, 4, group="world")
            for layer in alone:
                for a, b in zip(alone[layer].tensors(), together[layer].tensors()):
                    assert torch.equal(a, b)
        dist.destroy_process_group()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert run.returncode == 0, run.stderr


def test_a_pass_goes_on_to_the_same_bits(tmp_path):
    model = small_network().to(DEVICE)
    batches = [(torch.randn(16, 3, 12, 12), torch.arange(16) % 4) for _ in range(5)]

    def until(number):
        yield from batches[:number]
        raise KeyboardInterrupt

    whole = discedit.collect_moments(model, batches, 4)
    with pytest.raises(KeyboardInterrupt):
        discedit.collect_moments(model, until(3), 4, checkpoint=tmp_path, checkpoint_every=0)
    found = discedit.collect_moments(model, batches, 4, checkpoint=tmp_path)
    for layer in whole:
        assert found[layer].device.type == DEVICE.type
        for a, b in zip(found[layer].tensors(), whole[layer].tensors(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["full", "singleton"])
def test_second_moments_are_those_of_the_cpu(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 4)
    ).double()
    batches = [torch.randn(10, 3, 8, 8).double() for _ in range(3)]
    expected = collect_second_moments(model, batches, kind=kind)
    found = collect_second_moments(model.to(DEVICE), batches, kind=kind)
    for layer, state in expected.items():
        for name, tensor in state.named().items():
            torch.testing.assert_close(found[layer].named()[name], tensor, rtol=1e-10, atol=1e-10)


def test_modhifi_prunes_on_the_device():
    pytest.importorskip("torch_pruning", reason="needs torch_pruning")
    model = small_network().to(DEVICE)
    batches = [torch.randn(10, 3, 12, 12) for _ in range(3)]
    edit = discedit.prune(
        model,
        criterion="fidelity",
        repair="compensation",
        ratio=0.5,
        example_inputs=batches[0].to(DEVICE),
        data=batches,
    )
    assert edit.model(batches[0].to(DEVICE)).isfinite().all()
