"""Fits vLLM 0.26 and a copy of our sources to one another, for measuring on a machine that has no newer one; not for users: our plugin is tested with 0.32.

`python tests/acceptance/gpu/vllm_0_26.py SITE SOURCES`: SITE holds vLLM 0.26, SOURCES becomes a copy of src/ with the distribution's entry points, to be put on the Python path.
What is moved or missing there: two modules' names, two exceptions, an endpoint plugin's right to replace a route; and weights are random (`--load-format dummy`) unless told otherwise.
"""

import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve()
ERRORS = "vllm/entrypoints/serve/exception_handling"
REPLACING = """
    ours = {(route.path, method) for plugin in endpoint_plugins for route in app.router.routes[before:] for method in route.methods}
    kept = [route for route in app.router.routes[:before] if not any((getattr(route, "path", None), method) in ours for method in getattr(route, "methods", None) or ())]
    app.router.routes[:] = [*kept, *app.router.routes[before:]]
"""


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    if old not in text:
        raise SystemExit(f"{path}: has no {old!r}; is it vLLM 0.26?")
    path.write_text(text.replace(old, new, 1), "utf-8")


def fit(site: Path) -> None:
    """Once for each unpacked copy."""
    folder = site / ERRORS
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "error_response.py").write_text(
        "from vllm.entrypoints.serve.utils.error_response import create_error_response as create_error_response\n", "utf-8"
    )
    (site / "vllm/entrypoints/serve/engine/protocol.py").write_text(
        "from vllm.entrypoints.openai.engine.protocol import ErrorResponse as ErrorResponse\n", "utf-8"
    )
    with (site / "vllm/exceptions.py").open("a", encoding="utf-8") as file:
        file.write(
            "\n\nclass VLLMClientError(ValueError): ...\n\n\nclass GracefulHTTPError(ValueError):\n    def __init__(self, message, http_status):\n        super().__init__(message)\n"
        )
    server = site / "vllm/entrypoints/openai/api_server.py"
    replace(
        server,
        "    for plugin in endpoint_plugins:\n        plugin.attach_router(app)\n",
        "    before = len(app.router.routes)\n    for plugin in endpoint_plugins:\n        plugin.attach_router(app)\n" + REPLACING,
    )
    replace(site / "vllm/config/load.py", 'load_format: str | LoadFormats = "auto"', 'load_format: str | LoadFormats = "dummy"')


def copy(sources: Path) -> None:
    repository = HERE.parents[3]
    shutil.copytree(repository / "src", sources)
    shutil.copytree(repository / "flows", sources / "flows")
    replace(sources / "pipeline/serving/plugin.py", 'TESTED_VLLM = ("0.32.0",)', 'TESTED_VLLM = ("0.32.0", "0.26.0")')
    points = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    info = sources / "tuneserve-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tuneserve\nVersion: 0\n", "utf-8")
    lines = [line for group, names in points.items() for line in (f"[{group}]", *(f"{name} = {place}" for name, place in names.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    fit(Path(sys.argv[1]))
    copy(Path(sys.argv[2]))
