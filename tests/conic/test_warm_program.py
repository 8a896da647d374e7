"""Warm start of quadratic programs. Oracle: the same program from a cold start, whose solution is unique."""

import pytest
import torch

from difflayers import SolveError, Status
from difflayers.conic import InteriorPoint, Moreau, ProgramPoint, quadratic_program, quadratic_program_ex

F64 = torch.float64
SOLVERS = [Moreau(), InteriorPoint()]


def program(batch: int = 8, n: int = 6, m: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)  # noqa: E731
    root, G, A, inside = draw(n, n), draw(m, n), draw(2, n), draw(batch, n)
    slack = torch.rand(batch, m, generator=generator, dtype=F64)
    return [root @ root.T / n + 0.1 * torch.eye(n, dtype=F64), draw(batch, n), G, inside @ G.T + slack, A, inside @ A.T]


def nudged(data: list[torch.Tensor]) -> list[torch.Tensor]:
    """A little for most elements, a lot for the last two."""
    P, q, *rest = data
    step = torch.full_like(q, 1e-4)
    step[-2:] = -3 * q[-2:]
    return [P, q + step, *rest]


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_solution_and_derivatives_without_a_step(solver):
    earlier = quadratic_program_ex(*program(), solver=solver)
    data = nudged(program())
    cold, warm = (quadratic_program_ex(*data, solver=solver, warm_start=w) for w in (None, earlier))
    assert bool((cold.steps > 0).all())
    assert bool((warm.steps[:-2] == 0).all()) and bool((warm.steps[-2:] > 0).all())
    assert bool(warm.converged.all()) and float(warm.residual.max()) < 1e-12
    for a, b in zip(warm.value, cold.value, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    slopes = []
    for start in (None, earlier.value):
        leaves = [t.clone().requires_grad_() for t in data]
        x = quadratic_program(*leaves, solver=solver, warm_start=start)
        first = torch.autograd.grad(x.sin().sum(), leaves, create_graph=True)
        slopes.append([*first, *torch.autograd.grad(sum(f.square().sum() for f in first), leaves)])
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_gradient_flows_to_the_earlier_solution():
    data = program()
    leaf = data[1].clone().requires_grad_()
    earlier = quadratic_program_ex(data[0], leaf, *data[2:])
    q = data[1].clone().requires_grad_()
    x = quadratic_program(data[0], q, *data[2:], warm_start=earlier)
    of_q, of_leaf = torch.autograd.grad(x.sum(), (q, leaf), allow_unused=True)
    assert of_leaf is None and bool((of_q != 0).any())


def test_elements_that_failed_start_cold():
    P, q, G, h, A, b = program()
    h = h.clone()
    h[3] = -1e3
    h[3, 0], G = -1e3, torch.cat([G, -G[:1]])
    h = torch.cat([h, h[:, :1].abs()], -1)  # element 3 contradicts itself
    earlier = quadratic_program_ex(P, q, G, h, A, b)
    assert earlier.status[3] == Status.INFEASIBLE
    spoilt = earlier.value._replace(z=torch.where(earlier.failed[:, None], torch.nan, earlier.value.z))
    h[3] = h[2] + 10
    b = b.clone()
    b[3] = b[2]
    found = quadratic_program_ex(P, q, G, h, A, b, warm_start=spoilt)
    assert bool(found.converged.all()) and bool((found.steps[[0, 1, 2, 4, 5, 6, 7]] == 0).all())
    torch.testing.assert_close(found.value.x, quadratic_program(P, q, G, h, A, b))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_infeasible_element_is_found_from_a_warm_start(solver):
    P, q, G, h, A, b = program()
    earlier = quadratic_program_ex(P, q, G, h, A, b, solver=solver)
    G, h = torch.cat([G, -G[:1]]), torch.cat([h, h[:, :1].abs() + 1], -1)
    h[4, 0], h[4, -1] = -2, 1
    z = torch.cat([earlier.value.z, torch.zeros(8, 1, dtype=F64)], -1)
    found = quadratic_program_ex(P, q, G, h, A, b, solver=solver, warm_start=earlier.value._replace(z=z))
    assert found.status[4] == Status.INFEASIBLE
    with pytest.raises(SolveError, match="elements 4"):
        quadratic_program(P, q, G, h, A, b, solver=solver, warm_start=earlier.value._replace(z=z))


def test_a_saddle_on_the_right_active_set_is_no_solution():
    """With the equality the KKT matrix of an indefinite P is regular, and its point satisfies every condition."""
    P, q = torch.diag(torch.tensor([1.0, -0.4], dtype=F64)), torch.ones(2, dtype=F64)
    A, b = torch.tensor([[1.0, 1.0]], dtype=F64), torch.ones(1, dtype=F64)
    G, h = torch.eye(2, dtype=F64), torch.full((2,), 9.0, dtype=F64)
    zero = torch.zeros(2, dtype=F64)
    with pytest.raises(ValueError, match="P: expected a positive semidefinite matrix"):
        quadratic_program(P, q, G, h, A, b, warm_start=ProgramPoint(zero, b, zero, zero))


def test_under_vmap_and_broadcast():
    P, q, G, h, A, b = data = program()
    earlier = quadratic_program_ex(*data)
    mapped = torch.func.vmap(
        lambda q, h, b, z: quadratic_program(P, q, G, h, A, b, warm_start=earlier.value._replace(z=z))
    )(q, h, b, earlier.value.z)
    torch.testing.assert_close(mapped, earlier.value.x)
    one = ProgramPoint(*(t[0] for t in earlier.value))
    torch.testing.assert_close(quadratic_program(*data, warm_start=one), earlier.value.x)
    single = [P, q[0], G, h[0], A, b[0]]
    assert int(quadratic_program_ex(*single, warm_start=one).steps) == 0


def test_only_equalities():
    P, q, _, _, A, b = program()
    earlier = quadratic_program_ex(P, q, A=A, b=b)
    found = quadratic_program_ex(P, 2 * q, A=A, b=b, warm_start=earlier)
    assert bool((found.steps == 0).all())
    torch.testing.assert_close(found.value.x, quadratic_program(P, 2 * q, A=A, b=b))


@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_program(solver):
    eye = torch.eye(3, dtype=F64)
    data = [0 * eye, torch.tensor([[-1.0, 2.0, -0.5], [1.0, 1.0, 1.0]], dtype=F64), torch.cat([eye, -eye])]
    data.append(torch.ones(6, dtype=F64))
    earlier = quadratic_program_ex(*data, solver=solver)
    again = quadratic_program_ex(*data, solver=solver, warm_start=earlier)
    assert bool((again.steps == 0).all())
    torch.testing.assert_close(again.value.x, -data[1].sign())


def test_wrong_warm_starts():
    data = program()
    point = quadratic_program_ex(*data).value
    with pytest.raises(ValueError, match=r"warm_start: expected a Solution .* got str"):
        quadratic_program(*data, warm_start="yesterday")
    with pytest.raises(ValueError, match=r"warm_start: expected 9 multipliers z, one per row of G, got shape \(8, 4\)"):
        quadratic_program(*data, warm_start=point._replace(z=point.z[:, :4]))
    with pytest.raises(ValueError, match=r"warm_start: expected batch dimensions"):
        quadratic_program(*data, warm_start=point._replace(z=point.z[:3]))
