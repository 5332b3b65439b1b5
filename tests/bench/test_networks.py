"""The check of public architectures, on a small one of our own: the others need libraries that the tests do without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.builds.check_networks import surprises
from bench.networks import report
from bench.networks.catalogue import NETWORKS, Network
from bench.networks.trial import trial


class Scaled(nn.BatchNorm2d):
    """A subclass of BatchNorm2d, which no conversion takes."""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.other, self.scaled = nn.Conv2d(16, 16, 3), Scaled(16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.bn(self.conv(x)).relu()
        return {"features": x, "logits": self.scaled(self.other(x)).mean((2, 3))}


EXPECTED = Network(Small, (3, 8, 8), replaced=1, kept={"no subclass": 1})


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "small", EXPECTED)
        with torch.random.fork_rng():
            return trial("small")


def test_a_trial(result: dict[str, Any]) -> None:
    assert (result["norms"], result["replaced"]) == (2, 1)
    assert len(result["float32"]) == len(result["bfloat16"]) == 3
    for key in ("fold", "converted"):
        assert (result[key]["norms"], result[key]["kept"]) == (2, 1)
        assert list(result[key]["reasons"].values()) == [["scaled"]]
        assert result[key]["off"] < 1e-12
    assert surprises(EXPECTED, result) == []
    assert report.how_far(result) == "Partly"
    assert report.row("small", result)[:5] == ("small", "2", "1", "1 of 2", "1 of 2")
    assert report.row("small", result)[-1].startswith("1: expected no subclass")


CHANGES: dict[str, tuple[Any, Any]] = {
    "norms replaced, got 0": (("replaced",), 0),
    "finite losses": (("bfloat16",), [1.0, float("nan"), 1.0]),
    "converted: expected outputs within": (("converted", "off"), 1e-8),
    "fold: expected outputs within": (("fold", "off"), float("nan")),
    "fold: expected a reason for each of 2 norms that stay": (("fold", "kept"), 2),
    "converted: expected a stated reason, got for bn: another": (
        ("converted", "reasons"), {"no subclass": ["scaled"], "another": ["bn"]},
    ),
    "fold: expected 1 norms that stay for 'no subclass', got 0": (("fold", "reasons"), {}),
    "the process ended": (("error",), "the process ended with -11: no message"),
}  # fmt: skip


@pytest.mark.parametrize("said", CHANGES)
def test_what_is_not_expected_is_a_failure(said: str, result: dict[str, Any]) -> None:
    path, value = CHANGES[said]
    changed = part = copy.deepcopy(result)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert any(said in surprise for surprise in surprises(EXPECTED, changed))


def test_the_page(result: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "LIBRARIES", ("torch",))
    whole = copy.deepcopy(result)
    for key in ("fold", "converted"):
        whole[key] |= {"kept": 0, "reasons": {}}
    report.write({"small": result, "whole": whole})
    page = (tmp_path / "networks.md").read_text()
    assert page.index("## Completely folded") < page.index("| whole | 2 | 1 | 2 of 2 | 2 of 2 |")
    assert page.index("## Partly folded") < page.index("| small | 2 | 1 | 1 of 2 | 1 of 2 |")
    assert "## Not folded" not in page
    assert (tmp_path / "networks.csv").read_text().count("\n") == 3


def test_there_are_thirty_and_a_quick_part() -> None:
    assert len(NETWORKS) >= 30
    assert 5 <= sum(network.quick for network in NETWORKS.values()) <= 8
