"""Synchronized layers in what people train with: DDP, FSDP2, torch.compile, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.layers.sync_cases import ALIKE, CASES, UNEVEN, UNLIKE, batch, loss, network, results, train
from tests.layers.sync_ranks import run_on_ranks
from tests.tolerances import assert_agree

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(CASES, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "first"), [("ddp", UNLIKE), ("compiled_ddp", ALIKE), ("fsdp", UNLIKE)])
def test_training_is_that_of_one_process(ranks: list[dict[str, Any]], name: str, first: tuple[int, ...]) -> None:
    """SGD steps, parameters and running statistics are those of one process.

    Shares are unlike, and in the last of four steps one rank has none.
    """
    one, other = (rank[name] for rank in ranks)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    model = network(convert=False)
    assert_agree(one, train(model, model, None, first))


def test_gradient_accumulation(ranks: list[dict[str, Any]]) -> None:
    model = network(convert=False)
    for k in range(2):
        loss(model, batch(k)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for rank in ranks:
        assert_agree(rank["accumulated"], results(model))


def test_compiled_in_one_graph(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["compiled"]) == 4
        for plain, fast in rank["compiled"].values():
            for key, value in plain.items():
                assert_agree(fast[key], value)


def test_compiled_once_for_all_batch_sizes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for plain, fast, compilations in rank["batch_sizes"]:
            assert_agree(fast, plain)
            assert compilations == rank["batch_sizes"][0][2]


def test_activation_checkpointing(ranks: list[dict[str, Any]]) -> None:
    """The forward pass runs twice, and so its collective does, on all ranks."""
    for rank in ranks:
        (plain, again), collectives = rank["checkpointed"]
        assert collectives == [UNEVEN.forward_bytes()] * 2 + [UNEVEN.backward_bytes()]
        for key, value in again.items():
            assert torch.equal(value, plain[key])


def test_copies_have_the_process_group(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["copies"]) == 4
        for kept, plain, twin in rank["copies"]:
            assert kept
            assert all(torch.equal(plain[key], twin[key]) for key in plain)


def test_examples_of_the_documentation(ranks: list[dict[str, Any]]) -> None:
    """DDP and FSDP2 both train, and keep the ranks alike."""
    (ddp, fsdp), other = (rank["examples"] for rank in ranks)
    for mine, theirs in zip((ddp, fsdp), other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert mine[-1] == 3  # batches


def test_blocks_share_compiled_code(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["blocks"] == 2  # the first one's input needs no gradient


def test_ranks_compare_once_in_each_group(ranks: list[dict[str, Any]]) -> None:
    """They do so while Dynamo traces, too: a rank that falls back to eager must not ask what others do not answer."""
    for rank in ranks:
        assert rank["comparisons"] == [1, 1, 1, 2, 2]


def test_ranks_that_disagree_are_told(ranks: list[dict[str, Any]]) -> None:
    """All ranks are told, with both layers, instead of waiting for each other or adding unlike sums."""
    for rank in ranks:
        found = rank["refusals"]
        for name, parts in {
            "channels": ("SyncIterNorm(8,", "SyncIterNorm(4,"),
            "group size": ("group_size=4", "group_size=2"),
            "method": ("SyncDBN(8", "SyncIterNorm(8"),
            "type": ("on torch.float32", "on torch.float64"),
            "gradient": ("gradient needed", "gradient not needed"),
        }.items():
            message = found[name]
            assert message.startswith("ValueError") and "expected the same on all ranks" in message, message
            assert all(part in message for part in parts), message
        assert found["double backward"].startswith("NotImplementedError: sync_iter_norm: expected a first derivative")
        assert found["sum"] == 2.0
