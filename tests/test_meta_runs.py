"""Few-shot runs: mistakes are told, tests are on fixed tasks, and what was cut short goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from few_shot import ADAM, EXACT, OneTask, Quadratics, characters, conv, images, start_of

from bilevel import hypergradient_at
from bilevel.cli.job import minimised
from bilevel.data import ClassEpisodes, Sinusoid
from bilevel.errors import UsageError
from bilevel.hypergradient import Implicit, Unrolled
from bilevel.hypergradient.negative_curvature import Truncate
from bilevel.linalg import ConjugateGradient
from bilevel.meta import (
    Classification,
    FewShot,
    FewShotEvaluation,
    FirstOrder,
    HeadFewShot,
    LearnedRateFewShot,
    ProximalFewShot,
    Regression,
    RidgeFewShot,
    evaluate,
)
from bilevel.models import MLP, ModuleNetwork
from bilevel.solvers import LBFGS, GradientDescent, NewtonCG
from bilevel.trainer import Callback, Trainer, fit, run
from bilevel.trainer.setup import set_up

pytestmark = pytest.mark.usefixtures("float64")

MISTAKES = [
    (lambda: FewShot(characters(way=2), conv(3)), r"tasks have 2 classes \(data.way\), but the network has 3 outputs"),
    (lambda: FewShot(conv(), conv()), "FewShot.tasks was expected to be a TaskSource"),
    (lambda: FewShot(characters(), characters()), "FewShot.network was expected to be a Network"),
    (
        lambda: FewShot(characters(), conv(), tasks_at_once=0),
        "tasks_at_once was expected to be an integer of at least 1",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strength=0.0),
        "strength of the proximal term was expected to be above 0",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths={"head": "much"}),
        "strength of the proximal term was expected to be above 0 and finite, but is 'much'",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strength=math.inf),
        "strength of the proximal term was expected to be above 0 and finite, but is inf",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths={"haed": 1.0}),
        "'haed' in strengths fits none of the tensors conv0.weight",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths={"head": 1.0}, learned="shared"),
        r"learned strength 'strength' were expected to start with the same, but have \[1.0, 2.0\].*problem.strengths=null",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths={"head": 1.0, "head.bias": 2.0}),
        r"'head.bias' in strengths decides about no tensor, since patterns before it .* put it first",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), strengths=0.5),
        r"strengths was expected to be a dictionary such as \{head: 0.5\}, but is 0.5",
    ),
    (
        lambda: ProximalFewShot(characters(), conv(), learned="per_feature"),
        "problem.learned was expected to be null, shared, .* but is 'per_feature'",
    ),
    (
        lambda: RidgeFewShot(characters(), conv(), penalty=-1.0),
        "RidgeFewShot needs penalty > 0, a number, but got -1.0",
    ),
    (lambda: RidgeFewShot(characters(), conv(), scale="x"), "RidgeFewShot needs scale > 0, a number, but got 'x'"),
    (
        lambda: HeadFewShot(characters(), ModuleNetwork(torch.nn.Linear(2, 3))),
        "HeadFewShot needs a network of features and a head",
    ),
    (
        lambda: FewShot(characters(), ModuleNetwork(torch.nn.Linear(2, 3)), zero_head=True),
        "FewShot with zero_head needs a network of features and a head .* or leave zero_head out",
    ),
    (lambda: LearnedRateFewShot(characters(), conv(), rate="x"), "rate, where all .* to be a number, but is 'x'"),
    (lambda: LearnedRateFewShot(characters(), conv(), rate=math.nan), "expected to be a number, but is nan"),
    (lambda: FewShotEvaluation(num_tasks=0), "FewShotEvaluation needs num_tasks >= 1"),
    (
        lambda: evaluate(FewShot(characters(), conv(), num_tasks=2), SOLVER, num_tasks=0),
        r"evaluate needs num_tasks of at least 1 and steps of at least 0, but got 0 and \[\]",
    ),
    (
        lambda: evaluate(FewShot(characters(), conv(), num_tasks=2), SOLVER, steps=[1, -1]),
        r"steps of at least 0, but got 1000 and \[1, -1\]",
    ),
    (
        lambda: evaluate(FewShot(characters(), conv(), num_tasks=2), SOLVER, {"start": torch.ones(2)}),
        r"hparams were expected to be \['init.conv0.bias', .*, but are \['start'\]",
    ),
]


@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake, sentence):
    with pytest.raises(UsageError, match=sentence):
        mistake()


def test_a_starting_point_is_out_of_reach_of_the_theorem_without_an_anchor():
    with pytest.raises(UsageError, match=r"'init\..*only enters the starting point"):
        hypergradient_at(FewShot(characters(), conv(), num_tasks=2).to(dtype=torch.float64), method=EXACT)


def sinusoids():
    torch.set_default_dtype(torch.float64)
    return FewShot(Sinusoid(), MLP(hidden=(8,)), Regression(), num_tasks=4).to(dtype=torch.float64)


SOLVER = GradientDescent(max_steps=2, atol=0.0, learning_rate=0.01)


def test_a_run_in_pieces_is_the_run_in_one(tmp_path):
    def trained(folder, *lengths):
        for number, length in enumerate(lengths):
            trainer = Trainer(num_steps=length, checkpoint_every=2)
            run(sinusoids(), SOLVER, Unrolled(), ADAM, trainer, tmp_path / folder, resume=number > 0)
        return (tmp_path / folder / "hparams_last.safetensors").read_bytes()

    assert trained("one", 7) == trained("pieces", 3, 5, 7)
    assert trained("other", 6) != trained("one", 7)


def test_evaluation_is_on_fixed_tasks_however_many_at_a_time():
    setup, state = set_up(sinusoids(), SOLVER, Unrolled(), ADAM, None)
    hparams = setup.natural(state.raw)
    found = evaluate(setup.problem, setup.solver, hparams, num_tasks=10, seed=3, steps=(1, 7))
    again = evaluate(setup.problem.with_tasks(3), setup.solver, hparams, num_tasks=10, seed=3, steps=(1,))
    other = evaluate(setup.problem, setup.solver, hparams, num_tasks=10, seed=4, steps=(1,))
    assert found.steps == (0, 1, 2, 7) and found.scores.shape == (4, 10) and found.num_steps == 2
    assert torch.equal(found.each, found.scores[2]) and found.num_diverged == 0
    torch.testing.assert_close(found.scores[:3], again.scores, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found.scores[:3], other.scores)
    params, hand = {name.removeprefix("init."): value for name, value in hparams.items()}, []
    for number in range(10):
        episode = setup.problem.problem.tasks.draw("test", 1, 3, number)
        outputs = setup.problem.problem.network(params, episode.query.inputs[0])
        hand.append((outputs - episode.query.targets[0]).square().mean())
    torch.testing.assert_close(found.scores[0], torch.stack(hand).detach(), rtol=1e-12, atol=1e-12)


class Keep(Callback):
    """Records as those behind it in the list of callbacks see them."""

    def on_start(self, run):
        self.records = []

    def on_step(self, record, hparams):
        self.records.append(dict(record))


def test_evaluation_is_by_the_compiled_program_of_an_outer_step_and_makes_no_other(caplog):
    """Five tasks, two at a time: the last one is eager."""
    problem = FewShot(Sinusoid(), MLP(hidden=(6,)), Regression(), num_tasks=2).to(dtype=torch.float64)
    compiling = replace(SOLVER, compile=True)
    setup, _ = set_up(problem, compiling, FirstOrder(), ADAM, None)
    with caplog.at_level("INFO", logger="bilevel"):
        eager, compiled = (
            evaluate(setup.problem, solver, start_of(problem), num_tasks=5, steps=(1, 4))
            for solver in (SOLVER, compiling)
        )
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "the gradients of inner steps are being compiled"
    ]
    assert len(setup.problem.compiled("the gradients of inner steps are").programs) == 1
    torch.testing.assert_close(compiled.scores, eager.scores)


def test_the_callback_records_validation_and_leaves_tables_and_pictures(tmp_path):
    from safetensors.torch import load_file

    evaluation = FewShotEvaluation(num_tasks=6, every=2, num_validation_tasks=5, steps=(1, 5), num_pictures=2)
    keep, trainer = Keep(), Trainer(num_steps=4)
    run(sinusoids(), SOLVER, Unrolled(), ADAM, trainer, tmp_path, callbacks=[evaluation, keep])
    assert ["metrics.validation_mse" in record for record in keep.records] == [False, True, False, True]
    assert not any("metrics.validation_diverged" in record for record in keep.records)
    summary = json.loads((tmp_path / "summary.json").read_text())
    left = load_file(tmp_path / "hparams_last.safetensors")  # after the last update, which no record has seen
    validated = evaluate(sinusoids(), SOLVER, left, part="validation", num_tasks=5)
    assert summary["validation"]["mean"] == validated.final.value != keep.records[-1]["metrics.validation_mse"]
    assert (
        minimised(summary) == summary["validation"]["mean"]
    )  # what a sweep goes by: not a loss of other tasks each step
    figures = summary["evaluation"]
    assert figures["inner_steps"] == [0, 1, 2, 5] and len(figures["each"]) == figures["num_tasks"] == 6
    assert figures["num_steps"] == 2 and figures["mean"][2] == pytest.approx(sum(figures["each"]) / 6)
    assert [row[0] for row in summary["baseline"]["rows"]][1:] == [f"after {n} inner steps" for n in (0, 1, 2, 5)]
    tensors = load_file(tmp_path / "episodes.safetensors")
    assert tensors["outputs.after"].shape == tensors["query.targets"].shape == (2, 50, 1)


def test_a_task_that_diverges_takes_no_other_with_it():
    wild = GradientDescent(max_steps=60, atol=0.0, learning_rate=0.2)
    together, alone = (
        evaluate(problem, wild, start_of(problem), num_tasks=8, steps=(5,))
        for problem in (
            FewShot(Sinusoid(), MLP(hidden=(8,)), Regression(), num_tasks=number).to(dtype=torch.float64)
            for number in (4, 1)
        )
    )
    assert 0 < together.num_diverged < 8 and together.num_diverged == alone.num_diverged
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_tasks_that_diverge_are_counted_where_their_scores_are(tmp_path):
    evaluation = FewShotEvaluation(num_tasks=8, every=1, num_validation_tasks=8, max_steps=60, num_pictures=0)
    wild, trainer, keep = replace(SOLVER, learning_rate=0.2), Trainer(num_steps=1), Keep()
    problem = FewShot(Sinusoid(), MLP(hidden=(8,)), Regression(), num_tasks=4).to(dtype=torch.float64)
    run(problem, wild, Unrolled(), ADAM, trainer, tmp_path, callbacks=[evaluation, keep])
    summary = json.loads((tmp_path / "summary.json").read_text())
    number = summary["evaluation"]["num_diverged"]
    assert number and summary["baseline"]["rows"][-1] == ["tasks that diverged, scored where they stopped", str(number)]
    assert keep.records[0]["metrics.validation_diverged"] > 0


def test_outputs_that_are_no_numbers_are_wrong():
    targets = torch.tensor([[0, 0, 1]])
    outputs = torch.tensor([[[2.0, 1.0], [torch.nan, torch.nan], [0.0, torch.nan]]])
    assert float(Classification().score(outputs, targets)) == pytest.approx(1 / 3)


def test_evaluation_takes_what_the_outer_loop_takes():
    rates = LearnedRateFewShot(Sinusoid(), MLP(hidden=(6,)), Regression(), num_tasks=3, rate=0.01).to(
        dtype=torch.float64
    )
    named = evaluate(rates, replace(SOLVER, learning_rate="rate"), start_of(rates), num_tasks=4)
    plain = evaluate(rates, replace(SOLVER, learning_rate=0.01), start_of(rates), num_tasks=4)
    torch.testing.assert_close(named.scores, plain.scores)
    looped = FewShot(characters(), OneTask(loops=True), num_tasks=3).to(dtype=torch.float64)
    with pytest.warns(UserWarning, match="one after the other"):
        found = evaluate(looped, SOLVER, start_of(looped), num_tasks=4)
    together = FewShot(characters(), conv(), num_tasks=3).to(dtype=torch.float64)
    torch.testing.assert_close(found.scores, evaluate(together, SOLVER, start_of(together), num_tasks=4).scores)


def test_evaluation_draws_the_same_numbers_each_time_and_none_of_the_runs():
    module = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    problem = FewShot(Sinusoid(), ModuleNetwork(module), Regression(), num_tasks=3).to(dtype=torch.float64)
    before = torch.get_rng_state()
    one, again = (evaluate(problem, SOLVER, start_of(problem), num_tasks=4, steps=(1,)) for _ in range(2))
    torch.testing.assert_close(one.scores, again.scores, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_of_a_module_move_with_its_problem():
    module = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).float().eval()
    problem = FewShot(Sinusoid(), ModuleNetwork(module), Regression(), num_tasks=2).to(dtype=torch.float64)
    assert evaluate(problem, SOLVER, start_of(problem), num_tasks=2).scores.dtype == torch.float64


def test_outputs_of_another_shape_than_their_targets_are_refused():
    with pytest.raises(UsageError, match=r"shape of the targets, \(2, 5, 1\), but have \(2, 5, 3\)"):
        Regression().loss(torch.zeros(2, 5, 3), torch.zeros(2, 5, 1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_pictures": -1}, "num_pictures >= 0, an integer, but got -1"),
        ({"steps": 5}, "steps to be a list of integers, but got 5"),
        ({"steps": (1, 0.5)}, "steps >= 0, an integer, but got 0.5"),
        ({"seed": "x"}, "seed >= 0, an integer, but got 'x'"),
        ({"max_steps": 0}, "max_steps >= 1"),
        ({"every": 0}, "every >= 1"),
    ],
)
def test_a_wrong_evaluation_is_refused_before_the_run(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        FewShotEvaluation(**arguments)


def test_tasks_without_a_test_part_are_refused_before_the_run():
    tasks = ClassEpisodes(images(), {"train": range(10)}, way=3, num_query=2, rotated_parts=["train"])
    problem = FewShot(tasks, conv(), num_tasks=2).to(dtype=torch.float64)
    with pytest.raises(UsageError, match="no classes for the test part of these tasks: give them some, or leave the"):
        fit(problem, num_steps=1, callbacks=[FewShotEvaluation()], hypergradient=Unrolled(), solver=SOLVER)


def test_evaluation_of_another_problem_is_refused():
    with pytest.raises(UsageError, match="few-shot evaluation needs a FewShot problem, but this is a Quadratics"):
        fit(Quadratics(0), num_steps=1, callbacks=[FewShotEvaluation()], hypergradient=EXACT, solver=NewtonCG())


def test_a_run_stops_when_its_seconds_are_used():
    result = fit(
        sinusoids(), solver=SOLVER, hypergradient=Unrolled(), trainer=Trainer(num_steps=10**6, max_seconds=0.05)
    )
    assert "of 0.05 seconds were used" in result.summary["stopped_because"]
    assert 0 < result.summary["num_steps"] < 10**6
    with pytest.raises(UsageError, match="trainer.max_seconds must be above 0"):
        Trainer(max_seconds=0.0)


def test_the_latest_step_is_the_best_of_a_run_of_episodes_and_patience_is_refused():
    result = fit(sinusoids(), solver=SOLVER, hypergradient=Unrolled(), num_steps=5)
    assert result.summary["best"]["step"] == 4
    longer = []

    class Keep(Callback):
        def on_step(self, record, hparams):
            longer.append(hparams)

    fit(sinusoids(), solver=SOLVER, hypergradient=Unrolled(), num_steps=6, callbacks=[Keep()])
    last = longer[5]  # what a sixth step starts from is what five steps leave
    assert all(torch.equal(value, last[name]) for name, value in result.hparams.items())
    with pytest.raises(
        UsageError, match=r"trainer.patience=2 .* each step of this problem has an episode or a minibatch of its own"
    ):
        fit(sinusoids(), solver=SOLVER, hypergradient=Unrolled(), trainer=Trainer(patience=2))


def test_training_lowers_the_error_of_new_tasks():
    problem = ProximalFewShot(Sinusoid(), MLP(hidden=(20, 20)), Regression(), num_tasks=10, strength=0.5).to(
        dtype=torch.float64
    )
    budget = ConjugateGradient(rtol=None, max_steps=5)
    method = Implicit(warm_start=False, linear_solver=budget, negative_curvature=Truncate(), error_estimate=None)
    solver = LBFGS(max_steps=5, atol=0.0)  # needs no learning rate, which the growing curvature would outgrow
    trained = fit(problem, solver=solver, hypergradient=method, num_steps=200, optimizer=ADAM)
    setup, state = set_up(problem, solver, EXACT, ADAM, None)
    before, after = (
        evaluate(setup.problem, solver, hparams, num_tasks=100).final.value
        for hparams in (setup.natural(state.raw), trained.hparams)
    )
    assert after < 0.8 * before
