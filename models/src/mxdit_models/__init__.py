"""The bundled model: `t2v/` and `i2v/` are ordinary diffusers pipeline directories, `first_frame.png` an image for I2V,
`burning/` a LoRA for both experts of `t2v`.

`digits` renders the clips that it was trained on, `judge` reads what a clip shows; both need scikit-learn, which
`pip install mxdit-models[judge]` brings.
"""
