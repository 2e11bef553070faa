"""Methods for minibatches: everything moves by single steps, and no inner problem is solved."""

from bilevel.hypergradient.stochastic.amigo import AmIGO
from bilevel.hypergradient.stochastic.bome import BOME
from bilevel.hypergradient.stochastic.f2sa import F2SA
from bilevel.hypergradient.stochastic.pbgd_free import PBGDFree
from bilevel.hypergradient.stochastic.saba import SABA
from bilevel.hypergradient.stochastic.soba import MASOBA, SOBA
from bilevel.hypergradient.stochastic.stocbio import StocBiO
from bilevel.hypergradient.stochastic.ttsa import TTSA

__all__ = ["BOME", "F2SA", "MASOBA", "SABA", "SOBA", "TTSA", "AmIGO", "PBGDFree", "StocBiO"]
