"""Arguments for one forward of a transformer that nobody gave any: by the names in its signature, tried without memory.

diffusers' transformers call the same things by the same names. What a name does not tell is tried: how latents are laid out,
and whether masks are wanted. How wide a tensor must be is read off the layer that refuses it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.errors import ModelError
from mxdit.models.skeleton import said
from mxdit.models.tracing import FAILURES, Trace, trace

TEXT, AUDIO, IMAGE = 6, 5, 257  # tokens; of an image those of CLIP, which models of Wan count on
WIDENED = 12  # times that a width is put right in one trial
WIDEST = 2**15  # no text encoder is as wide: a trial that asks for more has the latents the wrong way round
CHANNELS = ("in_channels", "in_visual_dim", "num_channels")  # keys of a config: of the latents


@dataclass(frozen=True)
class Layout:
    """How latents may lie: `dims` of one sample's, "c" for channels; `frames`, `height`, `width` of them, or of tokens."""

    name: str
    dims: tuple[int | str, ...]
    frames: int
    height: int
    width: int
    listed: bool = False

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


_VIDEOS = (
    Layout("(batch, channels, frames, height, width)", (1, "c", 2, 8, 8), 2, 8, 8),
    Layout("(batch, frames, channels, height, width)", (1, 2, "c", 8, 8), 2, 8, 8),
    Layout("(batch, frames, height, width, channels)", (1, 2, 8, 8, "c"), 2, 8, 8),
)
_IMAGES = (Layout("(batch, channels, height, width)", (1, "c", 8, 8), 1, 8, 8),)
_TOKENS = (Layout("(batch, tokens, channels)", (1, 16, "c"), 1, 4, 4),)
_LISTS = (Layout("a list of (channels, frames, height, width)", ("c", 1, 8, 8), 1, 8, 8, listed=True),)


@dataclass(frozen=True)
class Making:
    """What the arguments of one trial are made by."""

    layout: Layout
    masks: bool
    config: Mapping[str, Any]
    dtype: torch.dtype
    widths: dict[str, int]  # of arguments, as far as layers have told

    @property
    def text(self) -> int:
        """Tokens of text: as many as the model has places for, if it has a table of them."""
        return self.config.get("max_text_seq_length") or TEXT

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype)

    def latents(self, name: str) -> Any:
        channels = next((self.config[key] for key in CHANNELS if isinstance(self.config.get(key), int)), 16)
        width = self.widths.setdefault(name, channels)
        made = self.zeros(*(width if size == "c" else int(size) for size in self.layout.dims))
        return [made] if self.layout.listed else made

    def tokens(self, name: str, count: int) -> Any:
        width = self.widths.setdefault(name, 64)
        return [self.zeros(count, width)] if self.layout.listed else self.zeros(1, count, width)

    def row(self, name: str) -> Tensor:
        return self.zeros(1, self.widths.setdefault(name, 64))

    def places(self, count: int) -> Tensor:
        """Places of tokens, an axis each of the rotary embedding."""
        axes = next((self.config[key] for key in ("axes_dims_rope", "axes_dims") if self.config.get(key)), (1, 1, 1))
        return torch.zeros(count, len(axes))


# Name of an argument -> what it is made by; the first that fits counts.
_MADE: tuple[tuple[str, Callable[[Making, str], Any]], ...] = (
    (r"hidden_states|x|sample|latents|input|control_hidden_states", lambda make, name: make.latents(name)),
    (r"(r_|audio_)?(timesteps?|sigma)(_r)?|t", lambda make, name: torch.tensor([500.0])),
    (r"guidance", lambda make, name: torch.tensor([3.5])),
    (r"encoder_hidden_states_llama3", lambda make, name: torch.stack([make.tokens(name, make.text)] * 64)),
    (r"audio_hidden_states", lambda make, name: make.tokens(name, AUDIO)),
    (r"encoder_hidden_states_image", lambda make, name: make.tokens(name, IMAGE)),
    (r".*encoder_hidden_states(?!.*mask).*|cap_feats|image_embeds", lambda make, name: make.tokens(name, make.text)),
    (r"pooled_.*|global_hidden_states", lambda make, name: make.row(name)),
    (r"padding_mask", lambda make, name: make.zeros(1, 1, make.layout.height, make.layout.width)),
    (r".*encoder.*mask.*", lambda make, name: torch.ones(1, make.text, dtype=torch.long)),
    (r"img_ids", lambda make, name: make.places(make.layout.tokens)),
    (r"txt_ids", lambda make, name: make.places(make.text)),
    (r"position_ids", lambda make, name: make.places(make.layout.tokens + make.text)),
    (r"text_lens|txt_seq_lens", lambda make, name: torch.tensor([make.text])),
    (r"img_shapes", lambda make, name: [[(make.layout.frames, make.layout.height, make.layout.width)]]),
    (r"num_frames", lambda make, name: make.layout.frames),
    (r"height", lambda make, name: make.layout.height),
    (r"width", lambda make, name: make.layout.width),
    (r"audio_num_frames", lambda make, name: AUDIO),
    (r"original_size|target_size|crop_coords", lambda make, name: torch.full((1, 2), 64.0)),
    (r"added_cond_kwargs", lambda make, name: {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}),
    (r"text_rope_pos", lambda make, name: torch.arange(make.text)),
    (r"visual_rope_pos", lambda make, name: (torch.arange(make.layout.frames), torch.arange(4), torch.arange(4))),
)
# Of arguments that a forward can do without, those that are left out if a key of the config is there and not set.
_IF_SET = {
    "guidance": "guidance_embeds",
    "encoder_hidden_states_image": "image_dim",
    "image_embeds": "image_embed_dim",
    "encoder_hidden_states_2": "text_embed_2_dim",
    "encoder_hidden_states_t5": "text_embed_dim_t5",
    "timestep_r": "use_meanflow",
}
_LEFT_OUT = ("audio_timestep", "audio_sigma", "sigma")  # take another argument's value where they are not given


def trace_with_made_inputs(model: nn.Module, watched: list[str]) -> tuple[Trace, dict[str, Any], str]:
    """The trace of a forward of one sample on made arguments, those arguments, and how their latents lie, in words.

    Raises ModelError, which says what was tried.
    """
    tried: dict[str, str] = {}
    for make in _makings(model):
        for _ in range(WIDENED):
            seen, widths = Trace(), dict(make.widths)
            try:
                inputs = _inputs(model, make)
                trace(model, inputs, watched, into=seen)
            except FAILURES as error:
                tried[make.layout.name] = said(error)
                if not _widen(make.widths, seen) or make.widths == widths:
                    break
            else:
                return seen, inputs, make.layout.name
    raise ModelError(
        "no arguments were found that its forward takes",
        where=type(model).__name__,
        got="; ".join(f"{layout}: {why}" for layout, why in tried.items()),
        hint="Give the arguments of one forward, with tensors of any small size: inputs={...}.",
    )


def _makings(model: nn.Module) -> Iterator[Making]:
    config = getattr(model, "config", None)
    config = dict(config) if isinstance(config, Mapping) else {}
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    names = " ".join(inspect.signature(model.forward).parameters)
    layouts = (*_VIDEOS, *_IMAGES, *_TOKENS) if "3D" in type(model).__name__ else (*_IMAGES, *_TOKENS, *_VIDEOS)
    if re.search("img_ids|img_shapes|num_frames|token", names):
        layouts = (*_TOKENS, *layouts)
    for layout in dict.fromkeys((*layouts, *_LISTS)):
        for masks in (False, True) if "mask" in names else (False,):
            yield Making(layout, masks, config, dtype, {})


def _inputs(model: nn.Module, make: Making) -> dict[str, Any]:
    """Arguments for the parameters of the model's forward."""
    made = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        needed = parameter.default is parameter.empty
        maker = next((maker for pattern, maker in _MADE if re.fullmatch(pattern, name)), None)
        if not needed and (name in _LEFT_OUT or ("mask" in name and not make.masks)):
            continue
        if not needed and name in _IF_SET and not make.config.get(_IF_SET[name], True):
            continue
        if maker is not None and (needed or parameter.default is None):
            made[name] = maker(make, name)
        elif needed:
            made[name] = make.tokens(name, make.text)
    return made


def _widen(widths: dict[str, int], seen: Trace) -> bool:
    """Put right the width of the one argument that a layer refused; whether there is one."""
    if seen.misfit is None:
        return False
    reads, has, width = seen.misfit
    of = [name for name in reads if name in widths]
    if len(of) != 1 or not has or widths[of[0]] * width % has:
        return False
    widths[of[0]] = widths[of[0]] * width // has
    return 0 < widths[of[0]] <= WIDEST
