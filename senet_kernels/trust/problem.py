"""A call of a kind on synthetic data: its tensors, and how kernels, PyTorch and the oracle
compute it.

What depends on the form (the whole operation, its halves) is in :data:`_FORMS`; the rest treats
them alike. Tensors are in the order of the raw ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward as _run_engine
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from senet_kernels import fallback, reference
from senet_kernels.backends import native
from senet_kernels.pointwise import Options, pack

from .bands import Allocations, Bands, same_bits
from .kinds import TRAINING, Kind, digest, plan_for
from .variations import LARGE, MINUS_LARGE, PLAIN, Variation

Tensors = dict[str, Tensor | None]

#: Bytes of x that a proof takes at most, by taking fewer images; but 16 of them where those of the
#: call are a multiple of that.
MOST_BYTES = 64 << 20
# Elements of x that the oracle takes at a time.
_CHUNK = 1 << 22


class _Form(NamedTuple):
    """A form of the operation: its raw ops, and their tensors in order."""

    op: str
    names: tuple[str, ...]
    oracle: Callable[..., Tensor]
    keeps: bool  # forward has an argument `save`, and results besides y


_WHOLE = _Form(
    "forward",
    ("x", "w1", "b1", "w2", "b2", "residual", "alpha", "beta", "a", "b", "lengths"),
    reference.squeeze_excite_flat,
    True,
)
_FORMS: dict[str, _Form] = {
    "squeeze alone": _Form("squeeze", ("x", "a", "b", "lengths"), reference.squeeze_flat, False),
    "channel_scale alone": _Form(
        "channel_scale",
        ("x", "u", "residual", "alpha", "beta", "a", "b"),
        reference.channel_scale_flat,
        True,
    ),
}

# Of these the first extent is the batch,
_OF_IMAGES = frozenset(("x", "u", "residual", "lengths"))
#: and of the results these.
OF_IMAGES = ("y", "d x", "d u", "d residual")


class Results(NamedTuple):
    """What a call computes, by name: ``y``, and gradients as ``d x`` and so on."""

    values: dict[str, Tensor]

    def clone(self) -> Results:
        """A copy, in memory of its own."""
        return Results({name: t.clone() for name, t in self.values.items()})


class Problem:
    """Tensors of a kind, on its device."""

    def __init__(
        self, kind: Kind, batch: int, variation: Variation = PLAIN, *, seed: int = 0
    ) -> None:
        self.kind, self.variation = kind, variation
        self.batch = max(1, batch - variation.fewer)
        self.form = _FORMS.get(kind.call.form, _WHOLE)
        self.bands = Bands()
        of_kind = int(digest(kind.name)[:8], 16)
        self._generator = torch.Generator(kind.device).manual_seed(of_kind + seed)
        # Images with values of their own, by what these are.
        self.marked = {2 * i: what for i, what in enumerate(variation.special)}
        self.overwritten = False  # what forward keeps, by backward
        self.tensors = self._make()
        call = kind.call
        self.code = pack(call.options)
        self.needs = sum(
            1 << i for i, name in enumerate(self.differentiable) if self._has_gradient(name)
        )
        self.dy = self._make_dy() if kind.direction == TRAINING else None

    def _make_dy(self) -> Tensor:
        call, x = self.kind.call, self.tensors["x"]
        assert x is not None
        if self.form.op == "squeeze":
            dy = self._random(x.shape[:2], call.dtype)
        else:
            # So small that sums over all images and positions stay within half precision.
            terms = max(1, x.numel() // max(1, x.shape[1]))
            dy = self._image(call.dtype, turned=self.variation.turned)
            dy.mul_(2.0 ** -round(math.log2(terms) / 2))
        if self.variation.dy and dy.numel():
            _last_of(dy[0]).fill_(float(self.variation.dy))
        return dy

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The tensors that the backward op has gradients of, in its order."""
        return tuple(name for name in self.form.names if name != "lengths")

    def _has_gradient(self, name: str) -> bool:
        # The residual's gradient through identity is dy itself: no kernel computes it.
        passes_dy = name == "residual" and self.kind.call.options.after == "identity"
        wanted = f"d {name}" not in self.variation.without
        return self.tensors[name] is not None and wanted and not passes_dy

    # -- data

    def _make(self) -> Tensors:
        kind, call = self.kind, self.kind.call
        channels, hidden, outputs = kind.shape[1], kind.hidden, kind.outputs
        wide = call.param_dtype
        two = call.form == "two layers"
        inner = hidden if two else channels
        given: Tensors = dict.fromkeys(self.form.names)
        given["x"] = self._emphasised(self._image(call.dtype))
        if call.residual:
            given["residual"] = self._image(
                call.dtype, strides=kind.residual, turned=self.variation.turned
            )
        if "w2" in given:
            given["w2"] = self._random((outputs, inner), wide, 1.5 / max(1, inner) ** 0.5)
            if two:
                given["w1"] = self._random((hidden, channels), wide, 2 / max(1, channels) ** 0.5)
            given["b1"] = self._random((hidden,), wide) if two else None
            given["b2"] = self._random((outputs,), wide)
        if "u" in given:
            given["u"] = self._random((self.batch, outputs), wide)
        if call.weighted:
            given["alpha"] = self._random((channels,), wide)
            given["beta"] = self._random((channels,), wide)
        if call.affine:
            given["a"] = self._random((channels,), wide) * 0.3 + 1
            given["b"] = self._random((channels,), wide)
        if call.lengths and "lengths" in given:
            given["lengths"] = self._lengths()
        given.update(dict.fromkeys(given.keys() & set(self.variation.without)))
        self._mark(given["x"], given.get("u"))
        is_finite = not self.marked and self.variation.lengths != "none" and 0 not in kind.shape
        if given.get("b1") is not None and is_finite:
            self._awaken(given)
        return given

    def _lengths(self) -> Tensor:
        positions = torch.Size(self.kind.shape[2:]).numel()
        images = torch.arange(self.batch, device=self.kind.device)
        lengths = positions - (images * 7 + 3) % max(1, positions)
        first = {"none": 0, "one": min(1, positions), "all": positions}
        lengths[:1] = first.get(self.variation.lengths, int(lengths[0]) if self.batch else 0)
        return lengths

    def _emphasised(self, x: Tensor) -> Tensor:
        """The images as the variation has them."""
        if self.variation.tail and x.numel():
            positions = min(torch.Size(x.shape[2:]).numel(), 4096)
            x[-1].zero_()
            for channel in range(min(3, x.shape[1])):  # and every third from there on
                _last_of(x[-1, channel::3]).fill_(positions * (1 + channel) / 4)
        return x if self.variation.scale == 1 else x.mul_(self.variation.scale)

    def _awaken(self, given: Tensors) -> None:
        """Choose b1 so that no hidden unit is below zero in all images: one that is would hide what
        becomes of it. Of several images each unit is on in some and off in others."""
        x, w1, b1 = (given[name] for name in ("x", "w1", "b1"))
        assert x is not None
        assert w1 is not None
        assert b1 is not None
        a, b = given["a"], given["b"]
        z = fallback.squeeze(
            x.float(), before=self.kind.call.options.before, lengths=given["lengths"],
            before_affine=None if a is None or b is None else (a.float(), b.float()),
        )  # fmt: skip
        u = z @ w1.float().t()
        if len(u) == 1:
            above = torch.rand(u.shape[1], generator=self._generator, device=u.device) + 0.25
            b1.copy_(above - u[0])
        else:
            b1.copy_((u.amax(0) + u.amin(0)) / -2)

    def _random(self, shape: Any, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(
            tuple(shape), generator=self._generator, device=self.kind.device, dtype=torch.float32
        )
        strides = torch.empty(tuple(shape), device="meta").stride()
        made = self.bands.tensor(tuple(shape), strides, dtype, self.kind.device)
        return made.copy_(values.mul_(scale))

    def _image(
        self, dtype: torch.dtype, *, strides: tuple[int, ...] = (), turned: bool = False
    ) -> Tensor:
        """Random numbers, and a part that says where they are: no two images or channels have the
        same mean. ``strides``: for the kind's batch, in place of those of x; ``turned``: not in the
        order of these, nor aligned."""
        kind = self.kind
        shape = (self.batch, *kind.shape[1:])
        strides = strides or kind.strides
        strides = _turned(shape, strides) if turned else _strides_for(kind, strides, shape)
        values = torch.randn(
            shape, generator=self._generator, device=kind.device, dtype=torch.float32
        ).mul_(0.7)  # fmt: skip
        for axis, step in ((0, 1.7), (1, 0.61), (len(shape) - 1, 0.23)):
            view = [1] * len(shape)
            view[axis] = -1
            places = torch.arange(shape[axis], device=kind.device, dtype=torch.float32)
            values += torch.sin(places * step + 0.3).reshape(view)
        offset = 0 if kind.aligned and not turned else 1
        made = self.bands.tensor(shape, strides, dtype, kind.device, offset)
        return made.copy_(values)

    def _mark(self, x: Tensor | None, u: Tensor | None) -> None:
        """Put what the variation asks for into images of their own: NaN or an infinity into a
        channel, or numbers so large that exponentials of them overflow."""
        if x is None or 0 in x.shape:
            return
        self.marked = {image: what for image, what in self.marked.items() if image < len(x)}
        for image, what in self.marked.items():
            if what in (LARGE, MINUS_LARGE):
                for of_image in (t[image] for t in (x, u) if t is not None):
                    of_image.clamp_(1, 4).mul_(100 if what == LARGE else -100)
            else:
                channel = (3 * image // 2 + 1) % x.shape[1]
                x[image, channel].select(-1, x.shape[-1] // 2).fill_(float(what))

    def are(self, *what: str) -> list[int]:
        """The images that hold some special values."""
        return [image for image, of in self.marked.items() if of in what]

    # -- the ways to compute it

    def kernel(self, x: Tensor | None = None) -> Results:
        """By the backend's raw ops, what they allocate between bands. ``x``: to overwrite, where
        the call does."""
        with native.dispatched_allocations(), Allocations(self.bands) as seen:
            try:
                return self._kernel(x, watched=True)
            except Exception:
                if seen.error is not None:  # of which compiled code says that memory is out
                    raise seen.error from None
                raise

    def kernel_plainly(self) -> Results:
        """The same without bands, for its time."""
        return self._kernel(None)

    def _kernel(self, x: Tensor | None, *, watched: bool = False) -> Results:
        form, kind = self.form, self.kind
        given = [self.tensors[name] for name in form.names]
        if kind.call.inplace:
            target = self.tensors["x"] if x is None else x
            assert target is not None
            self._op("forward_")(target, *given[1:], self.code)
            return Results({"y": target})
        keep = kind.direction == TRAINING
        more = (keep,) if form.keeps else ()
        result = self._op(form.op)(*given, self.code, *more)
        y, *kept = result if form.keeps else (result,)
        values = {"y": y}
        if not keep:
            return Results(values)
        backward = "backward" if form.op == "forward" else f"{form.op}_backward"
        if kind.call.residual and not Options(*kind.call.options).after_again:
            given[form.names.index("residual")] = None
        copies = [t.clone() for t in kept] if watched else []
        gradients = self._op(backward)(self.dy, *given, *kept, self.code, self.needs)
        self.overwritten = not all(map(same_bits, copies, kept))
        for i, name in enumerate(self.differentiable):
            if self.needs & (1 << i):
                values[f"d {name}"] = gradients[i]
        return Results(values)

    def _op(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.senet_kernels, f"{self.kind.backend}_{name}").default
        # Past the modes, to the kernel itself; in it they are on.
        key = "CUDA" if torch.device(self.kind.device).type == "cuda" else "CPU"
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def call(*args: Any) -> Any:
            return op.redispatch(keys, *args)

        return call

    def eager(self) -> Results:
        """By PyTorch's own operators in the dtype of x."""
        return self._differentiated(self.plain_forward, self.tensors, self.dy)

    def plain_forward(self, given: Tensors) -> Tensor:
        """The forward pass of :meth:`eager`."""
        x, call = given["x"], self.kind.call
        assert x is not None
        given = {
            name: t if t is None or name == "lengths" else t.to(x.dtype)
            for name, t in given.items()
        }
        options: dict[str, Any] = {"before": call.options.before}
        if given["a"] is not None:
            options["before_affine"] = (given["a"], given["b"])
        if self.form.op == "squeeze":
            return fallback.squeeze(x, lengths=given["lengths"], **options)
        options |= {name: given[name] for name in ("residual", "alpha", "beta")}
        options |= {"gate": call.options.gate, "after": call.options.after}
        if self.form.op == "channel_scale":
            u = given["u"]
            assert u is not None
            return fallback.channel_scale(x, u, **options)
        w2 = given["w2"]
        assert w2 is not None
        return fallback.squeeze_excite(
            x, given["w1"], given["b1"], w2, given["b2"],
            activation=call.options.activation, lengths=given["lengths"], **options,
        )  # fmt: skip

    def _oracle_forward(self, given: Tensors) -> Tensor:
        return self.form.oracle(self.kind.call.options, *(given[n] for n in self.form.names))

    def oracle(self, first: int = 0) -> Iterator[tuple[slice, Results]]:
        """The results in float64, some images at a time: their slice of the batch, and what is of
        them; last, with a slice of nothing, the gradients that are sums over the batch. ``first``:
        begin with this image; sums are then of no use."""
        totals: dict[str, Tensor] = {}
        per_image = max(1, torch.Size(self.kind.shape[1:]).numel())
        step = max(1, _CHUNK // per_image)
        for start in range(first, self.batch, step):
            part = slice(start, min(start + step, self.batch))
            given: Tensors = {
                name: t if t is None
                else t[part] if name == "lengths"
                else (t[part] if name in _OF_IMAGES else t).double()
                for name, t in self.tensors.items()
            }  # fmt: skip
            dy = None if self.dy is None else self.dy[part].double()
            values = self._differentiated(self._oracle_forward, given, dy).values
            for name in [n for n in values if n not in OF_IMAGES]:
                sums = values.pop(name)
                totals[name] = totals[name] + sums if name in totals else sums
            yield part, Results(values)
        yield slice(0, 0), Results(totals)

    def reference(self) -> Results:
        """By the reference, in the dtype that kernels compute in."""
        return self._differentiated(self._oracle_forward, self.tensors, self.dy)

    def _differentiated(
        self, forward: Callable[[Tensors], Tensor], given: Tensors, dy: Tensor | None
    ) -> Results:
        if dy is None:
            with torch.no_grad():
                return Results({"y": forward(given)})
        left_out = self.variation.without
        wanted = [n for n in self.differentiable if f"d {n}" not in left_out]
        names = [n for n in wanted if given[n] is not None]
        leaves = {n: t.detach().requires_grad_() for n in names if (t := given[n]) is not None}
        with torch.enable_grad():
            y = forward({**given, **leaves})
        # What torch.autograd.grad calls; given dy, that would import SymPy first.
        gradients = _run_engine(
            (y,), (dy.to(y.dtype),), False, False, tuple(leaves.values()),
            allow_unreachable=False, accumulate_grad=False,
        )  # fmt: skip
        named = {f"d {n}": g for n, g in zip(leaves, gradients, strict=True)}
        return Results({"y": y.detach(), **named})


def _strides_for(kind: Kind, strides: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the kind's images for another batch; dense ones where its elements overlap."""
    covered = 1
    for stride, extent in sorted(zip(strides, kind.shape, strict=True)):
        if extent > 1:
            if stride < covered:
                layout = torch.empty(shape, device="meta")
                if "channels-last" in kind.name and len(shape) == 4:
                    layout = layout.contiguous(memory_format=torch.channels_last)
                return tuple(layout.stride())
            covered = stride * extent
    return strides


def _last_of(t: Tensor) -> Tensor:
    """The last position of each row; of what has no positions, its last element."""
    while t.dim() > 1:
        t = t.select(-1, -1)
    return t


def _turned(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a batch that is not in the order of x: channels last where x has them first, and
    the other way round; a part of a larger one."""
    order = list(range(len(shape)))
    if len(shape) > 2 and strides[1] != 1:
        order = [0, *order[2:], 1]
    found, covered = [0] * len(shape), 1
    for axis in reversed(order):
        found[axis] = covered
        covered *= shape[axis] + (axis == order[1])
    return tuple(found)


def plan_with(kind: Kind, batch: int) -> str:
    """The launch plan of the call with another number of images."""
    shape = (batch, *kind.shape[1:])
    return plan_for(
        kind.backend, kind.call, kind.device, shape, _strides_for(kind, kind.strides, shape),
        kind.aligned, kind.hidden, kind.outputs, kind.direction,
    )  # fmt: skip


def batch_for(kind: Kind, most: int = MOST_BYTES) -> int:
    """How many images a proof takes: those of the call, as far as they are not too many; tiles of
    16 are full with them, or not, as with the call's."""
    elements = max(1, torch.Size(kind.shape[1:]).numel(), kind.strides[0])  # and what lies between
    image = elements * kind.call.dtype.itemsize
    batch = max(1, min(kind.shape[0], most // image))
    if batch >= kind.shape[0] or (batch % 16 == 0) == (kind.shape[0] % 16 == 0):
        return batch
    if kind.shape[0] % 16:
        return batch - 1
    return max(16, batch // 16 * 16)


@contextmanager
def undisturbed(device: str) -> Iterator[None]:
    """Where nothing of the caller's has a part: modes, autocast, hooks, inference mode, the search
    for anomalies."""
    kind = torch.device(device).type
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        hooks_are_on: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        if hooks_are_on:  # else there are none
            stack.enter_context(saved_tensors_hooks(lambda t: t, lambda t: t))
        if kind == "cuda":
            stack.enter_context(torch.cuda.device(torch.device(device)))
        yield


@contextmanager
def exact_products(device: str) -> Iterator[None]:
    """While the errors of PyTorch's own operators are a measure: products of float32 and float16
    matrices are accumulated in float32 of all bits, whatever the caller allows (TF32, say)."""
    is_gpu = torch.device(device).type == "cuda"
    products = getattr(torch.backends, "cuda" if is_gpu else "mkldnn").matmul
    precision = products.fp32_precision
    flags = {name: getattr(products, name) for name in _REDUCED if is_gpu}
    if precision not in ("ieee", "none"):
        products.fp32_precision = "ieee"
    for name in flags:
        setattr(products, name, False)
    try:
        yield
    finally:
        if precision not in ("ieee", "none"):
            products.fp32_precision = "none"  # which follows torch.backends.fp32_precision
            if products.fp32_precision != precision:
                products.fp32_precision = precision
        for name, value in flags.items():
            setattr(products, name, value)


# Of products of half-precision matrices.
_REDUCED = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


def accumulates_in(kind: Kind) -> torch.dtype:
    """The dtype that kernels compute in."""
    return reference.accumulate_dtype(kind.call.dtype)
