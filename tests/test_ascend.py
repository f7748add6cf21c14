"""The Ascend backend through a fake torch_npu that keeps the operators' documented contract (tests/fakes).

Everything lies on the emulated device, gets there as it would on a real one, and comes back equal to the reference. Nobody
has run this on hardware: ``mxdit conformance --device npu`` is for those who can.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mxdit
import tiny
from mxdit import conformance, ops
from mxdit.backends import ascend, backends, layout_for, native
from mxdit.checkpoint import quantize_checkpoint
from mxdit.layers import MXLinear
from mxdit.numerics.formats import FORMATS, SCHEMES

pytestmark = pytest.mark.slow

OPS = torch.ops.mxdit
LINEARS = [(scheme, fmt) for scheme, row in SCHEMES.items() for fmt in row.weights]
ENCODINGS = [
    (fmt, rule, mode) for fmt, row in FORMATS.items() for rule, mode in itertools.product(row.rules, row.round_modes)
]
NO_OPERATOR = [("w4a16", "mxfp4"), ("w4a16", "mxfp4_dualscale"), ("w4a8", "mxfp4_dualscale"), ("w8a16", "mxfp8")]


@pytest.fixture(autouse=True)
def device(npu: Any) -> Iterator[Any]:
    """An A5 with everything installed, asked afresh."""
    forget()
    yield npu
    forget()


def forget() -> None:
    ascend._why_not.cache_clear()
    ascend._older.cache_clear()
    ascend._warn.cache_clear()


def there(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """On the device."""
    return tuple(None if tensor is None else tensor.to("npu") for tensor in tensors)


def called(npu: Any) -> list[str]:
    """The operators that were called, and an empty list from now on."""
    names = [name for name, _ in npu.state.calls if name != "get_npu_format"]
    npu.state.calls.clear()
    return names


def spread(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    blocks = torch.exp2((torch.rand(rows, -(-k // 32), 1) - 0.5) * 6)
    return (torch.randn(rows, -(-k // 32), 32) * blocks).flatten(1)[:, :k].to(dtype)


def reference_linear(x: torch.Tensor, w: mxdit.Packed, scheme: str, rule: str, bias: Any, mul_scale: Any) -> Any:
    with native.using("reference"):
        return OPS.linear(x, w.codes, w.scale, w.outer, mul_scale, bias, scheme, rule, "packed")


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the order of FP32 sums and one more rounding to bf16."""
    scale = float(expected.float().abs().mean().nan_to_num())  # of no rows: 0
    return torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=2**-8 * scale)


# -- the ops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "rule", "mode", "dtype"),
    [(*encoding, dtype) for encoding in ENCODINGS for dtype in FORMATS[encoding[0]].inputs],
    ids=str,
)
def test_quantizers_say_what_the_codec_says(fmt, rule, mode, dtype, device):
    for shape in ((3, 96), (2, 3, 1056), (5, 544), (64,), (1, 33) if FORMATS[fmt].per_byte == 1 else (1, 34), (0, 64)):
        x = spread(torch.Size(shape[:-1]).numel(), shape[-1], dtype).reshape(shape)
        mul_scale = torch.rand(shape[-1]) + 0.5 if FORMATS[fmt].outer else None
        expected = mxdit.encode(x, fmt, rule, mode, mul_scale)
        if FORMATS[fmt].outer:
            codes, outer, scale = OPS.quantize_dual(*there(x, mul_scale), mode)
            assert outer.dtype is torch.float32 and torch.equal(outer.cpu(), expected.outer)
        else:
            codes, scale = OPS.quantize(*there(x), fmt, rule, mode)
        assert codes.device.type == scale.device.type == "npu"
        assert torch.equal(codes.cpu(), expected.codes) and torch.equal(scale.cpu(), expected.scale)
        names = called(device)
        assert set(names) <= {"npu_dynamic_mx_quant", "npu_dynamic_dual_level_mx_quant"}
        assert len(names) == (1 if x.numel() else 0)


@settings(max_examples=40)
@given(
    m=st.integers(0, 9),
    n=st.integers(1, 40),
    k=st.sampled_from([64, 96, 544, 576, 1024, 1120]),
    case=st.sampled_from([case for case in LINEARS if case not in NO_OPERATOR]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    layout=st.sampled_from(["packed", "nz"]),
    with_bias=st.booleans(),
    smooth=st.booleans(),
)
def test_linear_is_the_references(m, n, k, case, dtype, layout, with_bias, smooth):
    scheme, fmt = case
    if dtype not in SCHEMES[scheme].output_dtypes(fmt):
        dtype = torch.bfloat16
    if scheme == "w4a8":
        k = -(-k // 64) * 64
    x, w = spread(m, k, dtype), mxdit.encode(spread(n, k) * 0.1, fmt)
    bias = torch.randn(n).to(dtype) if with_bias else None
    mul_scale = torch.rand(k) + 0.5 if smooth and w.format.smooths else None
    activation = SCHEMES[scheme].weights[fmt]
    rule = FORMATS[activation].default_rule
    expected = reference_linear(x, w, scheme, rule, bias, mul_scale)
    codes = w.codes.to("npu")
    if fmt == "mxfp8" or (layout == "nz" and w.outer is None):
        layout = "packed"
    if layout == "nz":
        codes = ascend.pack_nz(codes)
    got = OPS.linear(*there(x), codes, *there(w.scale, w.outer, mul_scale, bias), scheme, rule, layout)
    assert got.device.type == "npu" and got.dtype is dtype and got.shape == (m, n)
    assert torch.equal(got.cpu(), expected) if scheme == "w4a4" else close(got.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_packed_operands(dtype, device):
    x, w, bias = spread(6, 1056).reshape(2, 3, 1056), spread(17, 1056) * 0.1, torch.randn(17)
    for a_fmt, w_fmt in (("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("mxfp8", "mxfp4")):
        x, w = (x[..., :1024], w[:, :1024]) if a_fmt != w_fmt else (x, w)
        if a_fmt != w_fmt and dtype is torch.float32:
            continue
        a, b = mxdit.encode(x, a_fmt), mxdit.encode(w, w_fmt)
        args = (a.codes, a.scale, b.codes, b.scale, bias)
        with native.using("reference"):
            expected = OPS.matmul(*args, a_fmt, w_fmt, dtype)
        got = OPS.matmul(*there(*args), a_fmt, w_fmt, dtype).cpu()
        assert torch.equal(got, expected) if a_fmt == "mxfp4" else close(got, expected)
    if dtype is not torch.float32:
        a, b = mxdit.encode(x, "mxfp4_dualscale"), mxdit.encode(w, "mxfp4_dualscale")
        args = (a.codes, b.codes, a.outer, b.outer, a.scale, b.scale, bias)
        with native.using("reference"):
            expected = OPS.matmul_dual(*args, dtype)
        assert torch.equal(OPS.matmul_dual(*there(*args), dtype).cpu(), expected)
    assert called(device)


@pytest.mark.parametrize(("scheme", "fmt"), NO_OPERATOR)
def test_what_has_no_operator_is_computed_by_the_reference_and_said(scheme, fmt, device, caplog):
    x, w = spread(5, 576), mxdit.encode(spread(9, 576) * 0.1, fmt)
    activation = SCHEMES[scheme].weights[fmt]
    expected = reference_linear(x, w, scheme, "ocp", None, None)
    codes = ascend.pack_nz(w.codes.to("npu")) if w.outer is not None else w.codes.to("npu")
    called(device)
    with caplog.at_level(logging.WARNING, logger="mxdit"):
        for _ in range(2):
            got = OPS.linear(
                *there(x),
                codes,
                *there(w.scale, w.outer),
                None,
                None,
                scheme,
                "ocp",
                "packed" if w.outer is None else "nz",
            )
            assert close(got.cpu(), expected)
    assert "npu_quant_matmul" not in called(device) and (activation is None or activation == "mxfp8")
    assert [record.getMessage() for record in caplog.records].count(
        f"npu: the reference, plain torch, computes {scheme} over {fmt}: no operator computes it"
    ) == 1


@pytest.mark.parametrize(
    ("scheme", "fmt", "n", "k", "words"),
    [
        ("w4a4", "mxfp4", 65536, 32, "N=65536.*65535"),
        ("w4a4", "mxfp4", 4, 65536, "K=65536.*65535"),
        ("w4a4", "mxfp4", 4, 2, "K=2.*more than 2"),
        ("w4a8", "mxfp4", 4, 96, "K=96.*multiples of 64"),
        ("w8a8", "mxfp8", 65536, 32, "N=65536.*65535"),
    ],
)
def test_shapes_that_no_operator_takes_are_refused_before_it_is_asked(scheme, fmt, n, k, words, device):
    w = mxdit.Packed(
        torch.zeros(n, k // FORMATS[fmt].per_byte, dtype=torch.uint8), torch.ones(n, -(-k // 32)).byte(), None, fmt
    )
    assert ascend.rejects(scheme, k, n)
    with pytest.raises(mxdit.BackendError, match=rf"{words}.*ignored_layers"):
        OPS.linear(*there(spread(2, k), w.codes, w.scale), None, None, None, scheme, "ocp", "packed")
    a = mxdit.encode(spread(2, k), SCHEMES[scheme].weights[fmt])
    with pytest.raises(mxdit.BackendError, match=words):
        OPS.matmul(*there(a.codes, a.scale, w.codes, w.scale), None, a.fmt, fmt, torch.bfloat16)
    assert not set(called(device)) & {"npu_quant_matmul", "npu_dual_level_quant_matmul"}


def test_short_rows_of_fp32_are_refused():
    with pytest.raises(mxdit.BackendError, match=r"K=16.*32 or more.*bfloat16"):
        OPS.quantize(spread(2, 16, torch.float32).to("npu"), "mxfp4", "ocp", "rint")


def test_every_shape_that_a_layer_of_wan_has_is_taken():
    for (scheme, fmt), k, n in itertools.product(LINEARS, (3072, 5120, 13824, 14336), (5120, 13824, 15360)):
        assert ascend.rejects(scheme, k, n) is None, (scheme, fmt)


@pytest.mark.parametrize(("scheme", "fmt"), [case for case in LINEARS if case not in NO_OPERATOR])
def test_single_rows_cut_out_of_wider_ones(scheme, fmt):
    """They are contiguous in torch's eyes, with a stride that tells the operators of no transposition."""
    wide, per_byte = mxdit.encode(spread(3, 2048), fmt), FORMATS[fmt].per_byte
    x = spread(1, 2048)

    def row(device: str) -> torch.Tensor:
        codes, scale, outer = (t if t is None else t.to(device) for t in (wide.codes, wide.scale, wide.outer))
        args = (
            codes[1:2, 512 // per_byte : 1024 // per_byte],
            scale[1:2, 16:32],
            None if outer is None else outer[1:2, 1:2],
        )
        return OPS.linear(x.to(device)[:, 512:1024], *args, None, None, scheme, "ocp", "packed").cpu()

    with native.using("reference"):
        assert close(row("npu"), row("cpu"))


def test_layouts_are_for_the_device_that_reads_them():
    w = mxdit.encode(spread(4, 64), "mxfp4")
    with pytest.raises(mxdit.BackendError, match=r"'nz' on cpu.*'packed'"):
        OPS.linear(spread(1, 64), w.codes.view(torch.int8), w.scale, None, None, None, "w4a4", "uos", "nz")
    with pytest.raises(mxdit.BackendError, match=r"'tiled' on npu.*'packed' or 'nz'"):
        OPS.linear(*there(spread(1, 64), w.codes, w.scale), None, None, None, "w4a4", "uos", "tiled")
    with pytest.raises(mxdit.FormatError, match=r"torch.uint8.*\(N, K/2\) of torch.int8"):
        OPS.linear(*there(spread(1, 64), w.codes, w.scale), None, None, None, "w4a4", "uos", "nz")


def test_op_implementations_and_their_fakes_agree():
    """`torch.library.opcheck` cannot put its tensors on an emulated device; the one thing it would find here is this."""
    x, w = spread(6, 576).reshape(2, 3, 576), mxdit.encode(spread(9, 576), "mxfp4_dualscale")
    for args, fake in (
        ((OPS.quantize, x, "mxfp4", "uos", "rint"), ops.OPS["quantize"].prepare),
        ((OPS.quantize_dual, x, None, "rint"), ops.OPS["quantize_dual"].prepare),
        ((OPS.linear, x, w.codes, w.scale, w.outer, None, None, "w4a4", "ocp", "packed"), ops.OPS["linear"].prepare),
    ):
        got = args[0](*(a.to("npu") if isinstance(a, torch.Tensor) else a for a in args[1:]))
        expected = fake(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args[1:]))
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for real, meta in pairs:
            assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


# -- layers and models -----------------------------------------------------------------------------------------------------


def test_a_dual_scale_weight_is_packed_once_and_saved_canonical(device):
    weight, bias, x = spread(48, 576) * 0.1, torch.randn(48).bfloat16(), spread(5, 576)
    layer = MXLinear.from_weight(weight, bias, method="mxfp4_dualscale", mul_scale=torch.rand(576) + 0.5)
    expected, canonical = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to("npu")
    called(device)
    assert device.get_npu_format(layer.weight) == 29 and layer.weight.dtype is torch.int8
    with native.using("reference"):
        assert torch.equal(layer(x.to("npu")).cpu(), expected)
    assert called(device) == ["npu_dynamic_dual_level_mx_quant", "npu_dual_level_quant_matmul"]

    state = layer.state_dict()
    assert list(state) == list(canonical)
    for name, tensor in state.items():
        assert tensor.dtype is canonical[name].dtype and torch.equal(tensor.cpu(), canonical[name]), name
    layer.load_state_dict(canonical)
    assert device.get_npu_format(layer.weight) == 29 and torch.equal(layer(x.to("npu")).cpu(), expected)
    layer.to(torch.float16).to(torch.bfloat16)
    assert torch.equal(layer(x.to("npu")).cpu(), expected)
    layer.to("cpu")
    assert layer.weight.dtype is torch.uint8 and torch.equal(layer.weight, canonical["weight"])
    assert torch.equal(layer(x), expected)


def test_a_packed_weight_that_a_host_moved_by_itself_is_still_read(device):
    """Offloading hooks move tensors, not modules: the blocks are undone on the way to the CPU, and come back as rows."""
    layer = MXLinear.from_weight(spread(48, 576).to("npu"), None, method="mxfp4_dualscale")
    x = spread(5, 576).to("npu")
    expected, canonical = layer(x).cpu(), layer.state_dict()["weight"].cpu()
    layer._buffers["weight"] = layer.weight.cpu()
    assert torch.equal(layer.state_dict()["weight"], canonical)
    layer._buffers["weight"] = layer.weight.to("npu")
    assert device.get_npu_format(layer.weight) == 2
    assert torch.equal(layer(x).cpu(), expected)


def test_other_methods_have_no_other_layout():
    assert (
        layout_for(torch.device("npu"), "mxfp4") is None and layout_for(torch.device("cpu"), "mxfp4_dualscale") is None
    )
    layer = MXLinear.from_weight(spread(8, 64).to("npu"), None, method="mxfp4")
    assert layer.weight.dtype is torch.uint8


def forward(model: Any, device: str) -> torch.Tensor:
    """`tiny.forward` on a device, brought back; on the CPU by the reference."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8, generator=generator).to(model.dtype),
        "timestep": torch.tensor([999.3]),
        "encoder_hidden_states": torch.randn(1, 6, tiny.TEXT_DIM, generator=generator).to(model.dtype),
    }
    with torch.no_grad(), native.using("reference"):
        return model(**{name: tensor.to(device) for name, tensor in inputs.items()}).sample.cpu()


@pytest.mark.parametrize("method", FORMATS)
def test_a_model_online_and_offline(method, tmp_path, device):
    """Quantized on the CPU and on the device; saved, and loaded to the device: one model, one result."""
    here, there = tiny.transformer().bfloat16(), tiny.transformer().bfloat16().to("npu")
    for model in (here, there):
        mxdit.quantize_(model, method)
    called(device)
    assert torch.equal(forward(there, "npu"), forward(here, "cpu"))
    matmul = "npu_dual_level_quant_matmul" if FORMATS[method].outer else "npu_quant_matmul"
    assert called(device).count(matmul) == len(mxdit.report_of(there).quantized) > 0
    assert mxdit.report_of(there).to_dict() == mxdit.report_of(here).to_dict()

    for name, model in (("here", here), ("there", there)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "there" / tiny.WEIGHTS).read_bytes() == (tmp_path / "here" / tiny.WEIGHTS).read_bytes()
    expected = forward(tiny.load(tmp_path / "here"), "cpu")
    assert torch.equal(forward(tiny.load(tmp_path / "there").to("npu"), "npu"), expected)
    mapped = tiny.load(tmp_path / "there", device_map="npu")
    if FORMATS[method].outer:
        assert device.get_npu_format(mapped.blocks[0].ffn.net[2].weight) == 29
    assert torch.equal(forward(mapped, "npu"), expected)
    assert tiny.same(there.to("cpu"), here)


@pytest.mark.parametrize("method", FORMATS)
def test_a_checkpoint_quantized_on_the_device_is_canonical(method, tmp_path, device):
    tiny.transformer().bfloat16().save_pretrained(tmp_path / "float")
    called(device)
    for place in ("cpu", "npu"):
        quantize_checkpoint(tmp_path / "float", tmp_path / place, method, device=place).write()
    quantize = "npu_dynamic_dual_level_mx_quant" if FORMATS[method].outer else "npu_dynamic_mx_quant"
    assert called(device).count(quantize) == tiny.LINEARS * tiny.BLOCKS
    for name in (tiny.WEIGHTS, "config.json"):
        assert (tmp_path / "npu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("task", tiny.TASKS)
def test_a_whole_cascade(task, tmp_path, device):
    directory = tiny.save(tmp_path / "float", task)
    config = mxdit.pipeline_config("mxfp4_dualscale", transformer_2={"quant_method": "mxfp4"})
    cls = type(tiny.pipeline(task))
    clips = []
    for place in ("cpu", "npu"):
        pipe = cls.from_pretrained(str(directory), torch_dtype=torch.bfloat16, quantization_config=config).to(place)
        called(device)
        with native.using("reference"):
            clips.append(tiny.generate(pipe))
        if place == "npu":
            assert {"npu_dual_level_quant_matmul", "npu_quant_matmul", "npu_dynamic_mx_quant"} <= set(called(device))
    assert (clips[0] == clips[1]).all()


# -- why not ---------------------------------------------------------------------------------------------------------------


def line() -> str:
    forget()
    return str(ascend.why_not())


def test_why_not_tells_one_lack_from_another(device, monkeypatch):
    assert ascend.why_not() is None
    about = next(b for b in backends() if b.device == "npu").about()
    assert all(word in about for word in ("Ascend950", device.__version__, "9.1.0", "W4A16"))
    with device.state.pretending(count=0):
        assert "sees no NPU" in line()
    with device.state.pretending(name="Ascend910B3"):
        assert "Ascend910B3 has no MX operators" in line()
    with device.state.pretending(missing=frozenset({"npu_dual_level_quant_matmul"})):
        assert "has no npu_dual_level_quant_matmul" in line() and ascend.NEEDED in line()
    for kernel in ("aclnnDynamicDualLevelMxQuant", "aclnnQuantMatmulV5", "aclnnDualLevelQuantMatmulWeightNz"):
        with device.state.pretending(no_kernel=frozenset({kernel}), cann="8.5.0"):
            assert "CANN 8.5.0 does not run" in line() and kernel in line() and ascend.NEEDED in line()
    forget()
    monkeypatch.setattr(ascend, "find_spec", lambda name: None)
    assert "torch_npu is not installed" in str(ascend.why_not()) and ascend.NEEDED in str(ascend.why_not())
    monkeypatch.undo()

    def broken(name: str) -> Any:
        raise ImportError("libhccl.so: cannot open shared object file\nmore")

    monkeypatch.setattr(ascend, "import_module", broken)
    assert "torch_npu does not load (libhccl.so: cannot open shared object file)" in line() and "set_env.sh" in line()


def test_an_older_device_is_answered_by_the_reference(device, caplog):
    x, w = spread(3, 1024), mxdit.encode(spread(9, 1024), "mxfp4_dualscale")
    with device.state.pretending(name="Ascend910B3"), caplog.at_level(logging.WARNING, logger="mxdit"):
        forget()
        assert layout_for(torch.device("npu"), "mxfp4_dualscale") is None
        got = OPS.linear(*there(x, w.codes, w.scale, w.outer), None, None, "w4a4", "ocp", "packed")
        codes, scale = OPS.quantize(x.to("npu"), "mxfp4", "uos", "rint")
        assert not called(device)
    assert torch.equal(got.cpu(), reference_linear(x, w, "w4a4", "ocp", None, None))
    expected = mxdit.encode(x, "mxfp4", "uos")
    assert torch.equal(codes.cpu(), expected.codes) and torch.equal(scale.cpu(), expected.scale)
    assert "the reference, plain torch, computes w4a4 over mxfp4_dualscale: Ascend910B3" in caplog.text


def test_the_reference_computes_in_ieee_fp32_there(device):
    seen = []
    device.npu.matmul.allow_hf32 = True
    try:
        ascend._refer("a product", lambda: seen.append(device.npu.matmul.allow_hf32))
        assert seen == [False] and device.npu.matmul.allow_hf32
    finally:
        device.npu.matmul.allow_hf32 = False


# -- the conformance command -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("single_threaded")
@pytest.mark.parametrize(
    "case",  # rounding modes and rules are looked at above
    [case for case in conformance.cases() if not any(word in case.name for word in ("round", "floor", "even"))],
    ids=lambda case: case.name,
)
def test_conformance_cases(case):
    """What ``mxdit conformance --device npu`` has to say where everything is as documented."""
    result = case.run("npu")
    refused = "w4a8 mxfp4: K = 96" in case.name
    left = case.name.startswith(("dequantize", "attention", "rms_norm", "gelu_"))  # to the reference
    verdict = conformance.SKIPPED if left else conformance.REFUSED if refused else conformance.PASS
    assert result.verdict == verdict, f"{result.reason}\n{result.reproducer}"
    assert not result.codes and not result.scales
