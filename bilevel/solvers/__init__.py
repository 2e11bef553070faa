"""Inner solvers and the one loop that runs them."""

from bilevel.solvers.adam import Adam
from bilevel.solvers.anderson import AndersonAcceleration
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.lbfgs import LBFGS
from bilevel.solvers.loop import InnerResult, InnerSolution, run
from bilevel.solvers.newton_cg import NewtonCG
from bilevel.solvers.objective import Anchored, Objective
from bilevel.solvers.proximal import Polyhedral, Project, Proximal, SoftThreshold
from bilevel.solvers.proximal_gradient import ProximalGradient
from bilevel.solvers.proximal_newton import ProximalNewton
from bilevel.solvers.solver import InnerSolver
from bilevel.solvers.torch_optimizer import TorchOptimizer
from bilevel.solvers.update_rule import UpdateRule

__all__ = [
    "LBFGS",
    "Adam",
    "Anchored",
    "AndersonAcceleration",
    "GradientDescent",
    "InnerResult",
    "InnerSolution",
    "InnerSolver",
    "NewtonCG",
    "Objective",
    "Polyhedral",
    "Project",
    "Proximal",
    "ProximalGradient",
    "ProximalNewton",
    "SoftThreshold",
    "TorchOptimizer",
    "UpdateRule",
    "run",
]
