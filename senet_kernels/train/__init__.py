"""Training the networks of :mod:`senet_kernels.models`: a plain PyTorch recipe.

``python -m senet_kernels.train`` trains on scikit-learn's handwritten digits, which need no
download; ``--help`` lists what else it can do. What it needs beyond torch:
``pip install 'senet-kernels[train]'``.

The files in the order of a run: ``options`` -> ``parallel`` -> ``data`` -> ``loader`` ->
``network`` -> ``freeze`` -> ``optimise`` -> ``loop`` (a step, a test) -> ``run`` (epochs, stages)
-> ``checkpoint``, ``record``, ``plots``. ``api`` puts them together.
"""

from __future__ import annotations

from .api import evaluate, train
from .errors import TrainError
from .options import Options

__all__ = ["Options", "TrainError", "evaluate", "train"]
