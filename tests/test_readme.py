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
    before, after = re.match(r"([\d.e-]+) -> ([\d.e-]+)", capsys.readouterr().out).groups()
    assert float(after) < 0.9 * float(before)
    penalty = names["result"].hparams["penalty"]
    assert penalty[:3].max() < penalty[3:].median()  # the features that matter are penalised least


def test_the_decorator_example_differentiates():
    torch.set_default_dtype(torch.float64)
    try:

        def solver(theta):
            x = theta.clone()
            for _ in range(50):
                x = x - (4 * x**3 + 2 * (x - theta)) / (12 * x**2 + 2)
            return x

        names = {"my_solver": solver}
        exec(compile(BLOCKS[1], "README.md", "exec"), names)
        theta = torch.tensor([0.5, -1.0], requires_grad=True)
        x = names["solve"](theta)
        (slope,) = torch.autograd.grad(x.sum(), theta)
        torch.testing.assert_close(slope, 2 / (12 * x.detach() ** 2 + 2))
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_is_short_and_names_only_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for group, options in re.findall(r"(hypergradient)=([a-z_,]+)", text):
        for option in options.split(","):
            assert (ROOT / "conf" / group / f"{option}.yaml").is_file(), option
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    assert sys.version_info >= (3, 11)
