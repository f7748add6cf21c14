"""What a pipeline computes takes of memory beside its weights, told from configs alone.

What a module allocates while it runs is not derived on paper: the module runs without data, on torch's meta device, at the real
sizes, and `Live` adds up the tensors that are alive. That holds for whatever release of diffusers is installed. What kernels
allocate beside their results is added.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mxdit.errors import InputError
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.footprint import component_of

ONEDNN = 20480  # batch, channels, frames and rows of a convolution over which oneDNN does it on a CPU
PANEL = 64  # the widest panel that a kernel of attention lays keys or columns of values out in


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside a ``with`` block and still alive, and the most there ever were.

    A convolution is counted with a copy of its input: on a CPU oneDNN brings it into blocks (measured, docs/memory.md); what
    cuDNN takes for itself is not known beforehand, and is taken for the same.

    Attributes:
        now, peak: bytes.
        kept: bytes that our kernels of attention keep, had they attended: see `attention_bytes`.
        multiplied: floating-point operations of the convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.kept = self.multiplied = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given | self._known.keys():
                self._add(x.untyped_storage())
        beside = 0
        if func is torch.ops.aten.convolution.default:
            beside = _beside(args[0], args[1], result)
            self.multiplied += 2 * result.numel() * args[1].numel() // args[1].shape[0]
        self.peak = max(self.peak, self.now + beside)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= nbytes

        self.now += nbytes
        self._known[key] = weakref.ref(storage, gone)


def _beside(x: Tensor, weight: Tensor, result: Tensor) -> int:
    """What a convolution holds beside its result: see `Live`. A small one in FP32 and three dimensions torch does itself on a
    CPU, with its input laid out once for each place of the kernel (`use_mkldnn` of its Convolution.cpp, 2.13). Other devices are
    planned alike: what they take is not known."""
    if x.dim() == 5 and x.dtype is torch.float32 and x.shape[:4].numel() <= ONEDNN and x.shape[0] == 1:
        return result.nbytes // weight.shape[0] * weight[0].numel()
    return x.nbytes


class _Attention(TorchFunctionMode):
    """Attention as kernels do it that hold no scores: torch takes the product apart on the meta device, and on no other."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        *batch, heads, rows, width = query.shape
        self.kept = max(self.kept, attention_bytes(key.shape[-2], width, value.shape[-1]))
        return query.new_empty(*batch, rows, heads, value.shape[-1]).transpose(-3, -2)


def attention_bytes(keys: int, width: int, v_width: int) -> int:
    """Most that a CPU's kernels of attention keep between calls: a head's keys and values in fp32, in whole panels; 8 MiB where
    that is less, for more heads at once (docs/cpu.md). BF16 units keep half of it, INT8 a quarter or half."""
    padded = [(n + PANEL - 1) // PANEL * PANEL for n in (keys, width, v_width)]
    return max(2**23, padded[0] * (padded[1] + padded[2]) * 4)


def live(call: Callable[[], object]) -> Live:
    """What a call on the meta device takes; its result is alive at the end."""
    mode, attention = Live(), _Attention()
    with torch.no_grad(), attention, mode:
        result = call()
    del result
    mode.kept = attention.kept
    return mode


@dataclass(frozen=True)
class Work:
    """Bytes that are alive at most in each phase of a run beside the weights, for one size.

    text     the text encoder's pass over one prompt.
    image    the VAE's over the first frame, 0 where none is given; tiled, `image_tiled`.
    denoise  a forward of the transformer, with what the loop holds.
    decode   the VAE's pass over the latents; tiled, `decode_tiled`.
    pixels   the clip as floats and as bytes, after the VAE.
    kept     what a CPU's kernels of attention keep from the first step on.
    tiles    how many times as many operations the VAE takes in tiles; `operations` of it as a whole.
    """

    text: int
    image: int
    image_tiled: int
    denoise: int
    decode: int
    decode_tiled: int
    pixels: int
    kept: int
    tiles: float
    operations: int


@dataclass
class Works:
    """`Work` of a pipeline at any size. What does not depend on the size is traced once.

    Raises InputError for a family that says nothing of its transformer's inputs.
    """

    model: ModelDirectory
    task: str
    dtype: torch.dtype
    _found: dict[tuple[int, int, int], Work] = field(default_factory=dict)

    def at(self, height: int, width: int, frames: int) -> Work:
        """For a clip of this size in pixels and frames."""
        key = height, width, frames
        if key not in self._found:
            self._found[key] = self._traced(*key)
        return self._found[key]

    @cached_property
    def _transformer(self) -> Any:
        name = next(iter(self.model.components))
        if self.model.spec.shapes is None:
            raise InputError(
                "no plan of memory is made for this kind of model",
                field="memory",
                where=str(self.model.path),
                got=self.model.spec.transformer,
                hint="Leave it out; diffusers' own offloading works on its pipelines.",
            )
        made = nn.Module.to(component_of(self.model, name), self.dtype)  # a host's own `to` warns of casting
        for blocks in self.model.spec.blocks:  # one is like the other: two, for what the second holds of the first
            held = made.get_submodule(blocks)
            assert isinstance(held, nn.ModuleList)
            del held[2:]
        return made

    @cached_property
    def _vae(self) -> Any:
        float32 = "vae" in self.model.called(self.task).float32
        return nn.Module.to(component_of(self.model, "vae"), torch.float32 if float32 else self.dtype)

    @cached_property
    def _text(self) -> int:
        """Of the encoder that takes most; encoders run one after the other."""
        encoders = [nn.Module.to(component_of(self.model, name), self.dtype) for name in self.model.text_encoders]
        tokens = torch.empty(1, self.model.spec.text_tokens, dtype=torch.long, device="meta")
        return max((live(partial(encoder, tokens)).peak for encoder in encoders), default=0)

    def _traced(self, height: int, width: int, frames: int) -> Work:
        vae, model = self._vae, self._transformer
        settings, of = self.model.settings, self.model.spec.shapes
        assert of is not None
        shapes = of(model.config, vae.config, settings, height, width, frames)
        inputs = {name: torch.empty(shape, dtype=self.dtype, device="meta") for name, shape in shapes.inputs.items()}
        latents = torch.empty(shapes.latents, device="meta")
        # The loop holds latents, their mask, both velocities and the scheduler's last ones, in FP32; and the model's inputs.
        held = 8 * latents.nbytes + sum(x.nbytes for x in inputs.values())
        forward = live(lambda: model(**inputs, return_dict=False))
        clip = frames * height * width * 3
        whole, tiles = self._decoded(latents), self._tiles(latents)
        float_clip = clip * vae.dtype.itemsize
        decode_tiled = whole.peak
        if tiles.many:
            one = self._decoded(latents[..., : tiles.size[0], : tiles.size[1]]).peak / (tiles.size[0] * tiles.size[1])
            # Each is kept until all are joined; joining holds the rows, the clip, its clamped copy, and the last tile's frames.
            pixels = float_clip / (latents.shape[-1] * latents.shape[-2])
            before = accumulate(tiles.areas, initial=0)
            peaks = [done * pixels + area * one for done, area in zip(before, tiles.areas, strict=False)]
            decode_tiled = int(max(*peaks, (tiles.area + 3) * float_clip + tiles.areas[-1] * pixels))
        image = image_tiled = 0
        if self.task == "i2v":
            # The frames that follow the first one are encoded, too, as gray; but not where it has timesteps of its own.
            given = 1 if settings.get("expand_timesteps") else frames
            video = torch.empty(1, 3, given, height, width, dtype=vae.dtype, device="meta")
            image = 2 * video.nbytes + live(lambda: vae.encode(video[:, :, :9])).peak
            image_tiled = image
            if tiles.many:
                side = [n * height // latents.shape[-2] for n in tiles.size]
                image_tiled = 2 * video.nbytes + live(lambda: vae.encode(video[:, :, :9, : side[0], : side[1]])).peak
        return Work(
            text=self._text,
            image=image,
            image_tiled=image_tiled,
            denoise=held + forward.peak,
            decode=2 * latents.nbytes + max(whole.peak, 2 * float_clip),
            decode_tiled=2 * latents.nbytes + decode_tiled,
            pixels=3 * float_clip + clip * 4,
            kept=forward.kept,
            tiles=tiles.area if tiles.many else 1.0,
            operations=whole.multiplied,
        )

    def _decoded(self, latents: Tensor) -> Live:
        """The VAE's pass over latents: frame after frame, its caches full from the third on, so that more frames take no more
        than the room for their pixels."""
        vae, count = self._vae, latents.shape[2]
        some = min(count, 4)
        found = live(lambda: vae.decode(latents[:, :, :some].to(vae.dtype), return_dict=False))
        ratio = vae.spatial_compression_ratio
        scale = vae.config.scale_factor_temporal or 4
        pixels = 3 * latents.shape[-1] * latents.shape[-2] * ratio**2 * vae.dtype.itemsize
        found.peak += (count - some) * scale * pixels
        found.multiplied = found.multiplied * count // some
        return found

    def _tiles(self, latents: Tensor) -> _Tiles:
        """How diffusers cuts latents into tiles that overlap (`tiled_decode` of its Wan VAE)."""
        vae = self._vae
        ratio = vae.spatial_compression_ratio
        least = [vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio]
        stride = [vae.tile_sample_stride_height // ratio, vae.tile_sample_stride_width // ratio]
        sides = latents.shape[-2:]
        if all(side <= low for side, low in zip(sides, least, strict=True)):
            return _Tiles(False, (0, 0), (), 1.0)
        high, wide = (
            [min(low, side - at) for at in range(0, side, step)]
            for side, low, step in zip(sides, least, stride, strict=True)
        )
        areas = tuple(h * w for h in high for w in wide)
        return _Tiles(True, (high[0], wide[0]), areas, sum(areas) / (sides[0] * sides[1]))


@dataclass(frozen=True)
class _Tiles:
    """Whether there is more than one tile, the first one's sides in latents, all areas in the order in which they are decoded,
    and their sum over the whole's."""

    many: bool
    size: tuple[int, int]
    areas: tuple[int, ...]
    area: float
