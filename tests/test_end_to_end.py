"""The commands as a user gives them, in processes of their own: a sweep, its report, a run's report."""

import subprocess
import sys
import time

import pytest
import torch


def command(*words):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    status, out, err = command(
        "experiments.train", "-m", "hypergradient=implicit_cg,implicit_neumann,unrolled", "trainer.num_steps=2",
        "solver.max_steps=30", "threads=1", "tracking=console", f"output_dir={root}",
    )  # fmt: skip
    assert status == 0, err
    assert sum(line.startswith("summary: ") for line in out.splitlines()) == 3
    (folder,) = (root / "train").iterdir()
    assert out.splitlines()[-1] == f"report: {folder / 'report.html'}"
    return folder


def test_a_sweep_over_methods_leaves_a_run_each_and_a_leaderboard(sweep):
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1", "2", "figures"]
    (sweep / "report.html").unlink()
    status, out, err = command("bilevel", "report", str(sweep))
    assert status == 0, err
    assert out.strip() == f"report: {sweep / 'report.html'}"
    page = (sweep / "report.html").read_text()
    assert "ConjugateGradient" in page and "NeumannSeries" in page and "Unrolled" in page


def test_a_runs_report_is_made_again_on_request(sweep):
    (sweep / "0" / "report.html").unlink()
    status, _, err = command("bilevel", "report", str(sweep / "0"))
    assert status == 0, err
    assert (sweep / "0" / "report.html").stat().st_size > 10_000
    assert list((sweep / "0" / "figures").glob("*.png"))


def test_a_folder_that_is_no_run_gets_one_sentence(tmp_path):
    status, out, err = command("bilevel", "report", str(tmp_path))
    assert status == 2 and out == "" and "Traceback" not in err
    assert "Expected a run directory" in err and err.count("\n") == 1


def test_the_dtype_changes_no_data_and_the_seed_changes_what_it_should():
    """Float64 widens the numbers that float32 has; a seed draws other minibatches and weights, and no other split."""
    from bilevel.cli.composer import composer, resolve
    from bilevel.cli.job import assemble

    def problem_of(*words):
        with composer() as compose:
            config = resolve(compose.compose(list(words)))
        try:
            return assemble(config, torch.device("cpu"), getattr(torch, config["dtype"])).problem
        finally:
            torch.set_default_dtype(torch.float32)

    narrow, wide = (problem_of("problem=digits_mlp", f"dtype={dtype}") for dtype in ("float32", "float64"))
    assert wide.x.dtype == torch.float64 and torch.equal(wide.x, narrow.x.double())
    other = problem_of("problem=digits_mlp", "problem.batch_size=16", "seed=1")
    same = problem_of("problem=digits_mlp", "problem.batch_size=16")
    assert torch.equal(other.x, same.x) and not torch.equal(other.inner_batches(0, 0), same.inner_batches(0, 0))
    assert not torch.equal(other.init_params({})["layer0.weight"], same.init_params({})["layer0.weight"])


def test_a_run_that_applies_nothing_ends_in_a_sentence_and_exit_status_1(tmp_path):
    status, out, err = command(
        "bilevel", "train", "solver=gradient_descent", "solver.learning_rate=100", "problem.start=10", "tracking=console",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    assert status == 1 and "3 of 3 steps: the inner solve ended with diverged" in out
    assert err.count("\n") == 1 and "no hypergradient was applied in" in err and "lower the learning rate" in err
    (folder,) = (tmp_path / "train").iterdir()
    assert "3 of 3 steps: the inner solve ended with diverged" in (folder / "report.html").read_text()


def test_termination_ends_a_run_as_an_interruption_does(tmp_path):
    words = ["train", "problem.batch_size=8", "solver=gradient_descent", "trainer.num_steps=100000", "tracking=console"]
    run = subprocess.Popen(
        [sys.executable, "-m", "bilevel", *words, f"output_dir={tmp_path}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in run.stdout:
        if line.lstrip().startswith("0 "):
            break
    (folder,) = (tmp_path / "train").iterdir()
    while len((folder / "metrics.jsonl").read_text().splitlines()) < 2:  # step 0 is whole once step 1 is recorded
        time.sleep(0.01)
    run.terminate()
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and f"interrupted: go on with python -m bilevel train resume={folder}" in err
    assert list((folder / "checkpoints").iterdir()) and (folder / "summary.json").is_file()


def test_what_takes_long_before_the_first_step_is_told(tmp_path, capsys, monkeypatch):
    from bilevel.cli.main import main

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, example, options: graph)  # the rest is not slow
    words = ["trainer.num_steps=1", "solver.max_steps=5", "tracking=none", "callbacks=none", f"output_dir={tmp_path}"]
    assert main(["train", "experiment=digits", "hypergradient.compile=true", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the products are being compiled, the first time on a machine in up to minutes" in lines
