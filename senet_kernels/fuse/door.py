"""``torch.compile`` with squeeze-and-excitation fused: as a backend, and as options of Inductor.

This module imports nothing of Dynamo or Inductor until it is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from senet_kernels import dispatch, trust
from senet_kernels._version import __version__

from .report import GraphReport

log = logging.getLogger("senet_kernels.fuse")

#: The name that ``torch.compile`` knows the backend by.
NAME = "senet_kernels"


def compile_backend(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend ``"senet_kernels"`` of ``torch.compile``: Inductor, with the options of
    :func:`inductor_options`.

    ``mode`` and ``options`` are Inductor's. Two options are the backend's own: ``"inductor"``,
    False for the rewritten graph to run as it is, without a compiler; and ``"report"``, a function
    that is given the :class:`GraphReport` of each graph (not of one from Inductor's caches).
    """
    options = dict(options or {})
    report = options.pop("report", None)
    if not options.pop("inductor", True):
        if options or mode not in (None, "default"):
            raise ValueError(
                "options: expected none of Inductor's beside {'inductor': False}, got "
                f"{', '.join([*options, *([f'mode={mode!r}'] if mode else [])])}"
            )
        from .rewrite import rewrite_module

        _tell(rewrite_module(module, norm_in_training=False), report)
        forward: Callable[..., Any] = module.forward
        return forward
    patches = inductor_options(report=report, then=options.pop("pre_grad_custom_pass", None))
    inductor = torch._TorchCompileInductorWrapper(mode, {**options, **patches}, None)
    compiled: Callable[..., Any] = inductor(module, inputs)
    return compiled


def inductor_options(
    *, report: Callable[[GraphReport], Any] | None = None, then: Any = None
) -> dict[str, Any]:
    """Options with which ``torch.compile`` fuses squeeze-and-excitation, wherever it is written.

    Args:
        report: called with the :class:`GraphReport` of each graph; not for one that Inductor finds
            in its caches.
        then: another ``pre_grad_custom_pass`` of Inductor's, which runs after this one.

    Returns:
        A dictionary for ``torch.compile(model, options=...)``, to which others may be added.
    """
    return {"pre_grad_custom_pass": _pass_class()(report, then)}


@functools.cache
def _pass_class() -> type:
    """The class of the pass; made here, because its base is Inductor's."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class FuseSqueezeExcite(CustomGraphPass):
        """Rewrites each graph before autograd; see :mod:`senet_kernels.fuse`."""

        def __init__(self, report: Callable[[GraphReport], Any] | None, then: Any) -> None:
            self.report, self.then = report, then

        def __call__(self, graph: Graph) -> None:
            from .rewrite import rewrite

            _tell(rewrite(graph, norm_in_training=True), self.report)
            if self.then is not None:
                self.then(graph)

        def uuid(self) -> Any:
            """What the result depends on besides the graph: this package, which backends it has
            here, and which kernels were proven. None, and with it no caching, for another pass that
            names nothing."""
            files = tuple(sorted(str(p) for p in Path(__file__).parents[1].rglob("*.py")))
            backends = (dispatch.requested_backend(None), *sorted(dispatch.Backends().reasons))
            backends = (*backends, trust.mode(), *trust.compiled_classes())
            rest = None
            if self.then is not None:
                rest = self.then.uuid() if isinstance(self.then, CustomGraphPass) else None
                if rest is None:
                    return None
            return (__version__, get_hash_for_files(files), backends, rest)

        def __reduce__(self) -> Any:
            # What torch 2.11 to 2.12 make the key of their caches from.
            if (key := self.uuid()) is None:
                raise TypeError("pre_grad_custom_pass: expected a uuid of the other pass")
            return _restored, (self.report, self.then, key)

        def __eq__(self, other: object) -> bool:
            return (
                type(other) is type(self)
                and other.report is self.report
                and other.then is self.then
            )

        def __hash__(self) -> int:
            return hash((type(self), id(self.report), id(self.then)))

    return FuseSqueezeExcite


def _restored(report: Callable[[GraphReport], Any] | None, then: Any, _key: Any) -> Any:
    return _pass_class()(report, then)


def _tell(found: GraphReport, report: Callable[[GraphReport], Any] | None) -> None:
    if found.fused or found.refused:
        log.info("%s", found)
    if report is not None:
        report(found)


def compile_report(model: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> GraphReport:
    """What the ``torch.compile`` backend fuses in ``model(*args, **kwargs)``, and what it does not.

    The call runs once, through Dynamo and without a compiler; with it what the model does besides
    (running statistics, counters) happens once.

    Returns:
        The findings of all graphs that Dynamo makes of the call.
    """
    found: list[GraphReport] = []
    options: dict[str, Any] = {"inductor": False, "report": found.append}
    compiled = torch.compile(model, backend=compile_backend, options=options)
    compiled(*args, **kwargs)
    return sum(found, GraphReport())


def register() -> None:
    """Tell Dynamo the backend's name. Where the package is installed and has not been imported, its
    entry point does so."""
    from torch._dynamo.backends import registry

    if NAME not in registry._COMPILER_FNS:  # an entry point alone has not been loaded
        registry.register_backend(compile_backend, name=NAME)
