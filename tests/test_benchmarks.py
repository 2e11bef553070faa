"""The benchmarks as CI can run them: `--quick` does everything on a small scale, and the JSON file keeps its contract."""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.common import Claim, experiment_parts, finish, interleaved, machine, parse, table
from benchmarks.hpo import claims_of as claims_of_searches
from benchmarks.hpo import main as compare_searches
from benchmarks.hpo import plot as plot_searches
from benchmarks.hpo import read, write
from benchmarks.hpo import rows_of as rows_of_searches
from benchmarks.meta_accuracy import differences, fitting
from benchmarks.meta_omniglot import PAPER, RUNS
from benchmarks.searches import OURS, TPE, Point, Search, WordGroups, console
from benchmarks.searches import searched as search_by
from benchmarks.stochastic import QUICK as STOCHASTIC_QUICK
from benchmarks.stochastic import measure
from benchmarks.tuning import AUTO, CG, FEWER, Mean, Runs, Setting, claims_of, compare, tune
from bilevel.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


QUICK = [  # not meta_accuracy, which is a dozen processes: its own parts are tested below
    *("operators", "hypergradient", "memory", "meta_gradient", "meta_memory", "meta_step", "meta_sinusoid"),
    *("meta_omniglot", "hyper_cleaning", "text_penalties", "distillation", "weight_decay", "stochastic"),
    *("reweighting", "hpo"),
]


@pytest.fixture(scope="module", params=QUICK)
def quick(request, tmp_path_factory):
    """Name, output and JSON content of one benchmark, run as a user does; it leaves the committed results alone."""
    if request.param == "meta_omniglot":
        request.getfixturevalue("omniglot_root")
    if request.param in ("hyper_cleaning", "distillation", "weight_decay", "stochastic", "reweighting"):
        request.getfixturevalue("fashion_mnist")
    if request.param in ("text_penalties", "hpo"):
        request.getfixturevalue("wordnet")
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    file = tmp_path_factory.mktemp("benchmarks") / "new" / f"{request.param}.json"
    command = [sys.executable, "-m", f"benchmarks.{request.param}", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before
    return request.param, done.stdout, json.loads(file.read_text())


ROWS = {
    "operators": {"network", "cost of", "gradients", "ms"},
    "hypergradient": {"problem", "library", "bilevel / it", "ms", "products", "ms for 20 products"},
    "memory": {"method", "inner steps", "MB above baseline", "baseline MB", "seconds"},
    "meta_gradient": {"seed", "inner stationarity", "finite differences", "loop", "largest error over bound"},
    "meta_memory": {"method", "inner steps", "MB above baseline", "baseline MB", "seconds"},
    "meta_step": {"meta-step", "seconds", "over ours"},
    "meta_sinusoid": {"experiment", "seed"},
    "meta_omniglot": {"run", "accuracy", "95 %", "floor", "outer steps", "minutes"},
    "text_penalties": {"what", "hyperparameters", "seconds"},
    "weight_decay": {"what", "hyperparameters", "seconds"},
    "hpo": {"hyperparameters", "method", "trainings", "seconds", "gradients", "trained anew", "left out"},
    "reweighting": {"imbalance", "learned", "equal", "difference", "95 %"},
    "stochastic": {"method", "trained anew", "over the deterministic", "f1", "gradients", "seconds"},
    "distillation": {"images", "seed", "distilled", "real", "the largest of them", "minutes"},
    "hyper_cleaning": {"seed", "floor", "cleaned", "ceiling", "f1", "minutes"},
}
MAY_VANISH = {"unfinished", "seed", "f1", "95 %", "difference", "loop", "largest error over bound"}
SIGNED = {"over the deterministic", "difference"}


def test_quick_measures_everything_and_judges_nothing(quick):
    name, out, content = quick
    assert content["claims"] == [] and "claims are not judged with --quick" in out
    measured = [row for row in content["rows"] if "note" not in row]
    assert measured
    for row in measured:
        assert ROWS[name] <= row.keys(), row
        figures = {key: value for key, value in row.items() if isinstance(value, int | float)}
        assert figures and all(math.isfinite(figure) for figure in figures.values()), row
        assert all(figures[key] >= 0 for key in figures.keys() - SIGNED), row
        assert all(figures[key] > 0 for key in figures.keys() - MAY_VANISH - SIGNED), row
        assert all(str(value) in out for value in row.values() if isinstance(value, str)), row


def scored(*scores, floor=0.5):
    return {"evaluation": {"each": scores, "floor": floor}}


def test_accuracies_are_compared_task_by_task():
    ours, others = [scored(0.9, 0.8, 0.4), scored(0.7, 0.6, 0.6)], [scored(0.7, 0.6, 0.2), scored(0.8, 0.6, 0.3)]
    by_seed, pooled = differences(ours, others)
    assert [one.value for one in by_seed] == pytest.approx([0.2, 0.2 / 3])
    assert by_seed[0].half_width == pytest.approx(0, abs=1e-12)  # tasks differ by what both runs share
    gaps = torch.tensor([0.05, 0.1, 0.25], dtype=torch.float64)
    assert pooled.value == pytest.approx(float(gaps.mean()))
    assert pooled.half_width == pytest.approx(1.96 * float(gaps.std()) / 3**0.5, rel=1e-3)
    with pytest.raises(RuntimeError, match="have scored other tasks"):
        differences(ours, [others[0], scored(0.8, 0.6, 0.3, floor=0.4)])


def test_the_pilot_that_sets_the_number_of_steps_is_kept(tmp_path, monkeypatch):
    piloted = []

    def train(keys):
        piloted.append(keys["trainer.num_steps"])
        folder = Path(keys["output_dir"]) / "name" / "day"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        steps = [{"step": step, "seconds": 50.0 if step == 0 else 0.5} for step in range(10)]
        (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in [*steps, {"summary": 1}]))

    monkeypatch.setattr("benchmarks.meta_accuracy.train", train)
    plans = [fitting(tmp_path / "code" / "plan.txt", {"experiment": "a"}, 103.0) for _ in range(2)]
    assert plans == [200, 200] and piloted == [100]


@pytest.mark.usefixtures("wordnet")
@pytest.mark.parametrize("number", [1, 7, None])
def test_groups_of_words_are_about_equally_frequent_and_have_equal_shares(number):
    problem = WordGroups(number, num_texts=800)
    hparams = problem.init_hparams()
    size = len(hparams["penalty"])
    assert size == (problem.x.shape[1] if number is None else number)
    rows = problem.x.rows
    counts = rows.col_indices().bincount(minlength=problem.x.shape[1])
    if number is not None:
        squares = torch.zeros(size).index_add(0, problem.group[rows.col_indices()], rows.values().square())
        assert float(squares.min()) > 0.8 * float(squares.max())
    in_order = problem.group[counts.argsort(stable=True)]
    assert bool((in_order.diff() >= 0).all())
    strength, _ = problem.anchor({"penalty": torch.arange(1.0, size + 1)})  # whatever they are
    assert torch.equal(strength["weight"][0], problem.group + 1.0)


def searched(*losses, seconds=1.0, threads=2, training=None):
    points = [Point(seconds * number, 10 * number, loss) for number, loss in enumerate(losses, 1)]
    anew = {number: loss + 0.01 for number, loss in enumerate(losses)}
    return Search(points, anew, {"holdout_loss": 1.0, "test_accuracy": 0.5}, training, 0, {"threads": threads})


def test_hypergradients_are_timed_to_the_loss_that_tpe_ends_with(tmp_path):
    found = {
        (1, OURS): searched(0.9, 0.5),
        (1, TPE): searched(0.6),
        (10, OURS): searched(0.9, 0.7, 0.6, 0.4),
        (10, TPE): searched(0.8, 0.6, math.inf, seconds=20.0, training=45.0),
        (100, OURS): searched(0.9),
        (100, TPE): searched(0.9, 0.8, training=2.0),
        (200, OURS): searched(0.9),
        (200, TPE): searched(0.9, 0.9, training=2.0),
        (300, OURS): searched(0.9),
    }
    ten, hundred, stuck, unknown = claims_of_searches(found)
    assert ten.figure == pytest.approx(3 / 45) and ten.met
    assert hundred.figure == math.inf and not hundred.met
    assert stuck.figure is None  # TPE is where everybody begins
    assert unknown.figure is None and unknown.met is None
    rows = rows_of_searches(found)
    assert [row["seconds to TPE's"] for row in rows] == [2.0, 1.0, 3.0, 40.0, None, 2.0, 1.0, 1.0, None]
    assert rows[2]["gradients to TPE's"] == 30 and rows[3]["validation loss"] == 0.6 and rows[3]["best at"] == 2
    assert rows[3]["trained anew"] == pytest.approx(0.61)
    plot_searches(found, tmp_path / "hpo.png")
    assert (tmp_path / "hpo.png").read_bytes()[:4] == b"\x89PNG"
    for place, (_, search) in enumerate(found.items()):
        write(search, tmp_path / "kept" / f"{place}.json")
        assert read(tmp_path / "kept" / f"{place}.json") == search
    found[10, OURS] = searched(0.5, threads=1)
    with pytest.raises(UsageError, match="made with .*'threads': 1.* and .*'threads': 2.*, whose times do not compare"):
        claims_of_searches(found)


@pytest.mark.usefixtures("wordnet")
def test_a_search_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.searches.EVERY", 0.0)
    parts = experiment_parts("text_penalties", "callbacks=none", "problem.num_texts=1500")
    problem = WordGroups(4, num_texts=1500)
    problem.to(dtype=torch.float64)
    said, file = console(), tmp_path / "new" / "search.pt"
    first = search_by(TPE, problem, parts, 3, file, said, 0)
    more = search_by(TPE, problem, parts, 12, file, said, 0)
    assert more.points[:3] == first.points and len(more.points) == 12
    seconds = [point.seconds for point in more.points]
    assert seconds == sorted(seconds) and more.training <= seconds[-1]
    assert more.points[-1].gradients > first.points[-1].gradients
    assert set(more.anew) == {more.best} and more.anew[more.best] < 1.01 * more.points[more.best].loss
    assert len(search_by(TPE, problem, parts, 12, file, said, 0).points) == 12


@pytest.mark.usefixtures("wordnet")
@pytest.mark.parametrize("number", [200, 5000])
def test_groups_that_are_too_many_are_refused(number):
    with pytest.raises(UsageError, match=f"{number} groups of words were asked for, but some words have more"):
        WordGroups(number, num_texts=300)


@pytest.mark.parametrize("word", ["0", "-3", "all"])
def test_groups_are_numbers_or_each(word, capsys):
    with pytest.raises(SystemExit):
        compare_searches(["--groups", word])
    assert "a number of groups, at least 1, or `each` was expected" in capsys.readouterr().err


@pytest.mark.usefixtures("omniglot_root")
@pytest.mark.parametrize("name", [*RUNS, *PAPER])
def test_the_words_of_few_shot_rows_make_runs(name):
    rest = {**RUNS, **PAPER}[name]
    parts = experiment_parts(
        rest["experiment"], *(f"{key}={value}" for key, value in rest.items() if key != "experiment")
    )
    tasks = parts.problem.tasks
    shot = rest.get("data.shot", 5 if name == "reptile" else 1)
    assert (tasks.way, tasks.shot) == (rest.get("data.way", 5), shot)
    assert len(tasks.rotated_parts) == (3 if name in PAPER else 1)


def test_quick_names_its_machine(quick):
    _, _, content = quick
    assert content["machine"].keys() >= {"device", "cores", "threads", "system", "python", "torch", "date"}
    assert content["machine"]["cores"] >= 1 and content["machine"]["device"]


@pytest.mark.parametrize("name", sorted(file.stem for file in RESULTS.glob("*.json")))
def test_the_committed_results_keep_the_contract(name):
    content = json.loads((RESULTS / f"{name}.json").read_text())
    assert content["claims"] and content["rows"] and content["machine"]["torch"]
    for claim in content["claims"]:
        assert claim.keys() >= {"name", "figure", "target", "met"}
        judged = {key: claim[key] for key in ("name", "figure", "target")}
        assert claim["met"] is Claim(**judged, at_least=claim.get("at_least", False)).met


@pytest.mark.usefixtures("fashion_mnist")
@pytest.mark.parametrize(
    ("method", "inner", "outer"),
    [
        ("soba", [3, 3], [1, 1]),  # a gradient, a product, a mixed one
        (
            "saba",
            [3 * (4 + 1), 3],
            [2 + 1, 1],
        ),  # the first step fills the table, with four inner and two outer minibatches
        ("f2sa", [4, 4], [2, 2]),  # one step of each sequence, and the comparison
        ("amigo", [5 + 10 + 10 + 1 + 1] * 2, [1, 1]),  # each product has its gradient's graph, and so has the mixed one
    ],
)
def test_gradients_of_single_examples_are_counted(method, inner, outer):
    sizes = (64, 128) if method != "f2sa" else (256, 256)
    costs = [sum(pair[number] * size for pair, size in zip((inner, outer), sizes, strict=True)) for number in (0, 1)]
    assert measure(method, 0, *STOCHASTIC_QUICK).spent == [costs[0], sum(costs)]


# --- what they share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "at_least", "met", "word"),
    [
        (1.0, False, True, "met"),
        (1.1, False, False, "MISSED"),
        (math.nan, False, False, "MISSED"),
        (1.1, True, True, "met"),
        (0.9, True, False, "MISSED"),
        (math.nan, True, False, "MISSED"),
        (None, False, None, "not measured"),
    ],
)
def test_a_claim_is_judged(figure, at_least, met, word):
    claim = Claim("time over theirs", figure, 1.0, at_least)
    assert claim.met is met
    assert str(claim).startswith("claim time over theirs: ") and str(claim).endswith(f"): {word}")


def options(tmp_path, quick):
    return argparse.Namespace(quick=quick, json=tmp_path / "a.json", device="cpu", load=0.0)


def test_a_missed_claim_is_the_exit_status(tmp_path, capsys):
    met, missed, absent = Claim("a", 1.0, 2.0), Claim("b", 3.0, 2.0), Claim("c", None, 2.0)
    assert finish(options(tmp_path, False), [{"ms": 1.5}], [met, absent]) == 0
    assert finish(options(tmp_path, False), [{"ms": 1.5}], [met, missed], {"peers": {"jax": "0.5"}}) == 1
    content = json.loads((tmp_path / "a.json").read_text())
    assert [(claim["name"], claim["figure"], claim["target"], claim["met"]) for claim in content["claims"]] == [
        ("a", 1.0, 2.0, True),
        ("b", 3.0, 2.0, False),
    ]
    assert content["rows"] == [{"ms": 1.5}] and content["peers"] == {"jax": "0.5"}
    assert content["machine"].keys() > machine().keys()
    assert finish(options(tmp_path, True), [], [missed]) == 0
    assert capsys.readouterr().out.count("MISSED") == 1


def test_the_json_file_is_strict(tmp_path):
    assert finish(options(tmp_path, False), [{"ratio": math.inf}], [Claim("a", math.nan, 2.0)]) == 1

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content["rows"] == [{"ratio": "Infinity"}] and content["claims"][0]["figure"] == "NaN"


def test_every_function_is_timed_in_every_round():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, pause=0.0, awake=0.0)
    assert calls == ["a", "b"] * 4 and seconds.keys() == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())


def test_rows_with_different_keys_are_one_table():
    assert table([{"a": 1234}, {"b": None, "a": 1.0, "c": True}]).splitlines() == [
        "a      b  c",
        "1,234",
        "1         True",
    ]


def test_the_options_that_all_have():
    assert parse("a", ["--json", "x/y.json"]).json == Path("x/y.json")
    with pytest.raises(SystemExit):
        parse("a", ["--device", "cpu"], device=False)


def test_a_turn_lasts_until_the_processor_is_awake_and_its_last_call_counts():
    starts = []

    def call():
        starts.append(time.perf_counter())
        time.sleep(0.05 if len(starts) < 4 else 0.01)

    seconds = interleaved(
        {"a": call}, 1, pause=0.0, awake=0.12
    )  # the first call is a warm-up, the next three are timed
    assert len(starts) >= 4 and starts[-1] - starts[1] >= 0.08 and seconds["a"] < 0.05


# --- losses from the same starts --------------------------------------------------------------------------------------


def mean(setting, losses, products, first=0):
    runs = ({"seed": first + n, "validation loss": loss, "products": products} for n, loss in enumerate(losses))
    return Mean(setting, tuple(runs))


RIVAL = Setting(CG, 50, 0.0)
SPREAD = [1.0, 2.0, 0.5, 1.5, 3.0, 0.7, 1.2, 0.9]  # of the starts: pairs do not see it
CHANCE = [1.04, 0.97, 1.02, 0.98, 1.03, 0.96, 1.01, 0.99]


@pytest.mark.parametrize(
    ("factor", "chance", "products", "met"),
    [
        (1.0, 1.0, 400, [True, True, True]),
        (0.9, 1.0, 400, [True, True, True]),  # better
        (1.03, 0.5, 400, [False, True, True]),  # worse by more than chance
        (1.0, 4.0, 400, [True, False, True]),  # too few starts to tell
        (1.3, 1.0, 400, [False, False, True]),
        (1.0, 1.0, 600, [True, True, False]),
    ],
)
def test_the_claims_of_the_tuning_judge_the_interval_of_a_paired_ratio(factor, chance, products, met):
    losses = [factor * loss * luck**chance for loss, luck in zip(SPREAD, CHANCE, strict=True)]
    compared = compare([mean(Setting(AUTO), losses, products), mean(RIVAL, SPREAD, 1000)])
    assert [claim.met for claim in claims_of(compared)] == met
    row = compared[0]
    expected = factor * math.prod(CHANCE) ** (chance / 8)
    assert row["from"] < row["loss ratio"] < row["to"] and row["loss ratio"] == pytest.approx(expected)


def test_a_ratio_needs_the_same_starts():
    one, other = mean(Setting(AUTO), SPREAD, 1), mean(RIVAL, SPREAD, 1, first=1)
    with pytest.raises(ValueError, match="paired starts"):
        compare([one, other])


class Pool:
    """Makes runs at once, with figures that are made up, and fails after so many."""

    def __init__(self, limit=10**6):
        self.tasks, self.limit = [], limit

    def map(self, function, tasks):
        for setting, seed, _ in tasks:
            if len(self.tasks) == self.limit:
                raise KeyboardInterrupt
            self.tasks.append((setting, seed))
            loss = 1.0 if setting.method == AUTO else 1.0 + 0.1 * (setting.num_steps or 0) + 0.001 * seed
            yield {
                "method": setting.method, "K": setting.num_steps, "alpha": setting.alpha, "seed": seed,
                "validation loss": loss, "test loss": 0.0, "products": 10, "inner gradients": 5,
            }  # fmt: skip


GRID = [Setting(method, steps, 0.0) for method in (CG, "Neumann series") for steps in (3, 1, 2, 4)]
STARTS = (range(0, 2), range(2, 4), range(10, 50))


def test_tuning_tries_chooses_and_judges_on_starts_that_nothing_was_chosen_by():
    pool = Pool()
    tried, judged = tune(Runs(pool), GRID, STARTS)
    assert len(tried) == 8 and [mean.setting.method for mean in judged] == [AUTO, CG, "Neumann series"]
    assert [mean.setting.num_steps for mean in judged] == [None, 1, 1]
    assert [len(mean.runs) for mean in judged] == [40, 40, FEWER]
    assert len(pool.tasks) == 8 * 2 + 6 * 2 + 40 + 40 + FEWER == len(set(pool.tasks))
    assert [row["loss ratio"] < 1 for row in compare(judged)] == [True, True]


def test_tuning_that_was_cut_short_goes_on_from_its_file(tmp_path):
    file, pool = tmp_path / "runs.jsonl", Pool(limit=50)
    with pytest.raises(KeyboardInterrupt):
        tune(Runs(pool, file=file), GRID, STARTS)
    file.write_text(file.read_text() + '{"method": "conju')  # the power failed while a line was written
    again = Pool()
    found = tune(Runs(again, file=file), GRID, STARTS)
    assert found == tune(Runs(Pool()), GRID, STARTS)
    assert not set(pool.tasks) & set(again.tasks) and len(pool.tasks) + len(again.tasks) == 16 + 12 + 80 + FEWER
    with pytest.raises(UsageError, match="or runs of other keys"):
        Runs(Pool(), ("seed=1",), file)


@pytest.mark.parametrize("change", [None, (0, "validation loss"), (-1, "products")])
def test_runs_of_other_code_are_taken_where_it_gives_the_same(change, tmp_path):
    file = tmp_path / "runs.jsonl"
    found = tune(Runs(Pool(), file=file), GRID, STARTS)
    head, *lines = file.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if change is not None:
        place, figure = change
        rows[place][figure] += 1e-12
    old = head.replace('"code": "', '"code": "0')
    file.write_text("\n".join([old, *map(json.dumps, rows)]) + "\n")
    pool = Pool()
    if change is not None:
        with pytest.raises(UsageError, match=r"come out differently now: .* was expected, and .* came"):
            Runs(pool, file=file)
        assert file.read_text().startswith(old)
        return
    assert tune(Runs(pool, file=file), GRID, STARTS) == found
    assert len(pool.tasks) == 2 * 3  # the first and the last of each method
    assert file.read_text().splitlines() == [head, *lines]
    Runs(pool, file=file)
    assert len(pool.tasks) == 2 * 3  # and only once
