"""What docs/numerics.md is the text of: formats, checks, the codec, and products by the reference."""
