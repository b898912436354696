"""The PTX memory model over the kernels' exchange protocols: see README.md."""
