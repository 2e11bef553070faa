"""The outer loop: steps, clipping, early stopping, non-finite hypergradients, fit, bad input."""

import functools
import math

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import bilevel
from bilevel.constraints import Box, Positive, Simplex
from bilevel.data import Minibatches
from bilevel.errors import UsageError
from bilevel.hypergradient import Implicit, OneStep, Unrolled
from bilevel.linalg import GMRES, ConjugateGradient
from bilevel.problem import Problem
from bilevel.solvers import LBFGS, GradientDescent, NewtonCG, ProximalGradient, SoftThreshold
from bilevel.trainer import Callback, Trainer, fit, run
from bilevel.trainer.checkpoint import load_checkpoint, save_checkpoint
from bilevel.trainer.setup import set_up

pytestmark = pytest.mark.usefixtures("float64")


class Shrink(Problem):
    """Solution `w = target / (1 + penalty)`; best where `w = 1`, so at `penalty = target - 1`."""

    constraints = {"penalty": Positive()}

    def __init__(self, start=5.0, target=3.0, dimension=4):
        self.start, self.target, self.dimension = start, target, dimension

    def init_hparams(self):
        return {"penalty": torch.tensor(self.start)}

    def init_params(self, hparams):
        return {"w": torch.zeros(self.dimension)}

    def inner_loss(self, params, hparams, batch):
        w = params["w"]
        return ((w - self.target).square().sum() + hparams["penalty"] * w.square().sum()) / 2

    def outer_loss(self, params, hparams, batch):
        return (params["w"] - 1).square().sum()


SGD = functools.partial(torch.optim.SGD, lr=1e-1)


class Record(Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.calls, self.natural = [], []

    def on_start(self, run):
        self.calls.append(("start", run.step, run.num_steps))

    def on_step(self, record, hparams):
        self.calls.append(("step", record["step"]))
        self.natural.append(hparams["penalty"].clone())

    def on_end(self, summary):
        self.calls.append(("end", summary["stopped_because"]))


def test_fit_finds_the_known_optimum_and_reports_every_step():
    callback = Record()
    result = fit(Shrink(), num_steps=80, callbacks=[callback])
    assert float(result.hparams["penalty"]) == pytest.approx(2.0, rel=1e-2)
    torch.testing.assert_close(result.params["w"], torch.ones(4), rtol=1e-2, atol=0)
    assert [record["step"] for record in result.history] == list(range(80))
    assert callback.calls[0] == ("start", 0, 80) and callback.calls[-1] == ("end", "all steps were made")
    assert result.summary["best"]["outer_loss"] == min(record["outer_loss"] for record in result.history)
    assert result.history[0]["hparams.penalty"] == pytest.approx(5.0)


def test_a_step_moves_the_logarithm_by_the_chain_rule():
    """With SGD: raw = log penalty moves by lr * penalty * dL/dpenalty, in closed form."""
    callback = Record()
    fit(Shrink(), optimizer=SGD, num_steps=2, callbacks=[callback], solver=NewtonCG(atol=1e-12))
    penalty, target = 5.0, 3.0
    w = target / (1 + penalty)
    slope = 4 * 2 * (w - 1) * (-target / (1 + penalty) ** 2)
    expected = math.exp(math.log(penalty) - 0.1 * penalty * slope)
    assert float(callback.natural[1]) == pytest.approx(expected, rel=1e-10)


def test_coasting_goes_on_along_the_latest_hypergradient_and_solves_nothing():
    halving = functools.partial(schedulers.ExponentialLR, gamma=0.5)
    setup, state = set_up(Shrink(), LBFGS(), Implicit(linear_solver=ConjugateGradient()), SGD, halving)
    Trainer().step(setup, state)
    (gradient,), work, params = state.gradient.values(), dict(state.work), state.params
    expected = setup.natural(state.raw)["penalty"].log()
    for rate in (0.05, 0.025, 0.0125):
        expected = expected - rate * expected.exp() * gradient
    Trainer().coast(setup, state, 3)
    torch.testing.assert_close(setup.natural(state.raw)["penalty"], expected.exp(), rtol=1e-12, atol=0)
    assert (state.step, state.outer.learning_rate) == (4, 0.1 * 0.5**4)
    assert state.work == work and state.params is params


def test_clipping_bounds_the_step_in_raw_coordinates():
    callback = Record()
    trainer = Trainer(num_steps=2, clip_norm=0.01)
    fit(Shrink(), optimizer=functools.partial(torch.optim.SGD, lr=1.0), trainer=trainer, callbacks=[callback])
    moved = callback.natural[1].log() - callback.natural[0].log()
    assert float(moved.abs()) == pytest.approx(0.01, rel=1e-4)


def test_schedulers_change_the_learning_rate():
    half = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    result = fit(Shrink(), optimizer=SGD, scheduler=half, num_steps=4)
    assert [record["learning_rate"] for record in result.history] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_early_stopping_counts_steps_without_improvement():
    trainer = Trainer(num_steps=500, patience=4)
    result = fit(Shrink(), optimizer=functools.partial(torch.optim.Adam, lr=0.5), trainer=trainer)
    assert result.summary["stopped_because"] == "no better outer loss in 4 steps"
    assert result.history[-1]["step"] - result.summary["best"]["step"] == 4


def test_warm_starts_save_inner_work():
    cold = fit(
        Shrink(), hypergradient=Implicit(warm_start=False), solver=GradientDescent(learning_rate=0.05), num_steps=10
    )
    warm = fit(
        Shrink(), hypergradient=Implicit(warm_start=True), solver=GradientDescent(learning_rate=0.05), num_steps=10
    )
    assert warm.summary["work"]["inner_steps"] < 0.9 * cold.summary["work"]["inner_steps"]
    assert float(warm.hparams["penalty"]) == pytest.approx(float(cold.hparams["penalty"]), rel=1e-4)


class Broken(Shrink):
    """The outer loss is NaN in the steps named."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad
        self.outer_batches = lambda step, _: torch.tensor(float("nan") if step in bad else 0.0)

    def outer_loss(self, params, hparams, batch):
        return (params["w"] - 1).square().sum() + batch * params["w"].sum()


def test_a_non_finite_hypergradient_is_never_applied_and_poisons_nothing():
    callback = Record()
    result = fit(Broken(bad={2, 3, 5}), num_steps=8, optimizer=SGD, callbacks=[callback])
    assert [record["skipped"] for record in result.history] == [step in {2, 3, 5} for step in range(8)]
    assert all(float(value) == value and math.isfinite(float(value)) for value in callback.natural)
    assert callback.natural[3] == callback.natural[2] and callback.natural[4] == callback.natural[2]
    assert callback.natural[5] != callback.natural[4]
    assert math.isfinite(result.summary["best"]["outer_loss"])


def test_three_non_finite_hypergradients_in_a_row_stop_the_run_with_the_reason():
    result = fit(Broken(bad={2, 3, 5, 6, 7, 8}), num_steps=20)
    assert result.summary["stopped_because"] == "3 non-finite hypergradients in a row; none was applied"
    assert result.history[-1]["step"] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diverging_inner_solve_is_never_applied_and_stops_the_run_with_the_remedy(dtype):
    problem = Shrink().to(dtype=dtype)
    result = fit(problem, num_steps=20, solver=GradientDescent(learning_rate=30.0))
    assert result.summary["stopped_because"] == (
        "3 non-finite hypergradients in a row; none was applied (the inner solve: the gradient norm grew ten-billionfold: "
        "lower the learning rate, or use LBFGS or NewtonCG)"
    )
    assert not result.summary["best"] and all(record["skipped"] for record in result.history)


class Weighted(Problem):
    """A mixture of two losses with weights on the simplex and a temperature in a box."""

    constraints = {"mix": Simplex(), "scale": Box(0.5, 2.0)}

    def init_hparams(self):
        return {
            "mix": torch.tensor([0.2, 0.5, 0.3]),
            "scale": {"first": torch.tensor(1.0), "second": torch.tensor(1.5)},
        }

    def init_params(self, hparams):
        return {"w": torch.zeros(3)}

    def inner_loss(self, params, hparams, batch):
        targets = torch.eye(3)
        errors = (params["w"] - targets).square().sum(-1)
        return (hparams["mix"] * errors).sum() + 0.1 * hparams["scale.first"] * params["w"].square().sum()

    def outer_loss(self, params, hparams, batch):
        return (params["w"] - torch.tensor([0.6, 0.1, 0.2])).square().sum() + 0.01 * hparams["scale.second"] ** 2


def test_typed_hyperparameters_stay_in_their_sets_under_dotted_names():
    result = fit(Weighted(), num_steps=60)
    assert set(result.hparams) == {"mix", "scale.first", "scale.second"}
    assert float(result.hparams["mix"].sum()) == pytest.approx(1.0) and float(result.hparams["mix"].min()) > 0
    for name in ("scale.first", "scale.second"):
        assert 0.5 < float(result.hparams[name]) < 2.0
    assert result.history[-1]["outer_loss"] < 0.3 * result.history[0]["outer_loss"]


class Noisy(Shrink):
    """The target is known from minibatches only."""

    def __init__(self):
        super().__init__()
        self.noise = torch.randn(200, generator=torch.Generator().manual_seed(0))
        self.noise -= self.noise.mean()
        self.inner_batches = Minibatches(200, 50, seed=1)

    def inner_loss(self, params, hparams, batch):
        target = self.target + self.noise[batch].mean()
        w = params["w"]
        return ((w - target).square().sum() + hparams["penalty"] * w.square().sum()) / 2


@pytest.mark.parametrize("method", [Implicit(), Implicit.auto()], ids=["implicit", "implicit_auto"])
def test_with_minibatches_there_is_no_error_estimate_and_no_step_is_shrunk(method):
    solver = GradientDescent(learning_rate=0.1, max_steps=60, atol=0.0)
    result = fit(Noisy(), solver=solver, hypergradient=method, num_steps=6)
    for record in result.history:
        assert math.isnan(record["hypergradient_error"]) and math.isnan(record["receipt.error_estimate"])
        assert not record["shrunk"] and record["receipt.biased"]
        assert record["receipt.estimate_mv"] == 0
    moved = abs(float(result.history[-1]["hparams.penalty"]) / float(result.history[0]["hparams.penalty"]) - 1)
    assert moved > 0.05


def test_minibatches_reach_the_neighbourhood_of_the_optimum():
    solver = GradientDescent(learning_rate=0.1, max_steps=60, atol=0.0)
    result = fit(Noisy(), solver=solver, num_steps=80)
    assert float(result.history[-1]["hparams.penalty"]) == pytest.approx(2.0, rel=0.25)
    with pytest.raises(UsageError, match="LBFGS needs the full batch.*minibatches"):
        fit(Noisy(), solver=LBFGS())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_hparams": lambda self: {}}, "returned no hyperparameter"),
        ({"init_hparams": lambda self: {"penalty": torch.tensor(1)}}, "floating-point, but is torch.int64"),
        ({"init_hparams": lambda self: {"penalty": 1.0}}, "'penalty' was expected to be a tensor, but is a float"),
        ({"init_hparams": lambda self: {"penalty": torch.tensor(-1.0)}}, "'penalty' was expected to be above 0"),
        ({"init_hparams": lambda self: {"penalti": torch.tensor(1.0)}}, r"constraints name 'penalty'.*\['penalti'\]"),
        ({"init_hparams": lambda self: {"a": torch.ones(()), "a.b": torch.ones(()), "penalty": torch.ones(())}}, "'a' is a tensor and also"),
        ({"inner_loss": lambda self, p, h, b: h["penalty"] * p["w"] ** 2}, r"inner_loss was expected to return a scalar.*\(4,\)"),
        ({"inner_loss": lambda self, p, h, b: (p["w"].sum() * h["penalty"]) / 0.0}, "inner_loss is nan at the starting point"),
        ({"outer_loss": lambda self, p, h, b: p["w"]}, "outer_loss was expected to return a scalar"),
        ({"outer_loss": lambda self, p, h, b: torch.tensor(1.0)}, "'penalty' is used nowhere on the way to the outer loss"),
        ({"inner_loss": lambda self, p, h, b: p["w"].detach().sum() * h["penalty"]}, "inner_loss was expected to depend on params"),
        ({"metrics": lambda self, p, h: {"w": p["w"]}}, "metrics was expected to return numbers, but 'w' is a Tensor"),
    ],
)  # fmt: skip
def test_bad_problems_get_one_sentence(change, message):
    problem = type("Changed", (Shrink,), change)()
    with pytest.raises(UsageError, match=message) as caught:
        fit(problem, num_steps=1)
    assert "\n" not in str(caught.value)


def test_a_failed_linear_solve_is_not_taken_for_a_disconnected_hyperparameter():
    class Flat(Shrink):
        def inner_loss(self, params, hparams, batch):
            return hparams["penalty"] * params["w"].sum()

    result = fit(Flat(), solver=GradientDescent(max_steps=1), num_steps=2)
    assert result.history[0]["receipt.linear_result"] == "singular"
    assert result.history[0]["hypergradient_norm"] == 0.0


def test_a_disconnected_hyperparameter_is_named_before_anything_is_written(tmp_path):
    class Disconnected(Shrink):
        def init_hparams(self):
            return {"penalty": torch.tensor(5.0), "rate": torch.tensor(0.1)}

    directory = tmp_path / "run"
    with pytest.raises(UsageError, match="'rate' gets no hypergradient from Implicit.*unrolled"):
        run(Disconnected(), GradientDescent(learning_rate="rate"), Implicit(), SGD, Trainer(), directory)
    assert not directory.exists()
    learned = fit(
        Disconnected(),
        solver=GradientDescent(learning_rate="rate", max_steps=5, atol=0.0),
        hypergradient=Unrolled(),
        num_steps=1,
    )
    assert "hparams.rate" in learned.history[0]


@pytest.mark.parametrize("name", ["num_steps", "checkpoint_every", "keep_checkpoints", "patience", "clip_norm"])
def test_trainer_refuses_numbers_that_make_no_sense(name):
    with pytest.raises(UsageError, match=f"trainer.{name} must be"):
        Trainer(**{name: 0})


@pytest.mark.parametrize(
    "method", [Implicit(linear_solver=GMRES()), OneStep(), Unrolled()], ids=lambda m: type(m).__name__
)
def test_a_hypergradient_that_is_rightly_zero_is_told_and_no_reason_to_stop(method):
    """A lasso whose solution is zero does not react to its penalty, and a run may begin there."""

    class Lasso(Shrink):
        def init_hparams(self):
            return {"penalty": torch.tensor(20.0)}

        def inner_loss(self, params, hparams, batch):
            return (params["w"] - self.target).square().sum() / 2

    solver = ProximalGradient(proximal=SoftThreshold("penalty"), learning_rate=0.5)
    with pytest.warns(
        UserWarning, match="whole hypergradient of 'penalty' is exactly zero.*does not move it yet.*a lasso"
    ):
        result = fit(Lasso(), solver=solver, hypergradient=method, num_steps=2)
    assert result.summary["num_steps"] == 2 and not result.params["w"].any()
    assert float(result.hparams["penalty"]) == pytest.approx(20.0)


def test_a_trainer_and_a_number_of_steps_contradict_each_other():
    with pytest.raises(UsageError, match=r"both trainer \(with num_steps=50\) and num_steps=7: give"):
        fit(Shrink(), trainer=Trainer(), num_steps=7)


def names_of(module, base):
    found = (getattr(module, name) for name in dir(module))
    classes = {one.__name__ for one in found if isinstance(one, type) and issubclass(one, base)}
    return sorted(name for name in classes - {base.__name__} if not name.startswith("_"))


OPTIMIZERS = names_of(torch.optim, torch.optim.Optimizer)
RATES = {"Adadelta": 50.0, "Adafactor": 0.1, "ASGD": 0.02, "LBFGS": 0.5, "SGD": 0.02}  # the others take 0.05
REFUSED = {"SparseAdam": "SparseAdam .*dense gradients", "Muon": "outer optimizer cannot be made: Muon .*2D"}


def optimizer_factory(name):
    return functools.partial(getattr(torch.optim, name), lr=RATES.get(name, 0.05))


SCHEDULERS = {
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler([schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 2)]),
    "ConstantLR": functools.partial(schedulers.ConstantLR, factor=0.5, total_iters=3),
    "CosineAnnealingLR": functools.partial(schedulers.CosineAnnealingLR, T_max=8),
    "CosineAnnealingWarmRestarts": functools.partial(schedulers.CosineAnnealingWarmRestarts, T_0=3),
    "CyclicLR": functools.partial(schedulers.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    "ExponentialLR": functools.partial(schedulers.ExponentialLR, gamma=0.8),
    "LambdaLR": functools.partial(schedulers.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "LinearLR": functools.partial(schedulers.LinearLR, total_iters=6),
    "MultiStepLR": functools.partial(schedulers.MultiStepLR, milestones=[2, 5]),
    "MultiplicativeLR": functools.partial(schedulers.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "OneCycleLR": functools.partial(schedulers.OneCycleLR, max_lr=0.1, total_steps=9),
    "PolynomialLR": functools.partial(schedulers.PolynomialLR, total_iters=6),
    "ReduceLROnPlateau": functools.partial(schedulers.ReduceLROnPlateau, patience=0, threshold=0.5, factor=0.5),
    "SequentialLR": lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o), schedulers.StepLR(o, 2)], [3]),
    "StepLR": functools.partial(schedulers.StepLR, step_size=3),
}  # fmt: skip


def make_all_steps(factory, scheduler, folder):
    """The records of eight steps at once; that half of them, a checkpoint and the other half are bitwise the same."""
    method = Implicit(linear_solver=ConjugateGradient(rtol=1e-8), warm_start_linear=True)
    trainer = Trainer(num_steps=8)

    def fresh():
        return set_up(Shrink(), GradientDescent(learning_rate=0.05, max_steps=20), method, factory, scheduler)

    setup, whole = fresh()
    history = list(trainer.steps(setup, whole))
    setup, half = fresh()
    steps = trainer.steps(setup, half)
    for _ in range(4):
        next(steps)
    save_checkpoint(folder, half.step, half.save())
    setup, rest = fresh()
    rest.load(load_checkpoint(folder)[0])
    again = list(trainer.steps(setup, rest))
    assert rest.step == whole.step == 8
    assert torch.equal(rest.raw["penalty"], whole.raw["penalty"]) and torch.equal(rest.params, whole.params)
    assert [record["learning_rate"] for record in again] == [record["learning_rate"] for record in history[4:]]
    return history


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in REFUSED])
def test_any_torch_optimiser_lowers_the_loss_and_its_state_survives_a_checkpoint(optimizer, tmp_path):
    losses = [record["outer_loss"] for record in make_all_steps(optimizer_factory(optimizer), None, tmp_path)]
    assert losses[-1] < 0.9 * losses[0] and losses[1] < losses[0]


@pytest.mark.parametrize("scheduler", names_of(schedulers, schedulers.LRScheduler))
def test_any_torch_scheduler_changes_the_rate_and_survives_a_checkpoint(scheduler, tmp_path):
    history = make_all_steps(optimizer_factory("Adam"), SCHEDULERS[scheduler], tmp_path)
    assert len({record["learning_rate"] for record in history}) > 1


def test_a_plateau_is_judged_by_the_outer_loss():
    calm = functools.partial(schedulers.ReduceLROnPlateau, patience=1, threshold=0.0, factor=0.5)
    rates = [record["learning_rate"] for record in fit(Shrink(), optimizer=SGD, scheduler=calm, num_steps=6).history]
    assert rates == [0.1] * 6  # the loss falls
    strict = functools.partial(schedulers.ReduceLROnPlateau, patience=1, threshold=0.9, factor=0.5)
    rates = [record["learning_rate"] for record in fit(Shrink(), optimizer=SGD, scheduler=strict, num_steps=6).history]
    assert rates == [0.1, 0.1, 0.1, 0.05, 0.05, 0.025]


def test_lbfgs_makes_one_quasi_newton_step_an_outer_step_whatever_its_max_iter():
    histories = [
        fit(Shrink(), optimizer=functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=n), num_steps=12).history
        for n in (1, 20)
    ]
    one, twenty = ([record["hparams.penalty"] for record in history] for history in histories)
    assert one == twenty and one[-1] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        *((optimizer_factory(name), None, message) for name, message in REFUSED.items()),
        (functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"), None, "LBFGS was asked to search along a line"),
        (functools.partial(torch.optim.SGD, lr=-1.0), None, "outer optimizer cannot be made: Invalid learning rate: -1"),
        (functools.partial(torch.optim.SGD, lr=0.1, differentiable=True), None, "SGD cannot step on the raw hyper"),
        (SGD, functools.partial(schedulers.StepLR, steps=3), "outer scheduler cannot be made: .*'steps'"),
        (SGD, lambda optimizer: type("Odd", (), {"step": lambda self, loss: None})(), "Odd cannot step .*missing 1 required"),
    ],
)  # fmt: skip
def test_optimisers_and_schedulers_that_cannot_serve_are_refused_by_name(optimizer, scheduler, message):
    with pytest.raises(UsageError, match=message) as caught:
        fit(Shrink(), optimizer=optimizer, scheduler=scheduler, num_steps=1)
    assert "\n" not in str(caught.value)


def test_the_public_names_are_there_and_lazy():
    for name in bilevel.__all__:
        assert getattr(bilevel, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bilevel.nonsense  # noqa: B018 - the access is the test


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"problem": Shrink},
            r"problem was expected to be an instance of your Problem, but is the class .*: write Shrink\(\)",
        ),
        (
            {"hypergradient": "implicit_cg"},
            r"hypergradient was expected to be a method such as Implicit\(.*'implicit_cg'",
        ),
        ({"hypergradient": Implicit}, r"write Implicit\(\)"),
        ({"solver": "lbfgs"}, r"solver was expected to be an inner solver such as LBFGS\(\), but is 'lbfgs'"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)},
            r"makes one .* an object of SGD: write functools.partial",
        ),
        ({"callbacks": [print]}, "a callback needs on_start, on_step and on_end, .* derive it from bilevel.Callback"),
    ],
    ids=["problem", "name", "class", "solver", "optimizer", "callback"],
)
def test_things_of_the_wrong_kind_are_named(given, message):
    with pytest.raises(UsageError, match=message):
        fit(**{"problem": Shrink(), "num_steps": 1, **given})


def test_a_constraint_that_is_none_is_named():
    problem = Shrink()
    problem.constraints = {"penalty": Positive}
    with pytest.raises(UsageError, match=r"constraint of 'penalty' .* Positive\(\), but is .*: write Positive\(\)"):
        fit(problem, num_steps=1)


class Free(Shrink):
    """An unconstrained hyperparameter, whose raw and natural values are the same number."""

    constraints = {}

    def init_hparams(self):
        return {"t": torch.tensor(0.3, dtype=torch.float64)}

    def init_params(self, hparams):
        return {"w": torch.zeros(1, dtype=torch.float64)}

    def inner_loss(self, params, hparams, batch):
        return (params["w"] - hparams["t"]).square().sum()

    def outer_loss(self, params, hparams, batch):
        return params["w"].square().sum()


def test_unconstrained_hyperparameters_are_no_views_of_what_the_optimizer_moves():
    """With a learning rate that overshoots, the best step is the first: what was seen there must stay as it was."""
    seen = []

    class Keep(Callback):
        def on_step(self, record, hparams):
            seen.append(hparams["t"])

    overshooting = functools.partial(torch.optim.SGD, lr=1.05)
    result = fit(Free(), num_steps=4, optimizer=overshooting, callbacks=[Keep()])
    assert result.summary["best"]["step"] == 0
    assert float(result.hparams["t"]) == pytest.approx(0.3) == float(result.params["w"])
    assert [float(value) for value in seen] == pytest.approx([r["hparams.t"] for r in result.history])
    assert not result.hparams["t"].requires_grad


def test_the_best_hyperparameters_survive_a_resume(tmp_path):
    from safetensors.torch import load_file

    def go(directory, num_steps, **how):
        optimizer = functools.partial(torch.optim.SGD, lr=1.05)
        run(Free(), LBFGS(), Implicit(), optimizer, Trainer(num_steps=num_steps, checkpoint_every=1), directory, **how)
        return load_file(directory / "hparams.safetensors"), load_file(directory / "hparams_last.safetensors")

    for name in "ab":
        (tmp_path / name).mkdir()
    whole = go(tmp_path / "a", 6)
    go(tmp_path / "b", 2)
    resumed = go(tmp_path / "b", 6, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one["t"], other["t"])
    assert float(whole[0]["t"]) == pytest.approx(0.3) and float(whole[1]["t"]) != float(whole[0]["t"])


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": math.nan}, {"min_improvement": math.nan}, {"patience": 1.5}, {"num_steps": 2.5}],
    ids=str,
)
def test_settings_that_are_no_numbers_of_the_right_kind_are_refused(options):
    with pytest.raises(UsageError, match=rf"trainer\.{next(iter(options))} must be"):
        Trainer(**options)


def test_a_simplex_start_may_come_from_float32():
    from bilevel.constraints import Bijections

    start = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float32).double()
    raw = Bijections.of({"mix": Simplex()}, ["mix"]).to_raw({"mix": start})["mix"]
    torch.testing.assert_close(Simplex().to_natural(raw), start, rtol=1e-6, atol=0)
    with pytest.raises(UsageError, match="'mix' was expected to be positive with sum 1 .*is a single number"):
        Simplex().to_raw(torch.tensor(1.0), "mix")


class Overfitting(Shrink):
    """Its outer loss falls for long; what it leaves out wants a penalty of about 3, on the way."""

    def metrics(self, params, hparams):
        return {"holdout_loss": float((hparams["penalty"] - 3.0).square()), "test_loss": 7.0}


def test_steps_compare_by_the_metric_that_is_monitored():
    trainer = Trainer(num_steps=200, monitor="holdout_loss", patience=3)
    result = fit(Overfitting(), optimizer=functools.partial(torch.optim.Adam, lr=0.1), trainer=trainer)
    figures = [record["metrics.holdout_loss"] for record in result.history]
    least = min(range(len(figures)), key=figures.__getitem__)
    assert 0 < least < len(figures) - 1 and result.history[-1]["outer_loss"] < result.history[least]["outer_loss"]
    assert result.summary["best"]["step"] == least and result.summary["monitor"] == "holdout_loss"
    assert float(result.hparams["penalty"]) == pytest.approx(result.history[least]["hparams.penalty"])
    assert result.summary["stopped_because"] == "no better holdout_loss in 3 steps"
    assert result.history[-1]["step"] == least + 3


def test_a_metric_that_the_problem_has_not_cannot_be_monitored():
    with pytest.raises(
        UsageError, match=r"trainer.monitor was expected to be one of .* holdout_loss, test_loss, but is"
    ):
        fit(Overfitting(), trainer=Trainer(num_steps=2, monitor="holdout"))


def test_metrics_are_evaluated_as_often_as_asked_for_and_in_the_last_step():
    trainer = Trainer(num_steps=8, metrics_every=3, monitor="holdout_loss")
    result = fit(Overfitting(), optimizer=functools.partial(torch.optim.Adam, lr=0.1), trainer=trainer)
    assert [r["step"] for r in result.history if "metrics.holdout_loss" in r] == [0, 3, 6, 7]
    figures = {r["step"]: r["metrics.holdout_loss"] for r in result.history if "metrics.holdout_loss" in r}
    assert result.summary["best"]["step"] == min(figures, key=figures.get)
