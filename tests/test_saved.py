"""Load what earlier versions have saved: state_dicts of every layer and of BNP, and an ONNX file.

``python -m tests.test_saved`` writes the files of the version at hand to tests/saved. They are made once per release
and never again: a change that cannot load them breaks the users' checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkernels as nk
from tests.tolerances import assert_agree

FOLDER = Path(__file__).parent / "saved"
SAVED = {path.stem: torch.load(path, weights_only=True) for path in sorted(FOLDER.glob("*.pt"))}  # by version
OTHERS = {"BNP", "network"}  # what is saved beside layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "IterNorm1d": (lambda: nk.IterNorm1d(8, 4), (12, 8)),
    "IterNorm2d": (lambda: nk.IterNorm2d(8, 4), (6, 8, 3, 5)),
    "IterNorm2d-cumulative": (lambda: nk.IterNorm2d(8, 8, momentum=None, scaling="frobenius"), (6, 8, 3, 5)),
    "IterNorm3d": (lambda: nk.IterNorm3d(8, 8), (6, 8, 2, 3, 2)),
    "DBN1d": (lambda: nk.DBN1d(8, 4), (12, 8)),
    "DBN2d": (lambda: nk.DBN2d(16, 8), (6, 16, 4, 4)),
    "DBN3d": (lambda: nk.DBN3d(8, 8, affine=False), (6, 8, 2, 3, 2)),
    "POPNorm1d": (lambda: nk.POPNorm1d(8), (12, 8)),
    "POPNorm2d": (lambda: nk.POPNorm2d(8), (6, 8, 3, 5)),
    "POPNorm3d": (lambda: nk.POPNorm3d(8, center=False), (6, 8, 2, 3, 2)),
    "ConvNorm1d": (lambda: nk.ConvNorm1d(4, 6, 3, padding=1), (5, 4, 9)),
    "ConvNorm2d": (lambda: nk.ConvNorm2d(4, 6, 3, padding=1, stride=2, groups=2), (5, 4, 9, 8)),
    "oni": (lambda: nk.parametrizations.oni(nn.Linear(6, 4)), (5, 6)),
    "weight_standardization": (lambda: nk.parametrizations.weight_standardization(nn.Conv2d(4, 6, 3)), (5, 4, 9, 8)),
    "centered_weight_norm": (lambda: nk.parametrizations.centered_weight_norm(nn.Linear(6, 4)), (5, 6)),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


def network() -> nn.Sequential:
    convolutions = [nn.Conv2d(3, 8, 3), nk.IterNorm2d(8, 4), nn.ReLU(), nk.ConvNorm2d(8, 8, 3, padding=1)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 4))


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


def bnp_step(model: nn.Module, bnp: nk.optim.BNP, seed: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(normal(7, 3, 5, 5) + seed).square().mean().backward()
    bnp.step()
    optimizer.step()


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in state.items()}


def made() -> dict[str, Any]:
    """Return the state of every layer after two training steps, with input and output in evaluation, and BNP's."""
    torch.manual_seed(0)
    saved: dict[str, Any] = {}
    for name, (make, shape) in LAYERS.items():
        layer, x = make(), normal(*shape)
        with torch.no_grad():
            for turn in range(2):
                layer(x + turn)
            saved[name] = {"state": copied(layer.state_dict()), "x": x, "y": layer.eval()(x)}
    model = small_network()
    bnp = nk.optim.BNP(model)
    bnp_step(model, bnp, 0)
    saved["BNP"] = {"state": copied(model.state_dict()), "bnp": bnp.state_dict()}
    bnp_step(model, bnp, 1)
    saved["BNP"]["after another step"] = copied(model.state_dict())
    return saved


@pytest.fixture(params=SAVED)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


def test_this_version_is_saved() -> None:
    assert set(SAVED[nk.__version__]) == LAYERS.keys() | OTHERS


@pytest.mark.parametrize(("version", "name"), [(v, name) for v in SAVED for name in SAVED[v] if name not in OTHERS])
def test_layers(version: str, name: str) -> None:
    saved = SAVED[version][name]
    layer = LAYERS[name][0]()
    layer.load_state_dict(saved["state"])
    assert list(layer.state_dict()) == list(saved["state"])
    with torch.no_grad():
        assert_agree(layer.eval()(saved["x"]), saved["y"])


def test_bnp(version: str) -> None:
    """Training goes on as it would have."""
    saved = SAVED[version]["BNP"]
    model = small_network()
    model.load_state_dict(saved["state"])
    bnp = nk.optim.BNP(model)
    bnp.load_state_dict(saved["bnp"])
    bnp_step(model, bnp, 1)
    for name, value in model.state_dict().items():
        assert_agree(value, saved["after another step"][name])


def test_onnx(version: str) -> None:
    """A file for ONNX needs nothing of the package, and gives what the network of its state gives."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(FOLDER / f"{version}.onnx", providers=["CPUExecutionProvider"])
    model = network()
    model.load_state_dict(SAVED[version]["network"]["state"])
    x = normal(3, 3, 6, 6)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_agree(torch.from_numpy(got), model.eval()(x))


def main() -> None:
    torch.set_num_threads(1)
    saved, model, x = made(), network(), normal(3, 3, 6, 6)
    with torch.no_grad():
        model(x)
    saved["network"] = {"state": copied(model.state_dict())}
    FOLDER.mkdir(exist_ok=True)
    torch.save(saved, FOLDER / f"{nk.__version__}.pt")
    program = torch.onnx.export(
        model.eval(), (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n", min=2)},), verbose=False
    )
    assert program is not None
    program.save(FOLDER / f"{nk.__version__}.onnx")


if __name__ == "__main__":
    main()
