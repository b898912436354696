"""Writes and executes tour.ipynb: ``python examples/tour.py``, with the extra ``notebook``."""

from __future__ import annotations

from pathlib import Path

CELLS = (
    """# A tour of senet_kernels

Squeeze-and-excitation: the mean of each channel goes through a tiny MLP, whose outputs scale the
channels. Here it is one operation.""",
    """import torch

from senet_kernels import FusedSEBlock, explain

torch.manual_seed(0)
block = FusedSEBlock(64, reduction=8)
x = torch.randn(2, 64, 14, 14)
y = block(x)
block, y.shape""",
    "## What it does: one gate per channel\n\nThe output is the input times a number per channel.",
    """gates = (y / x).flatten(2)
print("a channel's gate, smallest and largest over its positions:", gates[0, 0].aminmax())
print("gates of the first image:", gates[0, :6, 0])""",
    "It cannot see where anything is: permuted positions leave the gates as they were.",
    '''order = torch.randperm(14 * 14)
permuted = x.flatten(2)[:, :, order].view_as(x)
torch.testing.assert_close(block(permuted).flatten(2), y.flatten(2)[:, :, order])
"same gates"''',
    "## Gradients\n\nThe same as those of the definition in float64.",
    '''def definition(x, w1, b1, w2, b2):
    z = x.mean((2, 3))
    u = torch.relu(z @ w1.flatten(1).T + b1) @ w2.flatten(1).T + b2
    return x * torch.sigmoid(u)[:, :, None, None]


parameters = block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias
exact = [t.detach().double().requires_grad_() for t in (x, *parameters)]
definition(*exact).square().sum().backward()
leaf = x.clone().requires_grad_()
block(leaf).square().sum().backward()
error = (leaf.grad - exact[0].grad).abs().max() / exact[0].grad.abs().max()
assert error < 1e-5
"largest error of dx, of its largest value: below 1e-5"''',
    "## A model that exists",
    """from torch import nn

from senet_kernels import fuse_se_blocks


class Attention(nn.Module):  # somebody's own squeeze-and-excitation
    def __init__(self, channels):
        super().__init__()
        self.down = nn.Linear(channels, channels // 4)
        self.up = nn.Linear(channels // 4, channels)

    def forward(self, x):
        u = self.up(torch.relu(self.down(x.mean((2, 3)))))
        return x * torch.sigmoid(u)[:, :, None, None]


network = nn.Sequential(nn.Conv2d(3, 64, 3), Attention(64), nn.Conv2d(64, 8, 3)).eval()
picture = torch.randn(1, 3, 32, 32)
before = network(picture)
print(fuse_se_blocks(network))
torch.testing.assert_close(network(picture), before)""",
    "## What runs, and why",
    """print(str(explain(x, *parameters)).splitlines()[0])""",
)


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    new = nbformat.v4
    book = new.new_notebook(metadata={"language_info": {"name": "python"}})
    for i, text in enumerate(CELLS):
        is_code = i % 2 == 1
        cell = (new.new_code_cell if is_code else new.new_markdown_cell)(text)
        cell["id"] = f"cell-{i}"
        book.cells.append(cell)
    NotebookClient(book, timeout=600, kernel_name="python3").execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times, which differ in every run
    target = Path(__file__).with_suffix(".ipynb")
    nbformat.write(book, target)


if __name__ == "__main__":
    main()
