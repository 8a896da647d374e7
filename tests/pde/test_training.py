"""The training loop: the oracle is a loop written out by hand, and for runs that were stopped the run that was not."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import difflayers.pde._training as training
from difflayers.pde import Box, PDEConstraint, Poisson, train

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
}
SCHEDULERS = {
    "none": lambda o: None,
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "steps": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 9]),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [4],
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}
STEPS = 12


class Setting:
    """A network with buffers and dropout, whose loss draws from both generators."""

    def __init__(self, optimizer="Adam", scheduler="none", seed=0):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.stop_in, self.error = None, KeyboardInterrupt

    def loss(self, step):
        x = torch.randn(16, 2) + 0.1 * torch.randn(16, 2, generator=self.generator)
        value = (self.net(x) - x.prod(-1, keepdim=True) - step / 10).square().mean()
        if step == self.stop_in:
            raise self.error  # after random numbers and BatchNorm's averages have moved
        return value

    def train(self, steps=STEPS, **options):
        options = {"state": {"net": self.net}, "scheduler": self.scheduler, "generator": self.generator} | options
        return train(self.loss, self.optimizer, steps, progress=False, **options)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Strange:
    """A file with this in it is not loaded again with `weights_only`."""

    def state_dict(self):
        return {"self": self}

    def load_state_dict(self, state):
        pass


# ---------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_loop_is_the_one_everybody_writes(max_norm):
    ours = Setting(scheduler="cosine")
    history = ours.train(max_norm=max_norm)
    by_hand = Setting(scheduler="cosine")
    losses, rates = [], []
    for step in range(STEPS):
        by_hand.optimizer.zero_grad()
        value = by_hand.loss(step)
        value.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(by_hand.net.parameters(), max_norm)
        rates.append(by_hand.optimizer.param_groups[0]["lr"])
        by_hand.optimizer.step()
        by_hand.scheduler.step()
        losses.append(value.item())
    assert history.losses.tolist() == losses and history.learning_rates.tolist() == rates
    assert same(ours.net, by_hand.net)
    assert history.resumed == 0 and history.seconds > 0


def test_lbfgs_sees_the_same_random_numbers_within_a_step():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    own, seen = torch.Generator().manual_seed(1), []

    def loss(step):
        drawn = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64, generator=own)
        seen.append((step, *torch.cat(drawn).tolist()))
        return (x - drawn[0] - drawn[1]).square().sum()

    train(loss, OPTIMIZERS["LBFGS"]([x]), 4, generator=own, progress=False)
    assert len(seen) > 4 and len(set(seen)) == 4


def test_sparse_gradients():
    table = nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    train(lambda step: table(torch.tensor([1, 1, 3])).sum(), optimizer, 1, progress=False)
    torch.testing.assert_close(before - table.weight, 0.5 * torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0]).expand(2, 5).mT)


def test_learning_rate_falls_on_a_plateau():
    x = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    history = train(lambda step: (3, 2, 2, 1)[step] + 0 * x, optimizer, 4, scheduler=scheduler, progress=False)
    assert history.learning_rates.tolist() == [1.0, 1.0, 1.0, 0.5]


def test_progress_bar(capsys, monkeypatch):
    Setting().train(3)
    assert capsys.readouterr().err == ""
    setting = Setting()
    train(setting.loss, setting.optimizer, 3, generator=setting.generator)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    Setting().train(1)


# ----------------------------------------------------------------------------------------------------------- resuming


# SequentialLR of torch 2.6 steps in a way that torch itself has deprecated
@pytest.mark.filterwarnings(r"ignore:The epoch parameter in `scheduler\.step\(\)` was not necessary:UserWarning")
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        *((optimizer, "cosine") for optimizer in OPTIMIZERS),
        *(("Adam", scheduler) for scheduler in SCHEDULERS if scheduler != "cosine"),
    ],
)
def test_stopped_run_ends_as_one_that_was_not(optimizer, scheduler, tmp_path):
    whole = Setting(optimizer, scheduler)
    expected = whole.train()
    after = torch.rand(3), torch.rand(3, generator=whole.generator)
    first = Setting(optimizer, scheduler)
    first.stop_in = 7
    with pytest.raises(KeyboardInterrupt):
        first.train(checkpoint=tmp_path / "deep" / "run.pt", every=3)
    second = Setting(optimizer, scheduler, seed=50)
    second.stop_in, second.error = 10, RuntimeError
    with pytest.raises(RuntimeError):
        second.train(checkpoint=str(tmp_path / "deep" / "run.pt"), every=100)
    third = Setting(optimizer, scheduler, seed=99)
    found = third.train(checkpoint=tmp_path / "deep" / "run.pt")
    assert found.resumed == 10  # nothing was lost, though neither stop was at a multiple of `every`
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.learning_rates, expected.learning_rates)
    assert same(third.net, whole.net)
    assert torch.equal(torch.rand(3), after[0])
    assert torch.equal(torch.rand(3, generator=third.generator), after[1])
    again = Setting(optimizer, scheduler).train(checkpoint=tmp_path / "deep" / "run.pt")
    assert again.resumed == STEPS and torch.equal(again.losses, expected.losses)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["run.pt"]


def test_same_objects_go_on_after_ctrl_c(tmp_path):
    whole = Setting(scheduler="cosine")
    whole.train()
    stopped = Setting(scheduler="cosine")
    stopped.stop_in = 5
    with pytest.raises(KeyboardInterrupt):
        stopped.train(checkpoint=tmp_path / "run.pt")
    stopped.stop_in = None
    assert stopped.train(checkpoint=tmp_path / "run.pt").resumed == 5
    assert same(stopped.net, whole.net)


def test_parameters_resume_without_state(tmp_path):
    def made():
        x = torch.ones(2, requires_grad=True)
        return x, torch.optim.Adam([x], lr=0.1)

    x, optimizer = made()
    train(lambda step: (x - step).square().sum(), optimizer, 8, progress=False)
    y, optimizer = made()
    train(lambda step: (y - step).square().sum(), optimizer, 5, checkpoint=tmp_path / "run", progress=False)
    z, optimizer = made()
    history = train(lambda step: (z - step).square().sum(), optimizer, 8, checkpoint=tmp_path / "run", progress=False)
    assert history.resumed == 5 and len(history.losses) == 8  # a longer run goes on
    assert torch.equal(x, z)


def test_interruption_inside_an_update_leaves_the_last_checkpoint(tmp_path):
    class Stumbling(torch.optim.SGD):
        stumbles = False

        def step(self, closure=None):
            value = super().step(closure)
            if self.stumbles and len(losses) == 8:
                raise KeyboardInterrupt
            return value

    whole = Setting("SGD")
    expected = whole.train()
    for stumbles in (True, False):
        setting, losses = Setting("SGD", seed=0 if stumbles else 7), []
        setting.optimizer.__class__, Stumbling.stumbles = Stumbling, stumbles
        inner = setting.loss

        def loss(step, inner=inner, losses=losses):
            losses.append(step)
            return inner(step)

        setting.loss = loss
        if stumbles:
            with pytest.raises(KeyboardInterrupt):
                setting.train(checkpoint=tmp_path / "run", every=3)
    history = setting.train(checkpoint=tmp_path / "run", every=3)
    assert history.resumed == 6  # the eighth update was under way
    assert torch.equal(history.losses, expected.losses) and same(setting.net, whole.net)


def test_checkpoint_holds_the_network(tmp_path):
    setting = Setting()
    setting.train(checkpoint=tmp_path / "run")
    other = Setting(seed=5)
    other.net.load_state_dict(torch.load(tmp_path / "run", weights_only=True)["state"]["net"])
    assert same(other.net, setting.net)


def test_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    first = Setting()
    first.train(3, checkpoint=tmp_path / "run")
    before = (tmp_path / "run").read_bytes()

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(training.torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        Setting().train(8, checkpoint=tmp_path / "run", every=2)
    assert (tmp_path / "run").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_state_that_could_not_be_read_again_fails_at_once(tmp_path):
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"(?s)state: expected tensors, .*Strange"):
        train(
            lambda step: x.sum(),
            torch.optim.SGD([x], lr=1.0),
            4,
            state={"strange": Strange()},
            checkpoint=tmp_path / "run",
            every=1,
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def test_layer_inside_the_loss(tmp_path):
    def run(steps, **options):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        layer = PDEConstraint(Poisson(domain=Box(x=(0.0, 1.0)), conditions=()), ridge=1e-6).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

        def loss(step):
            return layer(net).terms["u_xx"].add(1).square().mean()

        return train(loss, optimizer, steps, progress=False, **options).losses

    whole = run(6)
    run(3, checkpoint=tmp_path / "run")
    assert torch.equal(run(6, checkpoint=tmp_path / "run"), whole)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_that_are_not_finite_name_the_step(bad, tmp_path):
    setting = Setting()
    kept = []

    def loss(step):
        value = setting.loss(step)
        if step < 5:
            return value
        kept.append(copy.deepcopy(setting.net.state_dict()))
        if bad == "loss":
            return value * torch.inf
        return value + (setting.net[0].weight.flatten()[0] * 0).sqrt()  # 0, with the slope inf * 0

    with pytest.raises(FloatingPointError, match=f"{bad} is.* step 5"):
        train(
            loss,
            setting.optimizer,
            12,
            state={"net": setting.net},
            generator=setting.generator,
            checkpoint=tmp_path / "run",
            every=2,
            progress=False,
        )
    assert all(torch.equal(kept[0][k], v) for k, v in setting.net.state_dict().items() if "running" not in k)
    saved = torch.load(tmp_path / "run", weights_only=True)
    assert saved["losses"].shape == (2, 4) and saved["losses"].isfinite().all()


def _wider(setting):
    setting.net[0] = nn.Linear(2, 8, bias=False)
    setting.optimizer = torch.optim.Adam(setting.net.parameters())


def _double(setting):
    setting.net = setting.net.double()


def _renamed(setting):
    setting.net = nn.ModuleDict({"body": setting.net})


def _other_optimizer(setting):
    setting.optimizer = torch.optim.SGD(setting.net.parameters(), lr=0.1)


def _without_scheduler(setting):
    setting.scheduler = None


def _named(setting):
    setting.optimizer = torch.optim.Adam(setting.net.named_parameters())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_wider, "shapes of parameters"),
        (_double, "dtypes of parameters"),
        (_renamed, r"state\['net'\]"),
        (_other_optimizer, "optimizer SGD, got Adam"),
        (_without_scheduler, "scheduler"),
        (_named, "names of parameters"),
    ],
)
def test_checkpoint_of_another_run_is_refused(change, what, tmp_path):
    Setting(scheduler="cosine").train(2, checkpoint=tmp_path / "run")
    other = Setting(scheduler="cosine")
    change(other)
    before = copy.deepcopy(other.net.state_dict())
    with pytest.raises(ValueError, match=f"checkpoint: expected .*{what}"):
        other.train(4, checkpoint=tmp_path / "run")
    assert all(torch.equal(before[k], v) for k, v in other.net.state_dict().items())


@pytest.mark.parametrize("content", [b"no checkpoint", None])
def test_other_files_are_refused(content, tmp_path):
    if content is None:
        torch.save({"something": 1}, tmp_path / "run")
    else:
        (tmp_path / "run").write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint: expected a file that train wrote"):
        Setting().train(4, checkpoint=tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: expected an integer of at least 0, got -1"),
        ({"every": 0}, "every: expected an integer of at least 1, got 0"),
        ({"max_norm": 0.0}, "max_norm: expected a number above 0, got 0.0"),
        ({"state": {"numbers": [1]}}, r"state\['numbers'\]: expected an object with state_dict, got list"),
        ({"state": nn.Linear(1, 1)}, "state: expected a mapping from names to objects, got Linear"),
        ({"loss": lambda step: 1.0}, "loss: expected a tensor with one entry, got float"),
        ({"loss": lambda step: torch.ones(2)}, r"loss: expected a tensor with one entry, got shape \(2,\)"),
        ({"loss": lambda step: torch.ones(())}, "loss: expected a tensor that depends"),
        ({"loss": lambda step: torch.ones((), requires_grad=True)}, "of the optimizer, got another"),
    ],
)
def test_bad_arguments(arguments, message):
    setting = Setting()
    given = {"loss": setting.loss, "steps": 3} | arguments
    loss, steps = given.pop("loss"), given.pop("steps")
    with pytest.raises(ValueError, match=message):
        train(loss, setting.optimizer, steps, progress=False, **given)


def test_fewer_steps_than_were_done(tmp_path):
    Setting().train(4, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="steps: expected at least the 4 that the checkpoint has done, got 3"):
        Setting().train(3, checkpoint=tmp_path / "run")
    assert Setting().train(0).losses.shape == (0,)
