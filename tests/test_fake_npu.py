"""The fake torch_npu itself: a device that computes what the CPU does, and operators that refuse what theirs would."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mxdit
import tiny
from mxdit.backends import native
from processes import output_of

pytestmark = pytest.mark.slow

OPS = torch.ops.mxdit
HERE = Path(__file__).parent
CASTS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def nz(npu: Any) -> torch.Tensor:
    """A FRACTAL_NZ tensor of bytes, (33, 70)."""
    return npu.npu_format_cast(torch.randint(-128, 127, (33, 70), dtype=torch.int8).to("npu"), 29)


def numbers(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, k) * torch.exp2(torch.randint(-3, 4, (rows, 1)))).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a, on the device, is b, which is not."""
    return a.device.type == "npu" and a.dtype is b.dtype and torch.equal(a.cpu(), b)


# -- the device --------------------------------------------------------------------------------------------------------


def test_tensors_move_and_are_made(npu):
    x = torch.randn(3, 4)
    for device in ("npu", "npu:0", torch.device("npu", 0)):
        assert same(x.to(device), x) and str(x.to(device).device) == "npu:0"
    y = x.npu()
    assert y.is_npu and type(y.cpu()) is torch.Tensor and y.to("npu") is y
    assert same(y.to(torch.bfloat16), x.bfloat16()) and same(x.to("npu", torch.half), x.half())
    target, source = torch.empty(3, 4), torch.empty(3, 4, device="npu")
    assert target.copy_(y) is target and torch.equal(target, x) and type(target) is torch.Tensor
    assert source.copy_(x) is source and same(source, x)
    for made, expected in (
        (torch.zeros(2, device="npu"), torch.zeros(2)),
        (torch.arange(3, device="npu"), torch.arange(3)),
        (torch.tensor([1, 2], device="npu"), torch.tensor([1, 2])),
        (torch.full((2,), 3.0, device="npu:0"), torch.full((2,), 3.0)),
        (torch.ones_like(x, device="npu"), torch.ones(3, 4)),
        (y.new_zeros(2), torch.zeros(2)),
        (torch.linspace(0, 1, 5, device="npu"), torch.linspace(0, 1, 5)),
    ):
        assert same(made, expected)
    assert torch.ones_like(y, device="cpu").device.type == "cpu" and y.to("meta").device.type == "meta"
    assert torch.randn(2, device="npu").device.type == "npu"


def test_operators_are_the_cpus(npu):
    x = torch.randn(3, 4)
    y = x.to("npu")
    assert same((y @ y.T + 1).relu().sum(-1), (x @ x.T + 1).relu().sum(-1))
    assert same(torch.cat([y, y * torch.tensor(2.0)]), torch.cat([x, x * 2]))
    assert same(torch.where(y > 0, y, 0.0), torch.where(x > 0, x, 0.0))
    assert all(same(a, b) for a, b in zip(y.topk(2), x.topk(2), strict=True))
    assert float(y.sum()) == float(x.sum()) and bool((y == y).all()) and y.tolist() == x.tolist()
    assert torch.equal(y, x.to("npu")) and y.shape == x.shape and y[1].stride() == x[1].stride()
    assert repr(y) == repr(x)[:-1] + ", device='npu:0')" and f"{y.sum():.3f}" == f"{x.sum():.3f}"
    q = torch.randn(1, 2, 6, 8)
    attention = nn.functional.scaled_dot_product_attention
    assert same(attention(*(3 * (q.to("npu"),))), attention(q, q, q))


def test_in_place_and_views(npu):
    x = torch.randn(3, 4)
    y = x.to("npu")
    left = y[:, :2]
    assert left.zero_() is left and same(y, torch.cat([torch.zeros(3, 2), x[:, 2:]], -1))
    y.t().add_(1)
    assert same(left, torch.ones(3, 2)) and y.unsqueeze_(0) is y and y.shape == (1, 3, 4)
    out = torch.empty(0, device="npu")
    assert torch.add(y, 1, out=out) is out and out.shape == y.shape


def test_modules(npu):
    layer, x = nn.Linear(4, 5), torch.randn(3, 4)
    expected = layer(x).detach()
    moved = copy.deepcopy(layer).to("npu")
    assert isinstance(moved.weight, nn.Parameter) and same(moved.weight.data, layer.weight.data)
    with torch.no_grad():
        assert same(moved(x.to("npu")), expected)
    clone = copy.deepcopy(moved)
    clone.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()})
    assert same(clone.weight.data, 2 * layer.weight.data) and same(moved.state_dict()["bias"], layer.bias.data)
    assert same(moved.bfloat16().weight.data, layer.weight.data.bfloat16())
    assert type(moved.float().to("cpu").bias) is nn.Parameter


GRADIENTS = """
import copy, sys, torch
sys.path += sys.argv[1:]
import torch_npu
with torch_npu.state.pretending(count=1):
    layer, x = torch.nn.Linear(4, 5), torch.randn(3, 4)
    moved = copy.deepcopy(layer).to("npu")
    moved(x.to("npu")).square().sum().backward()
    layer(x).square().sum().backward()
    assert moved.weight.grad.device.type == "npu" and torch.equal(moved.weight.grad.cpu(), layer.weight.grad)
"""


def test_gradients():
    """In a process of its own: torch counts the devices at the first backward pass of a process, which another test may have
    made where there was none."""
    output_of("-c", GRADIENTS, HERE, HERE / "fakes")


def test_models_are_saved_from_the_device_and_loaded_onto_it(npu, tmp_path):
    model = tiny.transformer()
    copy.deepcopy(model).to("npu").save_pretrained(tmp_path)
    assert tiny.same(tiny.load(tmp_path, dtype=torch.float32), model)
    loaded = tiny.load(tmp_path, dtype=torch.float32, device_map="npu")
    assert loaded.device.type == "npu" and tiny.same(loaded.cpu(), model)


def test_what_a_device_refuses(npu):
    x = torch.randn(3, 4)
    y = x.to("npu")
    for mix in (
        lambda: y + x,
        lambda: torch.cat([x, y]),
        lambda: nn.Linear(4, 4)(y),
        lambda: x.add_(y),
        lambda: x + y.sum(),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert same(y + x.sum(), x + x.sum())
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="npu", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="not there"):
        x.to("npu:1")
    with npu.state.pretending(count=0), pytest.raises(RuntimeError, match="0 NPU devices"):
        x.to("npu")
    with pytest.raises((TypeError, RuntimeError)):
        y.numpy()


def test_other_libraries_get_their_own_kernels(npu):
    library = torch.library.Library("fake_npu_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    x = torch.randn(3)
    assert same(torch.ops.fake_npu_test.twice(x.to("npu")), x * 2)
    library.impl("twice", lambda x: x * 0 - 7, "PrivateUse1")
    assert same(torch.ops.fake_npu_test.twice(x.to("npu")), torch.full((3,), -7.0))
    assert torch.equal(torch.ops.fake_npu_test.twice(x), x * 2)


@pytest.mark.parametrize("fmt", [None, "mxfp4", "mxfp4_dualscale"])
def test_a_transformer_computes_what_it_does_on_the_cpu(fmt, npu):
    model = tiny.transformer().to(torch.bfloat16)
    if fmt:
        mxdit.quantize_(model, fmt)
    with native.using(native.REFERENCE):
        expected = tiny.forward(model)
    model.to("npu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        got = model(
            hidden_states=torch.randn(1, 16, 2, 8, 8, generator=generator).to("npu", model.dtype),
            timestep=torch.tensor([999.3], device="npu"),
            encoder_hidden_states=torch.randn(1, 6, tiny.TEXT_DIM, generator=generator).to("npu", model.dtype),
        ).sample
    assert same(got, expected)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_a_whole_pipeline_computes_what_it_does_on_the_cpu(task, npu):
    pipe = tiny.pipeline(task)
    expected = tiny.generate(pipe)
    assert (tiny.generate(pipe.to("npu")) == expected).all()


# -- FRACTAL_NZ --------------------------------------------------------------------------------------------------------


def test_blocks_lie_as_documented(npu):
    """(columns / C0, rows / 16, 16, C0), C0 of 32 bytes: aclnn_dual_level_quant_matmul.cpp SetShapeStrideForNZ,
    aclnnNpuFormatCast.md "C0"."""
    for rows, dtype in (
        (torch.randint(-128, 127, (33, 70), dtype=torch.int8), torch.int8),
        (torch.randn(17, 40).bfloat16(), torch.bfloat16),
    ):
        cast = npu.npu_format_cast(rows.to("npu"), 29)
        c0 = 32 // rows.element_size()
        blocks = cast.raw.view(dtype)
        assert blocks.shape == (-(-rows.shape[1] // c0), -(-rows.shape[0] // 16), 16, c0)
        for row, column in itertools.product((0, 15, 16, rows.shape[0] - 1), (0, c0 - 1, c0, rows.shape[1] - 1)):
            assert blocks[column // c0, row // 16, row % 16, column % c0] == rows[row, column]
        assert int((blocks != 0).sum()) == int((rows != 0).sum())  # zeros behind
        assert same(npu.npu_format_cast(cast, 2), rows) and torch.equal(cast.cpu(), rows)


def test_what_a_fractal_tensor_allows(npu, nz):
    rows = nz.cpu()
    target, holder = torch.empty_like(rows), nn.Module()
    holder.weight = nn.Parameter(nz, requires_grad=False)
    kept = (nz.detach(), nz.clone(), nz.data, nz.to("npu"), copy.deepcopy(holder).weight, holder.state_dict()["weight"])
    for tensor in kept:
        assert npu.get_npu_format(tensor) == 29 and torch.equal(tensor.cpu(), rows)
    assert nz.shape == (33, 70) and nz.stride() == (70, 1) and nz.dtype is torch.int8 and nz.is_contiguous()
    assert torch.equal(target.copy_(nz), rows) and npu.npu_format_cast(nz, npu.Format.FRACTAL_NZ) is nz
    assert npu.get_npu_format(npu.npu_format_cast(nz, npu.Format.ND)) == 2 and "npu" in repr(nz)
    assert npu.get_npu_format(torch.zeros(2, 2, device="npu")) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.view(-1),
        lambda x: x.reshape(70, 33),
        lambda x: x.view(torch.uint8),
        lambda x: x[0],
        lambda x: x[:, :32],
        lambda x: x.t(),
        lambda x: x.transpose(0, 1),
        lambda x: x.contiguous(),
        lambda x: nn.functional.pad(x, (0, 2)),
        lambda x: x + 1,
        lambda x: x.add_(1),
        lambda x: x.bitwise_and(15),
        lambda x: x.float(),
        lambda x: x.zero_(),
        lambda x: x.copy_(torch.zeros(33, 70, dtype=torch.int8)),
        lambda x: torch.cat([x, x]),
        lambda x: x.chunk(3),
        lambda x: x.unsqueeze(0),
        lambda x: torch.empty(33, 70, dtype=torch.int8, device="npu").copy_(x),
    ],
)
def test_what_a_fractal_tensor_refuses(nz, change: Callable[[torch.Tensor], Any]):
    with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
        change(nz)


# -- what the operators compute ----------------------------------------------------------------------------------------

SINGLE = [
    ("mxfp4", "ocp", {"scale_alg": 0}),
    ("mxfp4", "even6", {"scale_alg": 2}),
    ("mxfp4", "even6", {"scale_alg": 2, "dst_type_max": 6.0}),
    ("mxfp4", "even7", {"scale_alg": 2, "dst_type_max": 7.0}),
    ("mxfp4", "uos", {"scale_alg": 2, "dst_type_max": 7.25}),
    ("mxfp8", "ocp", {"dst_type": 292}),
    ("mxfp8", "cublas", {"dst_type": torch.float8_e4m3fn, "scale_alg": 1}),
]


@pytest.mark.parametrize("dtype", CASTS, ids=str)
@pytest.mark.parametrize(("fmt", "rule", "kwargs"), SINGLE)
def test_mx_quant(fmt, rule, kwargs, dtype, npu):
    for k in (32, 64, 96, 1120):
        x = torch.stack([numbers(3, k, dtype), numbers(3, k, dtype)])
        for mode in ("rint", "round", "floor") if fmt == "mxfp4" else ("rint",):
            codes, scale = npu.npu_dynamic_mx_quant(x.to("npu"), round_mode=mode, **kwargs)
            expected = mxdit.encode(x, fmt, rule, mode)
            assert codes.dtype is (torch.uint8 if fmt == "mxfp4" else torch.float8_e4m3fn)
            assert same(codes.view(torch.uint8), expected.codes)
            assert_paired(scale, expected.scale)
    turned = x.transpose(1, 2)[..., :2].transpose(1, 2)
    assert not turned.is_contiguous() and same(
        npu.npu_dynamic_mx_quant(turned.to("npu"))[0], mxdit.encode(turned, "mxfp4", "ocp").codes
    )


@pytest.mark.parametrize("mode", ["rint", "round", "floor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dual_level_mx_quant(dtype, mode, npu):
    for k, lead in ((1120, (3,)), (512, (2, 3)), (34, ())):
        x, smooth = (
            numbers(6, k, dtype)[: max(1, torch.Size(lead).numel())].reshape(*lead, k),
            torch.rand(k).add(0.5).to(dtype),
        )
        for scale in (None, smooth):
            on_npu = None if scale is None else scale.to("npu")
            codes, l0, l1 = npu.npu_dynamic_dual_level_mx_quant(x.to("npu"), smooth_scale=on_npu, round_mode=mode)
            expected = mxdit.encode(x, "mxfp4_dualscale", round_mode=mode, mul_scale=scale)
            assert same(codes, expected.codes) and same(l0, expected.outer)
            assert_paired(l1, expected.scale)


def test_the_vendors_vector(npu):
    """op-plugin test_npu_dynamic_dual_level_mx_quant.py."""
    codes, l0, l1 = npu.npu_dynamic_dual_level_mx_quant(torch.full((1, 512), 8.0, dtype=torch.bfloat16, device="npu"))
    assert codes.cpu().unique().tolist() == [0x77] and l1.cpu().unique().tolist() == [127]
    assert l0.item() == pytest.approx(4 / 3) and l1.shape == (1, 8, 2)


def assert_paired(pairs: torch.Tensor, scale: torch.Tensor) -> None:
    blocks = scale.shape[-1]
    assert pairs.shape == (*scale.shape[:-1], -(-blocks // 2), 2) and pairs.dtype is torch.uint8
    flat = pairs.cpu().flatten(-2)
    assert torch.equal(flat[..., :blocks], scale) and not flat[..., blocks:].any()


def product(npu: Any, left: str, right: str, m: int = 3, n: int = 6, k: int = 1152, out: Any = torch.bfloat16) -> Any:
    """Arguments of npu_quant_matmul, as vLLM-Omni gives them, and a function that gives the result."""
    dst = {"mxfp4": npu.float4_e2m1fn_x2, "mxfp8": npu.float8_e4m3fn}
    x, w, bias = numbers(m, k), numbers(n, k), torch.randn(n)
    if right != left:
        bias = bias.to(out)
    a, a_scale = npu.npu_dynamic_mx_quant(x.to("npu"), dst_type=dst[left])
    b, b_scale = npu.npu_dynamic_mx_quant(w.to("npu"), dst_type=dst[right])
    args = {
        "x1": a,
        "x2": b.transpose(0, 1),
        "scale": b_scale.transpose(0, 1),
        "pertoken_scale": a_scale,
        "scale_dtype": npu.float8_e8m0fnu,
        "pertoken_scale_dtype": npu.float8_e8m0fnu,
        "x1_dtype": npu.float4_e2m1fn_x2 if left == "mxfp4" else None,
        "x2_dtype": npu.float4_e2m1fn_x2 if right == "mxfp4" else None,
        "bias": (bias if left == right else bias.reshape(1, -1)).to("npu"),
        "output_dtype": out,
        "group_sizes": [1, 1, 32],
    }

    def expected() -> torch.Tensor:
        packed, weight = mxdit.encode(x, left, "ocp"), mxdit.encode(w, right, "ocp")
        with native.using(native.REFERENCE):
            return OPS.matmul(packed.codes, packed.scale, weight.codes, weight.scale, bias, left, right, out)

    return args, expected


MODES = [("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("mxfp8", "mxfp4")]


@pytest.mark.parametrize(("left", "right"), MODES)
def test_quant_matmul(left, right, npu):
    mixed = left != right
    for (m, n, k), out in itertools.product(((3, 6, 1152), (1, 1, 64), (5, 64, 128)), CASTS[: 2 if mixed else 3]):
        args, expected = product(npu, left, right, m, n, k, out)
        assert same(npu.npu_quant_matmul(**args), expected())
        assert same(npu.npu_quant_matmul(**args | {"group_sizes": [0, 0, 32] if mixed else None}), expected())
    if not mixed:
        args, expected = product(npu, left, right, 3, 6, 1120)
        assert same(npu.npu_quant_matmul(**args), expected())
        args["x1"], args["pertoken_scale"] = args["x1"].unsqueeze(1), args["pertoken_scale"].unsqueeze(1)
        assert same(npu.npu_quant_matmul(**args), expected().unsqueeze(1))
    native = {"scale": torch.float8_e8m0fnu, "pertoken_scale": torch.float8_e8m0fnu}
    native |= {name: torch.float4_e2m1fn_x2 for name in ("x1", "x2") if args[f"{name}_dtype"]}
    views = {name: args[name].view(dtype) for name, dtype in native.items()}
    assert torch.equal(
        npu.npu_quant_matmul(**args | views | {f"{name}_dtype": None for name in native}), npu.npu_quant_matmul(**args)
    )


def test_an_fp8_weight_may_lie_either_way(npu):
    args, expected = product(npu, "mxfp8", "mxfp8")
    plain = {name: args[name].contiguous() for name in ("x2", "scale")}
    assert plain["x2"].stride() != args["x2"].stride() and same(npu.npu_quant_matmul(**args | plain), expected())


def dual_product(npu: Any, m: int = 3, n: int = 6, k: int = 1120, out: torch.dtype = torch.bfloat16) -> Any:
    """Arguments of npu_dual_level_quant_matmul, as vLLM-Omni gives them, and a function that gives the result."""
    x, w, bias = numbers(m, k), numbers(n, k), torch.randn(n)
    a, a_l0, a_l1 = npu.npu_dynamic_dual_level_mx_quant(x.to("npu"))
    b, b_l0, b_l1 = npu.npu_dynamic_dual_level_mx_quant(w.to("npu"))
    args = {
        "x1": a,
        "x2": npu.npu_format_cast(b.view(torch.int8), 29, customize_dtype=torch.int8),
        "x1_level0_scale": a_l0,
        "x2_level0_scale": b_l0.transpose(0, 1).contiguous(),
        "x1_level1_scale": a_l1,
        "x2_level1_scale": b_l1,
        "bias": bias.to("npu"),
        "output_dtype": out,
    }

    def expected() -> torch.Tensor:
        a, w_ = mxdit.encode(x, "mxfp4_dualscale"), mxdit.encode(w, "mxfp4_dualscale")
        with native.using(native.REFERENCE):
            return OPS.matmul_dual(a.codes, w_.codes, a.outer, w_.outer, a.scale, w_.scale, bias, out)

    return args, expected


@pytest.mark.parametrize("out", CASTS[:2], ids=str)
def test_dual_level_quant_matmul(out, npu):
    for shape in ((3, 6, 1120), (1, 1, 512), (2, 2, 1024), (17, 33, 64)):
        args, expected = dual_product(npu, *shape, out)
        assert same(npu.npu_dual_level_quant_matmul(**args), expected())
    by_position = [args.pop(name) for name in list(args)[:6]]
    assert same(npu.npu_dual_level_quant_matmul(*by_position, **args), expected())


def test_dtype_cast(npu):
    """Numbers to FP4: to nearest, ties to even, over-range saturates, NaN is 0 (docs/numerics.md section 1)."""
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, -0.2, float("nan"), float("-inf"), 1e4]])
    for dtype in CASTS:
        packed = npu.npu_dtype_cast(x.to("npu", dtype), npu.float4_e2m1fn_x2)
        assert packed.dtype is torch.uint8 and packed.shape == (1, 6)
        assert packed.cpu().tolist() == [[0x20, 0x42, 0x64, 0x76, 0x08, 0x7F]]
        back = npu.npu_dtype_cast(packed, dtype, input_dtype=npu.float4_e2m1fn_x2)
        values = [[0, 1, 1, 2, 2, 4, 4, 6, 0, 0, -6, 6]]
        assert same(back, torch.tensor(values, dtype=dtype))
        assert torch.equal(npu.npu_dtype_cast(back, npu.float4_e2m1fn_x2).cpu() & 0x77, packed.cpu() & 0x77)
    grid = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]]).to(torch.float8_e4m3fn)
    assert npu.npu_dtype_cast(grid.to("npu"), npu.float4_e2m1fn_x2).cpu().tolist() == [[0x10, 0x32, 0x54, 0x76]]
    assert same(npu.npu_dtype_cast(x[:, :6].to("npu"), npu.float8_e4m3fn), x[:, :6].to(torch.float8_e4m3fn))
    assert same(npu.npu_dtype_cast(x[:, :6].to("npu"), torch.half), x[:, :6].half())


# -- what the operators refuse -----------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], dict[str, Any]]


def _set(**values: Any) -> Change:
    return lambda args: values


def _to(name: str, change: Callable[[torch.Tensor], Any]) -> Change:
    return lambda args: {name: change(args[name])}


def _swapped(a: str, b: str) -> Change:
    return lambda args: {a: args[b], b: args[a]}


def _padded(name: str) -> Change:
    """The pad behind an odd number of scales holds something; `name` is pairs in their plain layout."""

    def change(args: dict[str, Any]) -> dict[str, Any]:
        pairs = args[name].clone()
        (pairs if args[name].is_contiguous() else pairs.transpose(0, 1))[0, -1, 1] = 127
        return {name: pairs}

    return change


def cpu_copy(x: torch.Tensor) -> torch.Tensor:
    return x.cpu()


FP4, FP8, W4A8 = MODES[0], MODES[1], MODES[2]
WRONG_PRODUCTS = [
    (FP4, "weight as it lies", _to("x2", lambda x: x.t()), "transpose"),
    (FP4, "scale as it lies", _to("scale", lambda x: x.transpose(0, 1)), "transpose"),
    (FP4, "both as they lie", lambda a: {n: a[n].transpose(0, 1) for n in ("x2", "scale")}, "K of x1 and x2"),
    (FP4, "contiguous scale", _to("scale", lambda x: x.contiguous()), "transpose"),
    (FP4, "contiguous weight", _to("x2", lambda x: x.contiguous()), "transpose"),
    (FP4, "scales swapped", _swapped("scale", "pertoken_scale"), "transpose"),
    (FP4, "scales not in pairs", _to("pertoken_scale", lambda x: x.flatten(-2)), "one axis more"),
    (FP4, "scales without their pad", _to("pertoken_scale", lambda x: x[:, :-1].contiguous()), "pertoken_scale"),
    (FP4, "pad of the activation's scales", _padded("pertoken_scale"), "pad"),
    (FP4, "pad of the weight's scales", _padded("scale"), "pad"),
    (FP4, "no x1_dtype", _set(x1_dtype=None), "not an MX mode"),
    (FP4, "no x2_dtype", _set(x2_dtype=None), "not an MX mode"),
    (FP4, "no scale_dtype", _set(scale_dtype=None), "not an MX mode"),
    (FP4, "no pertoken_scale_dtype", _set(pertoken_scale_dtype=None), "not an MX mode"),
    (FP4, "no pertoken_scale", _set(pertoken_scale=None), "not an MX mode"),
    (FP4, "fp32 scales", _to("scale", lambda x: x.float()), "bytes"),
    (FP4, "another scale_dtype", _set(scale_dtype=292), "scale_dtype"),
    (FP4, "another x1_dtype", _set(x1_dtype=292), "x1_dtype"),
    (FP4, "bf16 x1", _to("x1", lambda x: x.bfloat16()), "one byte"),
    (FP4, "fp32 and no MX", _to("x1", lambda x: x.float()), "one byte"),
    (FP4, "wrong groups", _set(group_sizes=[1, 32, 32]), "group_sizes"),
    (FP4, "groups of W4A8", _set(group_sizes=[0, 0, 32]), "group_sizes"),
    (FP4, "bias in bf16", _to("bias", lambda x: x.bfloat16()), "bias"),
    (FP4, "bias of W4A8", _to("bias", lambda x: x.reshape(1, -1)), "bias"),
    (FP4, "bias of another length", _to("bias", lambda x: x[:-1]), "bias"),
    (FP4, "bias strided", _to("bias", lambda x: torch.stack([x, x], -1)[:, 0]), "contiguous"),
    (FP4, "no output_dtype", _set(output_dtype=None), "output_dtype"),
    (FP4, "int32 result", _set(output_dtype=torch.int32), "output_dtype"),
    (FP4, "an offset", lambda a: {"offset": a["bias"]}, "offset"),
    (FP4, "x1 on the CPU", _to("x1", cpu_copy), "on cpu"),
    (FP4, "bias on the CPU", _to("bias", cpu_copy), "on cpu"),
    (FP4, "1-D x1", _to("x1", lambda x: x[0]), "2-D"),
    (FP4, "strided x1", _to("x1", lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]), "x1 is strided"),
    (FP4, "no rows", lambda a: {n: a[n][:0] for n in ("x1", "pertoken_scale")}, "empty"),
    (FP4, "K of another weight", lambda a: {"x2": a["x2"][:-1].t().contiguous().t()}, "K of x1 and x2"),
    (FP8, "x1_dtype of a native dtype", _set(x1_dtype=292), "native"),
    (FP8, "FP8 taken for FP4", _set(x1_dtype=296, x2_dtype=296), "native"),
    (FP8, "scale of the other layout", _to("scale", lambda x: x.contiguous()), "transpose"),
    (FP8, "bias in fp16", _to("bias", lambda x: x.half()), "bias"),
    (FP8, "codes as bytes", lambda a: {n: a[n].view(torch.uint8) for n in ("x1", "x2")}, "not an MX mode"),
    (FP8, "groups of 128", _set(group_sizes=[1, 128, 128]), "group_sizes"),
    (W4A8, "fp32 bias", _to("bias", lambda x: x.float()), "bias"),
    (W4A8, "1-D bias", _to("bias", lambda x: x.flatten()), "bias"),
    (W4A8, "no groups", _set(group_sizes=None), "group_sizes"),
    (W4A8, "groups of 64", _set(group_sizes=[0, 0, 64]), "group_sizes"),
    (W4A8, "fp32 result", _set(output_dtype=torch.float32), "output_dtype"),
    (W4A8, "a batch", lambda a: {n: a[n].unsqueeze(0) for n in ("x1", "pertoken_scale")}, "batch"),
    (W4A8, "weight as it lies", lambda a: {n: a[n].transpose(0, 1) for n in ("x2", "scale")}, "transposed"),
    (W4A8, "another bias dtype than the result's", _set(output_dtype=torch.float16), "bias"),
]


@pytest.mark.parametrize(("mode", "what", "change", "message"), WRONG_PRODUCTS)
def test_quant_matmul_refuses(mode, what, change: Change, message, npu):
    # K of 1120 is 35 blocks, so there is a pad, and 18 pairs; with as many rows, transposed scales have the same shape.
    args, _ = product(npu, *mode, m=18, n=18, k=1152 if mode == W4A8 else 1120)
    with pytest.raises(RuntimeError, match=message):
        npu.npu_quant_matmul(**args | change(args))


@pytest.mark.parametrize(
    ("mode", "n", "k", "message"),
    [
        (FP4, 4, 2, "above 2"),
        (W4A8, 4, 96, "multiple of 64"),
        (FP4, 65536, 32, "65535"),
        (FP8, 1, 65568, "65535"),
    ],
)
def test_quant_matmul_refuses_shapes(mode, n, k, message, npu):
    args, _ = product(npu, *mode, m=1, n=n, k=k)
    with pytest.raises(RuntimeError, match=message):
        npu.npu_quant_matmul(**args)


WRONG_DUAL_PRODUCTS = [
    ("ND weight", lambda a: {"x2": a["x2"].cpu().to("npu")}, "FRACTAL_NZ"),
    (
        "level-0 scales of the weight by rows",
        _to("x2_level0_scale", lambda x: x.t().contiguous()),
        "x2_level0_scale",
    ),
    ("level-0 scales as a view", _to("x2_level0_scale", lambda x: x.t().contiguous().t()), "contiguous"),
    ("levels of x1 swapped", _swapped("x1_level0_scale", "x1_level1_scale"), "x1_level0_scale"),
    ("levels of x2 swapped", _swapped("x2_level0_scale", "x2_level1_scale"), "x2_level0_scale"),
    ("scales of x1 and x2 swapped", _swapped("x1_level1_scale", "x2_level1_scale"), "x1_level1_scale"),
    ("level-1 scales not in pairs", _to("x2_level1_scale", lambda x: x.flatten(-2)), "x2_level1_scale"),
    ("level-1 scales transposed", _to("x2_level1_scale", lambda x: x.transpose(0, 1)), "contiguous"),
    ("pad of x1", _padded("x1_level1_scale"), "pad"),
    ("pad of x2", _padded("x2_level1_scale"), "pad"),
    ("level-0 scales in bf16", _to("x1_level0_scale", lambda x: x.bfloat16()), "x1_level0_scale"),
    ("bias in bf16", _to("bias", lambda x: x.bfloat16()), "bias"),
    ("bias of W4A8", _to("bias", lambda x: x.reshape(1, -1)), "bias"),
    ("fp32 result", _set(output_dtype=torch.float32), "output_dtype"),
    ("3-D x1", _to("x1", lambda x: x.unsqueeze(0)), "2-D"),
    ("x1 a view", _to("x1", lambda x: torch.cat([x, x], 1)[:, : x.shape[1]]), "contiguous"),
    ("no rows", _to("x1", lambda x: x[:0]), "empty"),
    ("x1 on the CPU", _to("x1", cpu_copy), "on cpu"),
    ("K of another weight", lambda a: {"x1": a["x1"][:, :-16].contiguous()}, "K of x1 and x2"),
    ("operands swapped", _swapped("x1", "x2"), "FRACTAL_NZ"),
]


@pytest.mark.parametrize(("what", "change", "message"), WRONG_DUAL_PRODUCTS)
def test_dual_level_quant_matmul_refuses(what, change: Change, message, npu):
    args, _ = dual_product(npu)
    with pytest.raises(RuntimeError, match=message):
        npu.npu_dual_level_quant_matmul(**args | change(args))


BF16 = torch.zeros(2, 64, dtype=torch.bfloat16)
WRONG_CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("npu_dynamic_mx_quant", (BF16.int(),), {}, "input"),
    ("npu_dynamic_mx_quant", (BF16[:, :33],), {}, "even"),
    ("npu_dynamic_mx_quant", (BF16[:0],), {}, "empty"),
    ("npu_dynamic_mx_quant", (BF16.reshape(*8 * (1,), 128),), {}, "1-D to 7-D"),
    ("npu_dynamic_mx_quant", (BF16.float()[:, :16],), {}, "32 or above"),
    ("npu_dynamic_mx_quant", (BF16.float(),), {"block_size": 64}, "float32"),
    ("npu_dynamic_mx_quant", (BF16,), {"axis": 2}, "axis"),
    ("npu_dynamic_mx_quant", (BF16,), {"axis": 0}, "the emulation"),
    ("npu_dynamic_mx_quant", (BF16,), {"block_size": 48}, "block_size"),
    ("npu_dynamic_mx_quant", (BF16,), {"block_size": 64}, "the emulation"),
    ("npu_dynamic_mx_quant", (BF16,), {"scale_alg": 1}, "scale_alg"),
    ("npu_dynamic_mx_quant", (BF16,), {"scale_alg": 2, "dst_type": 292}, "scale_alg"),
    ("npu_dynamic_mx_quant", (BF16,), {"scale_alg": 2, "dst_type": 297}, "scale_alg"),
    ("npu_dynamic_mx_quant", (BF16,), {"scale_alg": 2, "block_size": 64}, "block_size"),
    ("npu_dynamic_mx_quant", (BF16,), {"scale_alg": 2, "dst_type_max": 4.0}, "dst_type_max"),
    ("npu_dynamic_mx_quant", (BF16,), {"scale_alg": 2, "dst_type_max": 13.0}, "dst_type_max"),
    ("npu_dynamic_mx_quant", (BF16,), {"dst_type": 292, "dst_type_max": 7.25}, "dst_type_max"),
    ("npu_dynamic_mx_quant", (BF16,), {"dst_type": 292, "round_mode": "round"}, "round_mode"),
    ("npu_dynamic_mx_quant", (BF16,), {"round_mode": "ceil"}, "round_mode"),
    ("npu_dynamic_mx_quant", (BF16,), {"dst_type": torch.bfloat16}, "dst_type"),
    ("npu_dynamic_mx_quant", (BF16,), {"max_low_bound": 1.0}, "max_low_bound"),
    ("npu_dynamic_mx_quant", (BF16,), {"dst_type": 292, "scale_alg": 1, "max_low_bound": -1.0}, "max_low_bound"),
    ("npu_dynamic_dual_level_mx_quant", (BF16.float(),), {}, "input"),
    ("npu_dynamic_dual_level_mx_quant", (BF16[:, :33],), {}, "even"),
    ("npu_dynamic_dual_level_mx_quant", (BF16[:0],), {}, "empty"),
    ("npu_dynamic_dual_level_mx_quant", (BF16,), {"smooth_scale": torch.ones(64)}, "smooth_scale"),
    ("npu_dynamic_dual_level_mx_quant", (BF16,), {"smooth_scale": BF16[0].half()}, "smooth_scale"),
    ("npu_dynamic_dual_level_mx_quant", (BF16,), {"smooth_scale": BF16[:1]}, "smooth_scale"),
    ("npu_dynamic_dual_level_mx_quant", (BF16,), {"smooth_scale": BF16[0, :63]}, "smooth_scale"),
    ("npu_dynamic_dual_level_mx_quant", (BF16,), {"round_mode": "ceil"}, "round_mode"),
    ("npu_dtype_cast", (BF16.to(torch.uint8), 296), {}, "not bytes"),
    ("npu_dtype_cast", (BF16.to(torch.int8), 296), {}, "not bytes"),
    ("npu_dtype_cast", (BF16.to(torch.uint8), 296), {"input_dtype": 296}, "not bytes"),
    ("npu_dtype_cast", (BF16.to(torch.uint8), 292), {}, "in CAST's table"),
    ("npu_dtype_cast", (BF16.to(torch.uint8).t(), 15), {"input_dtype": 296}, "contiguous"),
    ("npu_dtype_cast", (BF16[:, :33], 296), {}, "even"),
    ("npu_format_cast", (BF16.to(torch.uint8), 29), {"customize_dtype": torch.uint8}, "one of"),
    ("npu_format_cast", (BF16.to(torch.int8), 29), {"customize_dtype": torch.float16}, "customize_dtype"),
    ("npu_format_cast", (BF16.to(torch.uint8), 29), {"input_dtype": 296, "customize_dtype": 296}, "recovery format"),
    ("npu_format_cast", (BF16.to(torch.int8), 4), {}, "acl_format"),
    ("npu_format_cast", (BF16[0].to(torch.int8), 29), {}, "2-D"),
    ("npu_format_cast", (BF16[:0].to(torch.int8), 29), {}, "empty"),
    ("npu_format_cast", (BF16[:1], 29), {}, "more than one row"),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "message"), WRONG_CALLS)
def test_refused(name, args, kwargs, message, npu):
    def there(x: Any) -> Any:
        return x.to("npu") if isinstance(x, torch.Tensor) else x

    operator = getattr(npu, name)
    with pytest.raises(RuntimeError, match=message):
        operator(*map(there, args), **{key: there(value) for key, value in kwargs.items()})
    with pytest.raises(RuntimeError, match="on cpu"):
        operator(*args, **kwargs)


def test_signatures(npu):
    """Keyword-only where TN's yaml says so."""
    x = BF16.to("npu")
    for call in (
        lambda: npu.npu_dynamic_mx_quant(x, -1),
        lambda: npu.npu_dynamic_dual_level_mx_quant(x, None),
        lambda: npu.npu_format_cast(x, 29, torch.bfloat16),
        lambda: npu.npu_quant_matmul(x, x, x, None),
        lambda: npu.npu_dual_level_quant_matmul(x, x, x, x, x, x, None),
        lambda: npu.npu_dynamic_mx_quant(x, smooth_scale=None),
    ):
        with pytest.raises(TypeError):
            call()


# -- what machine it is ------------------------------------------------------------------------------------------------


def test_calls_are_logged(npu):
    x = BF16.to("npu")
    npu.npu_dynamic_mx_quant(x, scale_alg=2, dst_type_max=7.25)
    name, arguments = npu.state.calls[-1]
    assert name == "npu_dynamic_mx_quant" and arguments["input"] == (torch.bfloat16, (2, 64))
    assert arguments["dst_type_max"] == 7.25 and arguments["axis"] == -1
    with npu.state.pretending():
        assert npu.state.calls == []
        npu.get_npu_format(x)
        assert [name for name, _ in npu.state.calls] == ["get_npu_format"]
    assert npu.state.calls[-1] == (name, arguments)


def test_the_machine_can_be_another(npu):
    assert npu.npu.is_available() and torch.npu.device_count() == 1 and npu.npu.current_device() == 0
    assert npu.npu.get_device_name() == "Ascend950PR_9579" and npu.utils.get_cann_version() == npu.state.cann
    assert (npu.float4_e2m1fn_x2, npu.float8_e8m0fnu, npu.float8_e4m3fn) == (296, 293, 292) and npu.__version__
    with npu.state.pretending(count=0, cann="8.5.0"):
        assert not torch.npu.is_available() and npu.utils.get_cann_version() == "8.5.0"
    with npu.state.pretending(missing=frozenset({"npu_dual_level_quant_matmul"})):
        assert not hasattr(npu, "npu_dual_level_quant_matmul") and hasattr(npu, "npu_quant_matmul")
    assert hasattr(npu, "npu_dual_level_quant_matmul") and not hasattr(npu, "npu_of_nothing")


def test_an_older_cann_lacks_kernels(npu):
    x, (args, expected), (dual, _) = BF16.to("npu"), product(npu, *FP4), dual_product(npu)
    weight = dual["x2"].cpu().to("npu")
    for kernel, call in (
        ("aclnnDynamicDualLevelMxQuant", lambda: npu.npu_dynamic_dual_level_mx_quant(x)),
        ("aclnnQuantMatmulV5", lambda: npu.npu_quant_matmul(**args)),
        ("aclnnDualLevelQuantMatmulWeightNz", lambda: npu.npu_dual_level_quant_matmul(**dual)),
        ("aclnnNpuFormatCast", lambda: npu.npu_format_cast(weight, 29)),
        ("aclnnCast", lambda: npu.npu_dtype_cast(x, 296)),
    ):
        with (
            npu.state.pretending(no_kernel=frozenset({kernel})),
            pytest.raises(RuntimeError, match=f"{kernel}.* (not|failed)"),
        ):
            call()
    # Without V3 the quantizer calls V2, which has no scale_alg 2, and then V1.
    without = ("aclnnDynamicMxQuantV3", "aclnnDynamicMxQuantV2", "aclnnDynamicMxQuant")
    for number in (1, 2, 3):
        with npu.state.pretending(no_kernel=frozenset(without[:number])):
            with pytest.raises(
                RuntimeError, match="scale_alg" if number < 3 else "aclnnDynamicMxQuant or .*not in libopapi.so"
            ):
                npu.npu_dynamic_mx_quant(x, scale_alg=2, dst_type_max=7.25)
            if number < 3:
                npu.npu_dynamic_mx_quant(x)
    assert same(npu.npu_quant_matmul(**args), expected())


def test_an_older_device_has_no_mx_operators(npu):
    x, (args, _), (dual, _) = BF16.to("npu"), product(npu, *FP4), dual_product(npu)
    with npu.state.pretending(name="Ascend910B3"):
        for call in (
            lambda: npu.npu_dynamic_mx_quant(x),
            lambda: npu.npu_dynamic_dual_level_mx_quant(x),
            lambda: npu.npu_quant_matmul(**args),
            lambda: npu.npu_dtype_cast(x, 296),
        ):
            with pytest.raises(RuntimeError, match="Ascend910B3"):
                call()
        with pytest.raises(RuntimeError, match="Ascend950 platform"):
            npu.npu_dual_level_quant_matmul(**dual)
        assert same(npu.npu_dtype_cast(x, torch.float32), BF16.float())


def test_without_the_fixture_there_is_no_npu():
    """Wherever in the run this test comes: with the device set up in this process, or never."""
    import importlib.util

    assert importlib.util.find_spec("torch_npu") is None
    assert not hasattr(torch, "npu") or not torch.npu.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None
