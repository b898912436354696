"""Benchmarks of senet_kernels on the squeeze-excite layers of real networks, and on the networks.

``python -m benchmarks [layers|models|sweep|report]``, ``pytest benchmarks --benchmark-only`` for a
handful of key cases, ``python -m benchmarks.readme`` to renew the figures in README and docs.
"""
