"""What a linear layer costs on this CPU, dense and block-sparse.

``CostModel`` predicts from one short measurement that is kept on disk, ``linear_cost``
measures one layer, ``expected_cost`` predicts and measures only where it is close.

A time is that of a call in a row of such calls: inputs and weights are as warm as one
call leaves them for the next.
"""

from .cache import cache_file
from .cost import Cost
from .linear import expected_cost, linear_cost
from .model import CostModel, Fit, fit
from .terms import Call, Machine

__all__ = [
    "Call",
    "Cost",
    "CostModel",
    "Fit",
    "Machine",
    "cache_file",
    "expected_cost",
    "fit",
    "linear_cost",
]
