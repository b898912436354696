"""What a kernel is tried on, besides the plain call: what calls of a kind may leave out, and data
that shows what plain random numbers hide."""

from __future__ import annotations

from typing import NamedTuple

from .kinds import TRAINING, Kind

_PARAMETERS = ("w1", "b1", "w2", "b2", "alpha", "beta", "a", "b")
_BIASES = ("b1", "b2")
_FROZEN = tuple(f"d {name}" for name in _PARAMETERS)

#: What takes an image of its own in :func:`special`: values of a channel, or all of an image so
#: large that exponentials of it overflow.
NAN, INFINITE, MINUS_INFINITE, LARGE, MINUS_LARGE = "nan", "inf", "-inf", "large", "-large"
_SPECIAL = (NAN, INFINITE, LARGE, MINUS_INFINITE, MINUS_LARGE)


class Variation(NamedTuple):
    """One way to call a kernel.

    Attributes:
        without: tensors that are left out, and gradients (``d x``) that are not wanted.
        scale: times the images: functions that are bounded (ReLU6) are met beyond their bounds.
        tail: the last image is zero but for its last position: a sum that ends too soon is wrong.
        turned: dy and the residual lie in memory in another order than x, and not aligned.
        lengths: of the first image, where there are any: ``"some"`` positions, ``"one"``,
            ``"all"``, or ``"none"``, whose mean is NaN.
        fewer: images less than the batch: tiles that are full with it are not.
        special: what stands in images 0, 2, 4 and so on, see :func:`special`.
        dy: what stands in the gradient of the first image: ``"inf"`` or nothing.
    """

    without: tuple[str, ...] = ()
    scale: float = 1.0
    tail: bool = False
    turned: bool = False
    lengths: str = "some"
    fewer: int = 0
    special: tuple[str, ...] = ()
    dy: str = ""


PLAIN = Variation()


def of_numbers(kind: Kind, forced: bool = False) -> tuple[Variation, ...]:
    """What results are compared of, number by number; the plain call first. ``forced``: by a plan
    that is not for all calls of the kind: neither one without a second pass, nor misaligned ones.
    """
    call = kind.call
    bare = Variation((*_BIASES, "beta"), scale=2.5, lengths="one")
    tail = Variation(("alpha", *_FROZEN), tail=True, turned=not forced, lengths="all")
    if kind.direction != TRAINING:
        return PLAIN, bare, tail
    frozen_images = Variation(("d x", "d residual"), scale=2.5, fewer=1)
    has_more = (call.form != "squeeze alone" or call.affine) and not forced
    # Of the parameters the vectors alone, which is another launch.
    vectors = Variation(("d w1", "d w2"), tail=True, fewer=1)
    more = (frozen_images,) if has_more else ()
    return PLAIN, bare, tail, *more, *((vectors,) if "layer" in call.form else ())


def special(kind: Kind, batch: int) -> tuple[Variation, ...]:
    """What NaN, infinities and overflows are looked for in. Every other image stays as it is;
    where there are too few images, there are more calls."""
    places = max(1, (batch + 1) // 2)
    found = [
        Variation(without, special=_SPECIAL[first : first + places])
        for without in ((), (*_BIASES, "beta"))
        for first in range(0, len(_SPECIAL), places)
    ]
    if kind.call.lengths:
        found.append(Variation(lengths="none"))
    if kind.direction == TRAINING:
        found.append(Variation(special=(NAN,)))
        found.append(Variation(dy="inf"))
    return tuple(found)
