"""Compile every Triton kernel for one architecture, without a GPU, and print as JSON what the code is made of.

A process of its own, because Triton decides when it is imported whether kernels are compiled or interpreted:
`python compile_kernels.py 90`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxdit.backends import triton_codec, triton_matmul

OUTER = {"a_outer_ptr": "*fp32", "w_outer_ptr": "*fp32"}
BASES = {"a_base_ptr": "*u8", "w_base_ptr": "*u8"}
RESULT = {"bias_ptr": "*bf16", "out_ptr": "*bf16", "m": "i32", "n": "i32", "groups": "i32", "limit": "fp32"}
PACKED = {"a_ptr": "*u8", "a_scale_ptr": "*u8", "w_ptr": "*u8", "w_scale_ptr": "*u8"}
CODES = {"codes_ptr": "*u8", "scale_ptr": "*u8", "m": "i32", "k": "i32"}
E2M1 = {"a_element": "e2m1", "w_element": "e2m1", "operands": tl.bfloat16, "precision": "ieee"}


def kernels(arch: int) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """By name: the kernel, the types of its arguments, and its constants; arguments in neither are None."""
    rows, tile = {"rows": triton_codec.ROWS}, {**triton_matmul.TILE, "wide": 16}
    floats = {"step": triton_matmul.STEP_FLOATS, **tile}
    integers = {"step": triton_matmul.STEP_INTEGERS, **tile}
    encode, product = triton_codec._encode, triton_matmul._floats
    folded = {"a_ptr": "*i8", "w_ptr": "*i8", **BASES, **RESULT, "width": "i32"}
    found: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {}
    for dtype in ("bf16", "fp16", "fp32"):
        types = {"x_ptr": f"*{dtype}", **CODES, "stride": "i32"}
        found[f"encode mxfp4 {dtype}"] = (
            encode,
            types,
            {"element": "e2m1", "rule": "uos", "mode": "rint", "dual": False, **rows},
        )
    types = {"x_ptr": "*bf16", **CODES, "stride": "i32"}
    found["encode mxfp8"] = (
        encode,
        types,
        {"element": "e4m3", "rule": "cublas", "mode": "rint", "dual": False, **rows},
    )
    types |= {"mul_ptr": "*bf16", "outer_ptr": "*fp32"}
    found["encode mxfp4_dualscale"] = (
        encode,
        types,
        {"element": "e2m1", "rule": "ocp", "mode": "rint", "dual": True, **rows},
    )
    for element in ("e2m1", "e4m3"):
        types = {**CODES, "outer_ptr": "*fp32", "out_ptr": "*bf16"}
        found[f"decode {element}"] = (triton_codec._decode, types, {"element": element, **rows})
    found["fold"] = (triton_codec._fold, {**CODES, "out_ptr": "*i8", "base_ptr": "*u8", "stride": "i32"}, rows)
    for name, outer in (("", {}), (", dual", OUTER)):
        found[f"int8 product{name}"] = (triton_matmul._integers, folded | outer, integers)
        found[f"bf16 product{name}"] = (product, PACKED | BASES | RESULT | {"k": "i32"} | outer, E2M1 | floats)
        if arch >= 100:
            native = E2M1 | floats | {"operands": None, "step": triton_matmul.STEP_NATIVE}
            found[f"fp4 product{name}"] = (product, PACKED | RESULT | {"k": "i32"} | outer, native)
    mixed = PACKED | RESULT | {"k": "i32"}
    found["w4a8 product"] = (product, mixed, E2M1 | floats | {"a_element": "e4m3"})
    found["mxfp8 product"] = (product, mixed, E2M1 | floats | {"a_element": "e4m3", "w_element": "e4m3"})
    for dtype, operands, precision in (
        ("bf16", tl.bfloat16, "ieee"),
        ("fp16", tl.float32, "tf32"),
        ("fp32", tl.float32, "ieee"),
    ):
        types = {name: kind for name, kind in mixed.items() if name != "a_scale_ptr"} | {
            "a_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
        }
        constants = {**E2M1, **floats, "a_element": None, "operands": operands, "precision": precision}
        found[f"w4a16 product {dtype}"] = (product, types, constants)
    return found


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int) -> dict[str, Any]:
    """What the compiler made of it: counts of instructions, the tensor cores' ones by name, bytes of memory."""
    constants = {name: constants.get(name) for name in kernel.arg_names if name not in types}
    # As at run time, where torch's memory is aligned and Wan's sizes are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*") or name in ("m", "n", "k", "width", "stride")
    }
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={place: how for place, how in aligned.items() if kernel.arg_names[place[0]] in types},
    )
    launch = triton_matmul.LAUNCH if "tile_m" in constants else triton_codec.LAUNCH
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    ptx = result.asm["ptx"]
    return {
        "flushing": len(re.findall(r"\.ftz", ptx)),
        "approximate": len(re.findall(r"approx", ptx)),
        "fused": len(re.findall(r"fma\.rn\.f32", ptx)),
        "divisions": len(re.findall(r"div\.rn", ptx)),
        "units": " ".join(sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*", ptx)))),
        "shared": result.metadata.shared,
        "spilled": _stack(result.asm["cubin"]),
    }


def _stack(cubin: bytes) -> int:
    """Bytes of local memory a thread, by the disassembler that Triton brings; 0 where it brings none."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    if not tool.exists():
        return 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", said)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    arch = int(sys.argv[1])
    print(json.dumps({name: compiled(*kernel, arch) for name, kernel in kernels(arch).items()}, indent=1))
