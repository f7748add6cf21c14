"""Does the assembled mini model make what it is asked for? Scores T2V and I2V clips with `mxdit_models.judge`.

    python tools/train_mini/evaluate.py [--models models/src/mxdit_models] [--prompts N] [--skip N] [--out DIR]

T2V: captions that no expert was trained on, all 261 of them by default. I2V: first frames rendered from scans that nothing was
trained on. Prints each figure beside its target, and writes results.json and a contact sheet of the first 64 clips per task.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mxdit.generation import loading
from mxdit.generation.session import Session
from mxdit_models.digits import first_frames, heldout_specs
from mxdit_models.judge import Judge

TARGETS = {
    "t2v": {"digit": 0.90, "color": 0.95, "direction": 0.95},
    "i2v": {"first_frame_psnr_db": 24.0, "direction": 0.90},
}


def sheet(clips: list[np.ndarray], columns: int = 5) -> Image.Image:
    """A contact sheet: one row a clip, in three stacks side by side."""
    rows = [
        np.concatenate([clip[i] for i in np.linspace(0, len(clip) - 1, columns).round().astype(int)], 1)
        for clip in clips
    ]
    third = math.ceil(len(rows) / 3)
    stacks = [np.concatenate(rows[i * third : (i + 1) * third] or rows[:1]) for i in range(3)]
    stacks = [np.pad(s, ((0, third * rows[0].shape[0] - len(s)), (0, 8), (0, 0)), constant_values=255) for s in stacks]
    return Image.fromarray(np.concatenate(stacks, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models/src/mxdit_models"))
    parser.add_argument("--out", type=Path, default=Path("build/mini/evaluation"))
    parser.add_argument("--prompts", type=int, help="how many; default: all")
    parser.add_argument("--skip", type=int, default=0, help="held-out captions to pass over")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    parser.add_argument("--guidance", type=float, help="default: the preset's")
    parser.add_argument("--guidance-2", type=float, help="default: the preset's")
    parser.add_argument("--task", choices=TARGETS, help="default: both")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    loading.show_loading(False)
    judge = Judge()
    print(f"judge's accuracy on single frames of unseen scans: {judge.accuracy:.3f}", flush=True)
    specs = heldout_specs()[args.skip :][: args.prompts]
    stills = first_frames()[args.skip :][: args.prompts]
    results: dict[str, dict[str, float]] = {"judge": {"digit": judge.accuracy}}
    for task in [args.task] if args.task else list(TARGETS):
        session = Session.open(args.models / task)
        right = {"digit": 0, "color": 0, "direction": 0, "background": 0}
        psnrs, clips = [], []
        for i, spec in enumerate(specs):
            image = Image.fromarray(stills[i]) if task == "i2v" else None
            request = session.request(
                prompt=spec.caption,
                image=image,
                seed=args.skip + i,
                steps=args.steps,
                guidance=args.guidance,
                guidance_2=args.guidance_2,
            )
            frames = session.run(request).frames
            clips.append(frames)
            reading = judge.read(torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1)
            wrong = [key for key in right if getattr(reading, key) != getattr(spec, key)]
            for key in right:
                right[key] += key not in wrong
            if image is not None:
                error = np.square(frames[0].astype(float) - np.asarray(image, dtype=float)).mean()
                psnrs.append(10 * math.log10(255**2 / error))
            said = {key: getattr(reading, key) for key in wrong}
            print(f"{task} {i + 1}/{len(specs)}  {spec.caption}  {said or 'as asked'}", flush=True)
        results[task] = {key: count / len(specs) for key, count in right.items()}
        if psnrs:
            results[task]["first_frame_psnr_db"] = sum(psnrs) / len(psnrs)
            results[task]["first_frame_psnr_db_min"] = min(psnrs)
        sheet(clips[:64]).save(args.out / f"{task}.png")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    for task, targets in TARGETS.items():
        for key, value in results.get(task, {}).items():
            target = (
                f"  target {targets[key]:g}  {'met' if value >= targets[key] else 'MISSED'}" if key in targets else ""
            )
            print(f"{task} {key:24s} {value:.3f}{target}")


if __name__ == "__main__":
    main()
