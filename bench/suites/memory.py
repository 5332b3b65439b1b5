"""Memory: what is saved for the backward pass, and the peak of one training step. Nothing is timed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

from bench.measure.comparison import Comparison, Settings, workload
from bench.measure.environment import ROOT
from bench.measure.memory import MemoryUse, peak_of_step, saved_bytes
from bench.measure.workload import Inputs, prepare_layer
from bench.providers import catalogue as cat
from bench.providers import conv_catalogue as conv_cat
from bench.providers.names import BATCHNORM, CONV2D
from bench.suites import bnp, conv_norm

PROBE_TIMEOUT_S = 300


def memory(settings: Settings) -> list[Comparison]:
    """Return untimed comparisons of what is kept for the backward pass, and of the peak of one step."""
    providers = (
        cat.iter_norm(group_size=64),
        cat.dbn(),
        cat.plain_iter_norm(),
        cat.transposed_iter_norm(),
        cat.eigh_dbn(),
        cat.batch_norm(),
        cat.conv3x3(),
    )
    whitening = Comparison("memory", workload(settings, (64, 64, 32, 32)), providers, settings.plan(), (BATCHNORM,))
    layers = conv_cat.conv_norm_layers()[:4]
    diagonal = (cat.pop_norm(), cat.plain_pop_norm_layer(), cat.batch_norm())
    work = workload(settings, (64, 128, 32, 32))
    diagonal_norms = Comparison("memory", work, diagonal, settings.plan(), (BATCHNORM,))
    convolution = Comparison("memory", workload(settings, (32, 64, 32, 32)), layers, settings.plan(), (CONV2D,))
    spectra = [replace(comparison, kernel="memory") for comparison in conv_norm.spectra(settings)]
    return [whitening, diagonal_norms, convolution, *spectra, *bnp.memory(settings)]


def measure_memory(comparison: Comparison, provider: str) -> MemoryUse:
    """Check the provider, count what it saves, measure the peak (on a CPU in a process of its own)."""
    inputs = Inputs(comparison.work)
    call = prepare_layer(comparison.provider(provider), inputs)
    saved = saved_bytes(call.layer, inputs[0].x)
    del call, inputs
    measure = peak_of_step if comparison.work.device.type == "cuda" else probe
    return MemoryUse(saved, measure(comparison, provider), comparison.work.nbytes)


def probe(comparison: Comparison, provider: str) -> int:
    command = [sys.executable, "-m", "bench.suites.memory", "--key", comparison.key, "--provider", provider]
    # glibc keeps freed blocks below a threshold that grows with use; with a fixed one every tensor is given
    # back at once
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"expected the memory probe of {provider} to succeed, it said: {done.stderr[-500:]}")
    return int(json.loads(done.stdout)["peak"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one step of one provider, as JSON")
    parser.add_argument("--key", required=True, help="key of a comparison of the memory suite")
    parser.add_argument("--provider", required=True)
    arguments = parser.parse_args()
    found = {comparison.key: comparison for comparison in memory(Settings())}
    if arguments.key not in found:
        parser.error(f"expected one of {sorted(found)}, got {arguments.key!r}")
    peak = peak_of_step(found[arguments.key], arguments.provider)
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    main()
