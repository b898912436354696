"""Backends. None imports another; each has ``unavailable()``: why it cannot run here, or None."""
