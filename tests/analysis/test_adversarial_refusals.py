"""The attacks refuse bad input, and say what they expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from normkernels.analysis import accuracy, bim, gaussian_noise, simba
from tests.analysis.attacked import BIM, MODEL, SIMBA, X, Y

BOTH = [
    ({"x": X.tolist()}, TypeError, "x: expected a torch.Tensor, got list"),
    ({"x": X.long()}, TypeError, "x: expected float16"),
    ({"x": X[0, 0, 0]}, ValueError, r"x: expected a non-empty shape \(N, \*\), got \(3,\)"),
    ({"x": X[:0], "y": Y[:0]}, ValueError, "x: expected a non-empty shape"),
    ({"x": X + 1}, ValueError, r"x: expected values within the bounds \(0.0, 1.0\), got 1"),
    ({"x": X * math.nan}, ValueError, "x: expected values within the bounds"),
    ({"y": 0}, TypeError, "y: expected a torch.Tensor, got int"),
    ({"y": Y[1:]}, ValueError, r"y: expected as many as the 4 samples, got shape \(3,\)"),
    ({"bounds": (1.0, 0.0)}, ValueError, "bounds: expected two finite numbers, the lower one first"),
    ({"bounds": None}, TypeError, "bounds: expected two numbers, got None"),
    ({"bounds": (0.0, 0.5, 1.0)}, TypeError, "bounds: expected two numbers"),
    ({"bounds": (-math.inf, 1.0)}, ValueError, "bounds: expected two finite numbers"),
    ({"bounds": (0.0, math.inf)}, ValueError, "bounds: expected a finite number"),
    ({"eps": -0.1}, ValueError, r"eps: expected a finite number within \[0, 1\], got -0.1"),
    ({"eps": 1.5}, ValueError, r"eps: expected a finite number within \[0, 1\], got 1.5"),
    ({"eps": math.nan}, ValueError, "eps: expected a finite number"),
    ({"eps": "0.1"}, TypeError, "eps: expected a number"),
    ({"targeted": "no"}, TypeError, "targeted: expected True or False"),
    ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        *BOTH,
        ({"step_size": 0}, ValueError, "step_size: expected more than 0, got 0"),
        ({"step_size": -0.1}, ValueError, "step_size: expected a finite number at least 0"),
        ({"num_steps": 0}, ValueError, "num_steps: expected at least 1, got 0"),
        ({"num_steps": 1.0}, TypeError, "num_steps: expected an int"),
        ({"loss": lambda logits, y: None}, TypeError, "loss: expected a torch.Tensor, got NoneType"),
        ({"loss": "l2"}, TypeError, "loss: expected a function or a module, got str"),
        ({"y": torch.ones(4, 2)}, ValueError, r"y: expected probabilities of shape \(4, 3\), got \(4, 2\)"),
    ],
)
def test_bad_input_of_bim(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bim(**{"model": MODEL, "x": X, "y": Y, **BIM, **bad})


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        *BOTH,
        ({"eps": 0}, ValueError, "eps: expected more than 0, got 0"),
        ({"max_queries": 0}, ValueError, "max_queries: expected at least 1, got 0"),
        ({"basis": "fourier"}, ValueError, "basis: expected one of pixel, dct, got 'fourier'"),
        ({"frequencies": 2}, ValueError, "frequencies: expected None with basis='pixel', got 2"),
        ({"basis": "dct", "frequencies": 4}, ValueError, "frequencies: expected at most the 3 of the shortest axis"),
        (
            {"basis": "dct", "x": X[:, 0, 0]},
            ValueError,
            r"x: expected shape \(N, C, \*\) with basis='dct', got \(4, 3\)",
        ),
    ],
)
def test_bad_input_of_simba(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simba(**{"model": MODEL, "x": X, "y": Y, **SIMBA, **bad})


def test_bad_input_of_noise_and_accuracy() -> None:
    for arguments, error, message in (
        ((X.long(), 0.1), TypeError, "x: expected float16"),
        ((X, -0.1), ValueError, "std: expected a finite number at least 0, got -0.1"),
        ((X, 0.1, (1.0, 1.0)), ValueError, "bounds: expected two finite numbers"),
    ):
        with pytest.raises(error, match=message):
            gaussian_noise(*arguments)
    with pytest.raises(ValueError, match="x: expected a non-empty shape"):
        accuracy(MODEL, X[:0], Y[:0])
