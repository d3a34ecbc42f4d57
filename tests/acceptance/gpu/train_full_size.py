"""`tuneserve train` of GLM-4.5V at its true width, on one GPU or several, with weights that are made when they are read: seconds a step, tokens a second, peak memory.

Each length is a project's recipe of its own, trained by the command itself (MLflow, Prefect and ms-swift as ever). Rows are exactly as long as asked for, with pictures of
448x448 in each, and one row is an optimizer step of one process. See README.md here for what the machine needs.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pipeline.bench.steps import Training, arm_figures, logged_steps, step_seconds
from pipeline.bench.training import UNTIMED_STEPS, logged_one_by_one, turns
from pipeline.project import Project
from pipeline.prompt import Task, read_counter
from pipeline.recipe import FinetuneRecipe, load_recipe
from pipeline.training import swift_environment
from tests.acceptance.gpu.full_size_base import WORDS, know_digests, write

HERE = Path(__file__).parent
SIDE_PIXELS = 448
FIRST_WORD = "Shown:"
START_SECONDS = 900.0


def write_rows(project: Path, base: Path, tokens: int, images: int, rows: int) -> None:
    """train.jsonl: `rows` rows of exactly `tokens` tokens, nearly all of them the answer's or its pictures'; eval.jsonl: one short row."""
    folder = project / "data" / f"{tokens}-{images}"
    folder.mkdir(parents=True, exist_ok=True)
    counter = read_counter(base)
    question = "<image>" * images + "Describe what is shown."
    dice = random.Random(tokens)

    def row(number: int, words: int) -> dict[str, Any]:
        answer = " ".join([FIRST_WORD, *dice.choices(WORDS[:4000], k=words)])
        names = [f"{number}-{index}.png" for index in range(images)]
        for name in names:
            Image.frombytes("RGB", (SIDE_PIXELS, SIDE_PIXELS), dice.randbytes(3 * SIDE_PIXELS**2)).save(folder / name, compress_level=1)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "images": names}

    def length(words: int) -> int:
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": " ".join([FIRST_WORD, *WORDS[:1] * words])})
        found = counter.count(Task(messages, ((SIDE_PIXELS, SIDE_PIXELS),) * images, ""))
        if isinstance(found, str):
            raise SystemExit(found)
        return found.row

    words = tokens - length(1) + 1
    if words < 1 or length(words) != tokens:
        raise SystemExit(f"{images} pictures do not fit {tokens} tokens")
    (folder / "train.jsonl").write_text("".join(json.dumps(row(number, words)) + "\n" for number in range(rows)), "utf-8")
    (folder / "eval.jsonl").write_text(json.dumps(row(rows, 8)) + "\n", "utf-8")


def recipe_of(arguments: argparse.Namespace, tokens: int, number: int) -> dict[str, Any]:
    """Of round `number`, which is its seed: the same once more would not train at all."""
    data = f"data/{tokens}-{arguments.images}"
    training = {"max_steps": arguments.steps + UNTIMED_STEPS, "global_batch_size": arguments.processes, "max_length_tokens": tokens, "seed": 42 + number}
    training |= {
        "checkpoint_steps": logged_one_by_one(arguments.steps + UNTIMED_STEPS),
        "processes": arguments.processes,
        "device": "cpu" if arguments.narrow else "cuda",
    }
    training |= {"deepspeed": arguments.deepspeed} if arguments.deepspeed else {}
    training |= {"offload_checkpoints": True} if arguments.offload else {}
    recipe = {"name": f"tokens-{tokens}", "base_model": f"models/layers-{arguments.layers}", "training": training}
    recipe |= {"quantization": "nf4"} if arguments.base == "nf4" else {}
    return recipe | {"dataset": {"train": f"{data}/train.jsonl", "eval": f"{data}/eval.jsonl"}, "lora": {"rank": 16, "alpha": 32}}


def train(recipe: Path, arguments: argparse.Namespace, peaks: Path) -> dict[str, Any]:
    return measured(recipe, arguments, peaks, command=[sys.executable, "-m", "pipeline.cli", "train"], runs=Project(arguments.folder).runs)


def train_bare(recipe: Path, arguments: argparse.Namespace, peaks: Path) -> dict[str, Any]:
    """`swift sft` alone, with the arguments that `tuneserve train` gave it last."""
    args = max(Project(arguments.folder).runs.glob("*/swift_args.json"), key=lambda path: path.stat().st_mtime)
    bare: Path = arguments.folder / "bare" / f"{recipe.stem}.json"
    bare.parent.mkdir(exist_ok=True)
    bare.write_text(json.dumps(json.loads(args.read_text("utf-8")) | {"output_dir": str(bare.with_suffix(""))}), "utf-8")
    os.environ.update(swift_environment(load_recipe(recipe, FinetuneRecipe), arguments.folder / "ranks"))
    return measured(bare, arguments, peaks, command=[sys.executable, "-m", "swift.cli.main", "sft"], runs=bare.parent)


def measured(recipe: Path, arguments: argparse.Namespace, peaks: Path, *, command: Sequence[str], runs: Path) -> dict[str, Any]:
    """Runs `command` on the recipe until its steps are done, or, with --whole, until it ends; what was measured, or how it failed."""
    known = set(runs.glob("**/logging.jsonl"))
    environment = os.environ | {"TUNESERVE_PEAK": str(peaks), "PYTHONPATH": os.pathsep.join([str(HERE / "made_weights"), os.environ.get("PYTHONPATH", "")])}
    peaks.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    log = recipe.with_suffix(".log")
    with log.open("wb") as output:
        child = subprocess.Popen([*command, str(recipe)], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=arguments.folder)
        steps: list[float] = []
        while child.poll() is None and time.monotonic() - began < START_SECONDS:
            time.sleep(1)
            new = [path for path in runs.glob("**/logging.jsonl") if path not in known]
            steps = step_seconds(logged_steps(new[0])) if new else []
            if not arguments.whole and list(peaks.glob("*.json")):  # ms-swift has ended
                break
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        code = child.wait(120)
    new = [path for path in runs.glob("**/logging.jsonl") if path not in known]
    steps = step_seconds(logged_steps(new[0])) if new else []
    found: dict[str, Any] = {"seconds": time.monotonic() - began, "exit_code": code, "step_seconds": [round(step, 3) for step in steps]}
    found["peaks"] = [peak for path in peaks.glob("*.json") if (peak := json.loads(path.read_text("utf-8")))["peak_gib"]]
    if len(steps) <= UNTIMED_STEPS:
        logs = [log, *sorted((arguments.folder / ".tuneserve" / "logs").glob("training-*.log"), key=lambda path: path.stat().st_mtime)[-1:]]
        return found | {"failed": [path.read_text("utf-8", "replace")[-3000:] for path in logs]}
    found["typical_step_seconds"] = statistics.median(steps[UNTIMED_STEPS:])
    logged = logged_steps(new[0])
    return found | {"losses": [step["loss"] for step in logged], "memory_gib": max(step.get("memory(GiB)", 0.0) for step in logged)}


def plan(recipe: Path, folder: Path) -> Any:
    """What `tuneserve plan` says of it, for the GPUs that are here."""
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", "plan", str(recipe), "--json"], cwd=folder, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.stdout.startswith("{") else done.stderr[-1000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tuneserve-full-size"))  # noqa: S108 (a machine of one's own)
    parser.add_argument("--layers", type=int, default=46)
    parser.add_argument("--base", choices=("nf4", "bf16"), default="nf4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="timed ones")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--deepspeed", choices=("zero2", "zero3"))
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--whole", action="store_true", help="also the parity reference and the registration")
    parser.add_argument("--bare", action="store_true", help="in turns with `swift sft` alone with the same arguments")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--narrow", action="store_true", help="small dimensions on the CPU: whether the script works")
    parser.add_argument("--out", type=Path, default=Path("train.jsonl"), help="JSON lines, one as soon as it is known")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    kind = "-".join([arguments.base, str(arguments.layers), *([arguments.deepspeed] if arguments.deepspeed else [])])
    for tokens in arguments.tokens:  # the same again would be taken for ended, and go on from its checkpoint
        if any(folder.glob(f"peaks/{kind}-{tokens}-*/*.json")):
            raise SystemExit(f"{kind} of {tokens} tokens was trained in {folder} before; name another --folder")
    base = folder / "models" / f"layers-{arguments.layers}"
    if not base.is_dir():
        write(base, arguments.layers, narrow=arguments.narrow)
        know_digests(base, Project(folder).bases / "digests.json")
    os.environ["TUNESERVE_PROJECT"] = str(folder)
    (folder / "recipes").mkdir(exist_ok=True)
    for tokens in arguments.tokens:
        write_rows(folder, base, tokens, arguments.images, (arguments.steps + UNTIMED_STEPS) * arguments.processes)
        about = {key: getattr(arguments, key) for key in ("layers", "base", "images", "processes", "deepspeed", "offload")} | {"tokens": tokens}
        trained: list[Training] = []
        for number, arm in turns(("train", "bare") if arguments.bare else ("train",), arguments.rounds):
            recipe = folder / "recipes" / f"{kind}-{tokens}-{number}.yaml"
            recipe.write_text(yaml.safe_dump(recipe_of(arguments, tokens, number)), "utf-8")
            if (number, arm) == (0, "train"):
                tell(arguments.out, about | {"stage": "planned", "plan": plan(recipe, folder)})
            peaks = folder / "peaks" / f"{recipe.stem}-{arm}"
            found = train(recipe, arguments, peaks) if arm == "train" else train_bare(recipe, arguments, peaks)
            tell(arguments.out, about | {"stage": arm, "round": number} | with_rate(found, tokens * arguments.processes))
            trained.append(Training(arm, number, tuple(found["step_seconds"][UNTIMED_STEPS:]), found.get("memory_gib"), found["seconds"]))
        if arguments.bare:
            compared = arm_figures(trained, "bare", tokens * arguments.processes)
            tell(arguments.out, about | {"stage": "compared", "arms": [asdict(each) for each in compared]})


def with_rate(found: dict[str, Any], tokens: int) -> dict[str, Any]:
    return found | ({"tokens_per_second": round(tokens / found["typical_step_seconds"], 1)} if "typical_step_seconds" in found else {})


def tell(out: Path, figures: dict[str, Any]) -> None:
    line = json.dumps(figures)
    print(line, flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
