"""``fuse_se_blocks``: squeeze-and-excitation modules of an existing model run on the fused kernels.

A module is converted by giving it a new class: a subclass of its own whose ``forward`` calls
``squeeze_excite`` with the module's own parameters. Nothing else changes, so that parameters,
names, state_dict keys, hooks, flags and copies stay what they were, and giving the old class back
undoes it. Where a call is not what the module was recognised for, or a child has been hooked or
replaced since, the module's original forward runs (:mod:`senet_kernels.converted`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from . import between, dispatch
from .converted import Fused, check_code, fused_class, stale_reason
from .forms import Form, Mlp, one_line
from .neighbours import Block, recognise_block
from .parts import Refusal, find
from .recognise import Passed, recogniser
from .report import Entry, FusionReport, Placed

if TYPE_CHECKING:  # it takes a while to import
    from torch.export import ExportedProgram


def _describe(form: Form) -> str:
    if not isinstance(form, Mlp):
        return f"squeeze, its own excitation, channel_scale; gate {form.gate}; {between.WHERE}"
    layers = "one layer" if form.fc1 is None else f"two layers, {form.activation}"
    added = "" if form.residual is None else ", plus a residual"
    return f"squeeze_excite: {layers}, gate {form.gate}{added}"


class _Plan:
    """What is to be done to a model, worked out before anything is changed."""

    def __init__(
        self, model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None
    ) -> None:
        self.forms: dict[nn.Module, Form | Block] = {}
        self.replaced: list[Entry] = []
        self.refused: list[Entry] = []
        self.candidates = [
            (name, module)
            for name, module in model.named_modules()
            if filter_fn is None or filter_fn(name, module)
        ]

    def add_modules(self) -> None:
        """Every squeeze-and-excitation module; what lies inside one is done with."""
        inside: set[nn.Module] = set()
        passed: list[tuple[nn.Module, Entry]] = []
        its = recogniser()
        for name, module in self.candidates:
            if module in inside or isinstance(_form_of(module), Block):
                continue
            try:
                with _as_it_was(module):
                    form = _form_of(module) or its.recognise(module)
                    if form is not None and not isinstance(module, Fused):
                        check_code(type(module), form.kinds)
            except Passed as refusal:
                passed.append((module, Entry(name, _kind(module), str(refusal))))
                continue
            except Refusal as refusal:
                self.refused.append(Entry(name, _kind(module), str(refusal)))
            else:
                if form is None:
                    continue
                assert not isinstance(form, Block)
                self.forms[module] = form
                self.replaced.append(Entry(name, _kind(module), _describe(form)))
            inside.update(module.modules())
        # A network or a block by such a name, with the excitation in it, is none itself.
        for module, entry in reversed(passed):
            if inside.isdisjoint(module.modules()):
                self.refused.append(entry)
                inside.update(module.modules())
        order = {name: i for i, (name, _) in enumerate(self.candidates)}
        self.refused.sort(key=lambda entry: order[entry.name])

    def add_blocks(self) -> None:
        """Every module that calls one of those found."""
        for name, module in self.candidates:
            if not any(self._is_found(child) for child in module.children()):
                continue
            try:
                with _as_it_was(module):
                    block = _form_of(module) or recognise_block(module, self._is_found)
                    if not isinstance(module, Fused):
                        check_code(type(module), block.kinds)
            except Refusal as refusal:
                self.refused.append(Entry(name, _kind(module), f"neighbours: {refusal}", True))
            else:
                assert isinstance(block, Block)
                self.forms[module] = block
                self.replaced.append(Entry(name, _kind(module), f"neighbours: {block.note}", True))

    def _is_found(self, module: nn.Module) -> bool:
        form = self.forms.get(module)
        return isinstance(form, Mlp) and form.residual is None

    def placed(self, backend: str | None) -> Iterator[Placed]:
        """Where the layers of the SE blocks are."""
        for module, form in self.forms.items():
            if isinstance(form, Mlp):
                weight = find(module, form.fc2).weight
                if (
                    isinstance(weight, Tensor)
                    and not is_lazy(weight)
                    and weight.is_floating_point()
                ):
                    yield Placed(weight.device, weight.dtype, weight.shape[0], backend)

    def carry_out(self, backend: str | None) -> None:
        """Convert the modules, all or none.

        Raises:
            TypeError: one of them does not let its class or its attributes be set.
        """
        done: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
        for module, form in self.forms.items():
            before = {n: v for n, v in vars(module).items() if n.startswith("_senet_")}
            done.append((module, type(module), before))
            try:
                if not isinstance(module, Fused):
                    module.__class__ = fused_class(type(module))
                elif _is_converted(module):  # anew where its code is another by now
                    module.__class__ = fused_class(module._original)
                module._senet_form = form  # type: ignore[assignment]
                module._senet_backend = backend  # type: ignore[assignment]
            except Exception as error:  # __setattr__ may do as it likes
                for other, kind, facts in reversed(done):
                    object.__setattr__(other, "__class__", kind)
                    for name in ("_senet_form", "_senet_backend"):
                        vars(other).pop(name, None)
                    vars(other).update(facts)
                raise TypeError(
                    f"model: expected modules that can be converted, got one of class "
                    f"{_kind(module)}: {one_line(error)}; leave it out by filter_fn"
                ) from error


def _form_of(module: nn.Module) -> Form | Block | None:
    return module._senet_form if isinstance(module, Fused) else None


def _is_converted(module: nn.Module) -> bool:
    """Whether a module's class is one of ours, and not one that was put on top since."""
    return isinstance(module, Fused) and "_original" in vars(type(module))


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """With its own class, so that it is recognised anew, where it has changed since it was fused,
    or was made from a fused one's class."""
    cls, form = type(module), _form_of(module)
    if not _is_converted(module) or (form is not None and stale_reason(module, form) is None):
        yield
        return
    module.__class__ = vars(cls)["_original"]
    try:
        yield
    finally:
        module.__class__ = cls


def _kind(module: nn.Module) -> str:
    cls = module._original if isinstance(module, Fused) else type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def fuse_se_blocks(
    model: nn.Module | ExportedProgram,
    *,
    neighbours: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
    backend: str | None = None,
) -> FusionReport:
    """Run the squeeze-and-excitation modules of ``model`` on the fused kernels, in place.

    Recognised are the modules of timm, torchvision, transformers, MONAI,
    segmentation-models-pytorch, fvcore and speechbrain, by their exact classes and a hash of their
    source, and any other module whose graph, as Dynamo captures it, is squeeze-and-excitation and
    nothing else: no side effect, no write to a parameter, no branch on numbers or extents. Nothing
    is run for that. A module whose class is called after squeeze-and-excitation is refused with
    the reason where it is not, and where it holds none. Parameter objects, names,
    state_dict keys, hooks on the module, train flag, ``isinstance``, deepcopy and pickle stay as
    they are (``type(m)`` becomes a subclass); inlined blocks that are no module of their own are
    not found. A child that gets a hook, a parametrization or a replacement later makes its block
    run its original forward; so do settings of the module or its children that are changed later,
    functions of its class that are replaced, and inputs of other widths.

    Args:
        model: any module; it may itself be a squeeze-and-excitation module. Or a graph with fake
            tensors, a ``GraphModule`` or ``torch.export.ExportedProgram``: excitations in it become
            calls of the public op ``torch.ops.senet_kernels.squeeze_excite``, which
            ``unfuse_se_blocks`` does not undo, with their residual and activations if
            ``neighbours``; ``filter_fn`` and ``backend`` are not for it.
        neighbours: let the steps around a module join its operation: the activation before it
            (timm's EfficientNet, MobileNetV3 and RegNet blocks, any Sequential, so torchvision's
            too), or the residual and the activation after it (timm's ResNet blocks). Hooks on
            the block fire as before, those on the steps that joined make the block run its
            original forward.
        filter_fn: called with name and module; False leaves a module alone.
        strict: raise where a module is refused, before anything is changed.
        backend: see :func:`senet_kernels.squeeze_excite`; asked for by name, it never falls back.

    Returns:
        What was replaced, what was refused, and why. Modules already fused are left as they are
        (but for ``backend``) and listed as replaced.

    Raises:
        TypeError: ``model`` is no module, or ``filter_fn`` no function; or a module does not let
            its class be set (nothing is changed then).
        ValueError: ``strict``, and a module was refused; or no such backend; or an option that is
            not for graphs.
    """
    if not isinstance(model, nn.Module) and not is_program(model):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"filter_fn: expected a function of name and module, got {type(filter_fn).__name__}"
        )
    dispatch.check_backend_name(backend, "backend")
    if is_program(model):
        return _fuse_program(model, neighbours, filter_fn, strict, backend)
    assert isinstance(model, nn.Module)
    plan = _Plan(model, filter_fn)
    plan.add_modules()
    if neighbours:
        plan.add_blocks()
    if strict:
        _check_strict(plan.refused)
    plan.carry_out(backend)
    return FusionReport(tuple(plan.replaced), tuple(plan.refused), tuple(plan.placed(backend)))


def is_program(model: Any) -> bool:
    """Whether a model is a graph, of ``torch.export``, ``make_fx`` or Dynamo, with fake tensors."""
    graph = _graph_of(model)
    if not isinstance(graph, GraphModule):
        return False
    return any("val" in n.meta or "example_value" in n.meta for n in graph.graph.nodes)


def _graph_of(model: Any) -> Any:
    """The graph of an exported program; of a module, itself."""
    return model if isinstance(model, nn.Module) else getattr(model, "graph_module", None)


def _fuse_program(
    program: Any,
    neighbours: bool,
    filter_fn: Callable[[str, nn.Module], bool] | None,
    strict: bool,
    backend: str | None,
) -> FusionReport:
    """Put calls of the public op into a graph."""
    if filter_fn is not None or backend is not None:
        raise ValueError(
            "filter_fn, backend: expected None for a graph, whose products are no modules and "
            "whose backend is chosen where it runs"
        )
    from .fuse.rewrite import Door, rewrite_module

    door = Door(is_graph=True, steps=neighbours)
    graph = _graph_of(program)
    if strict:
        found = rewrite_module(copy.deepcopy(graph), norm_in_training=False, door=door)
        _check_strict([Entry(f.node, f.where, f.note) for f in found.refused])
    outputs = _outputs(graph)
    found = rewrite_module(graph, norm_in_training=False, door=door)
    if graph is not program:  # which knows its outputs by name
        for old, new in zip(outputs, _outputs(graph), strict=True):
            if old != new:
                program.graph_signature.replace_all_uses(old, new)
    fused, refused = (tuple(Entry(f.node, f.where, f.note) for f in part) for part in found)
    return FusionReport(fused, refused)


def _outputs(graph: GraphModule) -> list[str]:
    output = next(n for n in graph.graph.nodes if n.op == "output")
    return [n.name for n in pytree.tree_leaves(output.args) if isinstance(n, Node)]


def _check_strict(refused: Sequence[Entry]) -> None:
    if refused:
        raise ValueError(
            "strict: expected every squeeze-and-excitation module to be replaceable, got "
            + "; ".join(f"{e.name or 'the model'} ({e.kind}): {e.note}" for e in refused)
        )


def unfuse_se_blocks(model: nn.Module) -> int:
    """Give every module that :func:`fuse_se_blocks` converted its original class back.

    Do so before pickling a whole model for others, or quantising layers by their class.
    Exports need it not: docs/deploy.md.

    Returns:
        How many modules were restored.

    Raises:
        TypeError: ``model`` is no module, or something has given one of them another class on top
            (FSDP2, a parametrization): undo that first. Nothing is restored then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    for module in fused:
        if not _is_converted(module):
            raise TypeError(
                f"model: expected modules with the classes that fuse_se_blocks gave them, got one "
                f"of {type(module).__name__}, made of {_kind(module)}: undo first what was done to "
                "it since"
            )
    for module in fused:
        module.__dict__.pop("_senet_form", None)
        module.__dict__.pop("_senet_backend", None)
        module.__class__ = module._original  # type: ignore[assignment]
    return len(fused)
