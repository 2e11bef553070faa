"""The commands as a user gives them, in processes of their own: a sweep, its report, a run's report."""

import subprocess
import sys

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
    return folder


def test_a_sweep_over_methods_leaves_a_run_each_and_a_leaderboard(sweep):
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1", "2"]
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
