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

STAGES = ("vae", "pretrain", "high", "low")
WINDOW = 50


def means(path: Path) -> dict[str, np.ndarray]:
    """Columns of a stage's log, each the mean of WINDOW steps."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    table = {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}
    count = len(rows) // WINDOW * WINDOW
    return {key: np.nanmean(values[:count].reshape(-1, WINDOW), 1) for key, values in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/mini"))
    parser.add_argument("--dst", type=Path, default=Path("docs/mini-model"))
    args = parser.parse_args()
    args.dst.mkdir(parents=True, exist_ok=True)
    curves = {stage: means(args.out / stage / "log.csv") for stage in STAGES}
    for stage, table in curves.items():
        with (args.dst / f"{stage}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table)
            writer.writerows([f"{value:.5g}" for value in row] for row in zip(*table.values(), strict=True))

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    left.plot(curves["vae"]["step"], curves["vae"]["psnr"])
    left.set(title="VAE: PSNR on fresh clips", xlabel="step", ylabel="dB")
    changes = np.flatnonzero(np.diff(curves["vae"]["frames"])) + 1
    for index, name in zip((0, *changes), ("1 frame", "5", "9", "17, decoder"), strict=False):
        left.annotate(name, (curves["vae"]["step"][index], 12), fontsize=8)
    for key, label in (("low", "low noise, t < 875"), ("high", "high noise, t > 875")):
        middle.plot(curves["pretrain"]["step"], curves["pretrain"][key], label=label)
    middle.set(title="Pre-training: velocity MSE", xlabel="step", yscale="log")
    middle.legend()
    for stage in STAGES[2:]:
        right.plot(curves[stage]["step"], curves[stage]["loss"], label=stage)
    right.set(title="The two experts: velocity MSE", xlabel="step", yscale="log")
    right.legend()
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.savefig(args.dst / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
