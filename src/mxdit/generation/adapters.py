"""LoRA files beside a pipeline's weights: checked before any weight is read, kept in memory, and switched from run to run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from mxdit.checkpoint.files import read_header
from mxdit.checkpoint.loras import check_fits
from mxdit.config.loras import LoraFile, LoraLike, assigned
from mxdit.errors import InputError, MXDiTError
from mxdit.generation.directory import ModelDirectory
from mxdit.generation.recording import transformers_of
from mxdit.models.skeleton import skeleton_of

KEPT = (
    8  # files that stay in memory beside those that are in use; one of rank 64 for an expert of 14B has 0.6 GB in BF16
)


class Checked:
    """LoRA files for a model's directory, each checked once: by its headers against the transformer's config, and its data.

    May be called from any thread.
    """

    def __init__(self, model: ModelDirectory) -> None:
        self._model, self._sound = model, set[tuple[Any, ...]]()

    def of(self, loras: Iterable[LoraLike]) -> tuple[LoraFile, ...]:
        """They with the transformer of each.

        Raises InputError for a file that is not there or does not go with the model: what is wrong with it, and where.
        """
        from mxdit.integrations.lora_files import read_lora

        found = assigned(loras, self._model.components)
        if found and find_spec("peft") is None:
            raise InputError("a package is not installed", where="peft", hint="Install it: pip install 'mxdit[lora]'.")
        for lora in found:
            if (seen := _key(lora)) not in self._sound:
                config = self._model.components[str(lora.component)]
                try:
                    check_fits(read_lora(lora.file, self._model.spec), skeleton_of(config, str(lora.component)))
                except InputError:
                    raise
                except MXDiTError as error:
                    raise InputError(
                        error.what,
                        field="lora",
                        where=error.where,
                        got=error.got,
                        expected=error.expected,
                        hint=error.hint,
                    ) from error
                self._sound.add(seen)
        return found


def bytes_of(loras: Iterable[LoraFile], dtype: torch.dtype) -> int:
    """What files take of memory once they are loaded into transformers of this dtype, which diffusers casts them to; each once.

    Raises InputError for a file that is gone, and CheckpointError for one that is damaged.
    """
    files = {_key(lora): lora.file for lora in loras}.values()
    # An alpha is no number of a matrix.
    return sum(math.prod(t.shape) * dtype.itemsize for file in files for t in read_header(file).values() if t.shape)


class Adapters:
    """The LoRA files that a loaded pipeline has, and which of them take part in its runs.

    Args:
        sparing: keep none that takes no part.
    """

    def __init__(self, pipeline: Any, sparing: bool = False) -> None:
        self._pipeline, self._sparing, self._made = pipeline, sparing, 0
        self._names: dict[tuple[Any, ...], str] = {}  # the one that was used last stands last

    def use(self, loras: Sequence[LoraFile]) -> None:
        """Let these take part from now on, and no others; without any the pipeline gives the bits that it gave before the first.

        Files that are not there yet are loaded, as they are now. Raises as `mxdit.load_lora_weights` does; none take part then.
        """
        if not loras and not self._names:
            return
        try:
            files, scales = dict[tuple[Any, ...], LoraFile](), dict[tuple[Any, ...], float]()
            for lora in loras:
                key = _key(lora)
                files[key] = lora
                scales[key] = scales.get(key, 0.0) + lora.scale  # one file twice is one of both strengths
            unused = [key for key in self._names if key not in files]
            for key in unused[: max(0, len(unused) - (0 if self._sparing else KEPT))]:
                self._pipeline.delete_adapters(self._names.pop(key))
            for key, lora in files.items():
                self._load(key, lora)
        except MXDiTError:
            self._activate({})
            raise
        self._activate(scales)

    def _load(self, key: tuple[Any, ...], lora: LoraFile) -> None:
        from mxdit.integrations.diffusers_adapters import load_lora_weights

        if key not in self._names:
            name = f"lora_{self._made}"
            load_lora_weights(_alone(self._pipeline), {str(lora.component): lora.file}, name)
            self._names[key], self._made = name, self._made + 1
        self._names[key] = self._names.pop(key)

    def _activate(self, scales: Mapping[tuple[Any, ...], float]) -> None:
        """Which take part, and how strong each is."""
        for component, model in transformers_of(self._pipeline).items():
            there: Any = model
            chosen = {self._names[key]: scale for key, scale in scales.items() if key[0] == component}
            if chosen:
                there.enable_lora()
                there.set_adapters(list(chosen), list(chosen.values()))
            elif any(key[0] == component for key in self._names):
                there.disable_lora()


def _alone(pipeline: Any) -> Any:
    """A view of a pipeline that has its transformers only: where others have hooks that offload them, diffusers would take
    those for its own, and put its own offloading in their place."""
    view, kept = copy.copy(pipeline), transformers_of(pipeline)
    view.register_modules(**{name: None for name in pipeline.components if name not in kept})
    return view


def _key(lora: LoraFile) -> tuple[Any, ...]:
    """What tells a file from another one, and from what it was before it was written anew. Raises InputError where it is gone."""
    try:
        status = lora.file.stat()
    except OSError as error:
        raise InputError("the file cannot be read", field="lora", where=str(lora.file), got=error.strerror) from None
    return lora.component, str(lora.file.absolute()), status.st_ino, status.st_size, status.st_mtime_ns
