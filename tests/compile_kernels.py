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

import torch
import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxdit.backends import triton_attention, triton_attention_int8, triton_codec, triton_matmul, triton_rowwise

OUTER = {"a_outer_ptr": "*fp32", "w_outer_ptr": "*fp32"}
BASES = {"a_base_ptr": "*u8", "w_base_ptr": "*u8"}
RESULT = {"bias_ptr": "*bf16", "out_ptr": "*bf16", "m": "i32", "n": "i32", "groups": "i32", "limit": "fp32"}
PACKED = {"a_ptr": "*u8", "a_scale_ptr": "*u8", "w_ptr": "*u8", "w_scale_ptr": "*u8"}
CODES = {"codes_ptr": "*u8", "scale_ptr": "*u8", "m": "i32", "k": "i32"}
E2M1 = {"a_element": "e2m1", "w_element": "e2m1", "operands": tl.bfloat16, "precision": "ieee"}

HOPPER = ("int8 product", "int8 product, dual", "bf16 product", "mxfp8 product", "w4a16 product fp16")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ATTENTION = {  # by architecture, each once: the dtype, the width of heads, the mask, causal
    80: (
        ("bf16", 128, "u8", False),
        ("bf16", 64, None, True),
        ("bf16", 256, None, False),
        ("fp32", 128, None, False),
    ),
    90: (("bf16", 128, None, False), ("fp16", 128, "fp16", False)),
    100: (("bf16", 128, None, False),),
}
PLACES = [f"{x}_{axis}" for x in ("q", "k", "v") for axis in ("batch", "token", "head")]
PLACES += ["mask_batch", "mask_head", "mask_query"]
STRIDES = dict.fromkeys(["queries", "keys", "heads", *PLACES], "i32") | {"scale": "fp32"}


def kernels(arch: int) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """By name: the kernel, the types of its arguments, and its constants and launch options; arguments in neither are None."""
    rows = {"rows": triton_codec.ROWS}
    integers = {"wide": 16, **triton_matmul.INTEGERS}
    floats = {"wide": 16, "fit_m": integers["tile_m"], "fit_n": integers["tile_n"], **triton_matmul.FLOATS}
    found: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {}

    def encode(name: str, dtype: str, element: str, rule: str, dual: bool = False, smooth: bool = False) -> None:
        types = {"x_ptr": f"*{dtype}", **CODES, "stride": "i32"}
        types |= {"mul_ptr": f"*{dtype}"} if smooth else {}
        types |= {"outer_ptr": "*fp32"} if dual else {}
        constants = {"element": element, "rule": rule, "mode": "rint", "dual": dual, **rows}
        found[f"encode {name}"] = (triton_codec._encode, types, constants)

    def floating(name: str, types: dict[str, str], **constants: Any) -> None:
        found[name] = (triton_matmul._floats, PACKED | RESULT | {"k": "i32"} | types, E2M1 | floats | constants)

    for dtype in ("bf16", "fp16", "fp32"):
        encode(f"mxfp4 {dtype}", dtype, "e2m1", "uos")
    encode("mxfp4, smooth", "bf16", "e2m1", "uos", smooth=True)
    encode("mxfp8", "bf16", "e4m3", "cublas")
    encode("mxfp8, smooth", "bf16", "e4m3", "ocp", smooth=True)
    encode("mxfp4_dualscale", "bf16", "e2m1", "ocp", dual=True, smooth=True)
    for element in ("e2m1", "e4m3"):
        types = {**CODES, "outer_ptr": "*fp32", "out_ptr": "*bf16"}
        found[f"decode {element}"] = (triton_codec._decode, types, {"element": element, **rows})
    found["fold"] = (triton_codec._fold, {**CODES, "out_ptr": "*i8", "base_ptr": "*u8", "stride": "i32"}, rows)
    for name, outer in (("", {}), (", dual", OUTER)):
        types = {"a_ptr": "*i8", "w_ptr": "*i8", **BASES, **RESULT, "width": "i32", **outer}
        found[f"int8 product{name}"] = (triton_matmul._integers, types, integers)
        floating(f"bf16 product{name}", BASES | outer)
        if arch >= 100:
            floating(f"fp4 product{name}", outer, operands=None, step=128)
    floating("mxfp8 product", {}, a_element="e4m3", w_element="e4m3")
    for name, own in (("", {}), (", dual", {"w_outer_ptr": "*fp32"})):  # the weight's outer scales alone
        floating(f"w4a8 product{name}", own, a_element="e4m3")
        for dtype, precision in (("bf16", "ieee"), ("fp16", "tf32"), ("fp32", "ieee")):
            if own and dtype != "bf16":
                continue  # outer scales multiply sums, which are in fp32 whatever is summed
            wide = {} if dtype == "bf16" else {"operands": tl.float32, "step": 32, "num_stages": 2}
            types = {"a_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **own}
            floating(f"w4a16 product{name} {dtype}", types, a_element=None, precision=precision, **wide)
            del found[f"w4a16 product{name} {dtype}"][1]["a_scale_ptr"]
            if not own:
                floating(f"w8a16 product {dtype}", types, a_element=None, w_element="e4m3", precision=precision, **wide)
                del found[f"w8a16 product {dtype}"][1]["a_scale_ptr"]
    if arch == 90:  # between the others: what its own tensor cores multiply, once for each kind of operands
        found = {name: kernel for name, kernel in found.items() if name in HOPPER}
    return found | exact_attention(arch) | int8_attention(arch) | between_linears()


def int8_attention(arch: int) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Heads of 128 in bf16. A mask, of floats as the dearest kind, uses no unit of its own: one architecture shows that."""
    module, width = triton_attention_int8, {"width": 128}
    strides = {"stride_batch": "i32", "stride_row": "i32", "stride_head": "i32"}
    tokens = {"keys": "i32", "heads": "i32", "size": "i32", **strides}
    coded = {"codes_ptr": "*i8", "scale_ptr": "*fp32", **tokens}
    attend = {f"{name}_ptr": "*fp32" for name in ("k_scale", "v_scale")} | {
        "v_sums_ptr": "*i32",
        "undefined_ptr": "*i8",
    }
    attend |= {"q_ptr": "*bf16", "k_ptr": "*i8", "v_ptr": "*i8", "out_ptr": "*bf16", "factor": "fp32"}
    integers = ("queries", "keys", "heads", "group", "blocks", "size", "v_size", "q_batch", "q_row", "q_head")
    attend |= dict.fromkeys((*integers, *(f"mask_{axis}" for axis in ("batch", "head", "row", "key"))), "i32")
    sizes = {**width, "v_width": 128, "causal": False, "added": True, **module.ATTEND}
    return {
        "int8 attention: sums": (module._sums, {"k_ptr": "*bf16", "sums_ptr": "*fp32", **tokens}, width),
        "int8 attention: mean": (
            module._mean,
            {"sums_ptr": "*fp32", "mean_ptr": "*fp32", "blocks": "i32", "share": "fp32"},
            width,
        ),
        "int8 attention: keys": (module._keys, {"k_ptr": "*bf16", "mean_ptr": "*fp32", **coded}, width),
        "int8 attention: values": (module._values, {"v_ptr": "*bf16", "sums_ptr": "*i32", **coded}, width),
        "int8 attention": (module._attend, attend, sizes),
        **({"int8 attention, mask": (module._attend, attend | {"mask_ptr": "*bf16"}, sizes)} if arch == 80 else {}),
    }


def exact_attention(arch: int) -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    found: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {}
    for dtype, width, mask, causal in ATTENTION[arch]:
        types = {f"{x}_ptr": f"*{dtype}" for x in ("q", "k", "v", "out")} | STRIDES
        types |= {} if mask is None else {"mask_ptr": f"*{mask}"}
        unit, by_key = (1.0, True) if mask in (None, "u8") else (triton_attention.LOG2_E, False)
        sizes = {"width": width, "v_width": width, "wide": width, "v_wide": width}
        ones = {"shared": 1, "mask_key": 1}  # which makes them constants
        ones |= dict.fromkeys(("queries", "keys", "heads"), 1) if causal else {}
        constants = {"unit": unit, "causal": causal, "by_key": by_key, **sizes, **ones}
        constants |= triton_attention.settings(width, DTYPES[dtype])
        types = {argument: kind for argument, kind in types.items() if argument not in ones}
        found[f"exact attention, {dtype}, {width}, {mask}, {causal}"] = (triton_attention._exact, types, constants)
    return found


def between_linears() -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Norms over all of Wan's heads with rotary embedding, and over one head; GELU."""
    found: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {}
    sizes = dict.fromkeys(("count", "width", "x_stride", "out_stride", "tokens"), "i32") | {"eps": "fp32"}
    for dtype in DTYPES:
        for rows, turned in ((1, True), (8, False)):
            types = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "out")} | sizes
            types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32"} if turned else {}
            constants = {"head": 128, "rounded": not turned, "token_rows": 1, **triton_rowwise.NORM}
            constants |= {"rows": rows, "step": triton_rowwise.SIZE // rows}
            found[f"rms_norm {dtype}{', rotary' if turned else ''}"] = (triton_rowwise._rms_norm, types, constants)
        found[f"gelu {dtype}"] = (triton_rowwise._gelu, {"x_ptr": f"*{dtype}", "count": "i32"}, triton_rowwise.GELU)
    return found


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int) -> dict[str, Any]:
    """What the compiler made of it: counts of instructions, the tensor cores' ones by name, bytes of memory."""
    launch = triton_codec.LAUNCH | {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: constants.get(name) for name in kernel.arg_names if name not in types}
    # As at run time, where torch's memory is aligned, for sizes that are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*")
        or name in ("m", "n", "k", "width", "stride", "x_stride", "out_stride", "count", *PLACES)
    }
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={place: how for place, how in aligned.items() if kernel.arg_names[place[0]] in types},
    )
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    ptx = result.asm["ptx"]
    return {
        "flushing": len(re.findall(r"\.ftz", ptx)),
        "approximate": len(re.findall(r"approx", ptx)),
        "exponentials": len(re.findall(r"ex2\.approx", ptx)),
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
