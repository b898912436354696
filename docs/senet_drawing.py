"""Draws docs/senet.svg and docs/senet.zh-CN.svg: ``python docs/senet_drawing.py``.

The sizes in the drawing are those of the model, read from a forward pass on the meta device.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from senet_kernels.models import SENet
from svg import Drawing

#: The words of each drawing.
TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))

_WIDTH, _HEIGHT = 940, 660


def _shapes() -> tuple[list[str], list[int], int]:
    """Sizes after stem and stages for 224 pixels, blocks of each stage, features."""
    with torch.device("meta"):
        model = SENet(num_classes=1000).eval()
        sizes: list[str] = []
        for name in ("maxpool", *model.stages):
            model.get_submodule(name).register_forward_hook(
                lambda module, args, y: sizes.append("x".join(map(str, y.shape[1:])))
            )
        model(torch.empty(1, 3, 224, 224))
    return sizes, list(model.architecture.layers), model.num_features


def _network(d: Drawing, t: dict[str, str]) -> None:
    sizes, blocks, features = _shapes()
    x, w, h = 30, 330, 44
    d.title(x + w / 2, 34, t["network"])
    rows = [("#eeeeee", (t["image"],), "3x224x224"), ("#dde8f7", (t["stem"],), sizes[0])]
    for i, count in enumerate(blocks):
        label = f"layer{i + 1}: " + t["stage"].format(blocks=count)
        rows.append(("#cfe8d5", (label,), sizes[i + 1]))
    rows.append(("#dde8f7", (t["pool"],), str(features)))
    rows.append(("#eeeeee", (f"{t['fc']} (fc)",), "num_classes"))
    for i, (fill, lines, size) in enumerate(rows):
        y = 55 + 75 * i
        d.box(x, y, w, h, fill, *lines)
        d.arrow((x + w / 2, y + h), (x + w / 2, y + 75))
        d.text(x + w / 2 + 8, y + h + 20, size, "start", "font-size='11'")


def _block(d: Drawing, t: dict[str, str]) -> None:
    left, w, h = 445, 300, 34
    mid = left + w / 2
    d.title(mid + 40, 34, t["block"])
    for i, name in enumerate(("conv1", "conv2", "conv3")):
        d.box(left, 80 + 50 * i, w, h, "#dde8f7", t[name])
        if i:
            d.arrow((mid, 64 + 50 * i), (mid, 80 + 50 * i))
    d.arrow((mid, 50), (mid, 80))
    d.frame(left - 40, 240, w + 110, 380, t["fused"])
    d.arrow((mid, 214), (mid, 272))
    for i, name in enumerate(("squeeze", "fc1", "relu", "fc2", "gate")):
        y = 272 + 50 * i
        d.box(left, y, w, h, "#f7dfc0", t[name])
        d.arrow((mid, y + h), (mid, y + 50))
    d.box(left, 522, w, h, "#f3c98b", t["scale"])
    d.arrow((mid, 228), (left - 20, 228), (left - 20, 539), (left, 539))
    d.text(left - 26, 400, "x", "end", "font-style='italic'")
    d.arrow((mid, 556), (mid, 572))
    d.box(left, 572, w, h, "#f3c98b", t["sum"])
    far = left + w + 40
    d.arrow((mid, 60), (far, 60), (far, 589), (left + w, 589))
    d.parts.append(f"<g transform='translate({far + 45} 330) rotate(90)'>")
    d.text(0, 0, t["shortcut"])
    d.parts.append("</g>")
    d.arrow((mid, 606), (mid, 648))


def main() -> None:
    """Write both drawings beside this file."""
    for name, texts in TEXTS.items():
        drawing = Drawing(_WIDTH, _HEIGHT)
        _network(drawing, texts)
        _block(drawing, texts)
        drawing.save(Path(__file__).with_name(name))


if __name__ == "__main__":
    main()
