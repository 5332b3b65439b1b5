"""ConvNorm2d against the oracle with options that hypothesis draws."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layers.conv_norm_checks import build, check, plane
from tests.oracles.convnorm import Config, padding_of

OPTIONS = st.fixed_dictionaries(
    {
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["same", "valid"])),
        "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "groups": st.sampled_from([1, 2]),
        "padding_mode": st.sampled_from(["zeros", "replicate"]),
        "size": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    }
)


@given(OPTIONS)
@settings(max_examples=60)
def test_shape_is_that_of_conv2d(options: dict[str, Any]) -> None:
    """The values are the oracle's; a plane that nn.Conv2d has no output for is refused."""
    size, kernel = options.pop("size"), options.pop("kernel")
    if options["padding"] == "same":
        options["stride"] = (1, 1)
    config = Config(**options)
    x, layer = plane(1, 2, *size), build(2, 2, kernel, config)
    pads, reach = padding_of(config, kernel), [d * (k - 1) for k, d in zip(kernel, options["dilation"], strict=True)]
    room = [n + sum(p) - r for n, p, r in zip(size, pads, reach, strict=True)]
    if min(room) < 1:
        with pytest.raises(ValueError):
            layer(x)
        return
    y = layer(x)
    assert y.shape == (1, 2, *((n - 1) // s + 1 for n, s in zip(room, options["stride"], strict=True)))
    if options["padding"] != "same":  # for even kernels nn.Conv2d warns about a copy
        assert y.shape == nn.Conv2d(2, 2, kernel, **options)(x).shape
    check(layer, x, config)
