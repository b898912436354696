"""What the compiled GPU kernels take of a card, computed from their machine code: see
:mod:`tools.cost.__main__`."""
