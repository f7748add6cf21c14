"""Plans carried out: a pipeline that holds what its policy says, and prompts encoded by an encoder that does not stay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mxdit.generation.offload import Turns, by_block
from mxdit.generation.plan import BLOCKS, DROP, STAY, SWAP, TILES, Policy
from mxdit.generation.recording import transformers_of
from mxdit.generation.request import Request

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REMEMBERED = 8  # prompts whose embeddings are kept
CLOSER = (STAY, SWAP, BLOCKS)  # ways to hold transformers, each in less memory than the one before


class Held:
    """A pipeline that is held as policies say, for a device.

    How the text encoder and the transformers are held only ever becomes closer: what has once been too much for a budget stays
    out. Tiles are a matter of each run, because they change pixels: a run's pixels shall not depend on the runs before it.

    Args:
        read: reads the pipeline, without the components that it is told by name, on the CPU.
        parts: names of its components that have weights; `texts` are those of them that encode a prompt.
        embeddings: arguments of the pipeline's call that take what `encode_prompt` gives.
        device: name of a torch device.
        policy: of the first run.
    """

    def __init__(
        self,
        read: Callable[[tuple[str, ...]], DiffusionPipeline],
        parts: tuple[str, ...],
        texts: tuple[str, ...],
        embeddings: tuple[str, ...],
        device: str,
        policy: Policy,
    ) -> None:
        self._read, self._texts, self._arguments, self._device = read, texts, embeddings, device
        self._others = tuple(name for name in parts if name not in texts)
        self._known: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._undo: list[Callable[[], object]] = []
        self.policy = Policy(policy.text, STAY)
        self.pipeline = read(texts if policy.text == DROP else ())
        transformers = transformers_of(self.pipeline).values()
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and (part not in transformers or policy.transformers == STAY):
                part.to(device)
        self._hold(policy)

    def _hold(self, policy: Policy) -> None:
        """Hold the pipeline as closely as this policy says, or as it is held already."""
        if policy.text == DROP and self.policy.text != DROP:
            self.pipeline.register_modules(**dict.fromkeys(self._texts))
        way = max(policy.transformers, self.policy.transformers, key=CLOSER.index)
        if way != self.policy.transformers:
            while self._undo:
                self._undo.pop()()
            for model in transformers_of(self.pipeline).values():
                model.to("cpu")
            if way == SWAP:
                turns = Turns(self.pipeline, self._device)
                self._undo.append(turns.end)
                self._leave = turns.leave
            else:
                for model in transformers_of(self.pipeline).values():
                    self._undo.append(by_block(model, self._device))
        self.policy = Policy(DROP if DROP in (policy.text, self.policy.text) else STAY, way)

    @contextmanager
    def during(self, policy: Policy) -> Iterator[None]:
        """Hold the pipeline for one run as its policy says."""
        self._hold(policy)
        vae: Any = self.pipeline.components["vae"]
        if policy.vae == TILES:
            vae.enable_tiling()
        try:
            yield
        finally:
            if policy.vae == TILES:
                vae.disable_tiling()
            self._leave()

    def _leave(self) -> None:
        """At the end of a run."""

    def encoded(self, request: Request, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A request's arguments of the pipeline's call, with embeddings in place of its text where no encoder is held.

        The encoder is read for a prompt that was not asked for lately, and let go of before anything else works.
        """
        if self.policy.text != DROP:
            return dict(arguments)
        key = (request.prompt, request.negative_prompt)
        if key not in self._known:
            self._known[key] = self._encode(request)
            if len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]
        others = {name: value for name, value in arguments.items() if name not in ("prompt", "negative_prompt")}
        return {**others, **self._known[key]}

    def _encode(self, request: Request) -> dict[str, Tensor]:
        pipeline: Any = self._read(self._others)
        for name in self._texts:
            pipeline.components[name].to(self._device)
        length = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
        with torch.no_grad():
            found = pipeline.encode_prompt(
                request.prompt,
                request.negative_prompt,
                True,
                max_sequence_length=length,
                device=torch.device(self._device),
            )
        return dict(zip(self._arguments, found, strict=True))
