"""`mxdit bench gemm`, `memory`, `load` and `pipeline`: each reads its options, runs, and shows a table and JSON."""

from mxdit.cli.bench import gemm, load, memory, pipeline  # each registers its command

__all__ = ["gemm", "load", "memory", "pipeline"]
