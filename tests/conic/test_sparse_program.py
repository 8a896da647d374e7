"""Quadratic programs with sparse data.

Oracle: the same program with dense data, whose derivatives have tests of their own; for large programs the optimality
conditions, and the derivative on the set of free variables.
"""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from difflayers import SolveError, Status, trace
from difflayers.conic import InteriorPoint, Moreau, SparseMatrix, project_polyhedron, quadratic_program
from difflayers.conic import quadratic_program_ex as solve

F64 = torch.float64
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


def program(n: int = 20, batch: int = 4) -> list[torch.Tensor]:
    """Dense tensors with many zeros."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    thin = lambda M: M * (torch.rand(M.shape, generator=generator) < 0.3)  # noqa: E731
    root, G, A, inside = thin(draw(n, n)), thin(draw(30, n)), thin(draw(3, n)), draw(batch, n)
    slack = torch.rand(batch, 30, generator=generator, dtype=F64)
    return [root @ root.T + 0.5 * torch.eye(n, dtype=F64), draw(batch, n), G, inside @ G.T + slack, A, inside @ A.T]


def csr(data: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.to_sparse_csr() if i in (0, 2, 4) else t for i, t in enumerate(data)]


def with_values(M: torch.Tensor, values: torch.Tensor) -> SparseMatrix:
    """A matrix with the pattern of the CSR tensor `M`."""
    return SparseMatrix(M.crow_indices(), M.col_indices(), values, tuple(M.shape))


def on_pattern(dense: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """The entries of `dense` where the CSR tensor `M` has its values."""
    rows = torch.repeat_interleave(torch.arange(M.shape[0]), M.crow_indices().diff())
    return dense[rows, M.col_indices()]


def test_values_and_gradients_equal_the_dense_ones():
    data = program()
    dense = [t.clone().requires_grad_() for t in data]
    sparse = [t.clone().requires_grad_() for t in csr(data)]
    expected, found = solve(*dense), solve(*sparse)
    for a, b in zip(found.value, expected.value, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert bool(found.converged.all()) and float(found.residual.max()) < 1e-13
    loss = lambda point: sum(t.sin().sum() for t in point)  # noqa: E731
    slopes = zip(
        torch.autograd.grad(loss(found.value), sparse), torch.autograd.grad(loss(expected.value), dense), strict=True
    )
    for got, want in slopes:
        if got.layout == torch.sparse_csr:
            want, got = on_pattern(want, got), got.values()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives_equal_the_dense_ones():
    """In the values of a SparseMatrix, and of a CSR leaf."""
    data = program()
    P = data[0].to_sparse_csr()
    weight = torch.cos(torch.arange(len(P.values()), dtype=F64))

    def twice(leaf, x, values_of):
        (first,) = torch.autograd.grad(x.sin().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((values_of(first) * weight).sum(), leaf)
        return values_of(second)

    dense = data[0].clone().requires_grad_()
    expected = twice(dense, quadratic_program(dense, *data[1:]), lambda t: on_pattern(t, P))
    values, leaf = P.values().clone().requires_grad_(), P.clone().requires_grad_()
    found = twice(values, quadratic_program(with_values(P, values), *data[1:]), lambda t: t)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found = twice(leaf, quadratic_program(leaf, *data[1:]), lambda t: t.values())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_all_outputs_have_derivatives_of_both_orders_and_modes():
    """At n = 5, in all values, against central differences."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    P, G, A = torch.diag(1 + draw(5).abs()), draw(4, 5) * (draw(4, 5) > 0), torch.ones(1, 5, dtype=F64)
    matrices = [M.to_sparse_csr() for M in (P, G, A)]

    def point(P, q, G, h, A, b):
        P, G, A = (with_values(M, v) for M, v in zip(matrices, (P, G, A), strict=True))
        return torch.cat(solve(P, q, G, h, A, b).value, -1)

    values = [M.values() for M in matrices]
    data = [values[0], 2 * draw(2, 5), values[1], draw(2, 4).abs() / 2, values[2], draw(2, 1) / 4]
    leaves = [t.clone().requires_grad_() for t in data]
    assert 0 < int((solve(*[with_values(matrices[i // 2], t) if i in (0, 2, 4) else t
                            for i, t in enumerate(data)]).value.z > 0).sum()) < 8  # fmt: skip
    assert gradcheck(point, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(point, leaves, fast_mode=True)


def test_infinite_bounds_bind_nothing():
    P, q, G, h, A, b = program()
    h[:, 3], h[2] = torch.inf, torch.inf
    found = solve(P.to_sparse_csr(), q, G, h, A, b)
    expected = solve(P, q, G, h, A, b)
    assert bool(found.converged.all())
    for a, c in zip(found.value, expected.value, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


def test_a_solution_that_is_not_unique_has_no_derivative():
    """A positive semidefinite P whose rank only rounding hides."""
    root = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    P = (root @ root.T).to_sparse_csr()
    q = (root @ torch.ones(5, dtype=F64)).requires_grad_()
    x = quadratic_program(P, q)
    torch.testing.assert_close((P @ x.unsqueeze(-1)).squeeze(-1).detach(), -q.detach())
    for asked in (x.sum(), (root.T @ x).sum()):  # the second is unique, as far as it goes
        with pytest.raises(SolveError, match="SINGULAR"):
            torch.autograd.grad(asked, q, retain_graph=True)


def test_a_csr_tensor_made_of_values_passes_the_gradient_on_and_refuses_a_second():
    """torch's constructor is differentiable once; its second derivative must not be lost in silence."""
    data = program()
    P = data[0].to_sparse_csr()
    slopes = []
    for make in (
        lambda v: torch.sparse_csr_tensor(P.crow_indices(), P.col_indices(), v, P.shape),
        lambda v: with_values(P, v),
    ):
        values = P.values().clone().requires_grad_()
        slopes.append(torch.autograd.grad(quadratic_program(make(values), *data[1:]).sin().sum(), values)[0])
    torch.testing.assert_close(*slopes)
    values = P.values().clone().requires_grad_()
    x = quadratic_program(torch.sparse_csr_tensor(P.crow_indices(), P.col_indices(), values, P.shape), *data[1:])
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(x.sum(), values, create_graph=True)
        torch.autograd.grad(first.square().sum() + values.sum(), values)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                self.numel = max(self.numel, t.numel())
        return out


def test_twenty_thousand_variables():
    """Tridiagonal P, upper bounds, one equality of 2000 variables; a dense matrix would have 4e8 entries."""
    import tracemalloc

    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    n = 20000
    off = np.full(n - 1, -1.0)
    P = sparse.csr_array(sparse.diags_array([off, np.full(n, 2.1), off], offsets=[-1, 0, 1]))
    A = sparse.csr_array((np.ones(2000), (np.zeros(2000, int), 10 * np.arange(2000))), shape=(1, n))
    as_torch = lambda M: torch.sparse_csr_tensor(  # noqa: E731
        torch.from_numpy(M.indptr).long(), torch.from_numpy(M.indices).long(), torch.from_numpy(M.data), M.shape
    ).requires_grad_()
    q = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    h = torch.full((n,), 0.3, dtype=F64, requires_grad=True)
    b = torch.ones(1, dtype=F64, requires_grad=True)
    data = [as_torch(P), q, as_torch(sparse.csr_array(sparse.eye_array(n))), h, as_torch(A), b]
    g = torch.cos(torch.arange(n, dtype=F64))
    tracemalloc.start()
    with Largest() as largest:
        found = solve(*data)
        slopes = torch.autograd.grad(found.value.x, data, g)
    assert bool(found.converged)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    assert largest.numel < 5 * n
    x, y, z = (t.detach().numpy() for t in found.value[:3])
    assert np.abs(P @ x + q.detach().numpy() + A.T @ y + z).max() < 1e-11
    assert (x <= 0.3 + 1e-12).all() and (z >= 0).all() and np.abs(z * (0.3 - x)).max() < 1e-11
    assert abs(x[::10].sum() - 1) < 1e-10 and 1000 < (z > 0).sum() < n - 1000
    # on the free variables, which move as the solution of a smaller system with the one equality
    free = z == 0
    K = sparse.block_array([[P[free][:, free], A[:, free].T], [A[:, free], None]], format="csc")
    expected = np.zeros(n)
    expected[free] = -spsolve(K, np.r_[g.numpy()[free], 0.0])[:-1]
    np.testing.assert_allclose(slopes[1].numpy(), expected, atol=1e-10)
    half = (expected[1:] * x[:-1] + x[1:] * expected[:-1]) / 2
    below = slopes[0].values().numpy()[P.indices < np.repeat(np.arange(n), np.diff(P.indptr))]
    np.testing.assert_allclose(below, half, atol=1e-9)


def test_dense_and_sparse_may_be_mixed_and_any_part_absent():
    P, q, G, h, A, b = program()
    expected = quadratic_program(P, q, G, h, A, b)
    torch.testing.assert_close(quadratic_program(P, q, G.to_sparse_csr(), h, A, b), expected)
    torch.testing.assert_close(quadratic_program(P.to_sparse_csr(), q, G, h, A, b), expected)
    torch.testing.assert_close(quadratic_program(P.to_sparse_csr(), q), quadratic_program(P, q))
    for parts in ({"G": G, "h": h}, {"A": A, "b": b}):
        found = quadratic_program(P.to_sparse_csr(), q, **parts)
        torch.testing.assert_close(found, quadratic_program(P, q, **parts))
    torch.testing.assert_close(
        project_polyhedron(q, G.to_sparse_csr(), h, A, b), project_polyhedron(q, G, h, A, b), rtol=1e-9, atol=1e-9
    )


def test_values_that_differ_by_element():
    P, q, G, h, A, b = program()
    pattern = P.to_sparse_csr()
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)[:, None]
    x = quadratic_program(with_values(pattern, scale * pattern.values()), q, G, h, A, b)
    torch.testing.assert_close(x, quadratic_program(scale[..., None] * P, q, G, h, A, b), rtol=1e-9, atol=1e-9)


def test_warm_start_needs_no_step():
    P, q, G, h, A, b = csr(program())
    earlier = solve(P, q, G, h, A, b)
    moved = q + 1e-5
    moved[2] = -2 * q[2]
    found = solve(P, moved, G, h, A, b, warm_start=earlier)
    assert (found.steps == 0).tolist() == [True, True, False, True] and bool((earlier.steps > 0).all())
    torch.testing.assert_close(found.value.x, solve(P, moved, G, h, A, b).value.x)
    with trace() as solves:
        quadratic_program(P, q, G, h, A, b, warm_start=earlier)
    assert solves[0].name == f"quadratic_program[{Moreau()!r}, sparse]"


def test_dependent_rows_share_the_multiplier():
    """Least norm: of two equal rows each has half; the gradient in x is that without the duplicate."""
    P, q, G, h, A, b = program()
    twice, bounds = torch.cat([A, A]), torch.cat([b, b], -1)
    leaves = [q.clone().requires_grad_() for _ in range(2)]
    single = solve(P, leaves[0], G, h, A, b).value
    double = solve(P.to_sparse_csr(), leaves[1], G, h, twice, bounds).value
    torch.testing.assert_close(double.x, single.x, rtol=1e-8, atol=1e-8)
    slopes = [torch.autograd.grad(p.x.sin().sum(), leaf)[0] for p, leaf in zip((single, double), leaves, strict=True)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-7, atol=1e-7)


def test_linear_program():
    """At a vertex no derivative in the cost; where an edge is optimal, the backward pass raises."""
    eye = torch.eye(3, dtype=F64)
    P, G = (0 * eye).to_sparse_csr(), torch.cat([eye, -eye]).to_sparse_csr()
    h = torch.tensor([1.0, 2, 3, 1, 1, 1], dtype=F64).requires_grad_()
    q = torch.tensor([-1.0, 2.0, -0.5], dtype=F64, requires_grad=True)
    x = quadratic_program(P, q, G, h)
    torch.testing.assert_close(x, torch.tensor([1.0, -1.0, 3.0], dtype=F64))
    in_q, in_h = torch.autograd.grad(x[1], (q, h))
    assert bool((in_q.abs() < 1e-12).all())
    torch.testing.assert_close(in_h, torch.tensor([0.0, 0, 0, 0, -1, 0], dtype=F64))
    flat = torch.tensor([-1.0, 2.0, 0.0], dtype=F64, requires_grad=True)
    x = quadratic_program(P, flat, G, h)
    with pytest.raises(SolveError, match="SINGULAR"):
        torch.autograd.grad(x.sum(), flat)


def test_failing_elements_leave_the_others_alone():
    data = csr(program())
    P, q, G, h, A, b = data
    h = h.clone()
    h[1] = -1e3
    q = q.clone()
    q[2, 0] = torch.nan
    found = solve(P, q, G, h, A, b)
    assert found.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.DIVERGED, Status.CONVERGED]
    leaf = q.clone().requires_grad_()
    x = quadratic_program(P, leaf, G, h, A, b, on_failure="nan")
    (slope,) = torch.autograd.grad(x[[0, 3]].sum(), leaf)
    clean = data[1].clone().requires_grad_()
    y = quadratic_program(*[P, clean, G, data[3], A, b])
    (expected,) = torch.autograd.grad(y[[0, 3]].sum(), clean)
    assert torch.equal(x[[0, 3]], y[[0, 3]]) and torch.equal(slope, expected)
    assert bool(torch.isnan(x[[1, 2]]).all())
    with pytest.raises(ValueError, match="q: expected finite"):
        quadratic_program(P, q, G, data[3], A, b)


def test_float32_is_kept():
    data = [t.to(torch.float32) for t in program()]
    P, q, G, h, A, b = csr(data)
    leaf = P.clone().requires_grad_()
    x = quadratic_program(leaf, q, G, h, A, b)
    (slope,) = torch.autograd.grad(x.sum(), leaf)
    assert x.dtype == slope.dtype == torch.float32
    torch.testing.assert_close(x, quadratic_program(*program()).float(), rtol=1e-4, atol=1e-4)


def test_wrong_input():
    P, q, G, h, A, b = csr(program())
    with pytest.raises(ValueError, match=r"solver: expected Moreau or None for sparse data, got InteriorPoint"):
        quadratic_program(P, q, G, h, A, b, solver=InteriorPoint())
    with pytest.raises(ValueError, match=r"smoothing: expected None for sparse data"):
        quadratic_program(P, q, G, h, A, b, smoothing=0.1)
    with pytest.raises(ValueError, match=r"h: expected 30 entries, one per row of G, got \(4, 29\)"):
        quadratic_program(P, q, G, h[:, 1:], A, b)
    with pytest.raises(ValueError, match=r"G: expected 20 columns as of q, got \(3, 3\)"):
        quadratic_program(P, q, torch.eye(3, dtype=F64).to_sparse_csr(), h[:, :3], A, b)
    with pytest.raises(ValueError, match=r"P: expected a positive semidefinite matrix, got a negative pivot"):
        quadratic_program((P.to_dense() - 3 * torch.eye(20, dtype=F64)).to_sparse_csr(), q, G, h, A, b)
    good = with_values(P, P.values())
    falling = good._replace(col_indices=good.col_indices.flip(0))
    with pytest.raises(ValueError, match=r"P: expected columns in 0..19 that rise within each row"):
        quadratic_program(falling, q, G, h, A, b)
    with pytest.raises(ValueError, match=r"P: expected row offsets that rise from 0"):
        quadratic_program(good._replace(crow_indices=good.crow_indices.flip(0)), q, G, h, A, b)
    with pytest.raises(ValueError, match=r"P: expected 21 row offsets and as many columns as values"):
        quadratic_program(good._replace(values=P.values()[1:]), q, G, h, A, b)
    with pytest.raises(ValueError, match=r"q: expected dtype torch.float64 as of P, got torch.float32"):
        quadratic_program(P, q.float(), G, h, A, b)
    with pytest.raises(ValueError, match=r"P: expected a SparseMatrix or .* got layout torch.sparse_coo"):
        quadratic_program(P.to_dense().to_sparse(), q, G, h, A, b)
