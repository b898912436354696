"""Imported by a process that tries kernels: there the card is pretended too."""

from pretended import pretend

pretend()
