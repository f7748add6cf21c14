"""Whether Wan2.2-T2V-A14B runs in the memory that a plan says: made at full size with random weights, and run under a hard limit.

    python benchmarks/full_size.py make DIR [--scale full|mid|shallow|tiny] [--method mxfp4] [--text mxfp4] [--table mxfp8]
    python benchmarks/full_size.py run DIR [--memory 12GiB | --tiles] [--limit 9GiB] [--size 832x480] [--frames 5]
        [--steps 2] [--attention exact] [--fused] [--compile]
    python benchmarks/full_size.py configs DIR [--scale full] [--method mxfp4] [--text mxfp4] [--table mxfp8]

`make` writes the pipeline in packed form, one tensor at a time, 20 GB at full size: both experts, UMT5-XXL, the VAE in FP32, the
tokenizer of the bundled model. No BF16 model is ever made: codes are random bytes that are valid, and scales such that a
product of unit variance has about unit variance. It goes on where it was interrupted. `configs` writes the JSON files alone,
which is enough for `mxdit info DIR --memory`. `run` loads it with a plan in a fresh process, under RLIMIT_DATA where --limit
is given, makes a clip with guidance whose first half of the steps is one expert's and the second the other's, and prints peaks
of RssAnon and RSS beside the plan. Without --memory everything is resident; with --tiles, too, and the VAE decodes in tiles.

RLIMIT_DATA is the kernel's limit on private writable memory. It counts a mapped file whole, whether its pages are resident or
not, and safetensors maps weights so. --limit is therefore one of memory that no file backs: the files' bytes are added to it.

Exits with 1 when the measured peak of RSS is more than 5 % from the plan's, or above --memory.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mxdit.bench.processes import TIDY, alone
from mxdit.bench.shapes import A14B, TEXT_ENCODER, Wan
from mxdit.bench.standins import skeleton
from mxdit.checkpoint.writer import ENCODER_STEM, STEM, Part, index_of, new_directory, shards_of
from mxdit.config import MXConfig
from mxdit.config.encoders import encoder_config, stated
from mxdit.generation.directory import bundled
from mxdit.generation.memory import Sampler, status
from mxdit.generation.plan import TILES, Policy, budget_of
from mxdit.generation.session import Session
from mxdit.models import spec_of
from mxdit.numerics.formats import FORMATS, TensorInfo, block_format
from mxdit.quantize.plan import plan
from mxdit.quantize.tables import table_of
from mxdit.version import __version__

MIB, GIB = 2**20, 2**30
SHARD = 2 << 30
WITHIN = 0.05
SCALES: dict[str, tuple[Wan, dict[str, Any], dict[str, Any]]] = {  # expert, text encoder, VAE
    "full": (A14B, TEXT_ENCODER, {}),
    "mid": (
        replace(A14B, dim=2048, ffn=5632, heads=16, blocks=12),
        {**TEXT_ENCODER, "vocab_size": 32000, "d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 12},
        {"base_dim": 16},
    ),
    "shallow": (  # of which activations take the most: A14B's proportions in two blocks, for many tokens
        replace(A14B, dim=2048, ffn=5632, heads=16, blocks=2),
        {**TEXT_ENCODER, "vocab_size": 512, "d_model": 256, "d_ff": 512, "num_heads": 4, "num_layers": 1},
        {"base_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    ),
    "tiny": (
        replace(A14B, dim=256, ffn=512, heads=2, blocks=2),
        {**TEXT_ENCODER, "vocab_size": 512, "d_model": 64, "d_ff": 128, "num_heads": 1, "num_layers": 1},
        {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "configs", "run"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="full", help="of what is made")
    parser.add_argument("--method", default="mxfp4", help="of both experts: mxfp4, mxfp4_dualscale or mxfp8")
    parser.add_argument("--text", choices=("bf16", *FORMATS), default="mxfp4", help="form of the text encoder")
    parser.add_argument("--table", choices=("bf16", *FORMATS), help="form of its token table; mxfp8 where it is packed")
    held = parser.add_mutually_exclusive_group()
    held.add_argument("--memory", help="budget of the run, as in 12GiB; without it everything is resident")
    held.add_argument("--tiles", action="store_true", help="everything is resident, and the VAE decodes in tiles")
    parser.add_argument("--limit", help="hard limit on memory that no file backs (RLIMIT_DATA), as in 9GiB")
    parser.add_argument("--size", default="832x480", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--attention", help="as `mxdit generate` takes it, such as exact or int8; torch's own without it"
    )
    parser.add_argument("--fused", action="store_true", help="norms, rotary embeddings and GELU in one pass each")
    parser.add_argument("--compile", action="store_true", help="the transformers' blocks are compiled")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, help="write the numbers of a run there as well")
    args = parser.parse_args()
    if args.what == "run":
        row = alone(run, args, environment=TIDY)
        show(row)
        if args.json:
            args.json.write_text(json.dumps(row, indent=1) + "\n")
        return 0 if abs(row["rss"] / row["plan"]["peak"] - 1) <= WITHIN and row["kept"] else 1
    started = time.perf_counter()
    table = args.table or ("bf16" if args.text == "bf16" else "mxfp8")
    make(args.directory, *SCALES[args.scale], args.method, args.text, table, weights=args.what == "make")
    nbytes = sum(file.stat().st_size for file in args.directory.rglob("*") if file.is_file())
    print(f"{args.directory}: {nbytes / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")
    return 0


# -- making it ---------------------------------------------------------------------------------------------------------


def make(
    root: Path,
    wan: Wan,
    text: dict[str, Any],
    vae: dict[str, Any],
    method: str,
    form: str,
    table: str,
    *,
    weights: bool,
) -> None:
    """Write what is not there yet of a pipeline's directory; each component appears whole or not at all."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    if form == "bf16" != table:
        sys.exit("the table of a text encoder in BF16 stays in BF16, too: leave --table out, or pack the encoder")
    root.mkdir(parents=True, exist_ok=True)
    wan = replace(wan, vae=vae)
    for name in ("transformer", "transformer_2"):
        expert = skeleton(wan)
        expert.register_to_config(text_dim=text["d_model"])
        config = {**dict(expert.config), "_class_name": "WanTransformer3DModel"}
        config.pop("_use_default_values", None)  # of which from_config would take others
        with torch.device("meta"):
            expert = type(expert).from_config(config)
        write(root / name, expert.bfloat16(), config, STEM, weights, MXConfig(method), seed=len(name))
    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config(**text)).bfloat16()
        autoencoder = AutoencoderKLWan(**vae)
    config = {**encoder.config.to_dict(), "architectures": ["UMT5EncoderModel"], "dtype": "bfloat16"}
    own = {"quant_method": form, "embedding": None if table == "bf16" else table}
    write(
        root / "text_encoder",
        encoder,
        config,
        ENCODER_STEM,
        weights,
        None if form == "bf16" else encoder_config(own, form),
    )
    config = {**dict(autoencoder.config), "_class_name": "AutoencoderKLWan"}
    config.pop("_use_default_values", None)
    write(root / "vae", autoencoder, config, STEM, weights)
    if not (root / "tokenizer").exists():
        shutil.copytree(bundled("t2v") / "tokenizer", root / "tokenizer")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(root / "scheduler")
    tokenizer = json.loads((bundled("t2v") / "model_index.json").read_text())["tokenizer"]
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.875,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": tokenizer,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write(
    folder: Path,
    model: nn.Module,
    config: dict[str, Any],
    stem: str,
    weights: bool,
    method: MXConfig | None = None,
    *,
    seed: int = 0,
) -> None:
    """A component's directory; with a method its linears are packed, and its token table where the config says so."""
    if folder.exists():
        print(f"{folder.name} is there")
        return
    started, parts, seen = time.perf_counter(), dict[str, Part](), set[int]()
    methods = {} if method is None else {path: decision.method for path, decision in plan(model, method).items()}
    table = None if method is None else table_of(method, spec_of(model))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        path, _, leaf = name.rpartition(".")
        of = str(method.embedding) if method is not None and path == table else methods.get(path)
        if of is not None and leaf == "weight":
            record = block_format(of).tensors(*tensor.shape, where=name)
            fill = partial(packed, of, 1 if path == table else tensor.shape[1])
            parts |= {
                f"{path}.{key}": Part(info, partial(fill, key, info, seed + len(parts))) for key, info in record.items()
            }
        else:
            info = TensorInfo(tuple(tensor.shape), tensor.dtype)
            parts[name] = Part(info, partial(plain, name, info, seed + len(parts)))
    if method is not None:
        serialized = method.serialized(methods, {"mxdit": __version__})
        config = {**config, "quantization_config": stated(serialized) if stem == ENCODER_STEM else serialized.to_dict()}
    shards = shards_of(parts, SHARD, stem)
    with new_directory(folder, f"full_size {sorted(str(p.info) for p in parts.values())}") as staging:
        for shard in shards if weights else ():
            if not staging.has(shard.name, shard):
                staging.write_shard(shard.name, shard)
        if len(shards) > 1 and weights:
            staging.write_json(f"{stem}.safetensors.index.json", index_of(shards))
        staging.write_json("config.json", config)
    nbytes = sum(shard.nbytes for shard in shards)
    print(f"{folder.name}: {nbytes / GIB:.2f} GiB of tensors, {time.perf_counter() - started:.0f} s", flush=True)


def packed(method: str, fan_in: int, key: str, info: TensorInfo, seed: int) -> Tensor:
    """Codes of all values but NaN, and scales that make a weight of them whose products keep their variance."""
    if key == "weight":
        stretch = codes(method == "mxfp8").roll(seed * 7919)
        return stretch.repeat(math.ceil(info.nbytes / len(stretch)))[: info.nbytes].view(info.shape)
    spread = 3.0 if method != "mxfp8" else 100.0  # about the standard deviation of codes that are equally likely
    if key == "weight_scale":
        exponent = 127 if method == "mxfp4_dualscale" else round(math.log2(1 / (spread * math.sqrt(fan_in)))) + 127
        return torch.full(info.shape, exponent, dtype=torch.uint8)
    return torch.full(info.shape, 1 / (spread * math.sqrt(fan_in)), dtype=info.dtype)  # weight_dual_scale


@cache
def codes(eight_bits: bool) -> Tensor:
    """One stretch of random codes, of which each tensor begins at another place: much cheaper than new ones for each."""
    found = torch.randint(256, ((1 << 24) - 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return found.masked_fill_((found & 0x7F) == 0x7F, 0) if eight_bits else found


def plain(name: str, info: TensorInfo, seed: int) -> Tensor:
    """Norms of one, biases of zero, and noise that keeps variance."""
    assert info.dtype is not None
    if len(info.shape) < 2:
        return torch.full(info.shape, float("norm" in name and name.endswith("weight")), dtype=info.dtype)
    if "gamma" in name:
        return torch.ones(info.shape, dtype=info.dtype)
    std = 1.0 if "shared" in name or "embed_tokens" in name else 1 / math.sqrt(math.prod(info.shape[1:]))
    generator, noise = torch.Generator().manual_seed(seed), torch.empty(info.shape, dtype=info.dtype)
    return noise.normal_(std=std, generator=generator)


# -- running it --------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan, load and make a clip in this process, which is a fresh one."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.limit:
        files = sum(file.stat().st_size for file in args.directory.rglob("*.safetensors"))
        limit = budget_of(args.limit) + files
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    width, height = map(int, args.size.split("x"))
    how = {"attention": args.attention, "fused": args.fused, "compile": args.compile}
    session = Session.open(args.directory, memory=args.memory, **how)
    # The schedule's middle: half of the steps are each expert's.
    steps = {"steps": args.steps, "guidance": 4.0, "boundary_ratio": boundary(session, args.steps)}
    request = session.request(prompt="a red seven moving left", size=(height, width), frames=args.frames, **steps)
    planned, tell = session.plan(request), list[tuple[str, float]]()
    if args.tiles:
        planned = next(plan for plan in session.plans(request) if plan.policy == Policy(vae=TILES))
    before, experts = status("VmRSS"), dict[str, int]()
    with Sampler(every=0.01) as loading:
        started = time.perf_counter()
        pipeline = session.load(request)
        tell.append(("load", time.perf_counter() - started))
    if args.tiles:
        pipeline.components["vae"].enable_tiling()
    for name in ("transformer", "transformer_2"):
        pipeline.components[name].register_forward_hook(partial(count, experts, name))
    with Sampler(every=0.01) as making:
        result = session.run(request, told)
    return {
        "directory": str(args.directory),
        "request": {"size": args.size, "frames": args.frames, "steps": args.steps},
        **how,
        "memory": args.memory,
        "limit": args.limit,
        "plan": planned.to_dict(),
        "before": before,
        "anon": max(loading.anon, making.anon),
        "rss": max(loading.rss, making.rss),
        "rss_loading": loading.rss,
        "kept": args.memory is None or max(loading.rss, making.rss) <= budget_of(args.memory),
        "forwards": experts,
        "seconds": {**dict(tell), "run": result.seconds, "steps": list(result.step_seconds)},
        "threads": torch.get_num_threads(),
    }


def told(done: int, steps: int) -> None:
    print(f"step {done} of {steps}", file=sys.stderr, flush=True)


def count(counts: dict[str, int], name: str, *_: object) -> None:
    counts[name] = counts.get(name, 0) + 1


def boundary(session: Session, steps: int) -> float:
    """Between the two middle timesteps of a schedule of so many steps."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler.from_pretrained(session.model.path / "scheduler")
    shift = session.model.preset(session.task).flow_shift
    if shift is not None:
        scheduler = UniPCMultistepScheduler.from_config(scheduler.config, flow_shift=shift)
    scheduler.set_timesteps(steps)
    first, second = scheduler.timesteps[(steps - 1) // 2], scheduler.timesteps[min((steps + 1) // 2, steps - 1)]
    return float(first + second) / 2 / scheduler.config.num_train_timesteps


def show(row: dict[str, Any]) -> None:
    planned, seconds = row["plan"], row["seconds"]
    print(f"policy: {planned['policy']}")
    for phase in planned["phases"]:
        print(
            f"  {phase['name']}: {(phase['total'] + planned['floor']) / MIB:.0f} MiB, {phase['work'] / MIB:.0f} computing"
        )
    print(f"planned  {planned['peak'] / MIB:8.0f} MiB, {planned['floor'] / MIB:.0f} of them the process's")
    print(
        f"RSS      {row['rss'] / MIB:8.0f} MiB at most ({row['rss'] / planned['peak'] - 1:+.1%}), loading {row['rss_loading'] / MIB:.0f}"
    )
    print(f"RssAnon  {row['anon'] / MIB:8.0f} MiB at most")
    print(
        f"forwards {row['forwards']}; steps {', '.join(f'{s:.1f}' for s in seconds['steps'])} s; load {seconds['load']:.1f} s, run {seconds['run']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
