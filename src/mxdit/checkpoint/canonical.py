"""An expert in canonical form, whatever layout it is stored in: what the packed layout holds, and every fault on the way there.

Tensors are converted when they are read. Faults that names, shapes, dtypes and the small vectors show are found here; those that
only the data shows are raised when a tensor is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.checkpoint.experts import Expert, Finding, Stored
from mxdit.checkpoint.files import StoredTensor
from mxdit.checkpoint.layouts.numeric import pack
from mxdit.checkpoint.values import as_is, check_dual, check_e4m3, check_mul_scale, check_scale
from mxdit.checkpoint.writer import Part
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError, ConfigError, MXDiTError
from mxdit.models import spec_of
from mxdit.models.skeleton import skeleton_of
from mxdit.numerics.formats import FORMATS, BlockFormat, TensorInfo, block_format
from mxdit.quantize.plan import plan

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SCALES = ("weight_scale", "weight_dual_scale", "mul_scale")
OUTER = tuple(name for name, row in FORMATS.items() if row.outer)
ROTATIONS = ("q_rot", "k_rot")  # of msModelSlim's quantized attention; they cancel in the product of q and k


def read_expert(stored: Stored, base: Stored | None = None, *, fallback: bool = False) -> Expert:
    """Bring a stored expert into canonical form.

    Args:
        stored: what a layout's reader found.
        base: the same expert unquantized; gives the config where `stored` has none, and the tensors that it lacks.
        fallback: take linears of another method than the expert's, and smoothed float ones, from `base`.

    Raises CheckpointError where there is no telling what the expert is.
    """
    config = stored.config if stored.config is not None or base is None else base.config
    if config is None:
        raise CheckpointError(
            "the layout has no config.json that describes the model",
            where=str(stored.folder),
            hint="Name the unquantized model's directory with --base.",
        )
    most = len(stored.tensors) + len(base.tensors if base else ())
    for key, layers in config.items():  # num_layers, num_single_layers: too many would take for ever to make
        if key.endswith("_layers") and isinstance(layers, int) and layers > most:
            raise CheckpointError(
                "config.json describes another model than the files hold",
                where=str(stored.folder),
                got=f"{key} {layers}",
                expected=f"at most {most}, the number of tensors",
            )
    return _Reader(stored, base, config, fallback).expert()


@dataclass
class _Reader:
    stored: Stored
    base: Stored | None
    config: Mapping[str, Any]
    fallback: bool
    findings: list[Finding] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)

    def expert(self) -> Expert:
        where = str(self.stored.folder)
        skeleton = skeleton_of(self.config, where)
        self.spec = spec_of(skeleton)
        self.lost.extend(self.stored.lost)
        self.wanted = {name: TensorInfo.of(tensor) for name, tensor in skeleton.state_dict().items()}
        self.tensors = dict(self.stored.tensors)
        linears = {path: m for path, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
        methods = {path: self._method(path) for path in linears}
        if self.unsaid:
            self._find(
                f"{self.unsaid[0]}.weight",
                f"nothing says how this and {len(self.unsaid) - 1} other layers are quantized",
                "scales",
                "a quantization_config in config.json, or a quant_model_description*.json",
                "Restore that file: MXFP8 codes and FP4 values look alike.",
            )
        self._settle(methods)
        if self.stored.layout == "vllm-omni":
            self._drop_ones(methods)
        parts: dict[str, Part] = {}
        for name in self.wanted:
            path, _, leaf = name.rpartition(".")
            method = methods.get(path)
            if method and leaf == "weight":
                parts.update(self._quantized(path, linears[path], block_format(method)))
            else:
                part = self._float(name)
                if part:
                    parts[name] = part
        self._extra(parts, methods)
        self._smooth_groups(parts, methods)
        quantization = self._quantization(skeleton, methods)
        return Expert(
            self.stored,
            self.base,
            self.spec,
            self.config,
            quantization,
            parts,
            methods,
            tuple(self.findings),
            tuple(self.lost),
        )

    def _find(
        self, where: str, what: str, got: object = None, expected: object = None, hint: str | None = None
    ) -> None:
        self.findings.append(Finding(where, what, got, expected, hint))

    # -- which linear is what ----------------------------------------------------------------------------------------

    def _method(self, path: str) -> str | None:
        """How the linear at `path` is stored: by its description, else by its config, else by its tensors."""
        weight = self.tensors.get(f"{path}.weight")
        scale = self.tensors.get(f"{path}.weight_scale")
        said = None if self.stored.methods is None else self.stored.methods.get(path, "")
        stated = said or (str(self.stored.quantization.quant_method) if self.stored.quantization else None)
        if scale is None:
            if weight is None:
                return said or None
            if weight.info.dtype in FLOATS:
                if said:
                    self._find(
                        f"{path}.weight", f"the description says {said}", weight.info, f"{said} codes and scales"
                    )
                return None
            if not stated:
                self._find(
                    f"{path}.weight", "codes without a weight_scale", weight.info, "a float weight or its scales"
                )
            return stated  # whose scale is found missing
        if self.spec.place_of(path) is None:
            self._find(f"{path}.weight_scale", "a quantized linear outside the blocks")
        if said == "":
            self._find(f"{path}.weight", "the description says nothing of this layer", hint="Quantize the model again.")
        if said is None and self.stored.methods is not None:
            self._find(f"{path}.weight_scale", "the description calls this layer float", "scales", "a float weight")
            return None
        if stated:
            return stated
        if said is None:
            self.unsaid.append(path)
        # What it looks like, to look at the rest: a finding is there already.
        if f"{path}.weight_dual_scale" in self.tensors:
            return "mxfp4_dualscale"
        return "mxfp4" if weight is not None and weight.info.dtype is torch.uint8 else "mxfp8"

    def _settle(self, methods: dict[str, str | None]) -> None:
        """One expert has one method: what differs is refused, or taken from the base."""
        count = Counter(method for method in methods.values() if method)
        if self.stored.quantization is not None:
            main: str | None = str(self.stored.quantization.quant_method)
        else:
            # What most layers are; between equals the smaller one, over which the other is a fallback.
            main = max(count, key=lambda method: (count[method], -block_format(method).bits), default=None)
        others = [path for path, method in methods.items() if method and method != main]
        if self.fallback and self.base:
            for path in others:
                methods[path] = None
                self._from_base(path)
        elif others:
            blocks = sorted({place.index for path in others if (place := self.spec.place_of(path))})
            self._find(
                others[0],
                f"{len(others)} layers are stored in another method than the rest",
                f"{methods[others[0]]} in blocks {', '.join(map(str, blocks))}",
                main,
                "Keep them in BF16: --base with the unquantized model, and --fallback-from-base.",
            )
        for path in [p for p, m in methods.items() if not m and f"{p}.mul_scale" in self.tensors]:
            # Smoothing was folded into a weight that then stayed float: without its factor it is another weight.
            if self.fallback and self.base:
                self._from_base(path)
            else:
                self._find(
                    f"{path}.mul_scale",
                    "a float layer was smoothed, and a plain linear has no place for the factors",
                    hint="Take such layers from the unquantized model: --base and --fallback-from-base.",
                )

    def _drop_ones(self, methods: Mapping[str, str | None]) -> None:
        """vLLM-Omni wants factors in every dual-scale layer; where there is no smoothing a converter writes ones."""
        for path in methods:
            stored = self.tensors.get(f"{path}.mul_scale")
            if stored is not None and stored.info.dtype in FLOATS and bool((stored.read() == 1).all()):
                del self.tensors[stored.name]

    def _from_base(self, path: str) -> None:
        for name in [n for n in self.tensors if n.rpartition(".")[0] == path]:
            del self.tensors[name]

    # -- tensors -----------------------------------------------------------------------------------------------------

    def _float(self, name: str) -> Part | None:
        stored, want = self.tensors.get(name), self.wanted[name]
        if stored is None and self.base is not None:
            stored = self.base.tensors.get(name)
            if stored is not None and stored.info.dtype in FLOATS:
                # A base is often FP32: what is filled in has the dtype of what is there.
                part = Part(TensorInfo(want.shape, self._dtype()), partial(_cast, stored, self._dtype()))
                return self._shaped(name, stored, part)
        if stored is None:
            self._find(name, "missing tensor", hint="Fetch or convert the checkpoint again, or name its BF16 --base.")
            return None
        if stored.info.dtype not in FLOATS:
            self._find(name, "mistyped tensor", stored.info, TensorInfo(want.shape, torch.bfloat16))
            return None
        return self._shaped(name, stored, Part(stored.info, stored.read))

    def _shaped(self, name: str, stored: StoredTensor, part: Part) -> Part | None:
        if stored.shape == self.wanted[name].shape:
            return part
        self._find(name, "misshapen tensor", stored.info, self.wanted[name].shape)
        return None

    def _dtype(self) -> torch.dtype:
        """The dtype that most float tensors of the model itself have."""
        half = (torch.bfloat16, torch.float16)
        dtypes = [t.info.dtype for name, t in self.tensors.items() if not name.endswith(SCALES)]
        found = Counter(dtype for dtype in dtypes if dtype is not None and dtype in half)
        return found.most_common(1)[0][0] if found else torch.bfloat16

    def _quantized(self, path: str, linear: nn.Linear, row: BlockFormat) -> dict[str, Part]:
        n, k = linear.out_features, linear.in_features
        parts: dict[str, Part] = {}

        def add(leaf: str, shape: tuple[int, ...], dtype: torch.dtype, *accepted: tuple[TensorInfo, Callable]) -> None:
            name = f"{path}.{leaf}"
            stored = self.tensors.get(name)
            if stored is None:
                self._find(name, "missing tensor", hint="Fetch or convert the checkpoint again.")
                return
            for info, convert in accepted:
                if stored.info == info:
                    parts[name] = Part(TensorInfo(shape, dtype), partial(_converted, stored, convert))
                    return
            self._find(name, f"misshapen or mistyped tensor of a {row.name} layer", stored.info, accepted[0][0])

        codes = (n, k // row.per_byte)
        if row.bits == 8:
            e4m3 = TensorInfo((n, k), torch.float8_e4m3fn)
            add("weight", codes, torch.uint8, (TensorInfo(codes, torch.uint8), check_e4m3), (e4m3, check_e4m3))
        else:
            numeric = [(TensorInfo((n, k), dtype), pack) for dtype in (torch.float8_e4m3fn, *FLOATS)]
            add("weight", codes, torch.uint8, (TensorInfo(codes, torch.uint8), as_is), *numeric)
        scales = (n, row.blocks(k))
        e8m0 = [(TensorInfo(scales, dtype), check_scale) for dtype in (torch.uint8, torch.float8_e8m0fnu)]
        add("weight_scale", scales, torch.uint8, *e8m0)
        if row.outer:
            outer = (n, row.groups(k), 1)
            accepted = [(TensorInfo(shape, torch.float32), partial(check_dual, outer)) for shape in (outer, outer[:2])]
            add("weight_dual_scale", outer, torch.float32, *accepted)
        if f"{path}.mul_scale" in self.tensors:
            if row.outer:
                accepted = [(TensorInfo((k,), dtype), check_mul_scale) for dtype in FLOATS]
                add("mul_scale", (k,), torch.float32, *accepted)
            else:
                self._find(
                    f"{path}.mul_scale",
                    f"{row.name} is not smoothed: only mxfp4_dualscale has a place for the factors",
                    hint="Quantize without smoothing, or with dual scales.",
                )
        return parts

    # -- the whole ---------------------------------------------------------------------------------------------------

    def _extra(self, parts: Mapping[str, Part], methods: Mapping[str, str | None]) -> None:
        rotations = []
        for name in sorted(self.tensors):
            path, _, leaf = name.rpartition(".")
            if name in parts or name in self.wanted:
                continue
            if leaf in SCALES and path in methods and (leaf != "weight_dual_scale" or methods[path] in OUTER):
                continue  # a finding of its own already, where it is wrong
            if leaf in ROTATIONS:
                rotations.append(name)
            else:
                self._find(name, "a tensor that the model has no place for", self.tensors[name].info)
        if rotations:
            self.lost.append(f"{len(rotations)} rotations for quantized attention ({rotations[0]}, ...)")

    def _smooth_groups(self, parts: Mapping[str, Part], methods: Mapping[str, str | None]) -> None:
        """Linears that share an input share its smoothing: runtimes that fuse them have one vector for all."""
        blocks = dict.fromkeys(place[:2] for path in methods if (place := self.spec.place_of(path)))
        for blocks_of, index in blocks:
            for group in self.spec.groups:
                members = [path for name in group if (path := f"{blocks_of}.{index}.{name}") in methods]
                if len({methods[path] for path in members}) > 1:
                    got = ", ".join(f"{path} {methods[path] or 'float'}" for path in members)
                    self._find(members[0], "layers that share their input differ in precision", got, "one for all")
                    continue
                smooth = [parts[f"{path}.mul_scale"] for path in members if f"{path}.mul_scale" in parts]
                if not smooth:
                    continue
                try:
                    vectors = [part.read() for part in smooth]
                except MXDiTError:
                    continue  # the vector itself is at fault, which reading it says
                if len(vectors) < len(members) or any(not torch.equal(vectors[0], v) for v in vectors[1:]):
                    self._find(
                        f"{members[0]}.mul_scale",
                        "layers that share their input are smoothed differently",
                        ", ".join(members),
                        "equal mul_scale in all of them",
                    )

    def _quantization(self, skeleton: nn.Module, methods: Mapping[str, str | None]) -> MXConfig | None:
        found = {method for method in methods.values() if method}
        stated = self.stored.quantization
        if not found:
            if stated is not None or self.stored.methods is not None:
                self._find(str(self.stored.folder), "the model is said to be quantized, and no layer is")
            return None
        if len(found) > 1:
            return None  # a finding already
        ignored = [path for path, method in methods.items() if not method]
        if stated is None:
            alg = 0 if found == {"mxfp4"} else None  # what the runtimes that read such files do by default
            stated = MXConfig(found.pop(), activation=self.stored.activation, mxfp4_scale_alg=alg)
        elif self.stored.layout == "packed":
            try:
                decided = [path for path, decision in plan(skeleton, stated).items() if not decision.scheme]
            except ConfigError as error:
                self._find(f"{self.stored.folder}/config.json", f"quantization_config: {error}")
                return None
            off = sorted(set(decided) ^ set(ignored))
            self._listed(off, decided)
        elif self.stored.layout == "vllm-omni":
            listed = stated.ignored_layers
            names = {path: self.spec.runtime_name(path, "vllm-omni") for path in methods if self.spec.place_of(path)}
            off = [path for path, name in names.items() if (name in listed) == bool(methods[path])]
            self._listed(off, [path for path in off if names[path] in listed])
        stated = replace(
            stated,
            ignored_layers=tuple(ignored),
            num_bf16_fallback_layers=None,
            is_checkpoint_serialized=True,
            activation=stated.effective_activation,
        )
        if not stated.w4a8_fallback_layers or self.findings:
            return stated
        try:
            decisions = plan(skeleton, stated)
        except ConfigError as error:
            self._find(f"{self.stored.folder}/config.json", f"quantization_config: {error}")
            return None
        # By their paths and in the model's order: other layouts have no patterns and no order.
        raised = [
            p for p, decision in decisions.items() if decision.scheme and decision.activation != stated.activation
        ]
        return replace(stated, w4a8_fallback_layers=tuple(raised))

    def _listed(self, off: Sequence[str], listed: Container[str]) -> None:
        """A finding for layers that config.json lists as float and the files do not, or the other way round."""
        if off:
            there = off[0] in listed
            self._find(
                f"{self.stored.folder}/config.json",
                "ignored_layers lists other layers than the files hold as float",
                f"{off[0]} {'listed' if there else 'not listed'}",
                f"{'no scales' if there else 'scales'} stored for it",
            )


def _converted(stored: StoredTensor, convert: Callable[[Tensor, str], Tensor]) -> Tensor:
    return convert(stored.read(), f"{stored.file.name}: {stored.name}")


def _cast(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    return stored.read().to(dtype)
