"""Data only: `t2v/` and `i2v/` are ordinary diffusers pipeline directories, `first_frame.png` an image for I2V."""
