"""``fuse_se_blocks``: squeeze-and-excitation modules of an existing model run on the fused kernels.

A module is converted by giving it a new class: a subclass of its own whose ``forward`` calls
``squeeze_excite`` with the module's own parameters. Nothing else changes, so that parameters,
names, state_dict keys, hooks, flags and copies stay what they were, and giving the old class back
undoes it. Where a call is not what the module was recognised for, or a child has been hooked or
replaced since, the module's original forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import api, dispatch
from .recognise import Form, Mlp, Refusal, changed, class_name, find, recognise


class Entry(NamedTuple):
    """One line of a report: a module by its name in the model, and what became of it."""

    name: str
    kind: str
    note: str  # what it computes, or why it was refused


class FusionReport(NamedTuple):
    """What :func:`fuse_se_blocks` did. Print it to read it."""

    replaced: tuple[Entry, ...]
    refused: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, refused {len(self.refused)}"]
        for title, entries in (("replaced", self.replaced), ("refused", self.refused)):
            rows = [(title, e.name or "(the model)", e.kind, e.note) for e in entries]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
            for *cells, note in rows:
                padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
                lines.append("  ".join([*padded, note]))
        return "\n".join(lines)


class _Fused(nn.Module):
    """Put before a recognised class by :func:`_fused_class`."""

    _original: type[nn.Module]
    _senet_form: Form
    _senet_backend: str | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        form, backend = self._senet_form, self._senet_backend
        reason = _unexpected(form, x, args, kwargs) or changed(self, form.parts)
        if reason is not None:
            if backend is not None:
                dispatch.only_reference(f"this {self._original.__name__}: {reason}", backend)
            return super().forward(x, *args, **kwargs)
        if not isinstance(form, Mlp):
            u = form.excite(self, api.squeeze(x, backend=backend))
            return api.channel_scale(x, u, gate=form.gate, backend=backend)
        fc1 = None if form.fc1 is None else find(self, form.fc1)
        fc2 = find(self, form.fc2)
        return api.squeeze_excite(
            x,
            None if fc1 is None else fc1.weight,
            None if fc1 is None else fc1.bias,
            fc2.weight,
            fc2.bias,
            activation=form.activation,
            gate=form.gate,
            residual=None if form.residual is None else form.residual(self, x),
            backend=backend,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, where pickle and copy cannot find it by name.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_fused, (self._original,), *reduced[2:])


def _unexpected(form: Form, x: Any, args: Any, kwargs: Any) -> str | None:
    """What is unlike the calls the form was recognised for."""
    if args or kwargs:
        return "it was called with more than x"
    if not isinstance(x, Tensor):  # torch.fx traces the original
        return f"x is a {type(x).__name__}"
    if x.dim() not in form.ranks:
        return f"x has {x.dim()} dimensions"
    return None


_CLASSES: dict[type[nn.Module], type[_Fused]] = {}


def _fused_class(original: type[nn.Module]) -> type[_Fused]:
    if original not in _CLASSES:
        contents = {"_original": original, "__module__": __name__, "__doc__": original.__doc__}
        name = f"Fused{original.__name__}"
        _CLASSES[original] = type(name, (_Fused, original), contents)
    return _CLASSES[original]


def _new_fused(original: type[nn.Module]) -> nn.Module:
    cls = _fused_class(original)
    return cls.__new__(cls)


def _describe(form: Form) -> str:
    if not isinstance(form, Mlp):
        return f"squeeze, its own excitation, channel_scale; gate {form.gate}"
    layers = "one layer" if form.fc1 is None else f"two layers, {form.activation}"
    added = "" if form.residual is None else ", plus a residual"
    return f"squeeze_excite: {layers}, gate {form.gate}{added}"


def fuse_se_blocks(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    backend: str | None = None,
) -> FusionReport:
    """Run the squeeze-and-excitation modules of ``model`` on the fused kernels, in place.

    Recognised are the modules of timm, torchvision, transformers, MONAI,
    segmentation-models-pytorch and fvcore, by their exact classes, and any other module that
    consists of an excitation's two layers and is shown on random numbers to compute the operation.
    Parameter objects, names, state_dict keys, hooks on the module, train flag, ``isinstance``,
    deepcopy and pickle stay as they are (``type(m)`` becomes a subclass); inlined blocks that are
    no module of their own are not found. A child that gets a hook, a parametrization or a
    replacement later makes its block run its original forward.

    Args:
        model: any module; it may itself be a squeeze-and-excitation module.
        filter_fn: called with name and module; False leaves a module alone.
        strict: raise where a module is refused, before anything is changed.
        backend: see :func:`senet_kernels.squeeze_excite`; asked for by name, it never falls back.

    Returns:
        What was replaced, what was refused, and why. Modules already fused are left as they are
        (but for ``backend``) and listed as replaced.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``strict``, and a module was refused; or no such backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    dispatch.check_backend_name(backend, "backend")
    plans: list[tuple[nn.Module, Form]] = []
    replaced: list[Entry] = []
    refused: list[Entry] = []
    inside: set[int] = set()  # what lies in a module that has been dealt with
    for name, module in model.named_modules():
        if id(module) in inside or (filter_fn is not None and not filter_fn(name, module)):
            continue
        kind = class_name(module)
        try:
            if isinstance(module, _Fused):
                form: Form | None = module._senet_form
                kind = f"{module._original.__module__}.{module._original.__qualname__}"
            else:
                form = recognise(module)
        except Refusal as refusal:
            refused.append(Entry(name, kind, str(refusal)))
            form = None
        else:
            if form is None:
                continue
            plans.append((module, form))
            replaced.append(Entry(name, kind, _describe(form)))
        inside.update(map(id, module.modules()))
    if strict and refused:
        raise ValueError(
            "strict: expected every squeeze-and-excitation module to be replaceable, got "
            + "; ".join(f"{e.name or 'the model'} ({e.kind}): {e.note}" for e in refused)
        )
    for module, form in plans:
        if not isinstance(module, _Fused):
            module.__class__ = _fused_class(type(module))
        module._senet_form = form  # type: ignore[assignment]
        module._senet_backend = backend  # type: ignore[assignment]
    return FusionReport(tuple(replaced), tuple(refused))


def unfuse_se_blocks(model: nn.Module) -> int:
    """Give every module that :func:`fuse_se_blocks` converted its original class back.

    Do so before pickling a whole model for others, scripting, quantising or exporting to a runtime
    without these kernels.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    fused = [module for module in model.modules() if isinstance(module, _Fused)]
    for module in fused:
        del module._senet_form, module._senet_backend
        module.__class__ = module._original  # type: ignore[assignment]
    return len(fused)
