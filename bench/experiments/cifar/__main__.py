"""`python -m bench.experiments.cifar`: arguments, files, plot and table."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch.distributed as dist
from matplotlib.ticker import MaxNLocator

from bench.experiments.cifar.data import cifar, digits
from bench.experiments.cifar.deploy import Deployed, deploy
from bench.experiments.cifar.training import NORMS, Epoch, Settings, Training, join
from bench.measure.environment import ROOT, device_name, versions
from bench.measure.results import read_csv, write_csv
from bench.report.plots import BLUE, DARK, MID, ORANGE, STYLE, save
from bench.report.tables import number, table

CHECKPOINT, CURVES, PLOT, PROGRAM, SUMMARY = "checkpoint.pt", "curves.csv", "curves.png", "folded.pt2", "summary.csv"
COLOURS = {"batchnorm": DARK, "iternorm": BLUE, "dbn": ORANGE, "popnorm": MID}


@dataclass(frozen=True)
class Summary:
    """The end of a run: its last epoch, then what deploy.Deployed says."""

    data: str
    norm: str
    where: str
    width: str
    processes: int
    seed: int
    epochs: int
    train_loss: float
    test_loss: float
    accuracy: float
    folded_accuracy: float
    norms_left: int
    exact_difference: float
    folded_difference: float
    exported_difference: float
    seconds_per_epoch: float


def summarize(data: str, settings: Settings, history: Sequence[Epoch], deployed: Deployed) -> Summary:
    last = history[-1]
    return Summary(
        data, settings.norm, settings.where, settings.width, settings.processes, settings.seed, last.epoch,
        last.train_loss, last.test_loss, deployed.accuracy, deployed.folded_accuracy, deployed.norms_left,
        deployed.exact_difference, deployed.folded_difference, deployed.exported_difference,
        median(epoch.seconds for epoch in history),
    )  # fmt: skip


def summary_table(rows: Sequence[Summary]) -> str:
    header = [
        "norm", "processes", "epochs", "training loss", "test accuracy, %", "folded, %", "norms left",
        "folded - trained: float64", "float32", "loaded - folded", "s / epoch",
    ]  # fmt: skip
    return table(
        header,
        [
            [
                row.norm if row.where == "all" else f"{row.norm}, {row.where}", str(row.processes), str(row.epochs),
                f"{row.train_loss:.4f}", f"{100 * row.accuracy:.2f}", f"{100 * row.folded_accuracy:.2f}",
                str(row.norms_left), f"{row.exact_difference:.1e}", f"{row.folded_difference:.1e}",
                f"{row.exported_difference:.1e}", number(row.seconds_per_epoch),
            ]
            for row in rows
        ],
    )  # fmt: skip


def draw(runs: Sequence[Sequence[Epoch]], path: Path) -> Path:
    """Draw loss and accuracy by epoch: dashed for training, solid for the test images."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in runs:
        first = run[0]
        name = first.norm if first.where == "all" else f"{first.norm}, {first.where}"
        label = f"{name}, {first.processes} process{'es' if first.processes > 1 else ''}"
        epochs = [e.epoch for e in run]
        for axes, values in (
            (panels[0], ([e.train_loss for e in run], [e.test_loss for e in run])),
            (panels[1], ([100 * e.train_accuracy for e in run], [100 * e.test_accuracy for e in run])),
        ):
            for value, style in zip(values, ("--", "-"), strict=True):
                marker = "o" if len(run) == 1 else None  # one epoch is no line
                legend = label if style == "-" else None
                axes.plot(epochs, value, style, marker=marker, color=COLOURS[first.norm], linewidth=1.6, label=legend)
    panels[0].set_yscale("log")
    panels[0].set_title("Loss: test solid, training dashed")
    panels[1].set_title("Accuracy, %")
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e6e6e6", linewidth=0.8)
    panels[0].legend()
    return save(figure, path)


def width(text: str) -> str:
    """Return a fraction in lowest terms, so that .5 and 1/2 are one width."""
    try:
        return str(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 1/4, got {text}") from None


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    d = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.cifar",
        description="ResNet-18 with BatchNorm converted to whitening: trained, resumed, folded, exported.",
    )
    parser.add_argument("--norm", choices=NORMS, default=d.norm)
    parser.add_argument("--where", choices=("all", "first"), default=d.where, help="which BatchNorms are replaced")
    parser.add_argument("--decorrelate-features", action="store_true", help="a norm behind the average pooling, too")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10's binary version (default: digits)")
    parser.add_argument("--epochs", type=int, default=d.epochs)
    parser.add_argument("--stop-after", type=int, metavar="EPOCH", help="end this call there, to be resumed")
    parser.add_argument("--batch-size", type=int, default=d.batch_size, help="of all processes together")
    parser.add_argument("--lr", type=float, default=d.lr)
    parser.add_argument("--schedule", choices=("cosine", "step"), default=d.schedule)
    parser.add_argument("--width", type=width, default=d.width, help="factor on the channels, a multiple of 1/64")
    parser.add_argument("--seed", type=int, default=d.seed)
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--out", type=Path, help="folder (default: out/cifar/<norm>)")
    parser.add_argument("--resume", action="store_true", help=f"go on from {CHECKPOINT} in the folder")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], metavar="DIR", help="runs to draw beside this")
    options = parser.parse_args(arguments)
    for name in ("epochs", "stop_after", "batch_size", "lr"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')}: expected a finite positive number, got {value}")
    if not -(2**63) <= options.seed < 2**64:
        parser.error(f"--seed: expected an integer from -2^63 to 2^64 - 1, as torch takes them, got {options.seed}")
    if options.norm == "batchnorm" and (options.where != "all" or options.decorrelate_features):
        parser.error("--norm: expected a norm that replaces BatchNorm, got batchnorm")
    options.out = (options.out or ROOT / "out" / "cifar" / options.norm).resolve()
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {options.out}")
    checkpoint = options.out / CHECKPOINT
    if options.resume and not checkpoint.exists():
        parser.error(f"--resume: expected a checkpoint, got no {checkpoint}")
    if checkpoint.exists() and not options.resume:
        parser.error(f"--out: expected a folder without a run, or --resume, got {checkpoint}")
    for folder in options.beside:
        if not (folder / CURVES).exists():
            parser.error(f"--beside: expected folders of runs, got no {folder / CURVES}")
    return parser, options


def main(arguments: Sequence[str] | None = None) -> int:
    parser, options = parse(arguments)
    process = join()
    try:
        chosen = {f.name: getattr(options, f.name) for f in fields(Settings) if f.name != "processes"}
        settings = Settings(**chosen, processes=process.ranks)
        try:
            data = digits(process.device) if options.data is None else cifar(options.data, process.device)
            training = Training(settings, data, process)
            if options.resume:
                training.load(options.out / CHECKPOINT)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        if process.rank == 0:
            print(f"{device_name(process.device)}\n{versions(process.device)}")
            options.out.mkdir(parents=True, exist_ok=True)
        training.run(min(settings.epochs, options.stop_after or settings.epochs), options.out / CHECKPOINT)
        if process.rank == 0:
            report(training, "digits" if options.data is None else "CIFAR-10", options.out, options.beside)
        if process.ranks > 1:
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def report(training: Training, data: str, out: Path, beside: Sequence[Path]) -> None:
    """Write the files of a run; for a run that is not over, the curves so far."""
    settings, history = training.settings, training.history
    write_csv(out / CURVES, Epoch, history)
    with plt.rc_context(STYLE):
        draw([*(read_csv(folder / CURVES, Epoch) for folder in beside), history], out / PLOT)
    if len(history) < settings.epochs:
        print(f"{len(history)} of {settings.epochs} epochs, go on with --resume.\nFiles: {out}")
        return
    deployed = deploy(training.model, training.data, out / PROGRAM)
    summary = summarize(data, settings, history, deployed)
    write_csv(out / SUMMARY, Summary, [summary])
    print(f"\n{summary_table([summary])}\n\nDifferences of logits over the largest logit.\nFiles: {out}")


if __name__ == "__main__":
    sys.exit(main())
