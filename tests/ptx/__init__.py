"""PTX, executed on a CPU: see README.md."""
