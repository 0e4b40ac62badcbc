import math

import pytest
import torch
from helpers import BACKENDS, mostly_slow

from discedit import ops

BOUNDS = {"fisher": ops.fisher_bound, "minimax": ops.minimax_bound}


def law(weights, features):
    """Mean and population covariance of features (..., atoms, d) under weights (..., atoms)."""
    mean = (weights[..., None] * features).sum(-2)
    centred = features - mean[..., None, :]
    return mean, (weights[..., None] * centred).mT @ centred


def random_laws(pairs, atoms, generator):
    """Pairs of discrete laws on common atoms: generic, sparse (often disjoint), near-equal, and far from even."""
    p = torch.empty(2, pairs, atoms, dtype=torch.float64).exponential_(generator=generator)
    kind = torch.arange(pairs) % 4
    keep = torch.rand(2, pairs, atoms, generator=generator) < 0.4
    keep[..., 0] |= ~keep.any(-1)
    p = torch.where((kind == 1)[:, None], p * keep, p)
    nearly = p[0] * (1 + 1e-6 * torch.randn(pairs, atoms, generator=generator, dtype=torch.float64))
    p[1] = torch.where((kind == 2)[:, None], nearly, p[1])
    p = torch.where((kind == 3)[:, None], p**6, p)
    p = p / p.sum(-1, keepdim=True)
    return p[0], p[1], (p[0] - p[1]).abs().sum(-1) / 2


def random_values(pairs, atoms, generator):
    """Values on the atoms: normal, heavy-tailed, few distinct ones (so that t^2 depends on t), far from 0."""
    t = torch.randn(pairs, atoms, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 4, (pairs,), generator=generator)[:, None]
    t = torch.where(kind == 1, t**5, t)
    t = torch.where(kind == 2, (t > 0).double(), t)
    return torch.where(kind == 3, t + 50, t)


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS))
def test_never_exceeds_the_exact_total_variation(backend):
    generator = torch.Generator().manual_seed(20240)
    pairs_seen = 0
    for atoms in (2, 3, 4, 6, 10, 25, 64):
        pairs = 4000
        for _ in range(4 if backend == "cpp" else 1):
            p, q, exact = random_laws(pairs, atoms, generator)
            t = random_values(pairs, atoms, generator)
            columns = {
                1: t[..., None],
                2: torch.stack([t, t**2], -1),
                3: torch.stack([t, t**2, random_values(pairs, atoms, generator)], -1),
            }
            for features in columns.values():
                mean1, cov1 = law(p, features)
                mean2, cov2 = law(q, features)
                fisher = ops.fisher_bound(mean1, cov1, mean2, cov2, backend=backend)
                minimax = ops.minimax_bound(mean1, cov1, mean2, cov2, backend=backend)
                assert not fisher.isnan().any()
                assert float((minimax - exact).max()) <= 1e-9
                assert float((fisher - minimax).max()) <= 0
                assert float(fisher.min()) >= 0
            pairs_seen += pairs
    assert pairs_seen >= (100_000 if backend == "cpp" else 25_000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minimax_is_sharp_in_one_dimension(backend):
    # P on {0, 1}, Q on {0, -1}: the laws that attain the bound share all their mass at one atom.
    share = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    mean1, var1 = share, share * (1 - share)
    ours = ops.minimax_bound(mean1[:, None], var1[:, None, None], -mean1[:, None], var1[:, None, None], backend=backend)
    # TV is the share that each law moves away from the common atom.
    torch.testing.assert_close(ours, share, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend):
    for mean, v1, v2 in ((3.0, 1.0, 4.0), (0.1, 2.0, 0.0), (1e-3, 1e-4, 1e-8)):
        arguments = [torch.tensor(a, dtype=torch.float64) for a in ([mean], [[v1]], [0.0], [[v2]])]
        f = mean**2 / (v1 + v2)
        k = mean / (math.sqrt(v1) + math.sqrt(v2))
        assert ops.fisher_bound(*arguments, backend=backend).item() == pytest.approx(f / (2 + f), rel=1e-13)
        assert ops.minimax_bound(*arguments, backend=backend).item() == pytest.approx(k**2 / (1 + k**2), rel=1e-13)


def random_problem(pairs, d, generator, spread=3.0):
    mean1, mean2 = torch.randn(2, pairs, d, generator=generator, dtype=torch.float64)
    factors = torch.randn(2, pairs, d, d, generator=generator, dtype=torch.float64)
    powers = torch.empty(2, pairs, 1, 1, dtype=torch.float64).uniform_(-spread, spread, generator=generator)
    cov1, cov2 = factors @ factors.mT * 10**powers
    return mean1, cov1, mean2, cov2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 11, 16, 32])
def test_fisher_is_its_formula(backend, d):
    mean1, cov1, mean2, cov2 = random_problem(200, d, torch.Generator().manual_seed(d))
    delta = (mean1 - mean2)[..., None]
    u = torch.linalg.solve(cov1 + cov2, delta)[..., 0]
    f = (u * (mean1 - mean2)).sum(-1)
    ours = ops.fisher_bound(mean1, cov1, mean2, cov2, backend=backend)
    # Rounding of the covariances, amplified by their condition, and of the means, seen through u.
    condition = torch.linalg.cond(cov1 + cov2)
    means = ((mean1.abs() + mean2.abs()) * u.abs()).sum(-1)
    assert bool(((ours - f / (2 + f)).abs() <= 100 * d * 2.3e-16 * (condition + means)).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_minimax_is_the_maximum_over_all_directions_of_the_plane(backend):
    mean1, cov1, mean2, cov2 = random_problem(100, 2, torch.Generator().manual_seed(5))
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    u = torch.stack([angle.cos(), angle.sin()])
    ours = ops.minimax_bound(mean1, cov1, mean2, cov2, backend=backend)
    for i in range(100):
        gap = ((mean1 - mean2)[i] @ u).abs()
        s1, s2 = (((cov[i] @ u) * u).sum(0).clamp(min=0).sqrt() for cov in (cov1, cov2))
        k2 = ((gap / (s1 + s2)) ** 2).max().item()
        best = k2 / (1 + k2)
        # The grid can only miss upwards of its own best.
        assert best * (1 - 1e-9) <= ours[i].item() <= best * (1 + 1e-2) + 1e-9


@pytest.mark.parametrize("d", [2, 3, 4, 6, 8, 12, 32])
def test_backends_agree(d):
    problem = random_problem(100, d, torch.Generator().manual_seed(d), spread=6.0)
    for bound in BOUNDS.values():
        ours, reference = (bound(*problem, backend=backend) for backend in BACKENDS)
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-12)


def at_least_one_direction(u, problem):
    mean1, cov1, mean2, cov2 = problem
    gap = (u @ (mean1 - mean2)).abs()
    s1, s2 = (torch.einsum("ui,ij,uj->u", u, cov, u).clamp(min=0).sqrt() for cov in (cov1, cov2))
    k2 = ((gap / (s1 + s2)) ** 2).max()
    return k2 / (1 + k2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [3, 5, 8])
def test_no_direction_beats_minimax(backend, d):
    generator = torch.Generator().manual_seed(d)
    problem = random_problem(20, d, generator, spread=2.0)
    ours = ops.minimax_bound(*problem, backend=backend)
    u = torch.randn(5_000, d, generator=generator, dtype=torch.float64)
    for i in range(20):
        one = [part[i] for part in problem]
        # Random directions, and small steps around the Fisher direction, where the optimum is near.
        start = torch.linalg.solve(one[1] + one[3], one[0] - one[2])
        local = start + 0.3 * start.norm() * u / u.norm(dim=1, keepdim=True)
        assert float(max(at_least_one_direction(u, one), at_least_one_direction(local, one))) <= float(ours[i]) + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", BOUNDS)
class TestDegenerate:
    def value(self, bound, backend, mean1, cov1, mean2, cov2):
        arguments = [torch.tensor(a, dtype=torch.float64) for a in (mean1, cov1, mean2, cov2)]
        return BOUNDS[bound](*arguments, backend=backend).item()

    def test_constant_and_equal_is_useless(self, bound, backend):
        zero = [[0.0, 0.0], [0.0, 0.0]]
        assert self.value(bound, backend, [1.0, 2.0], zero, [1.0, 2.0], zero) == 0

    def test_constant_and_different_separates(self, bound, backend):
        zero = [[0.0, 0.0], [0.0, 0.0]]
        assert self.value(bound, backend, [1.0, 2.0], zero, [1.0, 2.5], zero) == 1

    def test_one_dead_coordinate_drops_out(self, bound, backend):
        dead = self.value(bound, backend, [1.0, 5.0], [[1.0, 0.0], [0.0, 0.0]], [0.0, 5.0], [[2.0, 0.0], [0.0, 0.0]])
        alone = self.value(bound, backend, [1.0], [[1.0]], [0.0], [[2.0]])
        assert dead == pytest.approx(alone, rel=1e-12)

    def test_duplicated_coordinates_count_once(self, bound, backend):
        pair = self.value(bound, backend, [1.0, 1.0], [[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0], [[2.0, 2.0], [2.0, 2.0]])
        alone = self.value(bound, backend, [1.0], [[1.0]], [0.0], [[2.0]])
        assert pair == pytest.approx(alone, rel=1e-6)
        assert pair <= alone

    def test_difference_along_a_direction_without_variance_separates(self, bound, backend):
        flat = [[1.0, 1.0], [1.0, 1.0]]
        assert self.value(bound, backend, [1.0, 0.0], flat, [0.0, 1.0], flat) == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("size", [1e-300, 1e300])
    def test_extreme_scales(self, bound, backend, size):
        value = self.value(bound, backend, [0.0], [[size]], [math.sqrt(size)], [[size]])
        expected = self.value(bound, backend, [0.0], [[1.0]], [1.0], [[1.0]])
        assert value == pytest.approx(expected, rel=1e-9)

    def test_not_finite_gives_nan(self, bound, backend):
        assert math.isnan(self.value(bound, backend, [math.nan], [[1.0]], [0.0], [[1.0]]))
        assert math.isnan(self.value(bound, backend, [1.0], [[math.inf]], [0.0], [[1.0]]))
        nan_off_diagonal = [[1.0, math.nan], [math.nan, 1.0]]
        eye = [[1.0, 0.0], [0.0, 1.0]]
        assert math.isnan(self.value(bound, backend, [1.0, 0.0], nan_off_diagonal, [0.0, 0.0], eye))


@pytest.mark.parametrize("bound", BOUNDS)
def test_batches_types_and_shapes(bound):
    mean1, cov1, mean2, cov2 = random_problem(12, 3, torch.Generator().manual_seed(0))
    flat = BOUNDS[bound](mean1, cov1, mean2, cov2)
    shaped = BOUNDS[bound](mean1.view(3, 4, 3), cov1.view(3, 4, 3, 3), mean2.view(3, 4, 3), cov2.view(3, 4, 3, 3))
    assert torch.equal(shaped, flat.view(3, 4))
    single = BOUNDS[bound](mean1.float(), cov1.float(), mean2.float(), cov2.float())
    assert single.dtype == torch.float32
    assert BOUNDS[bound](mean1[:0], cov1[:0], mean2[:0], cov2[:0]).shape == (0,)


@pytest.mark.parametrize("bound", BOUNDS)
def test_bad_input(bound):
    one, matrix = torch.ones(2), torch.eye(2)
    with pytest.raises(ValueError, match=rf"{bound}_bound: means must have shape \(..., d\) .* cov1 \(3, 3\)"):
        BOUNDS[bound](one, torch.eye(3), one, matrix)
    with pytest.raises(ValueError, match=rf"{bound}_bound: the last axis of mean1 must be d in 1..32, .*mean1 \(33,\)"):
        BOUNDS[bound](torch.ones(33), torch.eye(33), torch.ones(33), torch.eye(33))
    with pytest.raises(ValueError, match=r"mean2 must have the type and device of mean1: .* torch.float64 on cpu"):
        BOUNDS[bound](one, matrix, one.double(), matrix)
    with pytest.raises(ValueError, match=r"cov1 must be one of float32, float64, got int64"):
        BOUNDS[bound](one, matrix.long(), one, matrix)
