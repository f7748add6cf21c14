"""What a pipeline's weights take of memory, told from configs and headers alone: tensor by tensor, in the dtype and form in
which they will be held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mxdit.checkpoint.files import read_json
from mxdit.checkpoint.folders import open_tensors
from mxdit.config import MXConfig
from mxdit.errors import CheckpointError
from mxdit.generation.directory import ModelDirectory
from mxdit.models import spec_of
from mxdit.models.skeleton import UNBUILDABLE, skeleton_of
from mxdit.numerics.formats import FLOATS, TensorInfo, block_format
from mxdit.quantize.plan import plan


@dataclass(frozen=True)
class Weights:
    """Bytes of one component's tensors, as they will be held.

    own      in memory that no file backs: cast or quantized while they load.
    mapped   on a CPU the pages of a file, which can be let go and read again.
    rows     of `mapped`, embedding tables: a lookup reads the pages of a few rows.
    blocks   of all, those in a transformer's repeated blocks, and `block` those in the largest of them.
    read     to be read from the disk to have them.
    """

    own: int = 0
    mapped: int = 0
    rows: int = 0
    blocks: int = 0
    block: int = 0
    read: int = 0

    @property
    def total(self) -> int:
        """All tensors."""
        return self.own + self.mapped


def weights_of(
    model: ModelDirectory, name: str, config: MXConfig | None, dtype: torch.dtype, variant: str | None = None
) -> Weights:
    """Bytes of a component, by the headers of its files, or by its config.json alone where it has no files.

    Args:
        name: of the component in model_index.json.
        config: what it is quantized with while it loads, or as it is stored.
        dtype: of what is not quantized.

    Raises CheckpointError for a component that cannot be built, and files that are damaged.
    """
    folder, skeleton = model.path / name, component_of(model, name)
    stored = _stored(folder, variant)
    packed = {**model.stored, **model.stored_encoders}.get(name)
    quantized = packed.run_as(config) if packed and config else packed or config
    kept = _float32(skeleton, dtype)
    methods: dict[str, str] = {}  # of what is packed, on the disk or while it loads
    names = list(spec_of(skeleton).tables) if name in model.encoders else []  # of the token table
    if quantized is not None:
        decided = {path: decision.method for path, decision in plan(skeleton, quantized).items()}
        # What transformers keeps in FP32 it does not quantize.
        methods = {path: method for path, method in decided.items() if method and not kept(f"{path}.weight")}
        if quantized.embedding:
            methods |= dict.fromkeys(names, str(quantized.embedding))
    tables = {path for path, part in skeleton.named_modules(remove_duplicate=False) if isinstance(part, nn.Embedding)}
    found = stored or {name: TensorInfo.of(tensor) for name, tensor in _once(skeleton).items()}
    own = mapped = rows = inside = 0
    blocks: dict[tuple[str, int], int] = {}
    for tensor, info in found.items():
        path, _, leaf = tensor.rpartition(".")
        held = torch.float32 if kept(tensor) else dtype
        method = methods.get(path)
        if path in names[1:] and f"{names[0]}.weight" in found:  # a second name of what is there
            continue
        if method and leaf == "weight" and info.dtype in FLOATS:
            record = block_format(method).tensors(*info.shape, where=tensor)
            nbytes, maps = sum(part.nbytes for part in record.values()), stored is None
        elif info.dtype in FLOATS and not (method and leaf in ("weight_dual_scale", "mul_scale")):
            nbytes, maps = TensorInfo(info.shape, held).nbytes, stored is None or info.dtype is held
        else:  # packed: bytes stay bytes
            nbytes, maps = info.nbytes, True
        own, mapped = own + nbytes * (not maps), mapped + nbytes * maps
        rows += nbytes * (maps and path in tables)
        place = model.spec.place_of(tensor) if name in model.components else None
        if place:
            inside += nbytes
            blocks[place[:2]] = blocks.get(place[:2], 0) + nbytes
    extra = sum(b.nbytes for b in skeleton.buffers()) - sum(
        b.nbytes for n, b in skeleton.named_buffers() if n in skeleton.state_dict()
    )
    read = sum(info.nbytes for info in found.values())
    return Weights(own + extra, mapped, rows, inside, max(blocks.values(), default=0), read)


def component_of(model: ModelDirectory, name: str) -> nn.Module:
    """A component of a pipeline without memory, from its config.json. Raises CheckpointError where it cannot be built."""
    folder = model.path / name
    config = read_json(folder / "config.json")
    if name in model.components:
        return skeleton_of(config, str(folder / "config.json")).eval()
    library, kind = model.parts[name]
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        if library == "diffusers":
            import diffusers

            with torch.device("meta"):
                return getattr(diffusers, kind).from_config(config).eval()
        import transformers

        cls = getattr(transformers, kind)
        with torch.device("meta"):
            return cls(cls.config_class.from_dict(config)).eval()
    except UNBUILDABLE as error:
        raise CheckpointError(
            "no model can be built from this config",
            where=str(folder / "config.json"),
            got=f"{type(error).__name__}: {error}".splitlines()[0][:200],
        ) from None


def _stored(folder: Path, variant: str | None) -> dict[str, TensorInfo] | None:
    """The tensors of a component's files; None where there are none, or none that say their shapes (.bin)."""
    if not any(folder.glob("*.safetensors")):
        return None
    return {name: tensor.info for name, tensor in open_tensors(folder, variant=variant).items()}


def _once(skeleton: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state_dict, those that it has under two names once."""
    seen = {id(tensor): name for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers())}
    return {
        name: tensor for name, tensor in skeleton.state_dict(keep_vars=True).items() if seen.get(id(tensor)) == name
    }


def _float32(skeleton: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether the library that loads a tensor keeps it in FP32, whatever the dtype of the rest.

    diffusers does so for a class's `_keep_in_fp32_modules`, transformers for those only in FP16, and for its strict ones.
    """
    names = set(getattr(skeleton, "_keep_in_fp32_modules_strict", None) or ())
    if type(skeleton).__module__.startswith("diffusers") or dtype is torch.float16:
        names |= set(getattr(skeleton, "_keep_in_fp32_modules", None) or ())
    return lambda tensor: not names.isdisjoint(tensor.split("."))
