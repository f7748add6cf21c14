#!/usr/bin/env bash
# What a quantized checkpoint of yours costs in quality, against the BF16 model that it was made of.
#
#     examples/evaluate.sh BF16 QUANTIZED PROMPTS OUT [OPTION...]
#
# PROMPTS has one prompt a line. OUT gets report.html, report.md and results.json. Options go to `mxdit eval`, such as
# --device cuda or --seeds 2. What was computed is kept in OUT/cache, so an interrupted run goes on.
set -euo pipefail
bf16=${1:?BF16, a directory} quantized=${2:?QUANTIZED, a directory} prompts=${3:?PROMPTS, a file} out=${4:?OUT}
shift 4
mkdir -p "$out"

mxdit eval "$bf16" --modes bf16 --mode "mine=$quantized" --prompts "$prompts" --cache "$out/cache" --report "$out" "$@"
