"""Launches made ready: each kernel with all its arguments but the pointers. Imported on the first
call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from . import plan as plans
from .access import Flat, Functions, Tile
from .bwd_reduce import bwd_reduce_kernel, finish_sums_kernel
from .dx import dx_flat_kernel, dx_tile_kernel
from .excite import factors_kernel, gates_kernel, hidden_kernel
from .excite_bwd import excite_bwd_kernel, hidden_bwd_kernel, sums_kernel
from .launcher import Launch
from .operands import Kind
from .plan import FlatPlan, Plan, TilePlan, ceil_div, divisor
from .scale import scale_flat_kernel, scale_tile_kernel
from .squeeze import mean_kernel, squeeze_kernel

#: Every kernel there is, by the step that it computes.
KERNELS: dict[str, tuple[Any, ...]] = {
    "squeeze": (squeeze_kernel, mean_kernel),
    "excite": (hidden_kernel, gates_kernel, factors_kernel),
    "scale": (scale_flat_kernel, scale_tile_kernel),
    "bwd_reduce": (bwd_reduce_kernel, finish_sums_kernel),
    "excite_bwd": (hidden_bwd_kernel, excite_bwd_kernel, sums_kernel),
    "dx": (dx_flat_kernel, dx_tile_kernel),
}

#: How images of a dtype compute sigmoids by instructions of NVIDIA's GPUs, see :mod:`.pointwise`.
INSTRUCTIONS = dict.fromkeys((torch.bfloat16, torch.float16), "ex2")
_ACCUMULATE = {torch.float32: tl.float32, torch.float64: tl.float64}


class Product(NamedTuple):
    """Constants of kernels that multiply matrices."""

    BM: int
    BN: int
    BK: int
    ACC: tl.dtype
    PRECISION: tl.constexpr


def functions(kind: Kind, dtype: torch.dtype) -> Functions:
    approx = "none"
    if kind.device.capability >= 80:
        approx = INSTRUCTIONS.get(dtype, "none")
    # Functions of a kernel take constants alone for constants: Triton 3.6 no strings.
    return Functions(*map(tl.constexpr, (*kind.options, approx)))


class Builder:
    """Makes the launches of one call of one kind, cut by one plan."""

    def __init__(self, kind: Kind, plan: Plan, x: torch.Tensor, dtype: torch.dtype) -> None:
        """``dtype`` is that of the parameters."""
        self.kind, self.plan, self.shape = kind, plan, kind.shape
        self.functions = functions(kind, x.dtype)
        self.accumulate = _ACCUMULATE[kind.accumulate]
        block = plans.PRODUCT if kind.accumulate == torch.float32 else plans.PRODUCT_FP64
        # Half-precision weights are whole in tf32: three products are as good as float32's.
        few_bits = dtype in (torch.bfloat16, torch.float16) and kind.device.capability >= 80
        precision = tl.constexpr("tf32x3" if few_bits else "ieee")
        self.product = Product(*block, self.accumulate, precision)

    def values(self, **more: Any) -> dict[str, Any]:
        """What most kernels take besides pointers."""
        shape = self.shape
        outputs = shape.outputs or (2 if self.kind.shift else 1) * shape.channels
        return {
            "batch": shape.batch, "channels": shape.channels, "positions": shape.positions,
            "outputs": outputs, "hidden": shape.hidden or 0,
            "ACTIVATION": self.kind.options.activation, "SHIFT": self.kind.shift,
            "F": self.functions, "P": self.product, "ACC": self.accumulate,
            "BLOCK": plans.BLOCK, "BV": plans.VECTOR, "splits": self.plan.sums.splits, **more,
        }  # fmt: skip

    def _strides(self, unit: int, y_stride: int | None) -> dict[str, int]:
        """From image to image, in units; dense where not given."""
        shape = self.shape
        strides = {**self.kind.strides, "y": shape.image if y_stride is None else y_stride}
        outer, inner = shape.rows
        return {
            f"{name}_stride": strides.get(name, shape.image) // unit
            for name in ("x", "dy", "residual", "y")
        } | {"mask_stride": outer * ceil_div(inner, 8)}

    def _over_images(
        self, kernel: Any, cut: TilePlan | FlatPlan, y_stride: int | None = None, **more: Any
    ) -> Launch:
        shape = self.shape
        inner = shape.rows[1]
        values = self.values(
            per_image=divisor(cut.blocks), blocks=cut.blocks, **self._strides(cut.unit, y_stride)
        )
        if isinstance(cut, TilePlan):
            constants: Any = Tile(
                shape.last, cut.outer, cut.inner, cut.steps, cut.full, cut.even, cut.unit,
                cut.wide, cut.splits > 1, self.accumulate,
            )  # fmt: skip
            values |= {
                "inner_units": inner // cut.unit, "tiles": cut.tiles, "splits": cut.splits,
                "rounds": cut.rounds,
            }  # fmt: skip
        else:
            constants = Flat(
                shape.last, cut.row, cut.vec, cut.block, cut.steps, cut.even, cut.unit,
                self.accumulate,
            )  # fmt: skip
            per_row = divisor(inner // cut.vec if shape.last else inner)
            values |= {"extent": inner, "per_row": per_row, "vectors": cut.vectors}
        values |= {"T": constants, **more}
        return Launch(kernel, shape.batch * cut.blocks, values, warps=cut.warps)

    def _finish(self, kernel: Any) -> Launch | None:
        """The launch that adds up the parts of a sum; None where a program has it whole."""
        if self.plan.sums.splits == 1:
            return None
        programs = ceil_div(self.shape.batch * self.shape.channels, plans.BLOCK)
        return Launch(kernel, programs, self.values(), warps=4)

    def _product(self, kernel: Any, columns: int, times: int = 1, **more: Any) -> Launch:
        """Tiles of ``times`` products of ``[B, columns]``."""
        tiles = ceil_div(columns, self.product.BN)
        programs = times * ceil_div(self.shape.batch, self.product.BM) * tiles
        return Launch(kernel, programs, self.values(tiles=tiles, **more), warps=4)

    # -- forward -------------------------------------------------------------------------------

    def squeeze(self) -> tuple[Launch, Launch | None]:
        return self._over_images(squeeze_kernel, self.plan.sums), self._finish(mean_kernel)

    def hidden(self) -> Launch:
        return self._product(hidden_kernel, self.shape.hidden or 0)

    def gates(self) -> Launch:
        return self._product(
            gates_kernel, self.shape.channels, 1 + self.kind.shift, depth=self.shape.inner,
            ACTIVATION=self._inner_activation(),
        )  # fmt: skip

    def factors(self) -> Launch:
        return self._product(factors_kernel, self.shape.channels, 1 + self.kind.shift)

    def scale(self, y_stride: int | None = None) -> Launch:
        flat = isinstance(self.plan.writes, FlatPlan)
        kernel = scale_flat_kernel if flat else scale_tile_kernel
        return self._over_images(kernel, self.plan.writes, y_stride)

    # -- backward ------------------------------------------------------------------------------

    def bwd_reduce(self) -> tuple[Launch, Launch | None]:
        sums = self._over_images(bwd_reduce_kernel, self.plan.sums)
        return sums, self._finish(finish_sums_kernel)

    def hidden_bwd(self) -> Launch:
        return self._product(hidden_bwd_kernel, self.shape.hidden or 0)

    def excite_bwd(self, *, dz: bool, dw2: bool, dw1: bool, vectors: bool) -> Launch | None:
        """None where nothing of it is wanted."""
        shape, p = self.shape, self.product

        def tiles(rows: int, columns: int) -> int:
            return ceil_div(rows, p.BM) * ceil_div(columns, p.BN)

        hidden = shape.hidden or 0
        counts = {
            "dz_tiles": tiles(shape.batch, shape.channels) if dz else 0,
            "w2_tiles": tiles(shape.outputs, shape.inner) if dw2 else 0,
            "w1_tiles": tiles(hidden, shape.channels) if dw1 else 0,
        }
        programs = sum(counts.values())
        if vectors:
            programs += ceil_div(max(shape.outputs, hidden), plans.VECTOR)
        values = self.values(
            **counts, width=shape.inner, ACTIVATION=self._inner_activation(),
            depth=shape.outputs if shape.hidden is None else hidden,
        )  # fmt: skip
        return Launch(excite_bwd_kernel, programs, values, warps=4) if programs else None

    def dx(self, *, reads_x: bool) -> Launch:
        flat = isinstance(self.plan.writes, FlatPlan)
        kernel = dx_flat_kernel if flat else dx_tile_kernel
        return self._over_images(kernel, self.plan.writes, READS_X=reads_x)

    def sums(self) -> Launch:
        """Of ``[B, C]``, and of the parts that dx left for ``before_affine``."""
        writes = self.plan.writes
        rows = self.shape.batch * (writes.splits if isinstance(writes, TilePlan) else 0)
        programs = ceil_div(self.shape.channels, plans.VECTOR)
        return Launch(sums_kernel, programs, self.values(rows=rows), warps=4)

    def _inner_activation(self) -> str:
        """Of what w2 is multiplied with: a single layer has the mean itself."""
        return "identity" if self.shape.hidden is None else self.kind.options.activation
