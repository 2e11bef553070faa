"""The wheel, installed alone and used from another folder: conf/ comes along, and a user's own problem runs."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MY_PKG = """
import torch
from bilevel import Positive, Problem


class MyProblem(Problem):
    constraints = {"penalty": Positive()}

    def __init__(self, scale: float = 2.0):
        self.scale = scale

    def init_hparams(self):
        return {"penalty": torch.tensor(3.0)}

    def init_params(self, hparams):
        return {"w": torch.zeros(())}

    def inner_loss(self, params, hparams, batch):
        return (params["w"] - self.scale).square() + hparams["penalty"] * params["w"].square()

    def outer_loss(self, params, hparams, batch):
        return (params["w"] - 1).square()
"""


def call(*words, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
        env={**{key: value for key, value in os.environ.items() if not key.startswith("BILEVEL")}, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    (file,) = folder.glob("bilevel-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs Python in an empty folder with the wheel and its dependencies, and without the checkout."""
    target, folder = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    call(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=folder)

    def python(*words, **environment):
        # -S leaves out .pth files, by which an editable installation puts the checkout on the path
        path = os.pathsep.join([str(folder), str(target), sysconfig.get_paths()["purelib"]])
        return call("-S", *words, cwd=folder, PYTHONPATH=path, **environment)

    python.folder, python.target = folder, target
    return python


def test_the_wheel_holds_the_package_and_its_configurations_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    conf = {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bilevel").rglob("*.py")}
    assert {f"bilevel/{name}" for name in conf} | source <= set(names)
    assert "bilevel/py.typed" in names, "the classifier Typing :: Typed needs it"
    assert {name.split("/")[0] for name in names} == {
        "bilevel",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


def test_the_main_job_runs_from_the_wheel(installed):
    where = installed(
        "-c", "import bilevel, bilevel.cli.paths as paths; print(bilevel.__file__, paths.conf_directory())"
    )
    package = installed.target / "bilevel"
    assert where.split() == [str(package / "__init__.py"), str(package / "conf")]
    words = ["experiment=digits", "trainer.num_steps=2", "callbacks.grid.num_points=2", "tracking=console"]
    out = installed("-m", "bilevel", "train", *words)
    assert "grid of 2" in out and "best outer loss" in out
    summary = installed.folder / out.splitlines()[-1].removeprefix("summary: ")
    assert summary.is_file() and (summary.parent / "report.html").is_file()


def test_a_users_problem_runs_from_the_wheel(installed):
    (installed.folder / "my_pkg.py").write_text(MY_PKG)
    conf = installed.folder / "my_conf" / "problem"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text("_target_: my_pkg.MyProblem\nscale: 2.0\n")
    words = ["--config-dir", "my_conf", "problem=mine", "problem.scale=1.5", "solver=lbfgs", "trainer.num_steps=3"]
    out = installed("-m", "bilevel", "train", *words, "tracking=none", "name=mine", BILEVEL_ALLOW="my_pkg.")
    folder = (installed.folder / out.splitlines()[-1].removeprefix("summary: ")).parent
    assert folder.parent == installed.folder / "outputs" / "mine"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert "scale: 1.5" in (folder / "config.yaml").read_text()
