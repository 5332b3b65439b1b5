"""The end-to-end run in tiny: CIFAR-10's files, resuming to the bit, folding, exporting, two processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("sklearn")  # before what imports it
pytest.importorskip("matplotlib")

import normkernels as nk
from bench.experiments.cifar.__main__ import Summary, main
from bench.experiments.cifar.data import augmented, batches, cifar, digits, draws, share
from bench.experiments.cifar.deploy import CLOSE, deploy
from bench.experiments.cifar.training import Epoch, Process, Settings, Training, scheduler
from bench.measure.environment import ROOT
from bench.measure.results import read_csv
from bench.networks.resnet import resnet18
from tests.tolerances import assert_identity

CPU = torch.device("cpu")
COUNTS = {"data_batch_1.bin": 7, "data_batch_2.bin": 7, "data_batch_3.bin": 7, "data_batch_4.bin": 7,
          "data_batch_5.bin": 5, "test_batch.bin": 9}  # fmt: skip
# Batches of 8: the last one is of a single image, in training and in the test.
TINY = ["--width", "1/16", "--batch-size", "8", "--epochs", "2", "--lr", ".01"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def images_of(name: str) -> tuple[Tensor, Tensor]:
    """Draw noise whose brightness tells the label."""
    g = torch.Generator().manual_seed(list(COUNTS).index(name))
    labels = torch.randint(10, (COUNTS[name],), generator=g)
    noise = torch.randint(100, (COUNTS[name], 3, 32, 32), generator=g)
    return (noise + 15 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write CIFAR-10's files, byte by byte as its page describes them, into the subfolder that the archive has."""
    files = tmp_path_factory.mktemp("data") / "cifar-10-batches-bin"
    files.mkdir()
    for name in COUNTS:
        x, y = images_of(name)
        content = b"".join(
            bytes([int(label)]) + bytes(image.flatten().tolist()) for image, label in zip(x, y, strict=True)
        )
        (files / name).write_bytes(content)
    return files.parent


def test_reader(folder: Path) -> None:
    data = cifar(folder, CPU)
    x, y = zip(*[images_of(name) for name in COUNTS], strict=True)
    assert torch.equal(data.train_x, torch.cat(x[:5])) and torch.equal(data.train_y, torch.cat(y[:5]))
    assert torch.equal(data.test_x, x[5]) and torch.equal(data.test_y, y[5])
    assert data.flip
    assert torch.equal(cifar(folder / "cifar-10-batches-bin", CPU).train_x, data.train_x)
    record = (folder / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()[3073:]
    row, column = 3, 17  # in the second image of the second file
    assert [int(v) for v in data.train_x[8, :, row, column]] == [
        record[1 + 1024 * c + 32 * row + column] for c in range(3)
    ]


def test_standardization_is_that_of_the_training_images(folder: Path) -> None:
    data = cifar(folder, CPU)
    standard = data.standardized(data.train_x)
    assert standard.dtype == torch.float32
    pixels = data.train_x.double()
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), correction=0, keepdim=True)
    assert_identity(data.mean, mean[0])
    assert_identity(data.std, std[0])
    torch.testing.assert_close(standard, ((pixels - mean) / std).float())


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("data_batch_3.bin", None, FileNotFoundError, "got none named data_batch_3.bin$"),
        ("test_batch.bin", b"", ValueError, "test_batch.bin: expected records of 3073 bytes, got 0 bytes"),
        ("data_batch_1.bin", bytes(2 * 3073 - 1), ValueError, "expected records of 3073 bytes, got 6145 bytes"),
        ("data_batch_5.bin", bytes(3073) + b"\x0a" + bytes(3072), ValueError, "labels from 0 to 9, got 10 in record 1"),
    ],
)
def test_reader_refuses(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str
) -> None:
    for file in (folder / "cifar-10-batches-bin").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        cifar(tmp_path, CPU)


def test_reader_refuses_other_folders_and_constant_images(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with CIFAR-10's binary files, got .*nowhere"):
        cifar(tmp_path / "nowhere", CPU)
    for name in COUNTS:
        (tmp_path / name).write_bytes(bytes(3073))
    with pytest.raises(ValueError, match="expected pixels that differ"):
        cifar(tmp_path, CPU)


def test_digits() -> None:
    data = digits(CPU)
    assert data.train_x.shape == (898, 3, 32, 32) and data.test_x.shape == (899, 3, 32, 32)
    assert data.train_x.dtype == torch.uint8 and data.train_x.max() == 255
    assert not data.flip


def test_crops_and_flips() -> None:
    g = torch.Generator().manual_seed(0)
    x, drawn = torch.randint(1, 256, (40, 3, 32, 32), generator=g), draws(40, True, g)
    expected = []
    for image, (row, column, mirrored) in zip(x, drawn.tolist(), strict=True):
        crop = F.pad(image, (4, 4, 4, 4))[:, row : row + 32, column : column + 32]
        expected.append(crop.flip(2) if mirrored else crop)
    assert torch.equal(augmented(x, drawn), torch.stack(expected))
    assert set(drawn[:, :2].unique().tolist()) == set(range(9)) and set(drawn[:, 2].tolist()) == {0, 1}
    assert not draws(40, False, g)[:, 2].any()


def test_shares_cover_an_epoch_once() -> None:
    whole = list(batches(33, 8, torch.Generator().manual_seed(0)))
    assert [len(b) for b in whole] == [8, 8, 8, 8, 1]
    shares = [[share(b, rank, 3) for b in whole] for rank in range(3)]
    assert [[len(b) for b in rank] for rank in shares] == [[3, 3, 3, 3, 1], [3, 3, 3, 3, 0], [2, 2, 2, 2, 0]]
    assert sorted(int(i) for rank in shares for b in rank for i in b) == list(range(33))
    assert [b.tolist() for b in batches(3, 2)] == [[0, 1], [2]]


def test_resnet18() -> None:
    model = resnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # as in the usual implementations for CIFAR-10
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 20  # 17 and three projections
    sizes: list[torch.Size] = []
    tiny = resnet18("1/64").eval()
    for stage in range(1, 5):
        tiny.get_submodule(f"stage{stage}").register_forward_hook(lambda m, x, y: sizes.append(y.shape))
    assert tiny(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(2, 1, 32, 32), (2, 2, 16, 16), (2, 4, 8, 8), (2, 8, 4, 4)]
    for width in (0, "-1", "1/128", "1/3"):
        with pytest.raises(ValueError, match="width: expected a positive multiple of 1/64"):
            resnet18(width)


@pytest.mark.parametrize(("schedule", "rates"), [("cosine", [1, 0.75, 0.25, 0]), ("step", [1, 0.1, 0.01])])
def test_schedules(schedule: str, rates: list[float]) -> None:
    epochs = 3 if schedule == "cosine" else 4
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = scheduler(optimizer, replace(Settings(), schedule=schedule, epochs=epochs))
    got = []
    for _ in range(epochs + 1):
        got.append(steps.get_last_lr()[0])
        optimizer.step()
        steps.step()
    assert_identity(torch.tensor(got), torch.tensor(rates if schedule == "cosine" else [1, 1, 0.1, 0.01, 0.01]))


def assert_equal(a: Any, b: Any) -> None:
    """Check that two results are equal to the bit, but for the seconds."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train two epochs of IterNorm without a break."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        assert main([*TINY, "--data", str(folder), "--out", str(out)]) == 0
    yield out


def test_a_resumed_run_is_the_run_without_a_break(folder: Path, run: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--data", str(folder), "--out", str(tmp_path)]
    assert main([*arguments, "--stop-after", "1"]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "curves.csv", "curves.png"}
    assert [epoch.epoch for epoch in read_csv(tmp_path / "curves.csv", Epoch)] == [1]
    assert main([*arguments, "--resume"]) == 0
    whole, resumed = (torch.load(out / "checkpoint.pt") for out in (run, tmp_path))
    assert whole["epoch"] == 2 and len(whole["history"]) == 2
    assert_equal(whole, resumed)


def test_what_a_run_leaves(folder: Path, run: Path) -> None:
    names = {"checkpoint.pt", "curves.csv", "curves.png", "folded.pt2", "summary.csv"}
    assert {file.name for file in run.iterdir()} == names
    (row,) = read_csv(run / "summary.csv", Summary)
    assert (row.data, row.norm, row.processes, row.epochs, row.norms_left) == ("CIFAR-10", "iternorm", 1, 2, 0)
    assert row.accuracy == row.folded_accuracy

    saved = torch.load(run / "checkpoint.pt")
    model = nk.convert.replace(resnet18("1/16"), "IterNorm")
    model.load_state_dict(saved["model"])
    data = cifar(folder, CPU)
    x = data.standardized(data.test_x)
    program = torch.export.load(run / "folded.pt2")
    assert not any(
        "normkernels" in str(node.target) or "batch_norm" in str(node.target) for node in program.graph.nodes
    )
    with torch.no_grad():
        for count in (1, 2, 9):
            expected = model.eval()(x[:count])
            torch.testing.assert_close(
                program.module()(x[:count]), expected, rtol=0, atol=float(CLOSE * expected.abs().max())
            )
        loss = F.cross_entropy(model(x), data.test_y)
    last = read_csv(run / "curves.csv", Epoch)[-1]
    assert (last.epoch, last.norm, last.processes) == (2, "iternorm", 1)
    # The file has six digits; batches of other sizes round otherwise.
    assert last.test_loss == pytest.approx(float(loss), rel=1e-4)
    assert last.test_accuracy == pytest.approx(row.accuracy, rel=1e-5)


def test_a_finished_run_can_be_resumed(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left to train: the report is made again, here beside another run."""
    shutil.copy(run / "checkpoint.pt", tmp_path)
    assert main([*TINY, "--data", str(folder), "--out", str(tmp_path), "--resume", "--beside", str(run)]) == 0
    first, second = (read_csv(out / "summary.csv", Summary) for out in (run, tmp_path))
    assert first == second
    assert "| iternorm |         1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--norm", "batchnorm", "--schedule", "step"],
        ["--norm", "dbn", "--where", "first", "--amp"],
        ["--norm", "popnorm"],
        ["--norm", "iternorm", "--decorrelate-features", "--batch-size", "11"],
    ],
)
def test_other_runs(folder: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert main([*TINY, "--epochs", "1", "--data", str(folder), "--out", str(tmp_path), *arguments]) == 0
    (row,) = read_csv(tmp_path / "summary.csv", Summary)
    assert row.norm == arguments[1] and row.norms_left == 0
    keys = torch.load(tmp_path / "checkpoint.pt")["model"].keys()
    whitened = sum(key.endswith("running_whitening") for key in keys)
    assert whitened == {"batchnorm": 0, "dbn": 1, "popnorm": 0, "iternorm": 21}[arguments[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", ".02"], "expected lr 0.01 as in .*checkpoint.pt, got 0.02"),
        (["--norm", "dbn"], "expected norm iternorm as in .*checkpoint.pt, got dbn"),
        (["--width", "1/8"], "expected width 1/16 as in .*checkpoint.pt, got 1/8"),
        ([], "expected the images of .*checkpoint.pt, whose channels have the mean"),
    ],
)
def test_resuming_refuses_another_run(
    run: Path, tmp_path: Path, folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / "checkpoint.pt", tmp_path)
    data = ["--data", str(folder)] if arguments else []
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, *data, "--out", str(tmp_path), "--resume", *arguments])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: expected a finite positive number, got 0"),
        (["--lr", "nan"], "--lr: expected a finite positive number, got nan"),
        (["--lr", "inf"], "--lr: expected a finite positive number, got inf"),
        (["--stop-after", "-1"], "--stop-after: expected a finite positive number, got -1"),
        (
            ["--seed", str(2**64)],
            f"--seed: expected an integer from -2^63 to 2^64 - 1, as torch takes them, got {2**64}",
        ),
        (["--seed", str(-(2**63) - 1)], "--seed: expected an integer from"),
        (["--width", "x"], "expected a number or a fraction such as 1/4, got x"),
        (["--width", "1/0"], "expected a number or a fraction such as 1/4, got 1/0"),
        (["--width", "1/3"], "width: expected a positive multiple of 1/64, got 1/3"),
        (["--norm", "batchnorm", "--where", "first"], "--norm: expected a norm that replaces BatchNorm, got batchnorm"),
        (["--data", "nowhere"], "expected a folder with CIFAR-10's binary files, got nowhere"),
        (["--resume"], "--resume: expected a checkpoint, got no "),
        (["--beside", "nowhere"], "--beside: expected folders of runs, got no nowhere/curves.csv"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "new"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_runs_are_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, message in (
        (run, "expected a folder without a run, or --resume"),
        (run / "curves.csv", "expected a folder, got the file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["--out", str(out)])
        assert message in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_checkpoint_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(replace(Settings(), width="1/64"), cifar(folder, CPU), Process(0, 1, CPU))
    training.save(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def interrupted(state: object, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.save(tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_deploying_refuses_other_logits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold = nk.convert.fold

    def wrong(model: nn.Module) -> nn.Module:
        folded = fold(model)
        with torch.no_grad():
            folded.get_parameter("stage3.0.conv2.bias").mul_(1 + 1e-6)
        return folded

    model = nk.convert.replace(resnet18("1/64"), "IterNorm")
    with torch.no_grad():
        model.get_parameter("stage3.0.norm2.bias").fill_(1.0)
    data = cifar(folder, CPU)
    deploy(model, data, tmp_path / "right.pt2")
    monkeypatch.setattr(nk.convert, "fold", wrong)
    with pytest.raises(RuntimeError, match="exact_difference: expected at most 1e-09 of the largest logit, got"):
        deploy(model, data, tmp_path / "wrong.pt2")


RANK = """
import os, runpy
import torch
from bench.experiments.cifar.training import Training

torch.set_default_dtype(torch.float64)
whole = Training.run

def run(training, *arguments):
    whole(training, *arguments)
    state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    torch.save(state, f"{os.environ['RANKS']}/{training.process.rank}.pt")

Training.run = run
runpy.run_module("bench.experiments.cifar", run_name="__main__")
"""


def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    """In float64 two processes have the losses of one: the images are the same, and the norm is SyncIterNorm.

    The last share of an epoch is empty.
    """
    (tmp_path / "rank.py").write_text(RANK)
    threads_and_devices = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*TINY, "--data", str(folder), "--out", str(tmp_path / "two")]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "rank.py"), *arguments],
        check=True, cwd=ROOT, timeout=120,
        env=os.environ | threads_and_devices | {"PYTHONPATH": str(ROOT), "RANKS": str(tmp_path)},
    )  # fmt: skip
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(first, second)

    torch.set_default_dtype(torch.float64)
    try:
        assert main([*TINY, "--data", str(folder), "--out", str(tmp_path / "one")]) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    one, two = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert two["arguments"]["processes"] == 2
    assert_equal(two["model"], first["model"])
    for name, value in one["model"].items():
        assert_identity(two["model"][name], value)
    (row,) = read_csv(tmp_path / "two" / "summary.csv", Summary)
    assert row.processes == 2 and row.norms_left == 0
