"""The tests of the kernels catch mistakes: see mutations.py."""

from __future__ import annotations

import pytest

from tests.simt import build, mutations

pytestmark = pytest.mark.simt


@pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_caught(mutation: mutations.Mutation) -> None:
    reason = mutations.survives(mutation)
    assert not reason, reason
