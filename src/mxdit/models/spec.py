"""`ModelSpec`: what mxdit has to know of a model family, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Geometry:
    """What sizes of image or video a model takes, in pixels and frames.

    multiple   height and width are multiples of it.
    temporal   the number of frames is `first` more than a multiple of it; None for a model of images.
    first      the least number of frames.
    tiles      (least, step) of the height and of the width, where a VAE decodes whole tiles only: what is no tile would be
               black. They replace `multiple` and hold it.
    positions  most positions that its position table has along one axis, in patches or latent frames; None where it has
               no table.
    of_image   (height, width) of an image -> (height, width) that a pipeline makes of it, where it chooses them itself
               and its call takes none.
    scaled     (height, width) that is asked for -> (height, width) that a pipeline makes of it, where it changes them: only
               those that it leaves can be asked for.
    """

    multiple: int
    temporal: int | None = None
    positions: int | None = None
    of_image: Callable[[int, int], tuple[int, int]] | None = None
    scaled: Callable[[int, int], tuple[int, int]] | None = None
    first: int = 1
    tiles: tuple[tuple[int, int], tuple[int, int]] | None = None

    def nearest_frames(self, frames: int) -> int:
        """The number of frames that it takes and that is nearest to `frames`."""
        if self.temporal is None:
            return frames
        return max(0, round((frames - self.first) / self.temporal)) * self.temporal + self.first


@dataclass(frozen=True)
class Preset:
    """How a published model is meant to be run: the defaults of one model and task.

    name        what to call it.
    task        "t2v", "i2v", "t2i".
    config      keys of the transformer's config.json that tell this model from others of the family; empty is any.
    components  how many transformers its pipeline has; None is any.
    size        (height, width) in pixels; for I2V only their product counts, the image gives the aspect.
    frames      as the geometry takes them; 1 for an image.
    fps         frames per second of the written video.
    steps       denoising steps.
    guidance, guidance_2   guidance scale; of a cascade, of its first and its second transformer. None keeps what the
                directory's own pipeline has.
    flow_shift  of the noise schedule; None keeps the scheduler's own.
    prompt, negative_prompt  used when none is given; None means that a prompt must be given, and that the negative one is the
                pipeline's own.
    arguments   of the pipeline's call that no field of a request names, and their values.
    """

    name: str
    task: str
    size: tuple[int, int]
    frames: int
    fps: int
    steps: int
    guidance: float | None = None
    guidance_2: float | None = None
    flow_shift: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    components: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = ""
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def fits(self, config: Mapping[str, Any], components: int) -> bool:
        """Whether it is this model's, by the config.json of its first transformer and how many it has."""
        return self.components in (None, components) and all(config.get(k) == v for k, v in self.config.items())


IMAGE_CALL = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}
"""`PipelineSpec.call` as most pipelines of images have it."""
VIDEO_CALL = {**IMAGE_CALL, "frames": "num_frames"}
"""The same of videos."""


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline class of diffusers that runs the model.

    task       what it makes: "t2v", "i2v", "t2i".
    call       field of a `generation.request.Request` -> where the pipeline takes it: an argument of its call
               ("num_frames"), or for that one call a key of its own config ("config.KEY") or of a component's
               ("COMPONENT.KEY"). A field that is not here cannot be asked for; the seed and the flow shift, which the
               scheduler takes, always can.
    only_with  field -> key of model_index.json that must be set for it to be asked for.
    embeddings arguments of its call that take what its `encode_prompt` gives for a prompt and a negative one, in that order;
               empty where the text cannot be encoded beforehand.
    output     attribute of what the call returns, a batch of (frames, height, width, 3) or (height, width, 3) arrays.
    single     whether that is one such array, and no batch of them.
    prompt_first  whether the prompt's half comes first where one call of the transformer has both branches of guidance.
    float32    components that are loaded in FP32, whatever the dtype of the rest.
    tiled      whether its VAE decodes in tiles only, at every size.
    makes      component that it makes by itself where none is given -> the package that it makes it of.
    guidance_added  what the scale is short of the usual one, u + g (c - u): 1 where a pipeline makes it c + g (c - u).
    step_given keyword with which it has its scheduler make a step, where it asks the scheduler for a prediction before.
    """

    task: str
    call: Mapping[str, str] = field(hash=False)
    only_with: Mapping[str, str] = field(default_factory=dict, hash=False)
    embeddings: tuple[str, ...] = ()
    output: str = "frames"
    single: bool = False
    prompt_first: bool = False
    float32: tuple[str, ...] = ()
    tiled: bool = False
    makes: Mapping[str, str] = field(default_factory=dict, hash=False)
    guidance_added: float = 0.0
    step_given: str | None = None

    def takes(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Whether a request may set this field, by the pipeline's own settings in model_index.json."""
        return name in self.call and (name not in self.only_with or settings.get(self.only_with[name]) is not None)


class Shapes(NamedTuple):
    """Of one clip: the tensors that the transformer is called with at a step, and the latents that the VAE decodes."""

    inputs: Mapping[str, tuple[int, ...]]
    latents: tuple[int, ...]


class Place(NamedTuple):
    """Where a module is: its list of blocks, the block's index in it, and the path inside the block."""

    blocks: str
    index: int
    inside: str


MODULATION = "modulation: one row a sample, whose error is one of every token"
"""Why the linear of an adaptive norm stays, as `ModelSpec.keep` says it."""


@dataclass(frozen=True)
class Published:
    """A model of the family that can be downloaded, as docs/supported-models.md shows it.

    repository    at Hugging Face: "Wan-AI/Wan2.2-T2V-A14B-Diffusers".
    config        keys of its transformer's config.json that differ from the defaults of diffusers' class.
    transformers  of this config, that it has.
    """

    repository: str
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    transformers: int = 1


@dataclass(frozen=True)
class ModelSpec:
    """One family of transformers. Layer names are diffusers module paths; docs/adapting-a-model.md shows how to add one.

    title        what people call the family.
    transformer  class name of the diffusers transformer.
    blocks       paths of the ModuleLists of its repeated blocks, in the order in which they run. Only linears inside the
                 blocks are ever quantized.
    sequential   whether a list's blocks run one after the other and only the last one's output is used, which lets calibration
                 run the model a block at a time; others cannot be calibrated.
    groups       linears of a block, by their path inside it, that share an input: runtimes fuse them into one product, so
                 they must have one precision and one `mul_scale`. Members that a block does not have are passed over.
    keep         glob of linears, by their path inside a block, that stay in their float dtype -> why they do.
    tables       paths of a text encoder's token table, and then of modules that look the same table up.
    components   names that pipelines give their transformers; a cascade has several.
    packages     package that the transformer's class needs -> key of its config.json that is true where it does.
    pipelines    pipeline class name -> how it is called. The first that is listed for a task is the one that runs it.
    hosts        further pipeline classes that hold the model and take what no request has, such as a video to follow: their
                 checkpoints are quantized and packed, and called through diffusers.
    shared       key of model_index.json that is true where one set of weights serves all of `pipelines`.
    needed       keys that a transformer's config.json must have for `geometry`.
    geometry     the sizes that a model takes, given its transformer's and its VAE's config.json.
    shapes       of the tensors of a clip, given its transformer's and its VAE's config.json, the settings in model_index.json,
                 height, width and frames; a family without it has no plan of memory.
    text_tokens  that a prompt is filled up to.
    timestep     of a call of the transformer, given its arguments by name: a tensor that falls from step to step.
    idle         arguments of the transformer that change nothing in the calls of `pipelines`, and that a recorded call leaves
                 out: objects, which a file of calls cannot hold.
    presets      defaults, the first that fits counts; for each task the last must fit any model of the family.
    published    models whose sizes docs/supported-models.md shows.
    recipes      who else quantizes the family -> what that keeps in 16 bits, and why ours differs where it does.
    original     module and tensor paths of the model's own release -> ours, "#" for a block's index; the longest one that a
                 path begins with counts.
    original_mark        prefix of a tensor's name that only such a transformer has, in the release and in diffusers.
    original_components  folder of a component in the model's own release -> ours.
    original_config      makes our transformer's config of the release's, given (config, tensor name -> shape).
    original_sizes       the release's config of a model that was published in these shapes, given (tensor name -> shape); None
                 where there is none: a file without a config.json says no more.
    gguf         `general.architecture` of its GGUF files.
    runtimes     runtime -> {linear, by its path inside a block or its whole path outside them -> its name there}; others
                 are called as here. A runtime that is not here does not run the family, as far as mxdit knows.
    """

    transformer: str
    blocks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    keep: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    components: tuple[str, ...] = ("transformer",)
    packages: Mapping[str, str] = field(default_factory=dict)
    pipelines: Mapping[str, PipelineSpec] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    shared: str | None = None
    needed: tuple[str, ...] = ()
    geometry: Callable[[Mapping[str, Any], Mapping[str, Any]], Geometry] | None = None
    shapes: Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any], int, int, int], Shapes] | None = None
    text_tokens: int = 512
    timestep: Callable[[Mapping[str, Any]], Any] = itemgetter("timestep")
    idle: tuple[str, ...] = ()
    presets: tuple[Preset, ...] = ()
    published: tuple[Published, ...] = ()
    recipes: Mapping[str, str] = field(default_factory=dict)
    original: Mapping[str, str] = field(default_factory=dict)
    original_mark: str | None = None
    original_components: Mapping[str, str] = field(default_factory=dict)
    original_config: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], dict[str, Any]] | None = None
    original_sizes: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any] | None] | None = None
    gguf: str | None = None
    runtimes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    title: str = ""
    sequential: bool = True

    def place_of(self, path: str) -> Place | None:
        """Where the module at `path` is inside the blocks, or None outside them."""
        for blocks in self.blocks:
            head, dot, rest = path.partition(f"{blocks}.")
            index, inner_dot, inside = rest.partition(".")
            if dot and not head and inner_dot and index.isdigit():
                return Place(blocks, int(index), inside)
        return None

    def kept(self, inside: str) -> str | None:
        """Why a linear stays in its float dtype, by its path inside its block; None for one that is quantized."""
        return next((why for pattern, why in self.keep.items() if fnmatchcase(inside, pattern)), None)

    def sharing(self, paths: Iterable[str]) -> Iterator[list[str]]:
        """The linears among `paths` that share their input: a list for each of `groups` in each block, in that order."""
        blocks: dict[tuple[str, int], dict[str, str]] = {}
        for path in paths:
            place = self.place_of(path)
            if place:
                blocks.setdefault(place[:2], {})[place.inside] = path
        for inside in blocks.values():
            for group in self.groups:
                yield [inside[name] for name in group if name in inside]

    def preset(self, task: str, config: Mapping[str, Any], components: int) -> Preset:
        """The defaults for a task of a model, by the config.json of its first transformer and how many it has."""
        return next(p for p in self.presets if p.task == task and p.fits(config, components))

    def from_original(self, name: str) -> str | None:
        """Our name of a tensor of the model's own release; None for one that is not the model's.

        Whole path components are replaced, never substrings: "head.modulation" is not "modulation".
        """
        return _renamed(name, self.original)

    def to_original(self, name: str) -> str | None:
        """The name that the model's own release has for a tensor of ours; None for one that the release has no name for."""
        return _renamed(name, {ours: theirs for theirs, ours in self.original.items()})

    def runtime_name(self, path: str, runtime: str) -> str:
        """What a runtime calls the module at `path`."""
        place, names = self.place_of(path), self.runtimes.get(runtime, {})
        if place is None:
            return names.get(path, path)
        return f"{place.blocks}.{place.index}.{names.get(place.inside, place.inside)}"

    def looked_up(self, path: str, runtime: str) -> bool:
        """Whether a runtime looks for the module at `path` by the name that the spec gives for it."""
        place = self.place_of(path)
        return (path if place is None else place.inside) in self.runtimes.get(runtime, {})


def _renamed(name: str, paths: Mapping[str, str]) -> str | None:
    """A name of which the longest beginning that `paths` has is replaced by what it has for it, "#" being a block's index."""
    parts = name.split(".")
    index = (
        parts[1]
        if len(parts) > 1 and parts[1].isdigit() and any(path.startswith(f"{parts[0]}.#") for path in paths)
        else ""
    )
    if index:
        parts[1] = "#"
    for cut in range(len(parts), 0, -1):
        found = paths.get(".".join(parts[:cut]))
        if found is not None:
            return ".".join([found, *parts[cut:]]).replace("#", index)
    return None
