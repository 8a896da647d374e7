"""Digits as prices: a network that sees what shoppers buy, and never a price, learns to read through their program."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from chapters import Block, Code, Figure, Heading, Settings, Table, Text, chapter
from chapters._plots import BLUE, GREY, INK, ORANGE, axes, save
from difflayers import Solution, Status
from difflayers.conic import (
    BoxCompletion,
    ProgramPoint,
    dual_bound,
    project_polyhedron,
    quadratic_program,
    quadratic_program_ex,
)

OFFERS, NEEDS = 8, 3
HIGHEST = 9.0  # price
SMOOTH = 2.0  # weight of the square in training: with little of it, a basket hardly moves with a price
SHARP = 0.01  # in shops


# --------------------------------------------------------------------------------------------------------------- shops


@dataclass
class Shops:
    """What a shopper finds, and what she buys."""

    images: Tensor  # (shops, OFFERS, 64), handwritten prices
    contents: Tensor  # (shops, NEEDS, OFFERS), how much of what is in an offer
    needs: Tensor  # (shops, NEEDS)
    prices: Tensor  # (shops, OFFERS), which no network sees
    basket: Tensor  # (shops, OFFERS), what part of each offer is bought

    def __getitem__(self, index: Tensor) -> "Shops":
        return Shops(*(t[index] for t in vars(self).values()))


def constraints(contents: Tensor, needs: Tensor) -> tuple[Tensor, Tensor]:
    """``contents @ x >= needs`` and ``0 <= x <= 1`` as ``G x <= h``."""
    eye = torch.eye(OFFERS, dtype=contents.dtype).expand(len(contents), -1, -1)
    none = contents.new_zeros(len(contents), OFFERS)
    return torch.cat([-contents, -eye, eye], -2), torch.cat([-needs, none, none + 1], -1)


def cheapest(prices: Tensor, contents: Tensor, needs: Tensor, square: float) -> Tensor:
    """The layer: ``argmin_x prices @ x + square / 2 |x|^2``, under the constraints, in float64."""
    G, h = constraints(contents, needs)
    return quadratic_program(square * torch.eye(OFFERS, dtype=G.dtype), prices.to(G.dtype), G, h)


def shops(images: Tensor, digits: Tensor, count: int, seed: int) -> Shops:
    """Every shop has eight images for its prices, drawn without replacement until all have been used."""
    g = torch.Generator().manual_seed(seed)
    rounds = -(-count * OFFERS // len(digits))
    drawn = torch.cat([torch.randperm(len(digits), generator=g) for _ in range(rounds)])[: count * OFFERS]
    drawn = drawn.view(count, OFFERS)
    contents = torch.rand(count, NEEDS, OFFERS, generator=g, dtype=torch.float64)
    needs = contents.sum(-1) * (0.25 + 0.5 * torch.rand(count, NEEDS, generator=g, dtype=torch.float64))
    prices = digits[drawn].double()
    return Shops(images[drawn], contents, needs, prices, cheapest(prices, contents, needs, SHARP))


# -------------------------------------------------------------------------------------------------------------- models


class Shopper(nn.Module):
    """Reads prices, and buys."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def read(self, images: Tensor) -> Tensor:
        return HIGHEST * self.reader(images)[..., 0].sigmoid()

    def forward(self, images: Tensor, contents: Tensor, needs: Tensor, square: float = SMOOTH) -> Tensor:
        return cheapest(self.read(images), contents, needs, square)


class Guesser(Shopper):
    """Reads prices as a Shopper, and guesses from all that the program is given; the offers have no order."""

    def __init__(self) -> None:
        super().__init__()
        self.offer = nn.Sequential(nn.Linear(1 + NEEDS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.part = nn.Sequential(nn.Linear(128 + NEEDS, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, images: Tensor, contents: Tensor, needs: Tensor, square: float = SMOOTH) -> Tensor:
        offers = self.offer(torch.cat([self.read(images)[..., None], contents.mT.float()], -1))
        shop = torch.cat([offers.mean(-2), needs.float()], -1)[:, None].expand(-1, OFFERS, -1)
        return self.part(torch.cat([offers, shop], -1))[..., 0].sigmoid().double()


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Run:
    """What one network learnt."""

    model: Shopper
    seconds: float = 0.0
    loss: list[float] = field(default_factory=list)  # mean over an epoch
    medians: list[float] = field(default_factory=list)  # price that is read, by digit
    error: float = 0.0  # of a price that is read, on average
    covered: float = 0.0  # share of baskets that cover every need
    dearer: float = 0.0  # than the cheapest baskets, after what was missing has been added


def digits(tiny: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 8 x 8 digits, a fifth of them for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test = (torch.tensor(a, dtype=torch.float32) for a in split[:2])
    y_train, y_test = (torch.tensor(a) for a in split[2:])
    return (x_train[:200], x_test[:100], y_train[:200], y_test[:100]) if tiny else (x_train, x_test, y_train, y_test)


def train(name: str, model: Shopper, seen: Shops, epochs: int) -> Run:
    """AdamW on the squared distance to the baskets that were bought."""
    run, generator = Run(model), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    start = time.perf_counter()
    for _ in (bar := tqdm(range(epochs), desc=f"{name:<16}", unit="epoch")):
        losses = []
        for index in torch.randperm(len(seen.prices), generator=generator).split(32):
            shop = seen[index]
            loss = (model(shop.images, shop.contents, shop.needs) - shop.basket).square().sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        schedule.step()
        run.loss.append(sum(losses) / len(losses))
        bar.set_postfix(loss=f"{run.loss[-1]:.3f}")
    run.seconds = time.perf_counter() - start
    return run


# ---------------------------------------------------------------------------------------------------------------- test


@torch.no_grad()
def measure(run: Run, test: Shops, images: Tensor, labels: Tensor) -> Tensor:
    """Prices read, needs covered, money spent; returns the prices read."""
    read = run.model.read(images)
    run.medians = [read[labels == k].median().item() for k in range(10)]
    run.error = (read - labels).abs().mean().item()
    bought = run.model(test.images, test.contents, test.needs, SHARP)
    G, h = constraints(test.contents, test.needs)
    over = torch.einsum("bmn,bn->bm", G, bought) - h
    run.covered = (over < 1e-6).all(-1).double().mean().item()
    mended = project_polyhedron(bought, G, h)
    run.dearer = ((test.prices * mended).sum() / (test.prices * test.basket).sum() - 1).item()
    return read


def solve(model: Shopper, test: Shops) -> Solution[ProgramPoint]:
    """As the layer, with multipliers and statuses, and unchecked."""
    G, h = constraints(test.contents, test.needs)
    return quadratic_program_ex(SHARP * torch.eye(OFFERS, dtype=G.dtype), model.read(test.images).to(G.dtype), G, h)


@dataclass
class Receipts:
    """After the till: what each basket cost, the least it could have cost, and a bound on that."""

    cost: Tensor
    best: Tensor
    bound: Tensor


@torch.no_grad()
def certify(model: Shopper, test: Shops) -> Receipts:
    """The multipliers of the needs, found with the prices that were read, bound the cost at the true ones."""
    point = solve(model, test).value
    needs = point.z[:, :NEEDS]
    bound = dual_bound(needs, test.contents, test.needs, test.prices, BoxCompletion(0.0, 1.0)).bound
    return Receipts((test.prices * point.x).sum(-1), (test.prices * test.basket).sum(-1), bound)


@torch.no_grad()
def spoil(model: Shopper, test: Shops, index: int) -> tuple[list[str], bool]:
    """One shop is asked for more than it has: statuses around it, and whether all others get the same basket."""
    needs = test.needs.clone()
    needs[index] = 1.1 * test.contents[index].sum(-1)
    spoilt = solve(model, Shops(**(vars(test) | {"needs": needs})))
    others = torch.arange(len(needs)) != index
    same = torch.equal(spoilt.value.x[others], solve(model, test).value.x[others])
    return [Status(s).name for s in spoilt.status[index - 1 : index + 2].tolist()], same


# ------------------------------------------------------------------------------------------------------------- figures


def draw_read(title: str, read: Tensor, labels: Tensor, colour: str, path: Path) -> Path:
    """Every test digit at the price that is read in it."""
    figure, axis = axes(height=3.0)
    jitter = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) * 0.5 - 0.25
    axis.plot([0, 9], [0, 9], color=GREY, lw=1, zorder=0)
    axis.plot((labels + jitter).tolist(), read.tolist(), ".", ms=3, color=colour, alpha=0.5, mec="none")
    medians = [read[labels == k].median().item() for k in range(10)]
    axis.hlines(medians, [k - 0.38 for k in range(10)], [k + 0.38 for k in range(10)], color=INK, lw=1.8)
    axis.set(title=title, xlabel="digit", ylabel="price read", xticks=range(10), yticks=range(0, 10, 3))
    return save(figure, path)


def draw_shop(model: Shopper, shop: Shops, path: Path) -> Path:
    """The offers, the prices read, and the part of each that is bought."""
    figure, axis = axes(wide=True, height=1.55)
    axis.remove()
    with torch.no_grad():
        read = model.read(shop.images)[0]
        bought = model(shop.images, shop.contents, shop.needs, SHARP)[0]
    for i, panel in enumerate(figure.subplots(2, OFFERS, squeeze=False, gridspec_kw={"height_ratios": [4, 1]}).T):
        panel[0].imshow(shop.images[0, i].view(8, 8).numpy(), cmap="Greys", vmin=0, vmax=1)
        panel[0].set_title(f"{read[i]:.1f}", fontsize=8.5, loc="center", color=BLUE)
        panel[1].barh([0], [1], color="#e8ecf0", height=1)
        panel[1].barh([0], [bought[i].item()], color=BLUE, height=1)
        panel[1].set(xlim=(0, 1), ylim=(-0.5, 0.5))
        for p in panel:
            p.set(xticks=[], yticks=[])
            p.spines[:].set_visible(False)
    return save(figure, path)


def draw_receipts(receipts: Receipts, path: Path) -> Path:
    """How many baskets are dearer than the cheapest one by at most so much: certified, and in truth."""
    figure, axis = axes(wide=True, height=2.4)
    share = 100 * torch.arange(1, len(receipts.cost) + 1) / len(receipts.cost)
    for least, name, colour in (
        (receipts.best, "in truth: solved with the true prices", GREY),
        (receipts.bound, "certified, without solving anything", BLUE),
    ):
        dearer = (receipts.cost - least).clamp_min(0).sort().values
        axis.step([0, *dearer.tolist()], [0, *share.tolist()], where="post", color=colour, lw=1.8, label=name)
    axis.set(title="Share of baskets, %", xlabel="dearer than the cheapest by at most", xlim=(0, 4), ylim=(0, 102))
    axis.legend(loc="lower right")
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------- chapter

SNIPPET = """
class Shopper(nn.Module):
    def forward(self, images, contents, needs):
        prices = self.read(images)
        # between none and all of an offer,
        # and at least what is needed
        G = torch.cat([-eye, eye, -contents], -2)
        h = torch.cat([zeros, ones, -needs], -1)
        # argmin prices @ x + |x|^2, G x <= h
        return quadratic_program(2 * eye, prices, G, h)
"""


@chapter("conic", title="A layer that decides", order=30)
def run(settings: Settings) -> list[Block]:
    """The chapter."""
    x_train, x_test, y_train, y_test = digits(settings.tiny)
    start = time.perf_counter()
    seen = shops(x_train, y_train, 128 if settings.tiny else 2000, seed=0)
    test = shops(x_test, y_test, 32 if settings.tiny else 500, seed=1)
    seconds = time.perf_counter() - start
    epochs = 2 if settings.tiny else 20
    torch.manual_seed(0)
    runs = {"program": train("program", Shopper(), seen, epochs)}
    torch.manual_seed(0)
    runs["guess"] = train("guess", Guesser(), seen, 3 * epochs)
    program, guess = runs.values()
    read = {name: measure(r, test, x_test, y_test) for name, r in runs.items()}
    receipts = certify(program.model, test)
    statuses, same = spoil(program.model, test, len(test.needs) // 2)

    pictures = tuple(
        draw_read(title, read[name], y_test, colour, settings.out / f"{name}.png")
        for name, title, colour in (("program", "Through the program", BLUE), ("guess", "Without it", ORANGE))
    )
    shop = draw_shop(program.model, test[torch.tensor([1])], settings.out / "shop.png")
    curve = draw_receipts(receipts, settings.out / "receipts.png")

    certified = (receipts.cost.sum() / receipts.bound.sum() - 1).item()
    print(
        f"\nbaskets of {len(seen.prices)} + {len(test.prices)} shops in {seconds:.1f} s; then, on {len(test.prices)}:"
    )
    print("                 prices read, by digit" + " " * 27 + "error  needs met   dearer  training")
    for name, r in runs.items():
        medians = "".join(f"{m:4.1f}" for m in r.medians)
        print(f"  {name:<13}{medians}{r.error:10.2f}{r.covered:13.0%}{r.dearer:9.1%}{r.seconds:8.1f} s")
    print(f"certified without solving: at most {certified:.1%} dearer, all baskets together")
    print(f"a shop that is asked for too much: {', '.join(statuses)}; all others unchanged: {same}")
    kept = ("medians", "error", "covered", "dearer", "loss")
    numbers = {name: {key: getattr(r, key) for key in kept} for name, r in runs.items()}
    numbers |= {"certified": certified, "statuses": statuses, "same": same}
    (settings.out / "conic.json").write_text(json.dumps(numbers, indent=2))

    assert program.covered == 1 and same and statuses == ["CONVERGED", "INFEASIBLE", "CONVERGED"], numbers
    assert (receipts.bound <= receipts.best * (1 + 1e-9)).all()
    if not settings.tiny:
        assert program.medians == sorted(program.medians) and program.error < 1 < guess.error, numbers
        assert program.dearer < 0.06 < 0.1 < guess.dearer and guess.covered < 0.5, numbers
    return blocks(runs, receipts, certified, pictures, shop, curve, len(seen.prices))


def blocks(
    runs: dict[str, Run],
    receipts: Receipts,
    certified: float,
    pictures: tuple[Path, ...],
    shop: Path,
    curve: Path,
    count: int,
) -> list[Block]:
    """What the page shows."""
    program, guess = runs.values()
    turned = guess.medians[0] > guess.medians[9]
    close = (receipts.cost - receipts.bound < 0.5).double().mean().item()
    return [
        Text(
            f"A layer can decide. In each of {count} shops there are {OFFERS} offers, whose price is a handwritten "
            f"digit. A shopper needs certain amounts of {NEEDS} things, each offer has some of each, and she buys the "
            "cheapest basket that covers her needs; parts of an offer can be bought too. The network sees the shop and "
            "her basket. It is never told a price. To buy as she does, it has to learn to read."
        ),
        Code(SNIPPET),
        Figure(
            (shop,),
            "A shop that training did not see: offers, the prices that the trained network reads, and the part of each "
            "offer that it buys.",
            "Eight handwritten digits with the prices read above them and bars for the part that is bought below.",
        ),
        Heading("Does it learn to read?"),
        Text(
            "The gradient goes through the basket: through a quadratic program for every shop, on the constraints that "
            "are active there. What is wrong with a basket thus becomes what is wrong with its prices. For comparison, "
            "the same reader is followed by a network that is given all that the program is given, and guesses the "
            "basket in three times as many epochs. It too finds out that some digits are dearer than others, but on a "
            f"scale of its own{', upside down' if turned else ''}: nothing in it is a price. Nor does it keep rules: "
            f"{guess.covered:.0%} of its baskets cover all needs, where the program's always do."
        ),
        Figure(
            pictures,
            "Price read in each test digit; black lines are medians. Neither network was ever told what a digit means.",
            "Two scatter plots of the price read against the digit: along the diagonal with the program, elsewhere "
            "without it.",
        ),
        Table(
            ("network", "error of prices", "needs met", "dearer", "training"),
            [
                (
                    name,
                    f"{r.error:.1f}",
                    f"{r.covered:.0%}",
                    f"{r.dearer:.1%}",
                    f"{r.seconds:.1f} s",
                )
                for name, r in runs.items()
            ],
            "Error of prices: mean distance of what is read from the digit. Needs met: baskets that cover every need. "
            "Dearer: money spent beyond the cheapest baskets, where a basket that falls short is first moved to the "
            "nearest one that does not.",
        ),
        Text(
            "Of prices, both readers know only that they lie between 0 and 9. The program needs that for its scale: at "
            "twice the prices a shopper buys the same."
        ),
        Heading("How good is a basket?"),
        Text(
            "With the basket the program returns multipliers: what the last bit of each need costs. They were computed "
            "with the prices that the network reads. But any multipliers give a lower bound on the cost at any prices. "
            "So once the receipt shows the true prices, one matrix product tells how far a basket can be from the "
            "cheapest, and nothing has to be solved again. All baskets together are certified to be at most "
            f"{certified:.1%} dearer, and are {program.dearer:.1%} dearer in truth. Of {close:.0%} it is certified "
            "that they cost less than 0.5 too much."
        ),
        Figure(
            (curve,),
            "Test baskets by how much dearer they are than the cheapest, in truth and as the bound certifies. The "
            f"cheapest costs {receipts.best.mean():.1f} on average.",
            "Two rising curves; the certified one lies below the true one.",
        ),
        Heading("One impossible shop"),
        Text(
            "One shop of the batch is then asked for more than it has. Its status is INFEASIBLE, that of all others "
            "CONVERGED, and their baskets are the same to the last bit."
        ),
    ]
