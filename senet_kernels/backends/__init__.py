"""Backends. None imports another; each has ``UNAVAILABLE``: why it cannot run here, or None."""
