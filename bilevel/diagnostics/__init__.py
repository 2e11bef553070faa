"""What a hypergradient is worth and what it costs before it is used: the certificate and the planner."""

from bilevel.diagnostics.certificate import Certificate, Verdict, check
from bilevel.diagnostics.finding import Flaw, Row
from bilevel.diagnostics.forecast import Budget, Forecast
from bilevel.diagnostics.methods import Point, best_point
from bilevel.diagnostics.planner import Plan, plan

__all__ = [
    "Budget",
    "Certificate",
    "Flaw",
    "Forecast",
    "Plan",
    "Point",
    "Row",
    "Verdict",
    "best_point",
    "check",
    "plan",
]
