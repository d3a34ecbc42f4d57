"""Packs what `tuneserve train` needs on a GPU machine that has no network but a Python 3.12 with torch: ms-swift, DeepSpeed, MLflow, Prefect and the rest of the lock.

`python tests/acceptance/gpu/archive.py PRESENT OUT.tzst`; PRESENT lists the packages that the machine has, a name a line (`pip list --format=freeze` will do). Pages of
user interfaces, tests and other CUDA versions' libraries stay behind: 45 MB where torch, pandas, pyarrow and scipy are there. Over there, with pyarrow:

    python -c "import pyarrow as pa, tarfile; tarfile.open(fileobj=pa.CompressedInputStream(pa.OSFile('OUT.tzst'), 'zstd'), mode='r|').extractall('/tmp/site')"
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("tuneserve", "peft", "transformers")
ALWAYS = {"peft", "transformers"}
"""Packed whatever the machine has: their versions decide what a training makes."""
NEVER = {
    "crcmod",
    "oss2",
    "aliyun-python-sdk-core",
    "aliyun-python-sdk-kms",
    "pycryptodome",
    "cpm-kernels",
    "zstandard",
    "skops",
    "gradio",
    "triton",
    "tuneserve",
}
"""Wanted by a package that never imports them on our way, or there with torch."""
UNUSED = (
    "prefect/server/ui", "prefect/server/ui-v2", "mlflow/server/js", "modelscope/models", "modelscope/pipelines", "modelscope/trainers", "modelscope/preprocessors", "bin", "share",
)  # fmt: skip
CUDA_LIBRARY = "libbitsandbytes_cuda130.so"


def needed(present: set[str]) -> dict[str, str]:
    """Name and locked version of all that ROOTS want and the machine does not have."""
    found: dict[str, str] = {}
    waiting = [(root, ()) for root in ROOTS]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or (name in present - ALWAYS) or name in NEVER - {"tuneserve"}:
            continue
        seen.add((name, extras))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in NEVER:
            found[name] = distribution.version
        for text in distribution.requires or []:
            wanted = Requirement(text)
            places = [{"extra": extra, "python_version": "3.12", "python_full_version": "3.12.3"} for extra in ("", *extras)]
            if wanted.marker is None or any(wanted.marker.evaluate(place) for place in places):
                waiting.append((canonicalize_name(wanted.name), tuple(sorted(wanted.extras))))
    return found


def main() -> None:
    present_file, out = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
    present = {canonicalize_name(re.split(r"[=@ ]", line.strip())[0]) for line in present_file.read_text("utf-8").splitlines() if line.strip()} | {
        "torch",
        "torchvision",
    }
    with tempfile.TemporaryDirectory() as folder:
        site, listed = Path(folder) / "site", Path(folder) / "needed.txt"
        listed.write_text("\n".join(f"{name}=={version}" for name, version in sorted(needed(present).items())), "utf-8")
        uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-config", "--no-deps", "--target", str(site), "-r", str(listed)]
        subprocess.run([*uv, "--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"], check=True)
        for name in UNUSED:
            shutil.rmtree(site / name, ignore_errors=True)
        for path in [*site.rglob("tests"), *site.rglob("__pycache__")]:
            if path.is_dir() and not path.is_relative_to(site / "prefect"):
                shutil.rmtree(path, ignore_errors=True)
        for path in site.glob("bitsandbytes/*.so"):
            if path.name != CUDA_LIBRARY:
                path.unlink()
        with subprocess.Popen(["tar", "-C", str(site), "-cf", "-", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(["zstd", "-15", "-T0", "--long=27", "-q", "-f", "-o", str(out)], stdin=tar.stdout, check=True)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
