"""The README's own problem runs as it stands, and does what the text says."""

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_own_problem_runs_and_improves(capsys):
    names = {"__name__": "readme"}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    before, after = re.search(r"^([\d.e-]+) -> ([\d.e-]+)$", capsys.readouterr().out, re.MULTILINE).groups()
    assert float(after) < 0.9 * float(before)
    penalty = names["result"].hparams["penalty"]
    assert float(penalty[:3].max()) < 1 and 15 > float(penalty[3:].min()) > 10 and 600 < float(penalty.max()) < 700


def test_the_decorator_example_differentiates_a_scipy_solver():
    names = {"__name__": "readme"}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    theta = names["theta"]
    x = names["solve"](theta).detach()
    torch.testing.assert_close(theta.grad, 2 / (12 * x**2 + 2), rtol=1e-8, atol=0)
    assert names["solve"].report(theta).stationarity < 1e-8


def test_it_is_short_and_names_only_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for group, options in re.findall(r"(hypergradient)=([a-z_,]+)", text):
        for option in options.split(","):
            assert (ROOT / "conf" / group / f"{option}.yaml").is_file(), option
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    assert sys.version_info >= (3, 11)
