"""Squeeze-and-excitation found by dataflow, in any spelling, and fused: the doors of torch.compile.

:mod:`.spelling` reads what a node of a graph calls, :mod:`.flow` makes values of in-place operators
and views, :mod:`.find` reads backwards from each product, :mod:`.grow` takes in the neighbours,
:mod:`.rewrite` puts one call in the place of each, :mod:`.door` is what users call.
"""

from .door import compile_backend, compile_report, inductor_options, register
from .report import Finding, GraphReport

__all__ = [
    "Finding",
    "GraphReport",
    "compile_backend",
    "compile_report",
    "inductor_options",
    "register",
]
