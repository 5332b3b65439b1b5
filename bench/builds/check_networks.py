"""`make check-networks`: try normkernels on public architectures, with random weights.

    python -m bench.builds.check_networks                  # all of them; writes docs/networks.md and docs/networks.csv
    python -m bench.builds.check_networks --quick          # a few small ones
    python -m bench.builds.check_networks --only resnet    # all with this in their name

Every network is built and tried in a process of its own (bench/networks/trial.py): BatchNorm becomes IterNorm, three
steps of training in float32 and three in bfloat16 autocast, then the network as it was and the one with IterNorm are
folded and compared in float64 with what they were. Exit code 0 if all is as bench/networks/catalogue.py expects it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.builds.check_cuda import ROOT
from bench.networks.catalogue import NETWORKS, Network
from bench.networks.report import row, write
from bench.networks.trial import AGREEMENT

LIMIT = 900  # seconds for one network


def tried(name: str) -> dict[str, Any]:
    """Return what came of a network's trial in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "bench.networks.trial", name]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"expected an end within {LIMIT} s, got none"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"the process ended with {done.returncode}: {last[0]}"}
    return json.loads(done.stdout.splitlines()[-1])


def surprises(network: Network, result: dict[str, Any]) -> list[str]:
    """Return what is not as it is expected."""
    if "error" in result:
        return [result["error"]]
    found = []
    replaced = result["norms"] if network.replaced is None else network.replaced
    if result["replaced"] != replaced:
        found.append(f"expected {replaced} norms replaced, got {result['replaced']}: {result.get('refused', '')}")
    losses = result.get("float32", []) + result.get("bfloat16", [])
    if not all(map(math.isfinite, losses)):
        found.append(f"expected finite losses, got {losses}")
    for key, kept in (("fold", network.kept), ("converted", network.kept_converted or network.kept)):
        if key not in result:
            continue
        if not result[key]["off"] <= AGREEMENT:
            found.append(f"{key}: expected outputs within {AGREEMENT}, got {result[key]['off']:.1e}")
        given = result[key]["reasons"]
        for reason, names in given.items():
            if not any(re.search(pattern, reason) for pattern in kept):
                found.append(f"{key}: expected a stated reason, got for {', '.join(names)}: {reason}")
        for pattern, count in kept.items():
            got = sum(len(names) for reason, names in given.items() if re.search(pattern, reason))
            if got != count:
                found.append(f"{key}: expected {count} norms that stay for {pattern!r}, got {got}")
        if result[key]["kept"] != sum(map(len, given.values())):
            found.append(f"{key}: expected a reason for each of {result[key]['kept']} norms that stay, got {given}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.builds.check_networks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", metavar="NAME", help="networks with this in their name")
    parser.add_argument("--quick", action="store_true", help="the part for continuous integration")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="networks at a time")
    options = parser.parse_args(arguments)
    names = [
        name
        for name, network in NETWORKS.items()
        if (options.only or "") in name and (network.quick or not options.quick)
    ]
    if not names:
        parser.error(f"expected some of {', '.join(NETWORKS)}, got {options.only!r}")
    results, failed = {}, False
    with ThreadPoolExecutor(options.processes) as pool:
        for name, result in zip(names, pool.map(tried, names), strict=True):
            results[name] = result
            print(" | ".join(row(name, result)), flush=True)
            for surprise in surprises(NETWORKS[name], result):
                failed = True
                print(f"    {surprise}", flush=True)
    if len(names) == len(NETWORKS):
        write(results)
    print(f"{len(names)} networks, {'not all' if failed else 'all'} as expected.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
