"""The layers of the library: each part imports only from those it may know, and importing the package stays cheap.

The arrows are read from the source by `ast`, inside functions too; imports under `if TYPE_CHECKING` are for readers and
type checkers only, and are left out.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each part of `bilevel` may import besides itself; `bilevel/__init__.py` and `__main__.py` are the parts of these
# names. Whatever is below a part is listed by its layer; a part that is missing here is an error, so that nobody adds one
# without saying where it belongs.
BASE = {"errors", "jsonable", "outcome", "tree", "result", "rng", "autodiff", "purity", "parts", "sparse"}
LINALG = BASE | {"linalg"}
CORE = LINALG | {"implicit", "solvers"}
PROBLEM = CORE | {"problem", "constraints", "broadcast", "batches", "flat", "receipt"}
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(sorted(BASE), BASE),
    "linalg": BASE,
    "implicit": LINALG,
    "solvers": LINALG | {"implicit"},
    "constraints": BASE,
    "broadcast": BASE,
    "problem": CORE | {"constraints", "broadcast"},
    "batches": CORE | {"constraints", "broadcast", "problem"},
    "flat": CORE | {"constraints", "problem", "batches"},
    "receipt": PROBLEM,
    "linearisation": PROBLEM,
    "preconditioner": PROBLEM | {"linearisation"},
    "hypergradient": PROBLEM | {"linearisation", "preconditioner"},
    "data": BASE,
    "models": BASE,
    "problems": PROBLEM | {"data", "models"},
    "trainer": PROBLEM | {"hypergradient", "data"},
    "meta": PROBLEM | {"linearisation", "hypergradient", "trainer", "data", "models"},
    "diagnostics": PROBLEM | {"linearisation", "preconditioner", "hypergradient", "trainer"},
    "tracking": BASE,
    "report": BASE | {"tracking"},
    "cli": PROBLEM | {"hypergradient", "data", "problems", "trainer", "tracking", "report", "diagnostics"},
    "__main__": {"cli"},
    "__init__": set(),  # its names are loaded when they are first used
}
# Packages that only some files may know.
RESERVED = {
    "wandb": ("tracking/wandb.py",),
    "hydra": ("cli/", "conf/"),
    "omegaconf": ("cli/", "conf/"),
    "experiments": (),
    "benchmarks": (),
    "tests": (),
}


@dataclass(frozen=True)
class Import:
    """One imported module: where it stands and what it names, absolute."""

    file: str
    line: int
    module: str


def imports_of(path, package_root):
    """Every import of a file, relative ones made absolute, `from package import module` resolved to the module."""
    relative = path.relative_to(package_root)
    package = [package_root.name, *relative.parts[:-1]]
    found, pending = [], [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from bilevel import rng` imports the part `rng`, not the whole package.
            names = [f"{stem}.{alias.name}" for alias in node.names] if stem == package_root.name else [stem]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            target = node.args[0] if node.args else None
            names = [target.value] if isinstance(target, ast.Constant) else []
        found += [Import(relative.as_posix(), node.lineno, name) for name in names]
        pending.extend(ast.iter_child_nodes(node))
    return found


def wrong_arrows(package_root):
    """Sentences about the imports of a package that run the wrong way, in a fixed order."""
    faults = []
    for path in sorted(package_root.rglob("*.py")):
        relative = path.relative_to(package_root)
        part = relative.parts[0].removesuffix(".py")
        if part not in ALLOWED:
            faults.append(f"{relative.as_posix()} belongs to no layer: add '{part}' to ALLOWED.")
            continue
        for entry in sorted(imports_of(path, package_root), key=lambda entry: entry.line):
            top, *rest = entry.module.split(".")
            target = rest[0] if rest else "__init__"
            if top == package_root.name and target != part and target not in ALLOWED[part]:
                faults.append(f"{entry.file}:{entry.line} imports {entry.module}, which '{part}' must not know.")
            if top in RESERVED and not entry.file.startswith(RESERVED[top] or ("?",)):
                faults.append(f"{entry.file}:{entry.line} imports {entry.module}, which only {RESERVED[top]} may.")
    return faults


def test_every_import_runs_downwards():
    assert wrong_arrows(ROOT / "bilevel") == []


def test_the_layers_have_no_circle():
    """Taken by themselves, the rules order the parts: no two parts may know each other outside the base."""
    for part, known in ALLOWED.items():
        for other in known - BASE:
            assert part == other or part not in ALLOWED[other], f"{part} and {other} may import each other"


def test_the_rules_of_the_design_are_in_the_table():
    assert not {"hypergradient", "trainer"} & ALLOWED["problems"]
    assert not {"problems", "tracking"} & ALLOWED["trainer"]
    assert not PROBLEM - BASE & ALLOWED["data"] and not {"problem", "flat"} & (ALLOWED["linalg"] | ALLOWED["solvers"])
    assert ALLOWED["implicit"] == LINALG


PLANTED = [
    ("linalg/cg.py", "from bilevel.solvers import run", "linalg/cg.py:1 imports bilevel.solvers, which 'linalg'"),
    ("linalg/cg.py", "def f():\n    import bilevel.problem", "linalg/cg.py:2 imports bilevel.problem"),
    ("linalg/deep/a.py", "from ...flat import FlatProblem", "linalg/deep/a.py:1 imports bilevel.flat"),
    ("tree.py", "from bilevel import linalg", "tree.py:1 imports bilevel.linalg"),
    ("solvers/x.py", "try:\n    from bilevel.problem import P\nexcept ImportError: pass", "solvers/x.py:2 imports"),
    ("problems/own.py", "from bilevel.trainer import fit", "problems/own.py:1 imports bilevel.trainer"),
    (
        "problems/own.py",
        "import importlib\nimportlib.import_module('bilevel.hypergradient')",
        "problems/own.py:2 imports",
    ),
    ("trainer/run.py", "from bilevel.problems import Digits", "trainer/run.py:1 imports bilevel.problems"),
    ("trainer/run.py", "from bilevel.tracking.jsonl import J", "trainer/run.py:1 imports bilevel.tracking.jsonl"),
    ("data/a.py", "from bilevel.problem import Problem", "data/a.py:1 imports bilevel.problem"),
    ("data/a.py", "import bilevel", "data/a.py:1 imports bilevel, which 'data' must not know"),
    ("tracking/jsonl.py", "import wandb", "tracking/jsonl.py:1 imports wandb, which only ('tracking/wandb.py',) may"),
    ("trainer/run.py", "from omegaconf import OmegaConf", "trainer/run.py:1 imports omegaconf"),
    ("report/a.py", "import hydra.utils", "report/a.py:1 imports hydra.utils"),
    ("cli/a.py", "from experiments.train import main", "cli/a.py:1 imports experiments.train"),
    ("cli/a.py", "import benchmarks", "cli/a.py:1 imports benchmarks"),
    ("novel/a.py", "", "novel/a.py belongs to no layer: add 'novel' to ALLOWED"),
]


@pytest.mark.parametrize(
    ("file", "source", "fault"), PLANTED, ids=[f"{file}-{n}" for n, (file, *_) in enumerate(PLANTED)]
)
def test_planted_wrong_imports_are_found(tmp_path, file, source, fault):
    path = tmp_path / "bilevel" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = wrong_arrows(tmp_path / "bilevel")
    assert found.startswith(fault)


RIGHT = [
    ("linalg/cg.py", "from bilevel.linalg.operator import norm\nfrom bilevel import rng\nfrom .operator import norm"),
    ("tracking/wandb.py", "def f():\n    import wandb"),
    ("cli/a.py", "from hydra import main\nfrom bilevel.trainer import fit"),
    ("tracking/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bilevel.trainer import RunStart"),
    ("__main__.py", "from bilevel.cli import main"),
]


@pytest.mark.parametrize(("file", "source"), RIGHT, ids=[file for file, _ in RIGHT])
def test_right_imports_are_left_alone(tmp_path, file, source):
    path = tmp_path / "bilevel" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert wrong_arrows(tmp_path / "bilevel") == []


def test_nothing_imports_the_experiments_but_the_experiments():
    for folder in ("bilevel", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for entry in imports_of(path, ROOT / folder):
                assert entry.module.split(".")[0] != "experiments", f"{path}:{entry.line} imports {entry.module}"


def in_fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["bilevel", "bilevel.errors", "bilevel.cli", "bilevel.__main__"])
def test_importing_it_does_not_import_torch(module):
    heavy = "{'torch', 'numpy', 'wandb', 'matplotlib', 'hydra', 'sklearn'}"
    assert in_fresh_interpreter(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_every_public_name_loads_from_where_it_is_said_to_live():
    code = "import bilevel; print([n for n in bilevel.__all__ if getattr(bilevel, n).__name__ != n])"
    assert in_fresh_interpreter(code) == "[]"
    import bilevel

    assert set(bilevel._HOMES) == set(bilevel.__all__) <= set(dir(bilevel))
    with pytest.raises(AttributeError, match="module 'bilevel' has no attribute 'Nonsense'"):
        _ = bilevel.Nonsense
