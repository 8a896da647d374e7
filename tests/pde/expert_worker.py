"""What every process of a mesh computes for test_expert_parallel.py; see tests/processes.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from difflayers import SolveError
from difflayers.pde import (
    PDE,
    Box,
    Burgers,
    Dirichlet,
    DomainExperts,
    FiniteDifference,
    Fixed,
    Grid,
    HardBoxes,
    Heat,
    Initial,
    PartitionOfUnity,
    PDEConstraint,
    Sobol,
)
from difflayers.pde._expert_mesh import copied, copied_module, gathered, gathered_all, share, together

F64 = torch.float64
HEIGHT = torch.ones((), dtype=F64, requires_grad=True)
POINTS = torch.rand(30, 2, generator=torch.Generator().manual_seed(5), dtype=F64) * torch.tensor([1.0, 2.0]).to(F64)
POINTS = POINTS - torch.tensor([0.0, 1.0]).to(F64)


class Net(nn.Module):
    """A small basis, the same in every process."""

    def __init__(self, K: int = 6, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 12, dtype=dtype), nn.Linear(12, K, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=generator, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Start(nn.Module):
    """Initial values as a function of points."""

    def __init__(self) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, points: Tensor) -> Tensor:
        return -self.height * torch.sin(torch.pi * points[:, 1])


def start(points: Tensor) -> Tensor:
    return -torch.sin(torch.pi * points[:, 1])


def layer(E: int, mesh: Any, *, pde: PDE | None = None, gate: Any = None, **options: Any) -> DomainExperts:
    """Experts for Burgers' equation side by side; each touches the start."""
    options = {"sampler": Sobol(40, 6), "ridge": 1e-2, **options}
    constraint = PDEConstraint(pde or Burgers(nu=0.2), **options)
    return DomainExperts(constraint, gate or HardBoxes(x=E), mesh=mesh).double()


def report(field: Any) -> list[Tensor]:
    """All that the result has."""
    numbers = [field.value, field.status, field.steps, field.residual, field.linear, field.points, field.jumps]
    return [t.detach() for t in (*numbers, field.multipliers, *field.terms.values(), *field.norms.values())]


def loss(field: Any) -> Tensor:
    """Replicated: the network is in the experts, and in the evaluation of the field."""
    u = field(POINTS)
    return u.square().sum() + u.sum() + (field.terms["u_x"] ** 3).mean()


def data() -> tuple[Net, Tensor, Start]:
    return Net(), torch.tensor([0.2], dtype=F64, requires_grad=True), Start()


def gradients(E: int, mesh: Any, **options: Any) -> list[Tensor]:
    net, nu, begin = data()
    field = layer(E, mesh, **options)(net, {"nu": nu}, {"u0": begin})
    total = loss(field)
    return [total.detach(), *report(field), *torch.autograd.grad(total, [*net.parameters(), nu, begin.height])]


def second(mesh: Any) -> list[Tensor]:
    net, nu, begin = data()
    inputs = [*net.parameters(), nu, begin.height]
    first = torch.autograd.grad(loss(layer(5, mesh)(net, {"nu": nu}, {"u0": begin})), inputs, create_graph=True)
    total = torch.stack([(g.square() + g.sin()).sum() for g in first]).sum()
    return [total.detach(), *torch.autograd.grad(total, inputs)]


def third(mesh: Any) -> list[Tensor]:
    net, nu, _ = data()
    total = loss(layer(4, mesh)(net, {"nu": nu}, {"u0": start}))
    for _ in range(2):
        (total,) = torch.autograd.grad(total.sum(), nu, create_graph=True)
    return list(torch.autograd.grad(total.sum(), [nu, *net.parameters()]))


def transforms(mesh: Any) -> list[Tensor]:
    """On points of the caller's choice."""
    net, nu, _ = data()
    t, x = torch.linspace(0, 1, 7, dtype=F64), torch.linspace(-1, 1, 21, dtype=F64)
    sides = {"x=-1": torch.stack([t, -torch.ones_like(t)], -1), "x=1": torch.stack([t, torch.ones_like(t)], -1)}
    faces = {"t=0": torch.stack([torch.zeros_like(x), x], -1), **sides}
    nu, experts = nu.detach(), layer(4, mesh, sampler=Fixed(torch.cartesian_prod(t, x), faces))
    f = lambda nu: loss(experts(net, {"nu": nu}, {"u0": start}))  # noqa: E731
    return [
        torch.func.grad(f)(nu),
        torch.func.jvp(f, (nu,), (torch.ones_like(nu),))[1],
        torch.func.vmap(f)(torch.stack([nu, nu + 0.1])),
        torch.func.vmap(torch.func.grad(f))(torch.stack([nu, nu + 0.1])),
        torch.func.hessian(f)(nu),
    ]


def batched_cotangents(mesh: Any) -> list[Tensor]:
    net, nu, _ = data()
    w = layer(4, mesh)(net, {"nu": nu}, {"u0": start}).value
    eye = torch.eye(w.numel(), dtype=F64)[::7].reshape(-1, *w.shape)
    return list(torch.autograd.grad(w, [nu, *net.parameters()], eye, is_grads_batched=True))


def training(mesh: Any) -> list[Tensor]:
    net, _, begin = data()
    experts = layer(5, mesh)
    optimiser = torch.optim.Adam([*net.parameters(), *begin.parameters()], lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        loss(experts(net, values={"u0": begin})).backward()
        optimiser.step()
    return [p.detach() for p in (*net.parameters(), *begin.parameters())]


def batch(mesh: Any) -> list[Tensor]:
    net = Net()
    nu = torch.tensor([[0.2], [0.4], [0.1]], dtype=F64, requires_grad=True)
    field = layer(5, mesh)(net, {"nu": nu.unsqueeze(-2)}, {"u0": start})
    return [*report(field), *torch.autograd.grad(loss(field), [nu, *net.parameters()])]


def grid(mesh: Any) -> list[Tensor]:
    """Values on a grid as the basis: a tensor."""
    box = Box(t=(0.0, 1.0), x=(-1.0, 1.0))
    nodes = Grid(box, t=7, x=21)
    basis = Net()(nodes.points(POINTS)).detach().unflatten(0, nodes.shape).requires_grad_()
    field = layer(4, mesh, derivatives=FiniteDifference(nodes), sampler=None)(basis, values={"u0": start})
    return [*report(field), *torch.autograd.grad(field.terms["u_x"].square().sum(), basis)]


def exact(mesh: Any) -> list[Tensor]:
    """Exact rows, and a linear equation; no gradient is wanted."""
    pde = Heat(domain=Box(t=(0.0, 1.0), x=(0.0, 1.0)), conditions=(Initial("u0", exact=True), Dirichlet("x")))
    net = Net(8)
    with torch.no_grad():
        field = layer(5, mesh, pde=pde, sampler=Sobol(40, 3))(
            net, values={"u0": lambda p: torch.sin(torch.pi * p[:, 1])}
        )
    return report(field)


def unused(mesh: Any) -> list[Tensor]:
    """The last process does nothing with one of the tensors, but takes part in the sum of its gradients."""
    a, b = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.3, 0.7))
    tied, mine = {"a": a, "b": b}, range(4)
    first = {"a": a}
    if mesh is not None:
        tied, first, mine = copied(tied, mesh), copied(first, mesh), share(4, mesh)
    numbers = torch.tensor(mine, dtype=F64)
    local = (numbers * tied["b"]).sin() + (first["a"] ** 3 if 0 in mine else 0) * (numbers == 0)
    whole = local if mesh is None else gathered(local, 4, mesh, 0, tied=(tied, first))
    (g,) = torch.autograd.grad(whole.square().sum(), a, create_graph=True)
    return [whole.detach(), g.detach(), *torch.autograd.grad(g.square(), [a, b])]


class Mixed(nn.Module):
    """Parameters of several dtypes, one of them shared and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float32))
        self.wave = nn.Parameter(torch.tensor([[1.0 + 2.0j], [0.3 - 0.1j]], dtype=torch.complex128))
        self.again, self.fixed = self.wave, nn.Parameter(torch.ones(2, dtype=F64), requires_grad=False)
        self.register_buffer("shift", torch.tensor([0.1, 0.2], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        turned = (torch.exp(1j * x.unsqueeze(-1)) * self.wave.mT.squeeze(0) * self.again.mT.squeeze(0)).real
        return turned * self.single.double() + self.fixed * self.shift


def mixed(mesh: Any) -> list[Tensor]:
    net, mine = Mixed(), range(5)
    local, tied = net, ()
    if mesh is not None:
        local, mine = copied_module(net, mesh), share(5, mesh)
        tied = (local,)
    rows = local(torch.tensor(list(mine), dtype=F64)).sin()
    counts = torch.tensor(list(mine)) + 1
    flags = counts > 2
    if mesh is not None:
        rows, counts, flags = gathered_all([rows.mT, counts, flags], 5, mesh, [1, 0, 0], tied)
        rows = rows.mT
    total = (rows * net(rows[:, 0].detach())).sum()  # the module itself, too
    grads = torch.autograd.grad(total, [net.single, net.wave], create_graph=True)
    again = torch.autograd.grad(grads[1].abs().sum(), [net.single, net.wave])
    found = [torch.view_as_real(g) if g.is_complex() else g for g in (*grads, *again)]
    return [rows.detach(), counts, flags, *(g.detach() for g in found)]


def other_mesh(mesh: Any) -> list[Tensor]:
    """One dimension of a mesh that has another."""
    if mesh is not None:
        both = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "expert"))
        mesh = both["expert"]
    return gradients(4, mesh)


class Fragile(Burgers):
    """Burgers' equation, whose residual becomes infinite, or raises, in one place."""

    params = {"nu": 0.2, "where": -2.0}  # noqa: RUF012

    def residual(self, T: Any, p: Any) -> Tensor:
        near = (p["x"] - p["where"]).abs() < 0.15
        return super().residual(T, p) + torch.where(near, torch.inf, 0.0)


class Raises(Burgers):
    def residual(self, T: Any, p: Any) -> Tensor:
        if bool((p["x"] > 0.7).any()):
            raise ValueError("residual: the last expert does not like it")
        return super().residual(T, p)


def diverging(policy: str) -> Callable[[Any], list[Tensor]]:
    def case(mesh: Any) -> list[Tensor]:
        net = Net()
        experts = layer(5, mesh, pde=Fragile(), on_failure=policy)
        try:
            field = experts(net, {"where": 0.8}, {"u0": start})
        except SolveError as error:
            assert "elements 4" in str(error), error
            return [error.solution.status, error.solution.value[:4]]
        mine = [field.value[:4], *(field.terms[n][:4] for n in field.terms)]
        harmless = experts(net, {"where": -5.0}, {"u0": start}).value
        same = (field.value[:4] == harmless[:4]).all().reshape(1)
        if policy == "nan":
            (g,) = torch.autograd.grad(mine[0].sum(), net.a.weight)
            mine += [g, field.value[4].isnan(), *(field.terms[n][4].isnan() for n in field.terms)]
        return [same, field.status, *(t.detach() for t in mine)]

    return case


def one_raises_plainly(mesh: Any) -> list[Tensor]:
    def action() -> int:
        if mesh.get_local_rank() == mesh.size() - 1:
            raise KeyError("Grüße")
        return 1

    together(mesh, action)
    return []


def other_weights(mesh: Any) -> list[Tensor]:
    net = Net()
    if mesh is not None and mesh.get_local_rank() == mesh.size() - 1:
        with torch.no_grad():
            net.b.bias += 0.1
    return refused(mesh, net)


def refused(mesh: Any, basis: Any = None, u0: Any = start, pde: PDE | None = None) -> list[Tensor]:
    layer(5, mesh, pde=pde)(basis or Net(), values={"u0": u0})
    return []


def hidden_tensor(mesh: Any) -> list[Tensor]:
    """A module that keeps the output of another."""
    net = Net()
    bias = torch.ones(12, dtype=F64, requires_grad=True)
    net.a.register_forward_hook(lambda module, inputs, out: out + bias)
    return refused(mesh, net)


def constant_closure(mesh: Any) -> list[Tensor]:
    """A function may hold constants; without gradients anything."""
    net = Net().requires_grad_(False)
    free = report(layer(5, mesh)(lambda x: net(x), values={"u0": start}))
    net = Net()
    with torch.no_grad():
        return free + report(layer(5, mesh)(lambda x: net(x), values={"u0": start}))


def bad_meshes(mesh: Any) -> list[Tensor]:
    said = []
    W = 1 if mesh is None else mesh.size()
    for wrong in (3, init_device_mesh("cpu", (1, W)), mesh):
        try:
            share(W if wrong is not mesh else W - 1, wrong)
        except ValueError as error:
            said.append(str(error))
    raise ValueError(" / ".join(said))


CASES: dict[str, Callable[[Any], list[Tensor]]] = {
    "even": lambda mesh: gradients(4, mesh),
    "odd": lambda mesh: gradients(5, mesh),
    "overlap": lambda mesh: gradients(4, mesh, gate=PartitionOfUnity(overlap=0.25, x=4)),
    "second": second,
    "third": third,
    "transforms": transforms,
    "batched cotangents": batched_cotangents,
    "training": training,
    "batch": batch,
    "grid": grid,
    "exact": exact,
    "unused": unused,
    "mixed": mixed,
    "other mesh": other_mesh,
    "constant closure": constant_closure,
    "diverging, raise": diverging("raise"),
    "diverging, nan": diverging("nan"),
    "diverging, ignore": diverging("ignore"),
}
ERRORS: dict[str, Callable[[Any], list[Tensor]]] = {
    "one raises": lambda mesh: refused(mesh, pde=Raises()),
    "one raises plainly": one_raises_plainly,
    "other weights": other_weights,
    "closure": lambda mesh: refused(mesh, lambda x, net=Net(): net(x)),
    "closure of values": lambda mesh: refused(mesh, u0=lambda points: HEIGHT * start(points)),
    "hidden tensor": hidden_tensor,
    "hidden condition": lambda mesh: refused(mesh, pde=Burgers(conditions=(Initial("u0"), Dirichlet("x", HEIGHT)))),
    "bad meshes": bad_meshes,
}


def place(world: int) -> Any:
    """Nothing, or the mesh of all."""
    return init_device_mesh("cpu", (world,), mesh_dim_names=("expert",)) if world else None
