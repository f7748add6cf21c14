#!/usr/bin/env bash
# Quantize a float checkpoint, convert it for vLLM-Omni, and check what came of it.
#
#     examples/quantize_and_convert.sh MODEL OUT
#
# MODEL is in diffusers' layout or in Wan's own. Memory holds one layer at a time, and a run that was interrupted goes on
# when the same command is given again.
set -euo pipefail
model=${1:?MODEL, a directory} out=${2:?OUT, a directory to make}
mkdir -p "$out"

mxdit quantize "$model" "$out/packed" --method mxfp4_dualscale --num-bf16-fallback-layers 0
mxdit convert "$out/packed" "$out/vllm-omni" --to vllm-omni
mxdit inspect "$out/vllm-omni"
