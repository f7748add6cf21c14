"""The version of mxdit, which checkpoints name as their producer."""

__version__ = "0.1.0"
