"""What is captured trains: every gradient of an exported, traced, split, checkpointed or quantised
network with fused blocks is that of the network written out."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import captures
from captures import (
    CASES,
    FEW,
    PUBLIC,
    Captured,
    Case,
    assert_same,
    export,
    gradients,
    operators,
    own,
    penalties,
)
from senet_kernels import BackendUnavailableError, backends, resolve, squeeze_excite, use_backend

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_of_few = pytest.mark.parametrize("case", FEW, ids=str)
#: For what takes a second each: a call, a converted module, the halves.
each_of_three = pytest.mark.parametrize("case", FEW[::2], ids=str)


@pytest.fixture(autouse=True)
def _no_lost_gradients() -> Iterator[None]:
    """torch warns where an operator without a derivative cuts a graph off."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no autograd kernel|.*autograd kernel was not")
        yield
    torch._dynamo.reset()


def _trains(case: Case, captured: Captured, *, second: bool = False, larger: bool = False) -> None:
    """Every gradient is the written-out network's, for a batch and a size it has not seen too."""
    plain = own(case.net(plain=True))
    for inputs in (case.inputs(), *([case.inputs(captures.OTHER_BATCH, 3)] if larger else [])):
        assert_same(gradients(captured, inputs), gradients(plain, inputs))
        if second:
            assert_same(penalties(captured, inputs), penalties(plain, inputs))


@each_case
def test_eager(case: Case) -> None:
    """What the others are compared with: the two networks are the same one, and every parameter
    takes part."""
    right = gradients(own(case.net(plain=True)), case.inputs())
    shares = {n: (g != 0).double().mean().item() for n, g in right.items() if g is not None}
    assert len(shares) == len(right)
    assert min(shares.values()) > 0.2, shares
    _trains(case, own(case.net()), second=True, larger=True)


# ---- torch.export ----


@each_case
def test_exported(case: Case) -> None:
    program = export(case, dynamic=True)
    assert captures.operators(program.graph_module) <= PUBLIC
    assert captures.operators(program.graph_module)
    _trains(case, own(program.module()), second=True, larger=True)


@each_of_few
def test_exported_strictly(case: Case) -> None:
    program = export(case, strict=True, dynamic=True)
    assert captures.operators(program.graph_module) <= PUBLIC
    assert captures.operators(program.graph_module)
    _trains(case, own(program.module()), larger=True)


@each_of_few
def test_saved_loaded_and_unflattened(case: Case) -> None:
    program = captures.saved_and_loaded(export(case, dynamic=True))
    _trains(case, own(program.module()), second=True, larger=True)
    _trains(case, own(torch.export.unflatten(program)), larger=True)


@each_of_few
def test_decomposed_to_core_operators(case: Case) -> None:
    """What back ends ask for: the operator stays whole, and has its derivative, unless its own
    decomposition is asked for."""
    program = export(case, dynamic=True).run_decompositions()
    assert captures.operators(program.graph_module) <= PUBLIC
    assert captures.operators(program.graph_module)
    _trains(case, own(program.module()), larger=True)


@each_of_three
def test_decomposed_by_its_own_decomposition(case: Case) -> None:
    table = torch.export.default_decompositions()
    for name in PUBLIC:
        op = getattr(torch.ops.senet_kernels, name).default
        table[op] = torch._decomp.decomposition_table[op]
    program = export(case, dynamic=True).run_decompositions(table)
    assert captures.operators(program.graph_module) == set()
    _trains(case, own(program.module()), larger=True)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_program_reads_like_the_formula(strict: bool) -> None:
    """Names, not numbers; nothing of the machine that captured it."""
    case = captures.FEW[1]  # FusedSEBlock(before="silu", after="relu", gate="hardsigmoid")
    program = export(case, strict=strict)
    text = str(program)
    assert "torch.ops.senet_kernels.squeeze_excite.default(" in text
    for argument in ("gate = 'hardsigmoid'", "before = 'silu'", "after = 'relu'", "residual = "):
        assert argument in text
    for private in ("native_", "triton_", "forward", "reference"):
        assert f"senet_kernels.{private}" not in text


@each_of_few
def test_extents_that_tracing_takes_for_constants(case: Case) -> None:
    """0 and 1, where the batch and the extents of space may be anything."""
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        case.net(), case.inputs(),
        dynamic_shapes=({0: auto, 2: auto, 3: auto}, {0: auto})[: 1 + case.lengths],
    )  # fmt: skip
    captured, plain = own(program.module()), own(case.net(plain=True))
    (x,) = case.inputs()
    for part in (x[:1], x[:0], x[:, :, :1], x[:1, :, :1, :1]):
        if len(part) == 0 and case.name == "converted-halves":
            continue  # timm's module itself has no view of no images
        assert_same(gradients(captured, (part,)), gradients(plain, (part,)))


@each_of_few
def test_other_parameters(case: Case) -> None:
    """In a copy, in place of its own by ``functional_call``, and loaded into a program."""
    net, plain = case.net(), case.net(plain=True)
    program = export(case, net=net)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.25)
    other = {n: p.detach().clone().requires_grad_() for n, p in plain.named_parameters()}
    module, inputs = copy.deepcopy(program).module(), case.inputs()
    right = gradients(own(plain), inputs)
    by_call = (lambda *given: torch.func.functional_call(module, other, given)), other
    assert_same(gradients(by_call, inputs), right)
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(other, strict=False)
    assert_same(gradients(own(loaded), inputs), right)
    _trains(case, own(module))


def test_halves_read_like_their_formulas() -> None:
    text = str(export(next(case for case in CASES if case.name == "halves-lengths")))
    assert "torch.ops.senet_kernels.squeeze.default(" in text
    assert "torch.ops.senet_kernels.channel_scale.default(" in text
    for argument in ("before = 'silu'", "gate = 'tanh'", "after = 'gelu'", "lengths = "):
        assert argument in text


# ---- what names a backend ----


def _named(name: str, where: str, case: Case) -> torch.export.ExportedProgram:
    net = case.net()
    if where == "context":
        with use_backend(name):
            return export(case, net=net)
    net.block.inner.backend = name
    return export(case, net=net)


@pytest.mark.parametrize("where", ["context", "argument"])
@pytest.mark.parametrize("name", list(backends().reasons))
def test_a_backend_named_at_capture(name: str, where: str) -> None:
    """It trains whatever was named, and runs anywhere; or the error says why not."""
    case = next(case for case in CASES if case.name == "FusedSEBlock-plain")
    if name == "triton":  # not on a CPU
        with pytest.raises(BackendUnavailableError, match="triton"):
            _named(name, where, case)
        return
    program = _named(name, where, case)
    recorded = set() if name in ("fallback", "reference") else {"squeeze_excite"}
    assert captures.operators(program.graph_module) == recorded
    _trains(case, own(program.module()), second=True)


def test_in_place_does_not_stay_in_a_program() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            y = 2 * x
            squeeze_excite(y, w, None, w.t(), None, inplace=True)
            return y

    x, w = torch.randn(2, 8, 3, 5), torch.randn(4, 8)
    with torch.no_grad():
        program = torch.export.export(InPlace(), (x, w)).run_decompositions()
    assert captures.operators(program.graph_module) <= PUBLIC
    torch.testing.assert_close(program.module()(x, w), InPlace()(x, w))


# ---- other captures ----


@pytest.mark.parametrize("how", [
    {}, {"pre_dispatch": True}, {"tracing_mode": "symbolic"},
    {"tracing_mode": "symbolic", "pre_dispatch": True},
], ids=str)  # fmt: skip
@each_of_few
def test_make_fx(case: Case, how: dict[str, Any]) -> None:
    _trains(case, captures.by_make_fx(case, **how), larger="tracing_mode" in how)


@each_of_few
def test_make_fx_of_forward_and_backward(case: Case) -> None:
    """A training step as one graph."""
    net = case.net()
    names, values = zip(*net.named_parameters(), strict=True)

    def step(parameters: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        y = torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), inputs)
        return torch.autograd.grad(y.square().sum(), parameters)

    inputs = case.inputs()
    got = make_fx(step)(values, *inputs)(values, *inputs)
    right = gradients(own(case.net(plain=True)), inputs)
    assert_same(dict(zip(names, got, strict=True)), {n: right[n] for n in names})


@each_of_few
def test_no_symbol_stays_in_the_cache(case: Case) -> None:
    """The next call that is traced would be compared with it."""
    resolve._RESOLVED.clear()
    captures.by_make_fx(case, tracing_mode="symbolic")
    for kind in resolve._RESOLVED:
        facts = [fact for fact in kind if isinstance(fact, tuple)]
        assert {type(f) for of in facts for f in of} <= {bool, str, type(None)}, kind


@each_of_few
def test_checkpointed(case: Case) -> None:
    module = export(case).module()
    _trains(case, (captures.checkpointed(module), dict(module.named_parameters())))
    inside = captures.CheckpointInside(case.net())
    module = torch.export.export(inside, case.inputs()).module()
    parameters = {n.removeprefix("net."): p for n, p in module.named_parameters()}
    _trains(case, (module, parameters))


@pytest.mark.parametrize("name", ["vmap", "jacrev", "jacfwd", "jvp"])
def test_transforms_of_a_captured_network(name: str) -> None:
    case = FEW[1]
    module, plain = export(case).module(), case.net(plain=True)
    (x,) = case.inputs()
    x = x[:, :, :3, :3] if name.startswith("jac") else x
    transforms: dict[str, Callable[[Any], Tensor]] = {
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        "jacrev": lambda f: torch.func.jacrev(f)(x),
        "jacfwd": lambda f: torch.func.jacfwd(f)(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    }
    if name.startswith("jac"):
        module = torch.export.export(case.net(), (x,)).module()
    with torch.no_grad():
        got, right = (transforms[name](f) for f in (module, plain))
    torch.testing.assert_close(got, right, rtol=0, atol=1e-10)


@each_of_three
def test_captured_twice(case: Case) -> None:
    """A captured network is captured again, strictly, and traced."""
    module = export(case, dynamic=True).module()
    again = torch.export.export(module, case.inputs(), strict=True)
    assert captures.operators(again.graph_module) == captures.operators(module) != set()
    _trains(case, own(again.module()))
    _trains(case, captures.by_make_fx(case, module))


def _assert_near(got: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> None:
    """Equal up to the rounding of bfloat16, in the same dtypes."""
    assert got.keys() == right.keys()
    for name, value in right.items():
        found = got[name]
        assert value is not None
        assert found is not None, name
        assert found.dtype == value.dtype, name
        assert (found - value).float().norm() <= 0.02 * value.float().norm(), name


class _Autocast(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            result: Tensor = self.net(*inputs)
        return result


_CONSTANT = next(case for case in CASES if case.name == "FusedSEBlock-constant")
each_kind = pytest.mark.parametrize("case", [FEW[1], FEW[4], _CONSTANT], ids=str)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@each_kind
def test_autocast_inside(case: Case, strict: bool) -> None:
    """Captured with the network."""
    inputs = tuple(t.float() for t in case.inputs())
    right = gradients(own(_Autocast(case.net().float())), inputs)
    program = torch.export.export(_Autocast(case.net().float()), inputs, strict=strict)
    assert captures.operators(program.graph_module) <= PUBLIC
    _assert_near(gradients(own(program.module()), inputs), right)


@each_kind
def test_autocast_outside(case: Case) -> None:
    """Where the captured network runs; that around torch.export itself is not captured."""
    inputs = tuple(t.float() for t in case.inputs())
    network = case.net().float()
    without, right = gradients(own(network), inputs), gradients(own(_Autocast(network)), inputs)
    module = torch.export.export(network, inputs).module()
    _assert_near(gradients(own(_Autocast(module)), inputs), right)
    with torch.autocast("cpu", torch.bfloat16):
        module = torch.export.export(case.net().float(), inputs).module()
    _assert_near(gradients(own(module), inputs), without)


# ---- compiled ----


def _equal_or_error(run: Callable[[], dict[str, Tensor | None]], right: dict[str, Any]) -> None:
    got = None
    with contextlib.suppress(RuntimeError):  # nothing but torch's own refusal
        try:
            got = run()
        except RuntimeError as error:
            if "double backward" not in str(error):
                raise AssertionError from error
            raise
    if got is not None:
        assert_same(got, right)


@each_of_three
def test_compiled(case: Case) -> None:
    """A captured network and the network itself, by torch.compile."""
    inputs = case.inputs()
    right = gradients(own(case.net(plain=True)), inputs)
    for module in (case.net(), export(case).module()):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_same(gradients((compiled, dict(module.named_parameters())), inputs), right)


@each_of_three
def test_inductor_keeps_the_ops_of_a_captured_network(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CI set, too, where Inductor refuses operators with a decomposition and no lowering."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("CI", "1")
    inputs = case.inputs()
    module = export(case).module()
    with torch.no_grad():
        right = case.net(plain=True)(*inputs)
        compiled = torch.compile(module, options={"fx_graph_cache": False})
        y, code = run_and_get_code(compiled, *inputs)
    torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-10)
    for op in PUBLIC & operators(module):
        assert f"torch.ops.senet_kernels.{op}" in "".join(code)


@pytest.mark.parametrize("captured", [False, True], ids=["module", "exported"])
@each_of_three
def test_gradient_penalty_of_a_compiled_network(case: Case, captured: bool) -> None:
    """Double backward through torch.compile: the right numbers or an error."""
    inputs = case.inputs()
    right = penalties(own(case.net(plain=True)), inputs)
    module = export(case).module() if captured else case.net()
    compiled = torch.compile(module, backend="aot_eager")
    parameters = dict(module.named_parameters())
    _equal_or_error(lambda: penalties((compiled, parameters), inputs), right)


@each_of_three
def test_compiled_gradient_penalty(case: Case) -> None:
    """The whole loss, first gradient included, inside torch.compile."""
    inputs = case.inputs()
    right = penalties(own(case.net(plain=True)), inputs)
    module = case.net()
    parameters = dict(module.named_parameters())

    @torch.compile(backend="aot_eager")
    def loss(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = module(x, *rest)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y.sum() + dx.square().sum(), y, dx

    def run() -> dict[str, Tensor | None]:
        x = inputs[0].detach().requires_grad_()
        total, y, dx = loss(x, *inputs[1:])
        total.backward()
        return {"y": y.detach(), "x": x.grad, "dx": dx.detach(),
                **{n: p.grad for n, p in parameters.items()}}  # fmt: skip

    _equal_or_error(run, right)
