"""The family of bounds: every member against exact total variation, exact optima, and the other members."""

import functools
import math

import pytest
import torch
from helpers import BACKENDS, mostly_slow
from torch import nn

from benchmarks import bench_validity as oracles
from discedit import ops, zoo
from discedit.common.state import ClassMoments

OF_LAWS = {
    "fisher": ops.fisher_bound,
    "minimax": ops.minimax_bound,
    "minimax_published": functools.partial(ops.minimax_bound, published=True),
    "robust": ops.robust_bound,
    "hellinger": ops.hellinger_bound,
}
OF_ONE_NUMBER = ("witness", "witness_published", "certified")
OPTIONS = {"robust": {"radius": 1.5, "rho": 0.1}, "certified": {"value_range": (-50, 50), "alpha": 0.2}}
CELLS = [
    (bound, witness)
    for bound in (*OF_LAWS, *OF_ONE_NUMBER)
    for witness in (("linear",) if bound in OF_ONE_NUMBER else ("linear", "quadratic", "vector"))
]
VECTOR = ("mean", "l2", "max")
# The reference takes seconds where it solves minimax often; `test_backends_agree` compares it with cpp in every cell.
RUNS = [
    (backend, bound, witness)
    for bound, witness in CELLS
    for backend in (BACKENDS if not bound.startswith("minimax") else ["cpp"])
]


def tensors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


# ---- validity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS))
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_no_bound_exceeds_the_exact_total_variation(backend, d):
    generator = torch.Generator().manual_seed(d)
    number, sizes = (2000, oracles.ATOMS) if backend == "cpp" else (400, (2, 4, 25))
    for atoms in sizes:
        pairs = oracles.random_pairs(number, atoms, d, generator)
        exact = pairs.total_variation()
        for name, bound in oracles.bounds_of(pairs, generator, backend):
            assert bound.isfinite().all()
            assert float(bound.min()) >= 0
            assert float(bound.max()) <= 1
            if name != "hellinger":
                assert float((bound - exact).max()) <= 1e-9, (name, atoms)


@pytest.mark.parametrize("backend", mostly_slow(BACKENDS))
def test_no_bound_of_a_state_exceeds_the_exact_total_variation(backend):
    generator = torch.Generator().manual_seed(0)
    for atoms in oracles.ATOMS:
        pairs = oracles.random_pairs(2000 if backend == "cpp" else 500, atoms, 1, generator)
        exact = pairs.total_variation()
        for name, bound in oracles.bounds_of_state(pairs, backend):
            assert bound.isfinite().all()
            if name != "hellinger":
                assert float((bound - exact).max()) <= 1e-9, (name, atoms)


def test_hellinger_is_no_bound():
    """One law constant, the other nearly: their Gaussians have no mass in common, the laws almost all of it."""
    (bound,) = ops.hellinger_bound(*tensors([[0.0]], [[[0.0]]], [[1e-3]], [[[1e-3 - 1e-6]]]))
    assert float(bound) == 1  # against a total variation of 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_certified_covers_every_outcome_of_coins(backend):
    """The probability of a certified value above the total variation |p - q|, summed over all outcomes."""
    alpha, coins = 0.5, torch.linspace(0, 1, 21, dtype=torch.float64)
    for n1, n2 in ((2, 2), (5, 40), (60, 60), (400, 30)):
        heads = torch.cartesian_prod(torch.arange(n1 + 1.0), torch.arange(n2 + 1.0)).double().T
        n = torch.tensor([n1, n2])
        mean = heads / n[:, None]
        zero = torch.zeros_like(mean)
        state = ClassMoments(n, mean, n[:, None] * mean * (1 - mean), zero, zero)
        options = {"bound": "certified", "witness": "linear", "value_range": (0, 1), "alpha": alpha, "comparisons": 1}
        values = ops.one_vs_rest(state, backend=backend, **options)[:, 0].view(n1 + 1, n2 + 1)
        first, second = (
            torch.distributions.Binomial(count, coins[:, None]).log_prob(torch.arange(count + 1.0).double()).exp()
            for count in (n1, n2)
        )
        for i, p in enumerate(coins):
            for j, q in enumerate(coins):
                wrong = (values > (p - q).abs() + 1e-12).double()
                assert float(first[i] @ wrong @ second[j]) <= alpha
    assert float(values.max()) > 0.5  # and it is not 0 throughout


def test_certified_holds_for_the_rest_though_its_samples_are_of_several_laws():
    generator = torch.Generator().manual_seed(0)
    sizes, alpha = (50, 30, 20, 40), 0.3
    labels = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    x = torch.rand(len(labels), 3000, generator=generator, dtype=torch.float64)
    power = torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=torch.float64)  # of one class, u^a: mean 1 / (1 + a)
    x = x ** power[labels, None]
    mean, square = 1 / (1 + power), 1 / (1 + 2 * power)
    rest = torch.tensor(sizes[1:], dtype=torch.float64) / sum(sizes[1:])
    means = mean[0], (rest * mean[1:]).sum()
    variances = square[0] - means[0] ** 2, (rest * square[1:]).sum() - means[1] ** 2
    k = (means[0] - means[1]).abs() / (variances[0].sqrt() + variances[1].sqrt())
    options = {"bound": "certified", "witness": "linear", "value_range": (0, 1), "alpha": alpha, "comparisons": 1}
    values = ops.one_vs_rest(ops.class_moments(x, labels, 4), **options)[:, 0]
    assert float((values > k**2 / (1 + k**2)).double().mean()) <= alpha
    assert float(values.min()) > 0


# ---- sharp cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_witness_is_attained(backend):
    """Equality in Cauchy-Schwarz: f is c where P alone has mass, -c' where Q alone has, and 0 on what they share."""
    share = torch.linspace(0.001, 1, 60, dtype=torch.float64)
    for c, other in ((1.0, 1.0), (3.0, 0.2), (1e-3, 0.0), (0.0, 7.0), (1e8, 1.0)):
        moments = share * c, share * c**2, -share * other, share * other**2
        ours = ops.witness_bound(*moments, backend=backend)
        torch.testing.assert_close(ours, share, rtol=1e-9, atol=1e-9)
        published = ops.witness_bound(*moments, published=True, backend=backend)
        # The square of a sum is twice the sum of the squares for equal parts alone.
        expected = share * (c + other) ** 2 / (2 * c**2 + 2 * other**2)
        torch.testing.assert_close(published, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 3, 5, 8])
def test_minimax_is_attained_in_every_dimension(backend, d):
    """P = (1 - t) R + t A and Q = (1 - t) R + t B, where along some u R, A and B are constant, each at its own place:
    the total variation is t. Off u they vary at will."""
    generator = torch.Generator().manual_seed(d)
    pairs, atoms = 60, 3 * (d + 1)
    part = torch.arange(atoms) // (d + 1)  # R, A, B
    u = torch.randn(pairs, 1, d, generator=generator, dtype=torch.float64)
    u = u / u.norm(dim=-1, keepdim=True)
    values = torch.randn(pairs, atoms, d, generator=generator, dtype=torch.float64)
    place = 0.5 + torch.rand(pairs, 3, 1, generator=generator, dtype=torch.float64)
    place[:, 0], place[:, 2] = 0, -place[:, 2]
    values = values - (values * u).sum(-1, keepdim=True) * u + place[:, part] * u
    share = torch.linspace(0.02, 0.98, pairs, dtype=torch.float64)[:, None]
    within = torch.rand(pairs, 3, d + 1, generator=generator, dtype=torch.float64) + 0.1
    within = (within / within.sum(-1, keepdim=True)).flatten(1)
    p = within * torch.where(part == 0, 1 - share, torch.where(part == 1, share, 0.0))
    q = within * torch.where(part == 0, 1 - share, torch.where(part == 2, share, 0.0))
    laws = oracles.Pairs(p, q, values)
    torch.testing.assert_close(laws.total_variation(), share[:, 0], rtol=1e-12, atol=1e-12)
    ours = ops.minimax_bound(*laws.moments(), backend=backend)
    torch.testing.assert_close(ours, share[:, 0], rtol=1e-9, atol=1e-9)


def best_direction(mean1, cov1, mean2, cov2):
    """The optimum of minimax by bisection on Anderson and Bahadur's curve."""
    low, high = 0.0, 1.0
    for _ in range(60):
        weight = (low + high) / 2
        u = torch.linalg.solve((1 - weight) * cov1 + weight * cov2, mean1 - mean2)
        s1, s2 = (u @ cov1 @ u).sqrt(), (u @ cov2 @ u).sqrt()
        low, high = (weight, high) if s1 > weight * (s1 + s2) else (low, weight)
    return u, s1, s2


@pytest.mark.parametrize("d", [1, 2, 4])
def test_any_moments_have_laws_that_attain_minimax(d):
    """The construction of docs/bounds.md: the ellipsoids of size k around the means touch at a point r. Both laws put
    1 - t there, and t on a law of their own that makes up for their moments."""
    for problem in zip(*oracles.random_problems(10, d, torch.Generator().manual_seed(d)), strict=True):
        bound = float(ops.minimax_bound(*problem))
        mean1, cov1, mean2, cov2 = problem
        u, s1, s2 = best_direction(*problem)
        k = math.sqrt(bound / (1 - bound))
        touch = mean1 - k * cov1 @ u / s1
        torch.testing.assert_close(touch, mean2 + k * cov2 @ u / s2, rtol=1e-6, atol=1e-6)
        atoms, weights = [touch[None]], [1 - bound]
        for mean, cov in ((mean1, cov1), (mean2, cov2)):
            x = touch - mean
            own = mean - (1 - bound) / bound * x
            values, vectors = torch.linalg.eigh((cov - torch.outer(x, x) / k**2) / bound)
            steps = math.sqrt(d) * (vectors * values.clamp(min=0).sqrt()).T
            atoms += [own + steps, own - steps]
        part = torch.tensor([0] + [1] * (2 * d) + [2] * (2 * d))
        p, q = (torch.where(part == 0, weights[0], torch.where(part == own, bound / (2 * d), 0.0)) for own in (1, 2))
        laws = oracles.Pairs(p[None].double(), q[None].double(), torch.cat(atoms)[None])
        for ours, wanted in zip(laws.moments(), problem, strict=True):
            torch.testing.assert_close(ours[0], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        assert float(laws.total_variation()) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fisher_is_attained_where_both_deviations_are_equal(backend):
    share = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)[:, None]
    variance = (share * (1 - share))[..., None]
    for bound in (ops.fisher_bound, ops.minimax_bound):
        ours = bound(share, variance, -share, variance, backend=backend)
        torch.testing.assert_close(ours, share[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("bound", "witness"), CELLS)
def test_moment_matched_laws_score_0_though_they_are_disjoint(bound, witness):
    """{-1, 1} and {0, 0, -r, r} with r^2 = 2: the means and variances are equal, the total variation is 1."""
    x = torch.tensor([-1.0, -1, 1, 1, 0, 0, -(2**0.5), 2**0.5]).double()
    labels = torch.arange(8) // 4
    if witness == "vector":  # (t, t^2)
        state = ops.VectorMoments.empty(2, 2, 1)
        mean, second = tensors([0.0, 0.0], [1.0, 1.0])
        scatter = torch.stack([4 * second, mean, torch.tensor([0.0, 4.0], dtype=torch.float64)])[..., None]
        state.copy_(ops.VectorMoments(torch.tensor([4, 4]), torch.stack([mean, second])[..., None], scatter))
    else:
        state = ops.class_moments(x[:, None], labels, 2)
    value = float(ops.one_vs_rest(state, bound=bound, witness=witness, **OPTIONS.get(bound, {}))[0, 0])
    if bound == "hellinger" and witness != "linear":
        assert value > 0.999  # t^2 is constant in one of them, but for rounding, of which the fourth root is left
    else:
        assert value <= 1e-12


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 3, 6])
def test_order_of_the_bounds(backend, d):
    moments = oracles.random_problems(400, d, torch.Generator().manual_seed(d))
    bounds = {name: bound(*moments, backend=backend) for name, bound in OF_LAWS.items()}
    assert float((bounds["fisher"] - bounds["minimax"]).max()) <= 0
    assert float((bounds["minimax"] - 2 * bounds["fisher"]).max()) <= 1e-12
    assert float((bounds["minimax_published"] - bounds["fisher"]).max()) <= 1e-12
    assert float((bounds["minimax_published"] - bounds["minimax"]).max()) <= 0
    torch.testing.assert_close(bounds["robust"], bounds["fisher"], rtol=1e-9, atol=1e-12)
    k = (bounds["minimax"] / (1 - bounds["minimax"])).sqrt()
    torch.testing.assert_close(bounds["minimax_published"], (k / (2**0.5 + k)) ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2, 3, 6])
def test_robust_falls_with_radius_and_rho(backend, d):
    moments = oracles.random_problems(200, d, torch.Generator().manual_seed(d))
    robust = functools.partial(ops.robust_bound, *moments, backend=backend)
    distance = (moments[0] - moments[2]).norm(dim=-1)
    before = ops.fisher_bound(*moments, backend=backend)
    for share in (0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9):
        now = robust(radius1=share * distance)
        assert float((now - before).max()) <= 1e-12
        before = now
    assert float(before.max()) < 1e-9
    for share in (1.0, 1 + 1e-12, 3.0):
        assert not robust(radius1=share * distance / 2, radius2=share * distance / 2 * (1 + 1e-15)).any()
    before = robust(radius2=0.1 * distance)
    for rho in (1e-6, 1e-2, 1.0, 1e3, 1e9):
        now = robust(radius2=0.1 * distance, rho=rho)
        assert float((now - before).max()) <= 1e-12
        before = now
    # Only the sum of the radii counts.
    one, two = robust(radius1=0.3 * distance), robust(radius1=0.1 * distance, radius2=0.2 * distance)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_witness_with_the_best_offset_is_minimax(backend):
    mean1, cov1, mean2, cov2 = oracles.random_problems(500, 1, torch.Generator().manual_seed(0))
    minimax = ops.minimax_bound(mean1, cov1, mean2, cov2, backend=backend)
    m1, m2, v1, v2 = mean1[:, 0], mean2[:, 0], cov1[:, 0, 0], cov2[:, 0, 0]

    def witness(offset, published=False):
        moments = m1 + offset, v1 + (m1 + offset) ** 2, m2 + offset, v2 + (m2 + offset) ** 2
        return ops.witness_bound(*moments, published=published, backend=backend)

    for offset in (0.0, 1.0, -3.0, 100.0):
        assert float((witness(offset, published=True) - witness(offset)).max()) <= 0
        assert float((witness(offset) - 2 * witness(offset, published=True)).max()) <= 1e-15
        assert float((witness(offset) - minimax).max()) <= 1e-15
    # f = 0 between the means, nearer to that of the law with less spread: where (m1 + b) / s1 = -(m2 + b) / s2.
    s1, s2 = v1.sqrt(), v2.sqrt()
    torch.testing.assert_close(witness(-(m1 * s2 + m2 * s1) / (s1 + s2)), minimax, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_certified_is_minimax_in_the_limit_and_never_above(backend):
    x = torch.tensor([0.0, 0.2, 0.3, 1.0, 0.4, 0.5, 0.5, 0.6, 0.9, 1.0]).double()[:, None]
    labels = torch.tensor([0] * 4 + [1] * 6)
    before = 0.0
    for copies in (1, 10, 100, 10_000, 10**8, 10**14):
        one = ops.class_moments(x, labels, 2)
        state = ClassMoments(one.count * copies, one.mean, *(part * copies for part in one.tensors()[2:]))
        options = {"witness": "linear", "backend": backend}
        plain = float(ops.one_vs_rest(state, **options)[0, 0])
        for alpha in (1e-6, 0.05, 0.9):
            now = float(ops.one_vs_rest(state, bound="certified", value_range=(0, 1), alpha=alpha, **options)[0, 0])
            assert before - 1e-15 <= now <= plain  # more samples, or less to be sure of: never less
            before = now if alpha == 1e-6 else before
    assert now == pytest.approx(plain, rel=1e-5)


# ---- exact optima ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 5, 8])
def test_minimax_and_robust_are_what_convex_programming_finds(d):
    generator = torch.Generator().manual_seed(d)
    moments = oracles.random_problems(10, d, generator)
    radius = oracles.within_reach(moments, generator)
    minimax, robust = oracles.by_cvxpy(moments, radius, 0.3)
    assert int(minimax.isfinite().sum()) >= 8  # Clarabel does not call every solution accurate
    assert int(robust.isfinite().sum()) >= 8
    for backend in BACKENDS:
        ours = ops.minimax_bound(*moments, backend=backend)
        torch.testing.assert_close(ours[minimax.isfinite()], minimax[minimax.isfinite()], rtol=1e-6, atol=1e-9)
        ours = ops.robust_bound(*moments, radius1=radius / 4, radius2=radius * 3 / 4, rho=0.3, backend=backend)
        torch.testing.assert_close(ours[robust.isfinite()], robust[robust.isfinite()], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minimax_is_the_best_direction_of_the_plane(backend):
    moments = oracles.random_problems(300, 2, torch.Generator().manual_seed(2), spread=3.0)
    ours = ops.minimax_bound(*moments, backend=backend)
    torch.testing.assert_close(ours, oracles.best_in_the_plane(moments), rtol=1e-9, atol=1e-12)


def test_accuracy_against_40_digits():
    """Never above the exact value; below it by what rounding of the given moments may do, which grows with the
    condition: 1e-6 up to a condition of 5e7, 1e-2 at 1e12."""
    problems = list(oracles.conditioned_problems(120, torch.Generator().manual_seed(11)))
    assert max(one.condition for one in problems) > 1e11
    for one in problems:
        for backend in BACKENDS:
            for bound, (above, loss) in one.losses(backend).items():
                if bound != "hellinger":
                    assert above <= 1e-12, (bound, backend, one.condition)
                assert loss <= oracles.allowed_loss(one.condition), (bound, backend, one.condition)
    assert oracles.allowed_loss(5e7) < 1e-6
    assert oracles.allowed_loss(1e12) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [1.0, 3.0, 1e4, 1e-12, 1e-15, 1e-20])
def test_hellinger_is_its_closed_form_for_gaussians(backend, ratio):
    for gap in (0.0, 0.5, 3.0):
        coefficient = math.sqrt(2 * math.sqrt(ratio) / (1 + ratio)) * math.exp(-(gap**2) / 4 / (1 + ratio))
        ours = ops.hellinger_bound(*tensors([gap], [[1.0]], [0.0], [[ratio]]), backend=backend)
        assert float(ours) == pytest.approx(1 - coefficient, abs=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hellinger_of_all_but_equal_laws_on_a_plane(backend):
    """Three atoms in three dimensions: all covariances have rank 2, and no coordinate is a multiple of another."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, 3, 3, generator=generator, dtype=torch.float64)
    p = torch.rand(2000, 3, generator=generator, dtype=torch.float64) + 0.1
    q = p * (1 + 1e-9 * torch.randn(2000, 3, generator=generator, dtype=torch.float64))
    laws = oracles.Pairs(p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True), values)
    assert float(ops.hellinger_bound(*laws.moments(), backend=backend).max()) < 1e-6


# ---- degenerate laws ------------------------------------------------------------------------------------------------


ZERO, EYE = [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", OF_LAWS)
class TestDegenerate:
    def value(self, bound, backend, *moments, **options):
        return float(OF_LAWS[bound](*tensors(*moments), backend=backend, **options))

    def published(self, bound, value):
        """What the bound makes of a value of minimax, where both laws have the same deviation."""
        k = math.sqrt(value / (1 - value))
        return (k / (2**0.5 + k)) ** 2 if bound == "minimax_published" else value

    def test_constant_and_equal(self, bound, backend):
        for mean in (0.0, 1.0, -1e300, 1e-300):
            assert self.value(bound, backend, [mean, 2.0], ZERO, [mean, 2.0], ZERO) == 0

    def test_constant_and_different(self, bound, backend):
        for other in (2.5, 2 + 1e-12, -1e300):
            assert self.value(bound, backend, [1.0, 2.0], ZERO, [1.0, other], ZERO) == 1

    def test_constant_and_as_different_as_rounding_makes_them(self, bound, backend):
        assert self.value(bound, backend, [1.0, 2.0], ZERO, [1.0, 2 + 4e-16], ZERO) == 0

    def test_a_dead_coordinate_drops_out(self, bound, backend):
        dead = self.value(bound, backend, [1.0, 5.0], [[1.0, 0.0], [0.0, 0.0]], [0.0, 5.0], [[2.0, 0.0], [0.0, 0.0]])
        assert dead == pytest.approx(self.value(bound, backend, [1.0], [[1.0]], [0.0], [[2.0]]), rel=1e-12)

    def test_duplicated_coordinates_count_once(self, bound, backend):
        for copies in (2, 3, 5):
            one, two = ([[v] * copies] * copies for v in (1.0, 2.0))
            many = self.value(bound, backend, [1.0] * copies, one, [0.0] * copies, two)
            alone = self.value(bound, backend, [1.0], [[1.0]], [0.0], [[2.0]])
            assert many == pytest.approx(alone, rel=1e-6)

    def test_a_coordinate_of_rounding_alone_costs_little(self, bound, backend):
        cov = [[1.0, 0.5, 0.5e-17], [0.5, 1.0, 0.0], [0.5e-17, 0.0, 1e-34]]
        value = self.value(bound, backend, [1.0, -1.0, 0.1], cov, [0.0, 0.0, 0.1 + 1.4e-17], cov)
        plane = [[1.0, 0.5], [0.5, 1.0]]
        alone = self.value(bound, backend, [1.0, -1.0], plane, [0.0, 0.0], plane)
        assert value >= 0.98 * alone

    def test_a_difference_where_nothing_varies(self, bound, backend):
        flat = [[1.0, 1.0], [1.0, 1.0]]
        assert self.value(bound, backend, [1.0, 0.0], flat, [0.0, 1.0], flat) == pytest.approx(1, abs=1e-6)

    def test_constant_in_one_law(self, bound, backend):
        value = self.value(bound, backend, [2.0], [[0.0]], [0.0], [[1.0]])
        expected = {"fisher": 4 / 6, "robust": 4 / 6, "minimax": 0.8, "minimax_published": (2 / (2**0.5 + 2)) ** 2}
        assert value == pytest.approx(expected.get(bound, 1.0), rel=1e-12)

    def test_extreme_variances(self, bound, backend):
        expected = self.value(bound, backend, [1.0], [[1.0]], [0.0], [[1.0]])
        for variance in (1e-300, 1e-100, 1e100, 1e300):
            value = self.value(bound, backend, [math.sqrt(variance)], [[variance]], [0.0], [[variance]])
            assert value == pytest.approx(expected, rel=1e-9)

    def test_variances_of_extreme_ratio(self, bound, backend):
        cov = [[1e-300, 0.0], [0.0, 1e300]]
        value = self.value(bound, backend, [1e-150, 1e150], cov, [0.0, 0.0], cov)
        expected = self.value(bound, backend, [1.0, 1.0], EYE, [0.0, 0.0], EYE)
        assert value == pytest.approx(expected, rel=1e-9)

    def test_extreme_means(self, bound, backend):
        assert self.value(bound, backend, [1e300, 0.0], EYE, [-1e300, 0.0], EYE) == pytest.approx(1, abs=1e-12)
        assert self.value(bound, backend, [1e-300, 0.0], EYE, [-1e-300, 0.0], EYE) == pytest.approx(0, abs=1e-12)
        # Rounding of the means is charged: 1e17 and 1e17 + 16 may be the same number.
        assert self.value(bound, backend, [1e17, 0.0], EYE, [1e17 + 16, 0.0], EYE) <= (1 if bound == "hellinger" else 0)

    def test_not_finite(self, bound, backend):
        one = [[1.0]]
        for wrong in (math.nan, math.inf, -math.inf):
            assert math.isnan(self.value(bound, backend, [wrong], one, [0.0], one))
            assert math.isnan(self.value(bound, backend, [1.0], one, [wrong], one))
        for wrong in (math.nan, math.inf):
            assert math.isnan(self.value(bound, backend, [1.0], [[wrong]], [0.0], one))
            assert math.isnan(self.value(bound, backend, [1.0, 0.0], EYE, [0.0, 0.0], [[1.0, 0.0], [0.0, wrong]]))

    def test_not_finite_off_the_diagonal(self, bound, backend):
        wrong = [[1.0, math.nan], [math.nan, 1.0]]
        assert math.isnan(self.value(bound, backend, [1.0, 0.5], wrong, [0.0, 0.0], EYE))
        assert math.isnan(self.value(bound, backend, [1.0, 0.5], EYE, [0.0, 0.0], wrong))

    def test_types_and_empty_batches(self, bound, backend):
        mean1, cov1, mean2, cov2 = oracles.random_problems(12, 3, torch.Generator().manual_seed(0))
        run = functools.partial(OF_LAWS[bound], backend=backend)
        flat = run(mean1, cov1, mean2, cov2)
        shaped = run(mean1.view(3, 4, 3), cov1.view(3, 4, 3, 3), mean2.view(3, 4, 3), cov2.view(3, 4, 3, 3))
        assert torch.equal(shaped, flat.view(3, 4))
        assert run(mean1.float(), cov1.float(), mean2.float(), cov2.float()).dtype == torch.float32
        assert run(mean1[:0], cov1[:0], mean2[:0], cov2[:0]).shape == (0,)
        assert run(mean1[0], cov1[0], mean2[0], cov2[0]).shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
class TestDegenerateWitness:
    def value(self, backend, *moments, **options):
        return float(ops.witness_bound(*tensors(*moments), backend=backend, **options))

    def test_constants(self, backend):
        assert self.value(backend, 0.0, 0.0, 0.0, 0.0) == 0
        assert self.value(backend, 2.0, 4.0, 2.0, 4.0) == 0
        assert self.value(backend, 2.0, 4.0, 0.0, 0.0) == pytest.approx(1, abs=1e-12)
        assert self.value(backend, 2.0, 4.0, -1.0, 1.0) == pytest.approx(1, abs=1e-12)
        assert self.value(backend, 3.0, 9.0, 1.0, 1.0) == pytest.approx((3 - 1) ** 2 / (3 + 1) ** 2, rel=1e-12)

    def test_extremes(self, backend):
        for size in (1e-150, 1e-100, 1e100, 1e150):
            value = self.value(backend, size, 2 * size**2, 0.0, 2 * size**2)
            assert value == pytest.approx(1 / 8, rel=1e-12)

    def test_squares_outside_the_range(self, backend):
        # 4e308 / 6.8e308, and a second moment that is 0 because it is too small.
        assert self.value(backend, 1e154, 1.7e308, -1e154, 1.7e308) == pytest.approx(1e308 / 1.7e308, rel=1e-9)
        assert self.value(backend, 1e-170, 0.0, 0.0, 0.0) == 0

    def test_not_finite(self, backend):
        for wrong in (math.nan, math.inf):
            assert math.isnan(self.value(backend, 1.0, wrong, 0.0, 1.0))
        assert math.isnan(self.value(backend, math.nan, 1.0, 0.0, 1.0))


# ---- states: definition and invariances -----------------------------------------------------------------------------


def maps(samples=240, channels=6, classes=5):
    """Feature maps and labels; class 1 has no samples, class 4 has a few. Channels: normal, skewed, dead, constant."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    labels = torch.where(labels == 1, 3, labels)
    labels[:12] = 4
    x = torch.randn(samples, channels, 3, 3, generator=generator, dtype=torch.float64)
    x = x + 0.3 * labels[:, None, None, None]
    x[:, 2:4] = x[:, 2:4].exp()
    x[:, -2], x[:, -1] = 0.0, 0.1
    return x, labels, classes


def state_of(x, labels, classes, witness, backend="cpp", **options):
    if witness == "vector":
        return ops.class_moments(x, labels, classes, statistic=VECTOR, witness="vector", backend=backend, **options)
    return ops.class_moments(x, labels, classes, backend=backend, **options)


def features_of(witness, own, rest):
    """Of two samples (samples,) or (samples, d), in units in which squares are harmless."""
    if witness == "quadratic":
        middle, unit = (own.mean() + rest.mean()) / 2, torch.cat([own, rest]).std()
        z = [(t - middle) / unit if float(unit) > 0 else t - middle for t in (own, rest)]
        own, rest = (torch.stack([t, t**2], -1) for t in z)
    return [f if f.ndim == 2 else f[:, None] for f in (own, rest)]


def from_definition(bound, witness, comparisons, options):
    """The bound between explicit samples, for each of the comparisons (own, rest)."""
    if bound in ("witness", "witness_published"):
        moments = [[f.mean(), f.square().mean()] for pair in comparisons for f in pair]
        mean, second = torch.tensor(moments, dtype=torch.float64).T
        published = bound == "witness_published"
        return ops.witness_bound(mean[::2], second[::2], mean[1::2], second[1::2], published=published)
    laws, radii = [], []
    for own, rest in (features_of(witness, *pair) for pair in comparisons):
        if bound == "robust":  # in units of the two laws' summed variance, radii in standard errors
            unit = (own.var(0, correction=0) + rest.var(0, correction=0)).sqrt()
            own, rest = (f / torch.where(unit > 0, unit, 1.0) for f in (own, rest))
            errors = [(f.var(0, correction=0).sum() / len(f)).sqrt() for f in (own, rest)]
            radii.append([float(options["radius"] * error) for error in errors])
        laws.append([part for f in (own, rest) for part in (f.mean(0), (f - f.mean(0)).T @ (f - f.mean(0)) / len(f))])
    moments = [torch.stack(part) for part in zip(*laws, strict=True)]
    if bound == "robust":
        radius1, radius2 = torch.tensor(radii, dtype=torch.float64).T
        options = {"radius1": radius1, "radius2": radius2, "rho": options["rho"]}
    return OF_LAWS[bound](*moments, backend="reference", **options)


@pytest.mark.parametrize(("bound", "witness"), [cell for cell in CELLS if cell[0] != "certified"])
def test_states_are_compared_by_the_definition(bound, witness):
    x, labels, classes = maps()
    options = OPTIONS.get(bound, {})
    compare = {"bound": bound, "witness": witness, "backend": "cpp", **options}
    state = state_of(x, labels, classes, witness)
    rest, pairs = ops.one_vs_rest(state, **compare), ops.one_vs_one(state, **compare)
    pooled = ops.pool(x, statistic=VECTOR if witness == "vector" else "mean")
    ours, comparisons = [], []
    for channel in range(5):  # the last one is constant, but for rounding of its features here
        for cls in (0, 2, 3, 4):
            own = pooled[labels == cls, channel]
            ours.append(rest[channel, cls])
            comparisons.append((own, pooled[labels != cls, channel]))
            for other in {0, 2, 3, 4} - {cls}:
                ours.append(pairs[channel, cls, other])
                comparisons.append((own, pooled[labels == other, channel]))
    exact = from_definition(bound, witness, comparisons, options)
    torch.testing.assert_close(torch.stack(ours), exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("bound", "witness"), CELLS)
def test_backends_agree(bound, witness):
    x, labels, classes = maps(samples=600, channels=19)
    state = state_of(x, labels, classes, witness)
    options = {"bound": bound, "witness": witness, **OPTIONS.get(bound, {})}
    for op in (ops.one_vs_rest, ops.one_vs_one, ops.pairwise_mean, lambda *a, **k: ops.pairwise_min(*a, **k)[0]):
        ours, reference = (op(state, backend=backend, **options) for backend in BACKENDS)
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize(("backend", "bound", "witness"), RUNS)
def test_what_must_not_matter_does_not(backend, bound, witness):
    x, labels, classes = maps()
    options = {"bound": bound, "witness": witness, "backend": backend, **OPTIONS.get(bound, {})}

    def scores(x, labels, **changes):
        given = {**options, **changes}
        state = state_of(x, labels, classes, witness, backend)
        return ops.one_vs_rest(state, **given), ops.one_vs_one(state, **given), ops.pairwise_mean(state, **given)

    def assert_same(changed):
        for ours, value in zip(changed, scores(x, labels), strict=True):
            torch.testing.assert_close(ours, value, rtol=1e-9, atol=1e-9, equal_nan=True)

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert_same(scores(x[order], labels[order]))
    assert_same(scores(x.to(memory_format=torch.channels_last), labels))
    assert_same(scores(x.flip(-1).transpose(2, 3), labels))  # the statistics do not care where on a map a value is
    parts = None
    for batch in torch.arange(len(x)).split(37):
        parts = state_of(x[batch], labels[batch], classes, witness, backend, out=parts)
    changed = (op(parts, **options) for op in (ops.one_vs_rest, ops.one_vs_one, ops.pairwise_mean))
    assert_same(changed)
    tokens = x.flatten(2).transpose(1, 2)
    state = state_of(tokens, labels, classes, witness, backend, layout="tokens")
    assert_same(op(state, **options) for op in (ops.one_vs_rest, ops.one_vs_one, ops.pairwise_mean))
    if bound == "certified":  # the range goes with the values
        assert_same(scores(3 * x + 7, labels, value_range=(-143, 157)))
        assert_same(scores(1e-5 * x, labels, value_range=(-50e-5, 50e-5)))
        return
    scale = torch.tensor([1e-6, 1.0, 3.0, 1e3, 1e6, 1.0], dtype=torch.float64)[:, None, None]
    assert_same(scores(x * scale, labels))
    if bound not in OF_ONE_NUMBER and witness != "vector":  # a shift of the map is none of its norm
        shift = torch.tensor([0.0, 5.0, -3.0, 100.0, 1.0, -2.0], dtype=torch.float64)[:, None, None]
        assert_same(scores(x * scale + shift * scale, labels))
        if witness == "linear":
            assert_same(scores(-x, labels))


def test_vector_scores_do_not_depend_on_shift_and_scale_of_each_statistic():
    x, labels, classes = maps()
    state = state_of(x, labels, classes, "vector")
    scale, shift = tensors([1e-3, 5.0, 1e4], [3.0, -2.0, 0.5])
    rows, columns = torch.tril_indices(3, 3)
    moved = ops.VectorMoments(
        state.count,
        scale[:, None, None] * (state.mean + shift[:, None, None]),
        state.scatter * (scale[rows] * scale[columns])[:, None, None],
    )
    for bound in OF_LAWS:
        for backend in BACKENDS:
            options = {"bound": bound, "backend": backend, **OPTIONS.get(bound, {})}
            ours, plain = (ops.one_vs_rest(one, **options)[:4] for one in (moved, state))
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(("backend", "bound", "witness"), RUNS)
def test_degenerate_channels_of_a_state(backend, bound, witness):
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    x = torch.zeros(6, 5, 1, 1, dtype=torch.float64)
    x[:, 1] = 0.1  # constant and equal
    x[3:, 2] = 0.7  # constant and different, 0 in one class
    x[:, 3, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])  # equal
    x[:, 4, 0, 0] = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).double() * 1e100
    options = {"bound": bound, "witness": witness, "backend": backend, **OPTIONS.get(bound, {})}
    if bound == "certified":
        options["value_range"] = (0.0, 1e101)
    values = ops.one_vs_rest(state_of(x, labels, 2, witness, backend), **options)
    assert values[[0, 1, 3]].abs().max() <= 1e-12
    if bound == "certified":
        assert not values.any()  # six samples show nothing
        return
    # witness: (a - b)^2 / (|a| + |b|)^2, published over 2 (a^2 + b^2)
    expected = {"witness": (1, 1 / 9), "witness_published": (1 / 2, 1 / 10)}.get(bound, (1, 1))
    assert values[[2, 4]].flatten().tolist() == pytest.approx([v for v in expected for _ in range(2)], rel=1e-12)


# ---- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "bound", "witness"), RUNS)
def test_reductions_are_those_of_all_pairs(backend, bound, witness):
    x, labels, classes = maps(samples=300, channels=13)
    state = state_of(x, labels, classes, witness, backend)
    options = {"bound": bound, "witness": witness, "backend": backend, **OPTIONS.get(bound, {})}
    pairs = ops.one_vs_one(state, **options)
    seen = torch.tensor([0, 2, 3, 4])
    assert pairs.shape == (13, classes, classes)
    assert torch.equal(pairs.nan_to_num(7.0), pairs.mT.nan_to_num(7.0))
    assert pairs[:, 1].isnan().all()  # a class without samples
    assert not pairs[:, seen][..., seen].isnan().any()
    assert not pairs[:, seen, seen].any()
    one, two = torch.triu_indices(4, 4, 1)
    upper = pairs[:, seen[one], seen[two]]
    least, where = ops.pairwise_min(state, **options)
    torch.testing.assert_close(least, upper.amin(1), rtol=1e-12, atol=1e-15)
    assert bool((where[:, 0] < where[:, 1]).all())
    at = pairs[torch.arange(13), where[:, 0], where[:, 1]]
    torch.testing.assert_close(at, least, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ops.pairwise_mean(state, **options), upper.mean(1), rtol=1e-12, atol=1e-15)
    # Two classes alone: each is the rest of the other.
    few = state_of(x[labels < 3], labels[labels < 3], classes, witness, backend)
    if bound == "certified":  # alpha over as many values
        options["comparisons"] = 13
    rest, both = ops.one_vs_rest(few, **options), ops.one_vs_one(few, **options)
    for cls in (0, 2):
        torch.testing.assert_close(rest[:, cls], both[:, 0, 2], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("backend", "bound", "witness"), RUNS)
def test_fewer_than_two_classes(backend, bound, witness):
    x, labels, classes = maps(samples=20, channels=3)
    options = {"bound": bound, "witness": witness, "backend": backend, **OPTIONS.get(bound, {})}
    for samples in (0, 20):
        state = state_of(x[:samples], labels[:samples] * 0, classes, witness, backend)
        assert ops.one_vs_rest(state, **options).isnan().all()
        assert ops.pairwise_mean(state, **options).isnan().all()
        values, pairs = ops.pairwise_min(state, **options)
        assert values.isnan().all()
        assert pairs.tolist() == [[-1, -1]] * 3
        all_pairs = ops.one_vs_one(state, **options)
        if samples:
            assert not all_pairs[:, 0, 0].any()
            all_pairs[:, 0, 0] = torch.nan
        assert all_pairs.isnan().all()


@pytest.mark.parametrize(("backend", "bound", "witness"), RUNS)
def test_moments_that_are_not_finite_are_nan_and_stay_where_they_are(backend, bound, witness):
    x, labels, classes = maps()
    options = {"bound": bound, "witness": witness, "backend": backend, **OPTIONS.get(bound, {})}
    ops_of_all = (ops.one_vs_rest, ops.one_vs_one, ops.pairwise_mean, lambda *a, **k: ops.pairwise_min(*a, **k)[0])
    clean = [op(state_of(x, labels, classes, witness, backend), **options) for op in ops_of_all]
    x[labels == 3, 1, 0, 0] = math.nan
    state = state_of(x, labels, classes, witness, backend)
    others = torch.tensor([0, 2, 3, 4, 5])
    for op, before in zip(ops_of_all, clean, strict=True):
        now = op(state, **options)
        torch.testing.assert_close(now[others], before[others], rtol=0, atol=0, equal_nan=True)
        if op is ops.one_vs_rest:
            assert now[1].isnan().all()
        elif op is ops.one_vs_one:
            assert now[1, 3, [0, 2, 4]].isnan().all()
            assert torch.equal(now[1, 0, [2, 4]], before[1, 0, [2, 4]])
        else:
            assert now[1].isnan()


def test_all_pairs_give_the_same_bits_for_any_number_of_threads():
    x, labels, classes = maps(samples=400, channels=203)
    for bound, witness in CELLS:
        state = state_of(x, labels, classes, witness)
        options = {"bound": bound, "witness": witness, "backend": "cpp", **OPTIONS.get(bound, {})}
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((ops.one_vs_one(state, **options), ops.pairwise_mean(state, **options)))
        for result in results[1:]:
            for one, two in zip(result, results[0], strict=True):
                assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))


# ---- refusals -------------------------------------------------------------------------------------------------------


COMPARISONS = (ops.one_vs_rest, ops.one_vs_one, ops.pairwise_min, ops.pairwise_mean)


@pytest.mark.parametrize("op", COMPARISONS)
def test_refusals_of_states(op):
    x, labels, classes = maps(samples=20)
    scalar, vector = (state_of(x, labels, classes, witness) for witness in ("quadratic", "vector"))
    name = op.__name__
    for bound in OF_ONE_NUMBER:
        message = (
            rf"{name}: witness must be 'linear' or 'exp' for bound='{bound}', which compares the moments of one number"
        )
        with pytest.raises(ValueError, match=rf"{message}: witness='quadratic' is \(t, t\^2\)"):
            op(scalar, bound=bound, witness="quadratic")
        with pytest.raises(ValueError, match=rf"{message}: witness='vector' is a vector of statistics"):
            op(vector, bound=bound)
    with pytest.raises(TypeError, match=rf"{name}: 'radius' is no option of bound='minimax', which takes no options"):
        op(scalar, radius=1.0)
    with pytest.raises(
        TypeError, match=rf"{name}: 'alpha' is no option of bound='robust', which takes 'radius', 'rho'"
    ):
        op(scalar, bound="robust", alpha=0.1)
    for option in ("radius", "rho"):
        for wrong in (-1.0, math.nan, math.inf, "2", None, True):
            with pytest.raises(ValueError, match=rf"{name}: {option} must be a finite number of at least 0, got"):
                op(scalar, bound="robust", **{option: wrong})
    certified = functools.partial(op, scalar, bound="certified")
    for wrong in (0.0, 1.0, -0.1, math.nan, "x", None):
        with pytest.raises(ValueError, match=rf"{name}: alpha must be a probability above 0 and below 1, got"):
            certified(alpha=wrong, value_range=(-50, 50))
    for wrong in (0, -3, 2.5, "x"):
        with pytest.raises(ValueError, match=rf"{name}: comparisons must be an integer of at least 1, got"):
            certified(comparisons=wrong, value_range=(-50, 50))
    for wrong in ((1, 0), (0, 0), (0,), (0, math.inf), 3, "ab", (0, 1, 2)):
        with pytest.raises(
            ValueError, match=rf"{name}: value_range must be two finite numbers, the lower one first, got"
        ):
            certified(value_range=wrong)
    with pytest.raises(
        ValueError, match=rf"{name}: value_range must be given for bound='certified' unless witness='exp'"
    ):
        certified()
    with pytest.raises(
        ValueError, match=rf"{name}: value_range must hold every value of the witness, \(0, 1\) does not: class 0"
    ):
        certified(value_range=(0, 1))
    coin = ops.class_moments(torch.tensor([[0.0], [2.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1]), 2)
    with pytest.raises(ValueError, match=r"class 0, channel 0 has mean 1 and standard deviation 1"):
        op(coin, bound="certified", value_range=(0.5, 2))  # the means lie in it, but no law with this deviation does
    op(coin, bound="certified", value_range=(0, 2))


def test_refusals_of_explicit_bounds():
    one, eye = torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2)
    robust = functools.partial(ops.robust_bound, one, eye, one, eye)
    for option in ("radius1", "radius2", "rho"):
        for wrong in (-1.0, math.nan, math.inf, True):
            if option != "rho" and wrong is True:
                continue
            with pytest.raises(ValueError, match=rf"robust_bound: {option} must be a finite number of at least 0, got"):
                robust(**{option: wrong})
    with pytest.raises(ValueError, match=r"radius1 must be a number or have shape \(3,\) on cpu, got shape \(2,\)"):
        robust(radius1=torch.ones(2))
    with pytest.raises(ValueError, match=r"radius2 must be finite and at least 0 everywhere, got -1.0"):
        robust(radius2=torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match=r"radius1 must be one of float32, float64, got int64"):
        robust(radius1=torch.ones(3, dtype=torch.int64))
    for bound in OF_LAWS.values():
        with pytest.raises(ValueError, match=r"_bound: means must have shape \(..., d\) and covariances"):
            bound(one, eye, one, torch.eye(3).expand(3, 3, 3))
    two = torch.tensor([2.0])
    with pytest.raises(ValueError, match=r"witness_bound: second1 must be at least the square of its mean, .* up to 3"):
        ops.witness_bound(two, two / 2, two, 2 * two)
    with pytest.raises(ValueError, match=r"second2 must be at least the square of its mean"):
        ops.witness_bound(two, 2 * two, two, two / 2)
    with pytest.raises(
        ValueError,
        match=r"mean2 must have the shape, type and device of mean1: .* torch.float64 .* shape \(1,\)",
    ):
        ops.witness_bound(two, 2 * two, two.double(), 2 * two)
    with pytest.raises(TypeError, match=r"witness_bound: mean1 must be a torch.Tensor, got float"):
        ops.witness_bound(2.0, 2 * two, two, 2 * two)


# ---- other people's software ----------------------------------------------------------------------------------------


def digit_features():
    """The pixels of handwritten digits: 64 channels, some of them dead."""
    train, _ = zoo.digits()
    x, labels = train.tensors
    return x.flatten(1)[:, :, None, None], labels


def cifar_features(cifar):
    """A layer of ResNet20 behind its norm, and the images' labels."""
    model, train, _ = cifar
    seen = []
    handle = model.layer2[-1].bn2.register_forward_hook(lambda _module, _given, out: seen.append(out))
    with torch.no_grad():
        for x, _ in zoo.batches(train):
            model(x)
    handle.remove()
    return torch.cat(seen), train.tensors[1]


@pytest.fixture(params=["digits", pytest.param("cifar", marks=pytest.mark.data)])
def real_features(request):
    return digit_features() if request.param == "digits" else cifar_features(request.getfixturevalue("cifar"))


def test_naive_bayes_of_scikit_learn_has_the_same_means_and_variances(real_features):
    from sklearn.naive_bayes import GaussianNB

    x, labels = real_features
    theirs = GaussianNB(var_smoothing=0).fit(x.double().mean((2, 3)).numpy(), labels.numpy())
    for backend in BACKENDS:
        ours = ops.class_moments(x, labels, 10, backend=backend)
        # The pixels are multiples of 1/16, the maps float32: means agree to rounding of float64 sums.
        torch.testing.assert_close(ours.mean, torch.from_numpy(theirs.theta_), rtol=1e-9, atol=1e-12)
        variance = ours.m2 / ours.count[:, None]
        torch.testing.assert_close(variance, torch.from_numpy(theirs.var_), rtol=1e-9, atol=1e-12)


def test_fisher_is_the_mahalanobis_distance_of_linear_discriminant_analysis(real_features):
    """Between two classes of equal size: with W the mean of both covariances, delta' W^-1 delta = 2 F."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, labels = real_features
    pick = torch.cat([(labels == cls).nonzero()[:80, 0] for cls in (3, 5)])
    assert labels[pick].bincount()[[3, 5]].tolist() == [80, 80]
    x, labels = x[pick], (labels[pick] == 5).long()
    names = ("mean",) if x.shape[-1] == 1 else ("mean", "max", "rms")
    pooled = ops.pool(x, statistic=names)
    ours = {
        backend: ops.one_vs_rest(
            ops.class_moments(x, labels, 2, statistic=names, witness="vector", backend=backend),
            bound="fisher",
            backend=backend,
        )
        for backend in BACKENDS
    }
    compared = 0
    for channel in range(x.shape[1]):
        features = pooled[:, channel].numpy()
        if features.std(0).min() < 1e-6:
            continue
        lda = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels.numpy())
        distance = float((lda.coef_ @ (lda.means_[1] - lda.means_[0]))[0])
        for values in ours.values():
            assert values[channel].tolist() == pytest.approx([distance / (4 + distance)] * 2, rel=1e-6)
        compared += 1
    assert compared >= 30


def test_hellinger_is_a_numerical_integral_of_gaussian_densities():
    t = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    for mean, deviation in ((0.0, 1.0), (1.0, 1.0), (3.0, 0.2), (-2.0, 5.0)):
        p, q = (torch.distributions.Normal(*tensors(*law)).log_prob(t) for law in ((0.0, 1.0), (mean, deviation)))
        coefficient = torch.trapezoid(((p + q) / 2).exp(), t)
        ours = ops.hellinger_bound(*tensors([0.0], [[1.0]], [mean], [[deviation**2]]))
        assert float(ours) == pytest.approx(float(1 - coefficient), abs=1e-9)
        exact = float(torch.trapezoid((p.exp() - q.exp()).abs(), t)) / 2
        assert float(ours) <= exact + 1e-9  # of Gaussians it is a bound


def test_exp_scores_of_a_network_are_those_of_its_features():
    """The whole way from maps to scores under the witness exp, against explicit features."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with torch.no_grad():
        x = layer(torch.randn(200, 3, 9, 9))
    labels = torch.arange(200) % 4
    x[labels == 2] *= 1.5
    moments = ops.class_moments(x, labels, 4, statistic="l2", witness="exp", scale=0.3)
    f = torch.exp(-0.3 * x.double().square().sum((2, 3)).sqrt())
    for bound in (*OF_LAWS, "witness", "witness_published"):
        options = OPTIONS.get(bound, {})
        ours = ops.one_vs_rest(moments, bound=bound, witness="exp", **options)
        comparisons = [(f[labels == cls, c], f[labels != cls, c]) for c in range(8) for cls in range(4)]
        exact = from_definition(bound, "exp", comparisons, options).view(8, 4)
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-12)
    certified = ops.one_vs_rest(moments, bound="certified", witness="exp", alpha=0.9)  # in (0, 1) by default
    assert bool((certified <= ops.one_vs_rest(moments, witness="exp")).all())


# ---- the benchmark --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_validity_runs_and_says_what_it_finds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(oracles, "PAGE", tmp_path / "bounds.md")
    command = ["bench_validity", "--parts", "laws", "plane", "--pairs", "700", "--problems", "40", "--write"]
    monkeypatch.setattr("sys.argv", command)
    assert oracles.main() == 0
    text = (tmp_path / "bounds.md").read_text()
    assert text.count("| minimax |") == 5
    assert text.count("| hellinger (no bound) |") == 5
    assert oracles.main() == 0  # its sections are replaced
    assert (tmp_path / "bounds.md").read_text().count("| minimax |") == 5
    monkeypatch.setattr(oracles, "ALLOWED", -1.0)
    before = (tmp_path / "bounds.md").read_text()
    assert oracles.main() == 1
    assert "FAILED: minimax, d = 1: 700 violations" in capsys.readouterr().err
    assert (tmp_path / "bounds.md").read_text() == before
