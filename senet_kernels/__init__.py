"""Fused squeeze-and-excitation for PyTorch.

``squeeze_excite`` is the operation, ``FusedSEBlock`` the module; ``print(backends())`` shows what
runs here, ``explain(...)`` why a call runs where it does; ``models`` has the SENet family.
"""

from importlib import import_module

from . import fuse, trust
from ._after_import import after_import
from ._version import __version__
from .api import Explanation, channel_scale, explain, pack_options, squeeze, squeeze_excite
from .autograd import NativeSEFunction, TritonSEFunction
from .autotune import autotune_in_inductor
from .convert import fuse_se_blocks, unfuse_se_blocks
from .dispatch import Backends, BackendUnavailableError, backends, use_backend
from .fuse import GraphReport, compile_report, inductor_options
from .layers import TimmSE, TorchvisionSE
from .models import add_se_blocks
from .modules import FusedSEBlock
from .pointwise import ACTIVATIONS, GATES
from .public_kernels import keep_in_inductor as _keep_public_ops_in_inductor
from .public_kernels import register as _register_public_ops
from .report import FusionReport
from .settle import KernelMistrustError
from .trust import KernelMistrustWarning
from .trust.verify import verify

__all__ = [
    "ACTIVATIONS",
    "GATES",
    "BackendUnavailableError",
    "Backends",
    "Explanation",
    "FusedSEBlock",
    "FusionReport",
    "GraphReport",
    "KernelMistrustError",
    "KernelMistrustWarning",
    "NativeSEFunction",
    "TimmSE",
    "TorchvisionSE",
    "TritonSEFunction",
    "__version__",
    "add_se_blocks",
    "autotune_in_inductor",
    "backends",
    "channel_scale",
    "compile_report",
    "explain",
    "fuse_se_blocks",
    "inductor_options",
    "models",
    "pack_options",
    "squeeze",
    "squeeze_excite",
    "trust",
    "unfuse_se_blocks",
    "use_backend",
    "verify",
]

_register_public_ops()
after_import("torch._dynamo.backends.registry", fuse.register)
after_import("torch._inductor.lowering", _keep_public_ops_in_inductor)
after_import("torch.utils.flop_counter", lambda: import_module(f"{__name__}.flops"))
