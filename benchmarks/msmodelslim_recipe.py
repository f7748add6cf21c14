"""The bundled model, quantized to mxfp4_dualscale by msModelSlim's recipe, as a checkpoint that `mxdit eval` can measure.

    make test-interop                                              # once: fetches msModelSlim 26.1.0 into .interop
    python benchmarks/msmodelslim_recipe.py DIR [--task t2v|i2v] [--count N] [--peers DIR]
    mxdit eval bundled --task t2v --modes "mxfp4_dualscale online" --mode vendor=DIR

Ours are the maxima of every channel of every linear's input, from clips of the float model: those that `mxdit calibrate` learns
from, or the first N of them. A maximum is all that the recipe asks of a calibration. The rest is msModelSlim's own code, called
by tests/interop/slim.py in a process of its own: which linears are smoothed together (model/wan2_2/base_model_adapter.py), the
factors max|x|^0.9 / max|w|^0.1 with its default alpha (processor/anti_outlier/iter_smooth and
common/scale_computation.py, IterSmoothScaleCalculator), the smoothed weight, all in BF16 as there, its dual-scale quantizer
(core/quantizer/impl/dualscale.py: coarse scale max/6 of 512, rounding to nearest), its packer and its saver. No linear of a block
is left out. Its recipes for Wan2.2 (lab_practice/wan2_2) have neither the smoothing nor dual scales: this is what its parts give.

What is written is held against the values that msModelSlim itself multiplies by; a difference of one bit ends it with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mxdit
from mxdit.calibrate.experts import Experts, linear_at
from mxdit.calibrate.linears import Recipe
from mxdit.calibrate.settings import PRESETS, Settings
from mxdit.checkpoint import convert_checkpoint, inspect_checkpoint
from mxdit.checkpoint.canonical import read_component
from mxdit.checkpoint.sources import open_source
from mxdit.errors import MXDiTError
from mxdit.generation.directory import bundled, open_model
from mxdit.generation.recording import transformers_of
from mxdit.generation.session import Session
from mxdit.models import ModelSpec, spec_of

ROOT = Path(__file__).parents[1]
SLIM = ROOT / "tests" / "interop" / "slim.py"
METHOD = "mxfp4_dualscale"
LEAVES = ("weight", "weight_scale", "weight_dual_scale")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--task", choices=("t2v", "i2v"), default="t2v")
    parser.add_argument("--count", type=int, help="clips to take the maxima from (default: all, 64)")
    parser.add_argument("--peers", type=Path, default=ROOT / ".interop", help="where msModelSlim is installed")
    args = parser.parse_args()
    if args.destination.exists():
        parser.error(f"{args.destination} exists")
    if not (args.peers / "msmodelslim").is_dir():
        parser.error(f"there is no msmodelslim in {args.peers}: run `make test-interop`, or say --peers")
    try:
        make(args.destination, args.task, args.count, args.peers)
    except (MXDiTError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make(destination: Path, task: str, count: int | None, peers: Path) -> None:
    """Write the checkpoint, and hold it against msModelSlim's own values."""
    model = open_model(bundled(task))
    settings = Settings.choose(model, recipe=Recipe(METHOD, "mxfp4"), budget=PRESETS["fast"], request={}, count=count)
    session = Session.open(model.path, task=task, dtype=settings.dtype)
    models = transformers_of(session.load())
    spec = spec_of(models["transformer"])
    maxima = observed(session, settings)
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        for folder, component in spec.original_components.items():
            weights = {original(spec, name): tensor for name, tensor in models[component].state_dict().items()}
            largest = {original(spec, path): tensor for path, tensor in maxima[component].items()}
            (scratch / "original" / folder).mkdir(parents=True)
            (scratch / "maxima").mkdir(exist_ok=True)
            save_file(weights, scratch / "original" / folder / "model.safetensors")
            save_file(largest, scratch / "maxima" / f"{folder}.safetensors")
        directories = {"source": "original", "maxima": "maxima", "out": "out"}
        recipe = {"method": "dual", **{key: str(scratch / name) for key, name in directories.items()}}
        (scratch / "recipes.json").write_text(json.dumps([recipe]))
        run_slim(scratch / "recipes.json", peers)
        convert_checkpoint(scratch / "out", destination, "packed", base=model.path).write(copy=True)
        for folder, component in spec.original_components.items():
            hold(destination, component, load_file(scratch / "out" / "oracle" / f"{folder}.safetensors"), spec)
    if not inspect_checkpoint(destination).clean:
        raise RuntimeError(f"`mxdit inspect {destination}` finds faults")
    print(f"{destination}: maxima of {len(settings.fit)} clips; every value is msModelSlim's own")


def observed(session: Session, settings: Settings) -> dict[str, dict[str, Tensor]]:
    """Component -> path of a linear in the blocks -> the largest magnitude of each channel of its inputs."""
    experts = Experts(session, settings.recipe)
    found: dict[str, dict[tuple[str, ...], Tensor]] = {name: {} for name in experts.models}

    def hook(maxima: dict[tuple[str, ...], Tensor], paths: tuple[str, ...]) -> Callable[..., None]:
        def called(_: nn.Module, inputs: tuple[Tensor]) -> None:
            largest = inputs[0].abs().flatten(0, -2).amax(0)
            maxima[paths] = torch.maximum(maxima.get(paths, largest), largest)

        return called

    for name, model in experts.models.items():
        for group in experts.groups(name):  # one of those that share an input
            linear_at(model, group.paths[0]).register_forward_pre_hook(hook(found[name], group.paths))
    for number, request in enumerate(settings.fit, 1):
        print(f"clip {number} of {len(settings.fit)}", file=sys.stderr, flush=True)
        session.run(request)
    return {
        name: {path: largest.clone() for paths, largest in maxima.items() for path in paths}
        for name, maxima in found.items()
    }


def original(spec: ModelSpec, name: str) -> str:
    """What the model's own release calls a tensor or a module."""
    theirs = {ours: original for original, ours in spec.original.items()}
    place = spec.place_of(name)
    parts = (name if place is None else f"{place.blocks}.#.{place.inside}").split(".")
    cut = next(cut for cut in range(len(parts), 0, -1) if ".".join(parts[:cut]) in theirs)
    found = ".".join([theirs[".".join(parts[:cut])], *parts[cut:]])
    return found if place is None else found.replace("#", str(place.index))


def run_slim(recipes: Path, peers: Path) -> None:
    """msModelSlim in a process of its own: importing it changes pydantic and torch."""
    environment = {**os.environ, "PYTHONPATH": str(peers), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(SLIM), str(recipes)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SLIM.name} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def hold(checkpoint: Path, component: str, theirs: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Raise RuntimeError unless every weight and every factor is the one that msModelSlim multiplies by."""
    expert = read_component(open_source(checkpoint).read(component))
    ours: dict[str, Tensor] = {}
    for path in (path for path, method in expert.methods.items() if method):
        codes, scale, outer = (expert.parts[f"{path}.{leaf}"].read() for leaf in LEAVES)
        name = original(spec, path)
        ours[f"{name}.weight"] = mxdit.decode(mxdit.Packed(codes, scale, outer.squeeze(-1), METHOD))
        ours[f"{name}.mul_scale"] = expert.parts[f"{path}.mul_scale"].read()
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{component}: other linears are quantized: {sorted(ours.keys() ^ theirs.keys())}")
    other = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    if other:
        raise RuntimeError(f"{component}: {len(other)} tensors are not msModelSlim's own, {other[0]} first")


if __name__ == "__main__":
    raise SystemExit(main())
