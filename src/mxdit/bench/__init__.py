"""What 4 bits cost in memory and time: ``mxdit bench gemm``, ``memory``, ``load`` and ``pipeline``.

Each has a module with a `run` that returns rows and shows nothing; docs/measuring.md says what the numbers mean.
"""
