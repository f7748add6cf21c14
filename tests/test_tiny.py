"""Read this first: everything that mxdit is for, on a model of two blocks.

quantize while loading -> generate -> save -> reload with no argument -> the same bits
"""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import mxdit
import tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", tiny.TASKS)
@pytest.mark.parametrize("method", ["mxfp4", "mxfp4_dualscale", "mxfp8"])
def test_quantize_generate_save_reload(tmp_path, task, method):
    source = tiny.save(tmp_path / "bf16", task)
    floats = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.bfloat16)
    pipe = DiffusionPipeline.from_pretrained(
        source, torch_dtype=torch.bfloat16, quantization_config=mxdit.pipeline_config(method)
    )
    video = tiny.generate(pipe)
    assert video.shape == (1, 5, 16, 16, 3) and np.isfinite(video).all()
    for expert in (pipe.transformer, pipe.transformer_2):
        layers = [module for module in expert.modules() if isinstance(module, mxdit.MXLinear)]
        assert len(layers) == tiny.BLOCKS * tiny.LINEARS

    # Quantization changes the clip, a little: it is neither skipped nor broken.
    error = np.abs(video - tiny.generate(floats)).mean()
    assert 0 < error < 0.05

    pipe.save_pretrained(tmp_path / "quantized")
    for component in ("transformer", "transformer_2"):
        stored = json.loads((tmp_path / "quantized" / component / "config.json").read_text())["quantization_config"]
        assert stored["quant_method"] == method and stored["is_checkpoint_serialized"] and stored["layout"] == "packed"
    again = DiffusionPipeline.from_pretrained(tmp_path / "quantized", torch_dtype=torch.bfloat16)
    assert np.array_equal(tiny.generate(again), video)

    # And with no argument at all: the experts come back exactly (the VAE, which is not ours, then loads as float32).
    plain = DiffusionPipeline.from_pretrained(tmp_path / "quantized")
    for expert, reloaded in ((pipe.transformer, plain.transformer), (pipe.transformer_2, plain.transformer_2)):
        assert torch.equal(tiny.forward(reloaded), tiny.forward(expert))


def test_four_bit_weights_run_with_any_activations():
    model = tiny.transformer().bfloat16()
    print(mxdit.quantize_(model, "mxfp4"))
    outputs = {}
    for activation in ("bf16", "mxfp8", "mxfp4"):
        mxdit.set_activation(model, activation)
        outputs[activation] = tiny.forward(model).float()
    coarse, fine = ((outputs[name] - outputs["bf16"]).norm() for name in ("mxfp4", "mxfp8"))
    assert coarse > 2 * fine > 0
