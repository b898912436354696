"""Benchmarks of senet_kernels on the squeeze-excite layers of real networks.

``python -m benchmarks`` runs the main job, ``pytest benchmarks --benchmark-only`` a handful of key
cases, ``python -m benchmarks.readme RECORD.json README.md`` renews the figures in the README.
"""
