"""The layouts that other tools store checkpoints in, one module each."""
