"""Training curves for the documentation: one picture, and each stage's log in means of 50 steps.

python tools/train_mini/plot.py [--out build/mini] [--dst docs/mini-model]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import train_experts

STAGES = ("vae", "pretrain", "high", "low", "high-long", "low-long")
WINDOW = 50


def read(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def write_means(log: Path, destination: Path) -> None:
    """A stage's log in means of WINDOW steps."""
    table = read(log)
    count = len(table["step"]) // WINDOW * WINDOW
    table = {key: np.nanmean(values[:count].reshape(-1, WINDOW), 1) for key, values in table.items()}
    with destination.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows([f"{value:.5g}" for value in row] for row in zip(*table.values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/mini"))
    parser.add_argument("--dst", type=Path, default=Path("docs/mini-model"))
    args = parser.parse_args()
    args.dst.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if (args.out / stage / "log.csv").exists():
            write_means(args.out / stage / "log.csv", args.dst / f"{stage}.csv")
    curves = {stage: read(args.dst / f"{stage}.csv") for stage in STAGES}

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    left.plot(curves["vae"]["step"], curves["vae"]["psnr"])
    left.set(title="VAE: PSNR on fresh clips", xlabel="step", ylabel="dB")
    changes = np.flatnonzero(np.diff(curves["vae"]["frames"])) + 1
    for index, name in zip((0, *changes), ("1 frame", "5", "9", "17, decoder alone"), strict=False):
        left.annotate(name, (curves["vae"]["step"][index], 12), fontsize=8)
    for key, label in (("low", "low noise, t < 875"), ("high", "high noise, t > 875")):
        middle.plot(curves["pretrain"]["step"], curves["pretrain"][key], label=label)
    middle.set(title="Pre-training: velocity MSE", xlabel="step", yscale="log")
    middle.legend()
    for first, color in (("high", "tab:orange"), ("low", "tab:blue")):
        seen = 0.0
        for name in (first, f"{first}-long"):
            stage = train_experts.STAGES[name]
            clips = seen + curves[name]["step"] * stage.batch / 1000
            label = {"label": first} if name == first else {}
            right.plot(clips, curves[name]["loss"], color=color, **label)
            seen += stage.steps * stage.batch / 1000
    right.set(title="The two experts: weighted velocity MSE", xlabel="thousand clips seen", yscale="log")
    right.legend()
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.savefig(args.dst / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
