"""Wan 2.1 and 2.2 (T2V, I2V, TI2V): one transformer class, two experts in the A14B cascades."""

from mxdit.models.spec import ModelSpec

WAN = ModelSpec(
    transformer="WanTransformer3DModel",
    blocks="blocks",
    groups=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("attn2.add_k_proj", "attn2.add_v_proj"),  # the image branch, in Wan2.1 I2V only
    ),
    components=("transformer", "transformer_2"),
    pipelines={"WanPipeline": "t2v", "WanImageToVideoPipeline": "i2v"},
)
