"""vLLM-Omni: mxdit's linears in the engine's models, on every device that mxdit has a backend for.

The engine calls `register` in each of its processes, by the entry point ``vllm_omni.general_plugins``: to install mxdit beside
it is all that it takes. docs/serving-vllm-omni.md says how to serve; written for and tested with vLLM-Omni 0.30.

`config` says which linears of a model are quantized, `loading` what a rank holds of one and how a checkpoint's tensors come to
it, `linear` what it computes, `steps` at which denoising step a request is; `attention` has backends of attention.
"""

from __future__ import annotations

import logging
from functools import partial
from importlib.metadata import version

from mxdit.integrations.vllm_omni.steps import LOGGER
from mxdit.numerics.formats import FORMATS

logger = logging.getLogger(LOGGER)
TESTED = "0.30."


def register() -> None:
    """Answer for the engine's quantization methods of our formats' names (`--quantization` and `quantization_config`), and add
    our backends of attention to its own."""
    from vllm_omni.quantization.factory import register_quantization_override

    from mxdit.integrations.vllm_omni import attention
    from mxdit.integrations.vllm_omni.config import config_for

    found = version("vllm-omni")
    if not found.startswith(TESTED):
        logger.warning("mxdit's plugin was tested with vLLM-Omni %sx, and this is %s.", TESTED, found)
    for method in FORMATS:
        register_quantization_override(method, partial(config_for, method))
    attention.register()
