"""Checkpoints on disk: quantize, convert and inspect them, streaming, whatever layout they are in."""

from mxdit.checkpoint.convert import convert_checkpoint
from mxdit.checkpoint.inspect import Inspection, inspect_checkpoint
from mxdit.checkpoint.plan import CheckpointPlan
from mxdit.checkpoint.quantize import quantize_checkpoint

__all__ = ["CheckpointPlan", "Inspection", "convert_checkpoint", "inspect_checkpoint", "quantize_checkpoint"]
