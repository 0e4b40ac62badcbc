"""The Triton kernels: in the interpreter against the reference, and compiled ahead of time for every target.

`pool` and `class_moments` go through all of test_pool.py and test_class_moments.py too.
"""

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import all_pairs, hostile_maps, mostly_slow, poisoned_state, poisoned_vector, same_bits
from test_patch_moments import CONSTANTS, NOT_FINITE, WINDOWS, assert_constant, assert_right, assert_stays, batch

from discedit import ops
from discedit.backends import triton_interprets
from discedit.common.state import ClassMoments

triton = pytest.importorskip("triton")
pool = pytest.importorskip("discedit.kernels.pool")
class_moments = pytest.importorskip("discedit.kernels.class_moments")
pairwise_min = pytest.importorskip("discedit.kernels.pairwise_min")
patch_moments = pytest.importorskip("discedit.kernels.patch_moments")

# What a GPU does without a word, the interpreter's NumPy warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
interpreted = pytest.mark.skipif(not triton_interprets(), reason="Triton compiles for the GPU here: tests/test_gpu.py")

FORMATS = [torch.contiguous_format, torch.channels_last]
WITNESSES = {
    "linear": {},
    "quadratic": {},
    "vector of 1": {"statistic": ("mean",), "witness": "vector"},
    "vector of 2": {"statistic": ("mean", "max"), "witness": "vector"},
}


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty gives NaN (and the largest integers), so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def laws(dimension, pairs=150, seed=0):
    """Pairs of laws, of which some are constant, equal, all but singular, far apart, or not finite."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mean1 = randn(pairs, dimension)
    mean2 = mean1 + randn(pairs, dimension)
    factors = randn(2, pairs, dimension, dimension)
    factors[1, :40, -1] = 1e-9 * factors[1, :40, 0]
    cov1, cov2 = factors @ factors.mT
    cov1[::7], cov2[::5], mean2[::11] = 0, 0, mean1[::11]
    cov1[50:60] *= 1e-280
    cov2[50:60] *= 1e-280
    mean1[60:70] += 1e8
    mean2[60:70] += 1e8
    mean2[70:80] += 1e12
    mean1[81, 0], cov1[82, -1, -1], cov2[83, 0, 0] = float("nan"), float("inf"), float("nan")
    return mean1, cov1, mean2, cov2


@interpreted
@pytest.mark.parametrize(
    ("bound", "dimension"), mostly_slow([("fisher", 1), ("fisher", 2), ("minimax", 1), ("minimax", 2)])
)
def test_bounds_are_those_of_the_core(bound, dimension):
    problem = laws(dimension)
    function = getattr(ops, f"{bound}_bound")
    ours, core = (function(*problem, backend=backend) for backend in ("triton", "cpp"))
    assert torch.equal(ours.isnan(), core.isnan())
    torch.testing.assert_close(ours, core, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert bool((ours[~ours.isnan()] <= 1).all())
    reference = function(*problem, backend="reference")
    torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-9, equal_nan=True)


@interpreted
def test_bounds_keep_the_shape_of_the_laws():
    mean1, cov1, mean2, cov2 = laws(2, 90)
    shaped = [t.view(9, 10, *t.shape[1:]) for t in (mean1, cov1, mean2, cov2)]
    flat = ops.fisher_bound(mean1, cov1, mean2, cov2, backend="triton")
    assert torch.equal(ops.fisher_bound(*shaped, backend="triton").nan_to_num(7), flat.view(9, 10).nan_to_num(7))
    assert ops.fisher_bound(*(t[:0] for t in shaped), backend="triton").shape == (0, 10)


def moments_of(case, classes, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(12 * classes) % classes
    labels[labels == 1] = 0  # class 1 stays empty
    shift = torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(len(labels), channels, 3, generator=generator, dtype=torch.float64) + shift[labels][..., None]
    return ops.class_moments(x, labels, classes, layout="nchw", backend="cpp", **WITNESSES[case])


@interpreted
@pytest.mark.parametrize(
    ("bound", "case", "shape"), mostly_slow(all_pairs(["fisher", "minimax"], WITNESSES, [(3, 1), (6, 9), (19, 3)]))
)
def test_pairwise_min_is_that_of_the_reference(bound, case, shape):
    moments = moments_of(case, *shape)
    witness = case.split()[0]
    ours = ops.pairwise_min(moments, bound=bound, witness=witness, backend="triton")
    theirs = ops.pairwise_min(moments, bound=bound, witness=witness, backend="reference")
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(ours[1], theirs[1])


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_how_pairs_are_split_changes_nothing(monkeypatch, splits):
    moments = moments_of("quadratic", 9, 5)
    tied = ClassMoments(*(t.clone() for t in moments.tensors()))
    for tensor in tied.tensors():
        tensor[2:] = tensor[2]  # classes 2.. are one law: all their pairs tie
    for state in (moments, tied):
        whole = ops.pairwise_min(state, bound="fisher", backend="triton")
        monkeypatch.setattr(pairwise_min, "ENOUGH_PROGRAMS", splits)
        split = ops.pairwise_min(state, bound="fisher", backend="triton")
        assert torch.equal(whole[0], split[0])
        assert torch.equal(whole[1], split[1])
    assert split[1].tolist() == [[2, 3]] * 5


@interpreted
def test_pairwise_min_where_nothing_is_defined():
    moments = moments_of("quadratic", 4, 3)
    alone = ClassMoments(*(t.clone() for t in moments.tensors()))
    alone.count[1:] = 0
    broken = ClassMoments(*(t.clone() for t in moments.tensors()))
    broken.mean[2, 1] = float("inf")
    broken.mean[1] = float("nan")  # of the class without samples
    one_class = ops.class_moments(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64), 1)
    for state, undefined in ((alone, [0, 1, 2]), (broken, [1]), (one_class, [0, 1, 2])):
        values, pairs = ops.pairwise_min(state, bound="minimax", backend="triton")
        assert values.isnan().nonzero()[:, 0].tolist() == undefined
        assert (pairs[:, 0] == -1).nonzero()[:, 0].tolist() == undefined
        assert torch.equal(pairs[:, 0] == -1, pairs[:, 1] == -1)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "memory_format"), mostly_slow(all_pairs([torch.float32, torch.bfloat16, torch.float64], FORMATS))
)
def test_maps_cut_into_spans(monkeypatch, dtype, memory_format):
    x = torch.randn(2, 3, 37, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1, 30, 5], x[1, 2, 0, 0] = float("nan"), -float("inf")
    x = x.contiguous(memory_format=memory_format)
    names = tuple(pool.NAMES)
    whole = ops.pool(x, statistic=names, backend="triton")
    monkeypatch.setattr(pool, "LEAST_SPAN", 100)
    cut = ops.pool(x, statistic=names, backend="triton")
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=1e-13, equal_nan=True)
    torch.testing.assert_close(
        cut, ops.pool(x, statistic=names, backend="reference"), rtol=1e-12, atol=1e-12, equal_nan=True
    )
    assert cut[0, 1].isnan().all()


@interpreted
def test_axes_that_do_not_fuse():
    x = torch.randn(3, 4, 8, 9, 10)[:, :, ::2, ::3, ::2]
    torch.testing.assert_close(ops.pool(x, backend="triton"), x.double().mean((2, 3, 4)), rtol=1e-13, atol=1e-13)
    odd = torch.randn(2, 3, 4, 6, 6, 6)[..., ::2, ::2, ::2][:, :, ::2]
    with pytest.raises(ValueError, match=r"x must have at most 3 pooled axes that do not lie .* got 4 for shape"):
        ops.pool(odd, layout="nchw", backend="triton")


@interpreted
@pytest.mark.parametrize("samples", mostly_slow([5, 1, 70]))
def test_sorted_and_unsorted_labels_are_folded_alike(monkeypatch, samples):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 5, 2, generator=generator)
    labels = torch.randint(0, 4, (samples,), generator=generator)
    for options in ({"layout": "nchw"}, {"layout": "nchw", **WITNESSES["vector of 2"]}):
        exact = ops.class_moments(x, labels, 6, backend="reference", **options)
        for unsorted in (0, 1000):
            monkeypatch.setattr(class_moments, "UNSORTED", unsorted)
            state = ops.class_moments(x, labels, 6, backend="triton", **options)
            for ours, theirs in zip(state.tensors(), exact.tensors(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@interpreted
def test_a_million_classes_cost_no_more_than_their_samples():
    classes = 1 << 20
    x = torch.randn(6, 1, 3)
    labels = torch.tensor([0, classes - 1, 77, 77, 1 << 19, classes - 1])
    for state, options in (
        (poisoned_state(classes, 1), {}),
        (poisoned_vector(1, classes, 1), WITNESSES["vector of 1"]),
    ):
        ops.class_moments(x, labels, classes, layout="nchw", backend="triton", out=state, **options)
        seen = state.count.nonzero()[:, 0]
        assert seen.tolist() == [0, 77, 1 << 19, classes - 1]
        assert torch.equal((~state.mean.isnan()).nonzero()[:, -2], seen)


@interpreted
def test_the_same_batch_gives_the_same_bits():
    x = torch.randn(40, 33, 5, 5)
    labels = torch.randint(0, 3, (40,))
    first, second = (ops.class_moments(x, labels, 3, backend="triton") for _ in range(2))
    assert same_bits(first, second)


# ---- moments of patches ---------------------------------------------------------------------------------------------

PATCHES = {name: x for name, x in hostile_maps().items() if x.ndim == 4 and x.shape[1] < 100}


def of_patches(x, kernel_size, **options):
    """Products of 7 x 7 taps take the interpreter minutes: WINDOWS has them, for a GPU."""
    ours = ops.patch_moments(x, kernel_size, backend="triton", **options)
    assert_right(ours, x.double(), kernel_size, **options)
    return ours


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "memory_format"),
    list(zip([name for name, (_, shape) in WINDOWS.items() if shape[0] > 3], itertools.cycle(FORMATS))),
)
def test_patch_moments_are_their_definition(name, memory_format):
    (kernel_size, options), shape = WINDOWS[name]
    of_patches(batch(shape, torch.float32, memory_format), kernel_size, **options)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("name", PATCHES)
def test_patch_moments_of_hostile_maps(name):
    of_patches(PATCHES[name], 2, padding=1)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("places", "dtype", "memory_format"),
    all_pairs(
        [None, [], [27, 0, 5, 6, 5], list(range(0, 28, 3))],
        [torch.float16, torch.bfloat16, torch.float32, torch.float64],
        FORMATS,
    ),
)
def test_patch_moments_at_positions_in_spans(monkeypatch, places, dtype, memory_format):
    x = batch((5, 8, 14), dtype, memory_format)
    positions = None if places is None else torch.tensor(places, dtype=torch.int64)
    options = {"stride": 2, "padding": 1, "positions": positions}
    if places == []:
        assert not any(t.any() for t in ops.patch_moments(x, 2, backend="triton", **options)[1:])
        return
    whole = of_patches(x, 2, **options)
    for name, value in (("LEAST_SPAN", 1), ("LANES", 16)):
        monkeypatch.setattr(patch_moments, name, value)
    batches, spots, tile = patch_moments.lanes_of(x, len(places or range(28)))
    assert batches * spots * tile <= 16
    cut = of_patches(x, 2, **options)
    for ours, theirs in zip(cut[1:], whole[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@interpreted
@pytest.mark.parametrize(("value", "memory_format"), mostly_slow(all_pairs(NOT_FINITE, FORMATS)))
def test_patch_moments_that_are_not_finite_stay_with_their_taps(memory_format, value):
    assert_stays(partial(ops.patch_moments, backend="triton"), batch((3, 6, 6), torch.float32, memory_format), value)


@interpreted
@pytest.mark.parametrize("value", mostly_slow(CONSTANTS))
def test_patch_moments_of_a_constant_channel(value):
    assert_constant(partial(ops.patch_moments, backend="triton"), torch.full((3, 2, 4, 5), value))


# ---- ahead of time --------------------------------------------------------------------------------------------------

COMPILED = """
import sys
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from discedit.kernels import bounds, class_moments, pairwise_min, patch_moments, pool
from discedit.kernels._launch import COMPILE, Layout

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LONG = "i64"
EVERYTHING = tuple(range(7))
FLOATS = {"fp32": tl.int32, "bf16": tl.int16, "fp16": tl.int16, "fp64": tl.int64}


def compile_for(target, kernel, pointers, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: pointers.get(name, LONG) for name in names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=target, options=COMPILE)
    assert compiled.asm.get("cubin") or compiled.asm.get("hsaco")
    print(kernel.fn.__name__, constants)


# Axes, tile, block and cut that the launcher picks for maps of all kinds.
def choices():
    found = set()
    for channels in (1, 3, 24, 700):
        for elements in (1, 7, 49, 196, 3136, 1 << 20):
            for strides in ((elements, 1), (1, channels), (4 * elements, 2)):
                for samples in (1, 256):
                    for axes in (1, 2, 3) if channels == 24 else (1,):
                        layout = Layout(samples, channels, elements, channels * elements, strides[0], axes,
                                        (1, 1, elements), (1, 1, strides[1]))
                        tile, block = pool.tile_of(layout)
                        spans, _ = pool.spans_of(layout, samples * -(-channels // tile), block)
                        found.add((axes, tile, block, spans > 1))
    return sorted(found)


target = TARGETS[sys.argv[1]]
for axes, tile, block, cut in choices():
    compile_for(target, pool.pool_kernel, {"x": "*bf16", "out": "*fp64", "partial": "*fp64"}, AXES=axes,
                PLACES=EVERYTHING, CUT=cut, INTEGER=tl.int16, TILE=tile, BLOCK=block)
for name, integer in FLOATS.items():
    for axes, tile, block, cut in ((1, 64, 32, False), (1, 2, 1024, True), (2, 1, 512, False), (3, 32, 64, False)):
        for places in (EVERYTHING, (0,) + (-1,) * 6, (-1, -1, 0) + (-1,) * 4, (0, -1, -1, 1, 2, -1, -1)):
            if places is not EVERYTHING and axes > 1:
                continue
            compile_for(target, pool.pool_kernel, {"x": "*" + name, "out": "*fp64", "partial": "*fp64"}, AXES=axes,
                        PLACES=places, CUT=cut, INTEGER=integer, TILE=tile, BLOCK=block)
compile_for(target, pool.merge_spans_kernel, {"partial": "*fp64", "out": "*fp64"}, PLACES=EVERYTHING, TILE=64)
arrays = dict.fromkeys(("pooled", "scales", "mean", "m2", "m3", "m4", "scatter"), "*fp64")
arrays |= dict.fromkeys(("labels", "order", "count"), "*i64") | dict.fromkeys(("rows", "columns"), "*i32")
for is_sorted in (False, True):
    for tile, block in ((32, 32), (1, 1)):
        sizes = {"SORTED": is_sorted, "TILE": tile, "BLOCK": block}
        for exponential in (False, True):
            compile_for(target, class_moments.fold_kernel, arrays, EXP=exponential, **sizes)
        compile_for(target, class_moments.fold_scatter_kernel, arrays, **sizes)
        compile_for(target, class_moments.fold_mean_kernel, arrays, **sizes)
laws = dict.fromkeys(("mean1", "cov1", "mean2", "cov2", "out"), "*fp64")
state = dict.fromkeys(("mean", "second", "third", "fourth", "values", "out"), "*fp64")
state |= dict.fromkeys(("count", "pairs", "out_pairs"), "*i64")
for minimax in (False, True):
    for dimension in (1, 2):
        compile_for(target, bounds.bound_kernel, laws, DIMENSION=dimension, MINIMAX=minimax, BLOCK=bounds.BLOCK)
    for dimension, quadratic in ((0, False), (0, True), (1, False), (2, False)):
        compile_for(target, pairwise_min.pairwise_min_kernel, state, DIMENSION=dimension, QUADRATIC=quadratic,
                    MINIMAX=minimax, CHANNELS=pairwise_min.CHANNELS, CLASSES=pairwise_min.CLASSES)
compile_for(target, pairwise_min.merge_splits_kernel, state, BLOCK=128)
kernels = patch_moments
arrays = dict.fromkeys(("centre", "partial", "sums", "mean", "scatter"), "*fp64")
sizes = set()
for channels in (1, 3, 40):
    for samples, count in ((1, 1), (2, 16), (64, 49), (64, 3136)):
        for strides in ((9 * channels, 9, 3, 1), (9 * channels, 1, 3 * channels, channels)):
            sizes.add(kernels.lanes_of(torch.empty_strided((samples, channels, 3, 3), strides, device="meta"), count))
cases = [("fp32", size, 4, ()) for size in sorted(sizes)] + [(name, (4, 32, 1), 4, ()) for name in FLOATS]
# What is 1 becomes a constant: a layer that reads a pixel, of maps of a row, a column, a sample.
for ones in (("taps", "sides", "kernel_columns"), ("samples", "channels", "groups", "blocks", "all_blocks", "count"),
             ("outputs", "height", "width", "span", "stride_rows", "column_stride", "channel_stride")):
    cases += [("bf16", (1, 4, 32), 1, ones), ("bf16", (4, 32, 1), 4, ones)]
for name, (samples, places, tile), side, ones in cases:
    constants = {"SIDE": side, "SAMPLES": samples, "PLACES": places, "TILE": tile, "INTEGER": FLOATS[name],
                 "CHOSEN": side > 1, "INDEX": tl.int64 if ones else tl.int32}
    given = arrays | {"x": "*" + name, "positions": "*i64"}
    if name == "fp16":  # the others' integers have 64 bits
        given |= {name: "i32" for name in kernels.sum_kernel.arg_names if name not in given}
    compile_for(target, kernels.sum_kernel, given, **constants, **dict.fromkeys(ones, 1))
for name, integer in FLOATS.items():
    compile_for(target, kernels.centre_kernel, {"x": "*" + name, "centre": "*fp64"}, INTEGER=integer,
                COUNT=kernels.LOOKED_AT)
for ones in ((), ("taps", "size", "channels", "spans", "patches")):
    for kernel in (kernels.merge_kernel, kernels.finish_kernel):
        compile_for(target, kernel, arrays, BLOCK=kernels.MERGED,
                    **{name: 1 for name in ones if name in kernel.arg_names})
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles_ahead_of_time(target, tmp_path):
    """In a process of its own: here the interpreter takes the place of the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(tmp_path) / "compile.py"
    script.write_text(COMPILED)
    done = subprocess.run(
        [sys.executable, str(script), target], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    kernels = {
        name
        for module in ("pool", "class_moments", "bounds", "pairwise_min", "patch_moments")
        for name in kernels_of(module)
    }
    assert compiled == kernels


def kernels_of(module):
    """What a launcher may launch: jitted functions named so."""
    source = (Path(__file__).parent.parent / "kernels" / f"{module}.py").read_text()
    return [line.split("(")[0][4:] for line in source.splitlines() if line.startswith("def ") and "_kernel(" in line]
