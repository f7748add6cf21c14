"""`Session`: a model in memory, and the requests that it carries out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mxdit.config import MXConfig
from mxdit.config.attention import AttentionLike, AttentionPolicy
from mxdit.config.components import split_keys
from mxdit.config.loras import LoraLike
from mxdit.config.steps import StepPolicy
from mxdit.errors import InputError, ModelError
from mxdit.generation import compiling, loading, running
from mxdit.generation.adapters import Adapters, Checked, bytes_of
from mxdit.generation.directory import ModelDirectory, bundled, open_model
from mxdit.generation.measures import Held
from mxdit.generation.plan import Plan, Planner, Policy, budget_of
from mxdit.generation.recording import transformers_of
from mxdit.generation.request import Request, make_request, policies_of, policy_of
from mxdit.generation.running import Result, Watch, check_stop
from mxdit.models import COMPONENTS, TEXT_ENCODERS
from mxdit.quantize.report import QuantReport, report_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WAIT = 0.05  # seconds after which a run that waits for its turn looks whether it should stop


class Session:
    """A model, loaded once, and the requests that it carries out, one at a time.

    Threads may share it: a run waits for its turn. The parts of a pipeline hold state while they work (diffusers' video VAEs
    keep the frames before the one they decode in the module itself), so two runs at once would mix their pixels. What a
    request changes, the scheduler and settings of the pipeline, is changed in a view of the pipeline that the run has for
    itself: a run that is cancelled or fails leaves nothing behind.

    Attributes:
        model: what the directory holds.
        task: what is made: "t2v", "i2v", "t2i".
        configs: transformer -> the config it is quantized with while it loads, or None to load it as it is.
        encoders: text encoder -> the same, of those that are quantized while they load.
        dtype: of everything that is not quantized.
        device: name of a torch device.
        variant: of the weight files.
        offload: whether weights are on the device for no longer than they are used.
        loras: LoRA files that take part in the runs of requests that do not name their own.
        memory: bytes that a run may take, of the process on a CPU, else of the device; None says nothing.
        attention: transformer -> how it computes it, where a policy says so.
        compile: whether the repeated blocks of the transformers are compiled.
        parts: components that the pipeline is given as they are.
        fused: whether ops of mxdit compute norms, rotary embeddings and GELU of the transformers.
        lock: held while a run lasts. Hold it to use the pipeline yourself, such as with hooks in its modules; the thread that
            holds it can run requests meanwhile.
    """

    def __init__(
        self,
        model: ModelDirectory,
        task: str,
        configs: Mapping[str, MXConfig | None],
        dtype: torch.dtype,
        device: str,
        variant: str | None = None,
        offload: bool = False,
        encoders: Mapping[str, MXConfig] | None = None,
        loras: Sequence[LoraLike] = (),
        memory: int | None = None,
        attention: Mapping[str, AttentionPolicy] | None = None,
        compile: bool = False,
        parts: Mapping[str, Any] | None = None,
        fused: bool = False,
    ) -> None:
        self.model, self.task, self.configs, self.dtype, self.device = model, task, configs, dtype, device
        self.variant, self.offload, self.encoders, self.memory = variant, offload, encoders or {}, memory
        self.attention, self.compile, self.parts = attention or {}, compile, parts or {}
        self.fused = fused
        self._checked = Checked(model)
        self.loras = self._checked.of(loras)
        self.lock = threading.RLock()
        self._running = False
        self._pipeline: DiffusionPipeline | None = None
        self._adapters: Adapters | None = None
        self._held: Held | None = None
        self._planner = Planner(model, task, {**configs, **self.encoders}, dtype, device, variant, compile)

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        *,
        task: str | None = None,
        method: str | None = None,
        keys: Mapping[str, Any] | None = None,
        components: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        variant: str | None = None,
        offload: bool = False,
        loras: Sequence[LoraLike] = (),
        memory: str | int | None = None,
        attention: AttentionLike | None = None,
        compile: bool = False,
        parts: Mapping[str, Any] | None = None,
        fused: bool = False,
    ) -> Session:
        """Read what a model is, and decide how it is loaded; the weights are read by `load`, or by the first run.

        Args:
            path: a diffusers pipeline's directory, unquantized or quantized; None is the small model that comes with mxdit.
            task: "t2v", "i2v" or "t2i"; None takes what the directory's own pipeline makes, and "t2v" of the small model.
            method: "mxfp4", "mxfp4_dualscale" or "mxfp8" to quantize the weights while they load, "none", or None, which
                means as they are stored.
            keys: keys of `MXConfig` for every transformer.
            components: name of a transformer -> keys that differ there, an MXConfig that replaces all, or None to leave it
                as it is. Name of a text encoder -> a method's name, keys with `quant_method`, or an MXConfig.
            dtype: of everything that is not quantized.
            device: name of a torch device.
            offload: keep weights on the CPU, and each on the device for as long as it is used, of a transformer a block at a
                time. Slower; no number changes.
            memory: "24GiB", "24GB", "12000MiB" or bytes, that a run may take: of the process on a CPU, else of the device. What
                stays in memory is then planned before anything is loaded (`plan`); no number changes but where a plan decodes
                in tiles.
            variant: of the weight files, as diffusers calls it ("fp16"); None takes the plain ones, or the one that there is.
            attention: how the transformers compute it: an `AttentionPolicy`, its JSON or its text form, such as "exact" or
                "int8;0-1=exact"; or an object that has one for each under its name. None leaves it to diffusers.
            loras: LoRA files beside the weights, quantized or not; of a cascade each as
                `LoraFile(file, scale, "transformer_2")`. Several add up.
            compile: compile the repeated blocks of the transformers by torch.compile. The first step takes longer, those after it
                are faster, and numbers differ from those of the model as it is by rounding.
            parts: components of the pipeline, by name, that are taken as they are in place of the directory's or of what the
                pipeline makes by itself, such as a `safety_checker`.
            fused: let ops of mxdit compute the transformers' norms, rotary embeddings and GELU, as `fuse_` does: faster,
                in less memory, and numbers differ by last bits.

        Raises:
            InputError: no such directory, no pipeline that mxdit knows, a task that it does not do, a LoRA that does not fit, or
                no size of memory.
            CheckpointError: a JSON file that is missing or damaged.
            ConfigError: a method or keys that mean nothing, or do not go with what is stored.
        """
        model = open_model(bundled(task or "t2v") if path is None else Path(path))
        task = model.tasks[0] if task is None else task
        model.check_task(task)
        own, of_encoders = split_keys(components or {}, TEXT_ENCODERS)
        encoders = loading.encoders(model, of_encoders)
        configs = loading.quantization(model, method, keys or {}, own)
        budget = None if memory is None else budget_of(memory)
        if offload and budget is not None:
            raise InputError(
                "a plan of memory decides what is offloaded", field="offload", hint="Leave it out, or the memory."
            )
        if offload and compile:
            raise InputError(
                "blocks whose weights come and go are not compiled", field="compile", hint="Leave it out, or offload."
            )
        return cls(
            model,
            task,
            configs,
            dtype,
            device,
            variant=variant,
            offload=offload,
            encoders=encoders,
            loras=loras,
            memory=budget,
            attention=AttentionPolicy.of_each(attention, model.components, COMPONENTS),
            compile=compile,
            parts=parts,
            fused=fused,
        )

    def request(self, *, loras: Sequence[LoraLike] | None = None, **fields: Any) -> Request:
        """A request with every choice made; see `make_request` for the fields. Raises InputError, whose `field` says which, and
        ConfigError for activations that do not go with the weights.

        Args:
            loras: in place of the session's own: empty is none.
        """
        chosen = self.loras if loras is None else self._checked.of(loras)
        request = make_request(self.model, self.task, loras=chosen, **fields)
        for name, policy in self.policies(request).items():
            policy_of(policy, request.steps, where=name)
        for policy in self.attention.values():
            policy.check(request.steps)
        return request

    def policies(self, request: Request | None = None) -> dict[str, StepPolicy]:
        """Transformer -> what its activations are at some steps: of the request, or else as its config states.

        Raises InputError where the request asks for it and no transformer is quantized, and ConfigError where its activations
        do not go with their weights.
        """
        return policies_of(self.model, self.configs, None if request is None else request.activation_steps)

    def plan(self, request: Request | None = None) -> Plan:
        """How a run of a request, or of the model's own default size, is held in memory, before anything is loaded.

        Without `memory` it is what a session takes that holds everything.

        Raises InputError where nothing fits into `memory`; it names the smallest budget that does.
        """
        size, frames, *more = self._asked(request)
        if self.memory is None:
            return self._planner.plan(size, frames, Policy(), *more)
        return self._planner.choose(self.memory, size, frames, *more)

    def plans(self, request: Request | None = None) -> list[Plan]:
        """The same for every way to hold the model, whether it fits or not, those that cost least time first."""
        return self._planner.plans(*self._asked(request), budget=self.memory)

    def check_memory(self) -> None:
        """Raise InputError, as `plan` does, where no clip at all fits into `memory`."""
        if self.memory is not None:
            self._planner.choose(self.memory, *self._planner.smallest)

    def _asked(self, request: Request | None) -> tuple[tuple[int, int], int, int, int]:
        """(size, frames, steps, bytes of its LoRA files)."""
        loras = bytes_of(self.loras if request is None else request.loras, self.dtype)
        if request is not None:
            return (request.height, request.width), request.frames, request.steps, loras
        preset = self.model.preset(self.task)
        return preset.size, preset.frames, preset.steps, loras

    def load(self, request: Request | None = None) -> DiffusionPipeline:
        """The pipeline, loaded at the first call; with `memory`, as the plan for this request says, or for the default size.

        Raises CheckpointError and ConfigError for what does not fit the model, InputError for what does not fit into `memory`,
        for a component that is missing or cannot be given, and where nothing can be compiled; of `attention` ModelError and
        ConfigError for what cannot be chosen.
        """
        with self.lock:
            if self._pipeline is None:
                loading.check_attention(self.model, self.attention)
                if self.compile:
                    compiling.prepare(self.device)
                if self.memory is not None:
                    self._held = None  # of a load that failed
                    self._held = self._hold(self.plan(request).policy)
                    pipeline = self._held.pipeline
                else:
                    options: Any = {
                        "dtype": self.dtype,
                        "device": self.device,
                        "variant": self.variant,
                        "offloaded": self.offload,
                        "encoders": self.encoders,
                        "parts": self.parts,
                    }
                    pipeline = loading.load(self.model, self.task, self.configs, **options)
                if self.fused:
                    from mxdit.integrations.diffusers_fused import fuse_  # imports diffusers

                    for transformer in transformers_of(pipeline).values():
                        fuse_(transformer)
                if self.compile:
                    compiling.compile_blocks(transformers_of(pipeline).values())
                self._adapters = Adapters(pipeline, sparing=self.memory is not None)
                self._adapters.use(self.loras if request is None else request.loras)
                self._pipeline = pipeline
            return self._pipeline

    def _hold(self, policy: Policy) -> Held:
        model, called = self.model, self.model.called(self.task)

        def read(without: tuple[str, ...]) -> DiffusionPipeline:
            options: Any = {
                "dtype": self.dtype,
                "variant": self.variant,
                "encoders": self.encoders,
                "parts": self.parts,
            }
            return loading.read(model, self.task, self.configs, without=without, **options)

        parts = tuple(self._planner.weights)
        return Held(read, parts, model.text_encoders, called.embeddings, self.device, policy)

    def reports(self) -> dict[str, QuantReport]:
        """What the linears of each transformer are."""
        return {name: report_of(model) for name, model in transformers_of(self.load()).items()}

    def encoder_reports(self) -> dict[str, QuantReport]:
        """The same of each text encoder that is quantized."""
        names, pipeline = {**self.model.stored_encoders, **self.encoders}, self.load()
        return {name: report_of(getattr(pipeline, name)) for name in names}

    def run(
        self,
        request: Request,
        on_step: Callable[[int, int], None] | None = None,
        stop: threading.Event | None = None,
        *,
        on_latents: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Result:
        """Make one image or video, after the runs that other threads have begun.

        Args:
            request: of this session, or of another one of the same model and task.
            on_step: called with (steps done, steps in all) after each step.
            stop: set it, from any thread, to cancel: the run ends after the step that it is at.
            on_latents: called after each step with its index and its latents on the device, as the pipeline has them: of a
                video (1, C, T, H, W).

        Raises:
            Cancelled: `stop` was set.
            InputError: another task's request, or a flow shift for a scheduler that has none.
            ModelError: pixels that are no numbers, a run that was begun from another one's `on_step`, a LoRA that is another one
                by now and does not fit, or a block that cannot be compiled.
        """
        if request.task != self.task:
            raise InputError("the request is of another task", field="task", got=request.task, expected=self.task)
        with self._turn(stop):
            if self._running:  # by this thread, which holds the lock
                raise ModelError(
                    "a run was begun inside another one", where="Session.run", hint="Wait until on_step returns."
                )
            self._running = True
            try:
                return self._run(request, Watch(on_step, on_latents, stop))
            finally:
                self._running = False

    def _run(self, request: Request, watch: Watch) -> Result:
        plan = None if self.memory is None else self.plan(request)
        pipeline, policies = self.load(request), self.policies(request)
        assert self._adapters is not None
        self._adapters.use(request.loras)
        # Nothing is put on the transformers where neither the request nor a config asks for it.
        by_step = policies if policies or self.policies() else None
        held = None if plan is None or self._held is None else (self._held, plan.policy)
        how: Any = (pipeline, self.model.called(self.task), request, self.device, watch, by_step, self.attention, held)
        if not self.compile:
            return running.run(*how)
        with compiling.listening(transformers_of(pipeline).values()) as seconds:
            result = running.run(*how)
        return replace(result, compile_seconds=tuple(seconds))

    @contextmanager
    def _turn(self, stop: threading.Event | None) -> Iterator[None]:
        check_stop(stop)
        while not self.lock.acquire(timeout=-1 if stop is None else WAIT):
            check_stop(stop)
        try:
            yield
        finally:
            self.lock.release()
