"""The commands as a user gives them, in processes of their own: a sweep, its report, a run's report."""

import subprocess
import sys

import pytest


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
