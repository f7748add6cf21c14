"""mxdit inside other libraries. None of them is imported with mxdit: each integration imports its own host."""
