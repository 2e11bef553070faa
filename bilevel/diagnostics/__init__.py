"""What a hypergradient is worth before it is used: the certificate."""

from bilevel.diagnostics.certificate import Certificate, Verdict, check
from bilevel.diagnostics.finding import Flaw, Row

__all__ = ["Certificate", "Flaw", "Row", "Verdict", "check"]
