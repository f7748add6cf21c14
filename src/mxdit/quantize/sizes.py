"""What a transformer's weights come to in each method, told from a model without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from mxdit.errors import FormatError
from mxdit.layers import linears_of
from mxdit.models import ModelSpec, spec_of
from mxdit.models.skeleton import skeleton_of
from mxdit.models.spec import Published
from mxdit.numerics.formats import FORMATS
from mxdit.quantize.plan import plan
from mxdit.shards import PARALLEL, Shard

FLOAT = "bf16"
DEGREES = (2, 4, 8)


@dataclass(frozen=True)
class Sizes:
    """Of one transformer; counts are of numbers in the tensors that a checkpoint has: parameters, and tables of positions.

    parameters  all of them.
    quantized   those in weights that are quantized, where no block is kept whole.
    kept        glob of `ModelSpec.keep` -> those of linears that it keeps.
    outside     child of the model -> those in it that are outside the blocks.
    rest        the blocks' others: biases, norms, tables, convolutions.
    nbytes      FLOAT or a method -> bytes of all tensors, what is not quantized in BF16; the blocks that a method keeps by
                default are.
    degrees     of DEGREES, those at which each quantized linear can be cut by its outputs and by its inputs.
    """

    parameters: int
    quantized: int
    kept: Mapping[str, int]
    outside: Mapping[str, int]
    rest: int
    nbytes: Mapping[str, int]
    degrees: tuple[int, ...]

    @property
    def share(self) -> float:
        """Of the parameters, how many are quantized, 0 to 1."""
        return self.quantized / self.parameters


def published_sizes(spec: ModelSpec, published: Published) -> Sizes:
    """Sizes of one transformer of a published model. Raises as `skeleton_of` does."""
    return sizes_of(skeleton_of({"_class_name": spec.transformer, **published.config}, published.repository))


def sizes_of(model: nn.Module) -> Sizes:
    """Sizes of a transformer, which may be without memory. Raises ModelError for a class without a spec."""
    spec, linears = spec_of(model), dict(linears_of(model))
    tensors = {
        id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()
    }  # a shared one once
    counts = {name: tensor.numel() for name, tensor in tensors.values()}
    nbytes = {FLOAT: 2 * sum(counts.values())}
    for method, row in FORMATS.items():
        packed = [linears[path] for path, decided in plan(model, method).items() if decided.scheme]
        saved = [2 * of.weight.numel() - row.nbytes(of.out_features, of.in_features) for of in packed]
        nbytes[method] = nbytes[FLOAT] - sum(saved)
    every = {"quant_method": "mxfp4", "num_bf16_fallback_layers": 0}
    quantized = {path: linears[path] for path, decided in plan(model, every).items() if decided.scheme}
    shapes = {(linear.out_features, linear.in_features) for linear in quantized.values()}
    kept, outside, rest = Counter[str](), Counter[str](), 0
    for name, count in counts.items():
        path, _, leaf = name.rpartition(".")
        place = spec.place_of(name)
        if place is None:
            outside[name.partition(".")[0]] += count
        elif path in linears and spec.kept(inside := place.inside.rpartition(".")[0]):
            kept[next(glob for glob in spec.keep if fnmatchcase(inside, glob))] += count
        elif path not in quantized or leaf != "weight":
            rest += count
    return Sizes(
        parameters=sum(counts.values()),
        quantized=sum(linear.weight.numel() for linear in quantized.values()),
        kept=kept,
        outside=outside,
        rest=rest,
        nbytes=nbytes,
        degrees=tuple(degree for degree in DEGREES if _divides(shapes, degree)),
    )


def _divides(shapes: set[tuple[int, int]], degree: int) -> bool:
    """Whether a linear of each shape (N, K) can be cut for so many ranks, either way."""
    try:
        for n, k in shapes:
            for parallel in PARALLEL:
                Shard("mxfp4", n, k, parallel, 0, degree)
    except FormatError:
        return False
    return True
