"""What a GPU did in a trace of torch's profiler: `python tests/acceptance/gpu/trace_summary.py FOLDER` prints each trace's kernels by time, longest first."""

import collections
import gzip
import json
import sys
from pathlib import Path
from typing import Any

MOST_LINES, NAME_CHARACTERS = 25, 90


def summary(path: Path) -> list[str]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[dict[str, Any]] = [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return []
    span = max(event["ts"] + event["dur"] for event in kernels) - min(event["ts"] for event in kernels)
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in kernels:
        times[event["name"][:NAME_CHARACTERS]] += event["dur"]
        counts[event["name"][:NAME_CHARACTERS]] += 1
    lines = [f"{path.name}: {len(kernels)} kernels, {times.total() / 1e3:.1f} ms of {span / 1e3:.1f}"]
    return lines + [f"{took / 1e3:9.2f} ms {counts[name]:6d} x {took / counts[name]:8.2f} us  {name}" for name, took in times.most_common(MOST_LINES)]


if __name__ == "__main__":
    for trace in sorted(Path(sys.argv[1]).glob("*.json*")):
        print("\n".join(summary(trace)))
