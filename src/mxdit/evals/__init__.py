"""Measuring what 4 bits cost: the same videos in every mode, compared with BF16 at every level.

`modes` says what is compared, `run` carries an evaluation out, `probe` looks inside the transformers, `cache` keeps what was
computed. `definitions` says what every number means.
"""
