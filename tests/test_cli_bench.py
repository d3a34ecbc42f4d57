"""`tuneserve bench` from the command line, against servers in this process: its folder, its answers, its refusals, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench import plot, results
from pipeline.bench.figures import METRICS
from pipeline.history import history
from pipeline.registry import Registry, Version
from tests import command
from tests.openai_server import BASE, FakeOpenAI, openai_server
from tests.replicas import TOKEN, FakeReplica, http_server, model, served
from tests.test_cli_serving import registered

__all__ = ["registered"]  # a fixture, used by its name

FILES = {"rounds.jsonl", "result.json", "result.md", *plot.FILES}
SHORT = ("--concurrency", "1,2", "--requests", "2", "--rounds", "2", "--answer-tokens", "4", "--mix", "text")


@pytest.fixture(autouse=True, scope="module")
def one_font_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """matplotlib makes one in seconds, in each project."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


def tuneserve(cwd: Path, *args: str, mlflow: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return command.tuneserve(cwd, "bench", *args, **environment, **({"MLFLOW_TRACKING_URI": mlflow} if mlflow else {}))


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return found


def faults(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(str(fault) for fault in json.loads(done.stdout.splitlines()[-1])["errors"])


def test_serve_measures_what_the_server_has_and_puts_ratios_first(tmp_path: Path) -> None:
    server = FakeOpenAI(token_seconds=lambda name: 0.0005 if name == BASE else 0.002)
    with openai_server(server) as url:
        done = tuneserve(tmp_path, "serve", "--url", f"{url}/v1", *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    folder = Path(said["folder"])
    assert folder.parent == tmp_path / ".tuneserve/bench" and {path.name for path in folder.iterdir()} == FILES
    assert list(said)[:3] == ["folder", "kind", "complete"] and list(said)[3] == "ratios" and said["complete"] and "runs" not in said
    assert {(each["concurrency"], each["arm"]) for each in said["ratios"]} == {(level, arm) for level in (1, 2) for arm in ("one", "mixed")}
    assert {each["metric"] for each in said["ratios"]} == set(METRICS) and {each["against"] for each in said["ratios"]} == {"base"}
    slower = [each["ratio"] for each in said["ratios"] if each["metric"] == "per_token_p50_ms"]
    assert min(slower) > 1
    assert [(each["arm"], each["concurrency"], each["requests"], each["failed"]) for each in said["figures"]] == [
        (arm, level, 4, 0) for level in (1, 2) for arm in ("base", "one", "mixed")
    ]
    assert said["servers"] == [{"url": url, "version": "0.26.0", "models": [BASE, "shop", "shop/1", "shop/2"]}]
    assert set(said["machine"]) == {"gpus", "cpus", "architecture", "memory_gib", "python"} and said["settings"]["arms"][2]["models"] == ["shop", "shop/1"]
    whole = result(folder)
    assert whole["ratios"] == said["ratios"] and len(whole["runs"]) == 2 * 2 * 3 and len(whole["runs"][0]["requests"]["sent_ms"]) == 2
    table = (folder / "result.md").read_text("utf-8")
    assert table.startswith("Ratios [95% interval]") and "| 2 | mixed |" in table and f"{url}: vLLM 0.26.0" in table
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (folder / "plot.svg").read_text("utf-8")
    assert server.bodies[0]["max_tokens"] == 4


def test_the_table_is_what_is_printed_and_arms_may_be_other_servers(tmp_path: Path) -> None:
    merged = FakeOpenAI({}, key="k")
    with openai_server(FakeOpenAI(key="k")) as url, openai_server(merged) as other:
        arms = ("--arm", f"merged={other}#{BASE}", "--arm", "base", "--arm", "k2=shop/1,shop/2")
        done = tuneserve(tmp_path, "serve", "--url", url, *arms, "--out", "out", "--api-key-env", "KEY", *SHORT, KEY="k")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out/result.md").read_text("utf-8") + "\nwritten to out\n" and not (tmp_path / ".tuneserve/bench").exists()
    assert f"merged = {BASE} at {other}" in done.stdout and "| 1 | merged |" in done.stdout and "| 1 | k2 |" in done.stdout
    said = result(tmp_path / "out")
    assert said["settings"]["against"] == "base" and [found["url"] for found in said["servers"]] == [url, other] and "Bearer" not in json.dumps(said)


def test_what_fails_and_what_is_short_is_noted(tmp_path: Path) -> None:
    server = FakeOpenAI({}, knows_ignore_eos=False, fails=lambda number: "500" if number == 6 else None)
    with openai_server(server) as url:
        done = tuneserve(tmp_path, "serve", "--url", url, *SHORT, "--requests", "4", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["ratios"] == []
    assert "one and mixed not measured: the server has no adapter" in said["notes"]
    assert any("1 of 8 requests failed, the first with: HTTP 500" in note for note in said["notes"])
    assert any("3.0 tokens instead of 4, so the server does not know ignore_eos" in note for note in said["notes"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "localhost:8000"], "http://127.0.0.1:8000"),
        (["--concurrency", "1,x"], "for example 16 or 1,4,16"),
        (["--concurrency", "0"], "for example 16 or 1,4,16"),
        (["--concurrency", "4,4"], "name each once"),
        (["--requests", "2,2,2"], "give one, or one for each"),
        (["--requests", "1"], "give at least 2"),
        (["--arm", "two"], "two=MODEL or NAME=URL#MODEL"),
        (["--arm", "x=shpo"], "shpo is not served"),
        (["--arm", "base", "--against", "one"], "none of the arms: base"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "is not set"),
        (["--answer-tokens", "2048"], "ask for fewer than 2048"),
        (["--out", "taken"], "name another folder"),
    ],
)
def test_wrong_options_of_serve_exit_2_with_a_remedy_and_ask_nothing(options: list[str], said: str, tmp_path: Path) -> None:
    server = FakeOpenAI()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    with openai_server(server) as url:
        done = tuneserve(tmp_path, "serve", "--url", url, *SHORT, *options, "--json")
    assert done.returncode == 2 and said in faults(done), done.stderr
    assert server.bodies == [] and not (tmp_path / ".tuneserve").exists()


@pytest.mark.parametrize(
    "options", [["serve"], ["serve", "--url", "http://a:1", "--answer-tokens", "1"], ["serve", "--url", "http://a:1", "--mix", "x"], ["swap"], ["other"]]
)
def test_what_click_refuses_exits_2(options: list[str], tmp_path: Path) -> None:
    done = tuneserve(tmp_path, *options)
    assert done.returncode == 2 and done.stderr and not list(tmp_path.iterdir())


def test_a_server_that_is_not_there_exits_1_and_makes_nothing(tmp_path: Path) -> None:
    done = tuneserve(tmp_path, "serve", "--url", "http://127.0.0.1:9", "--json")
    assert done.returncode == 1 and "tuneserve serve" in faults(done) and not list(tmp_path.iterdir())


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path) -> None:
    """In the third run of twelve: after a warm-up of 2 x 1 + 2 + 2 x 2 + 2 requests."""

    def interrupt(number: int) -> None:
        if number == 15:
            os.kill(os.getpid(), signal.SIGINT)

    with openai_server(FakeOpenAI(on_request=interrupt)) as url:
        done = tuneserve(tmp_path, "serve", "--url", url, "--out", "out", *SHORT)
    assert done.returncode == 130 and "interrupted" in done.stderr and done.stdout == ""
    said = result(tmp_path / "out")
    assert not said["complete"] and 1 <= len(said["runs"]) < 12 and any("cut short" in note for note in said["notes"])
    assert "written to out" in done.stderr and {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_server_that_dies_exits_1_with_what_was_measured(tmp_path: Path) -> None:
    with openai_server(FakeOpenAI({}, fails=lambda number: "500" if number > 5 else None)) as url:
        done = tuneserve(tmp_path, "serve", "--url", url, "--out", "out", *SHORT, "--json")
    assert done.returncode == 1 and "was answered: HTTP 500" in faults(done)
    assert not result(tmp_path / "out")["complete"]


def test_results_are_made_anew_from_the_record_alone_also_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with openai_server(FakeOpenAI()) as url, monkeypatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib.figure", None)
        done = tuneserve(tmp_path, "serve", "--url", url, "--out", "out", *SHORT, "--json")
    assert done.returncode == 0 and any("no plot: matplotlib" in note for note in json.loads(done.stdout)["notes"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - set(plot.FILES)
    table = (tmp_path / "out/result.md").read_text("utf-8")
    (tmp_path / "out/result.md").unlink()
    again = tuneserve(tmp_path, "report", "out", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["notes"] == [] and (tmp_path / "out/result.md").read_text("utf-8") == table
    assert (tmp_path / "out/plot.svg").is_file()
    wrong = tuneserve(tmp_path, "report", "none", "--json")
    assert wrong.returncode == 2 and "tuneserve bench has written" in faults(wrong)


def test_serve_and_report_import_nothing_that_a_bare_machine_lacks(tmp_path: Path) -> None:
    unwanted = ("torch", "vllm", "mlflow", "prefect", "transformers", "openai", "scipy", "datasets", "swift", "pyarrow", "sqlalchemy", "tokenizers")
    code = f"""
import sys
from click.testing import CliRunner
from pipeline.cli import cli
for command in (["--help"], ["bench", "--help"], ["bench", "serve", "--help"]):
    assert CliRunner().invoke(cli, command).exit_code == 0
assert not [name for name in ("numpy", "PIL", "httpx", "matplotlib") if name in sys.modules]
done = CliRunner().invoke(cli, ["bench", "serve", "--url", sys.argv[1], "--out", "out", {", ".join(map(repr, SHORT))}])
assert done.exit_code == 0, done.output
print([name for name in {unwanted} if name in sys.modules])
"""
    with openai_server(FakeOpenAI()) as url:
        done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, cwd=tmp_path, env=command.command_environment(), check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


class Shop:
    """A replica that serves `shop` as the registry's champion says; its streams are answered by another port."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.server = FakeOpenAI({}, token_seconds=lambda name: 0.002)
        self.replica = FakeReplica(self.models)
        self.server.on_request = lambda number: self._follow()

    def _follow(self) -> None:
        champion = self.registry.champion("shop")
        assert champion
        self.server.adapters = {"shop": f"{champion.label}@{champion.digest[:8]}"}

    def models(self) -> dict[str, Any]:
        self._follow()
        champion = self.registry.champion("shop")
        assert champion
        live = served(champion.version, champion.digest)
        return {"shop": model(live, live)}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "project/.tuneserve").mkdir(parents=True)
    (tmp_path / "project/.tuneserve/token").write_text(TOKEN)
    return tmp_path / "project"


@pytest.fixture
def shop(registered: tuple[Registry, Version]) -> Iterator[tuple[Shop, str, str]]:
    """The shop, the URL of its streams, and its replica's."""
    shop = Shop(registered[0])
    shop.models()
    with openai_server(shop.server) as url, http_server(shop.replica.answer) as replica:
        yield shop, url, replica
    assert shop.registry.champion_number("shop") == "1"


def swap(home: Path, shop: tuple[Shop, str, str], *args: str) -> subprocess.CompletedProcess[str]:
    short = ("--moves", "3", "--streams", "2", "--pause", "0.2", "--answer-tokens", "6", "--mix", "text", "--out", "out")
    return tuneserve(home, "swap", *args, *short, "--url", shop[1], "--replica", shop[2], mlflow=shop[0].registry.uri)


def test_swap_moves_the_alias_measures_and_puts_it_back(home: Path, shop: tuple[Shop, str, str]) -> None:
    entries = len(history(shop[0].registry, "shop"))
    done = swap(home, shop, "shop/2", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["complete"] and [each["to"] for each in said["moves"]] == ["shop/2", "shop/1", "shop/2"]
    assert [each["was_loaded"] for each in said["moves"]] == [False, False, False]  # this replica says nothing of them
    assert said["first_token_seconds"]["all"]["moves"] == 3 and 0 < said["first_token_seconds"]["all"]["p50"] < 10
    assert said["traffic"]["failed"] == 0 and said["traffic"]["requests"] > 2 and all(each["live_seconds"] is not None for each in said["moves"])
    assert {path.name for path in (home / "out").iterdir()} == FILES
    table = (home / "out/result.md").read_text("utf-8")
    assert "| all moves | 3 |" in table and "shop/1 to shop/2 and back; replicas are told of each move" in table
    assert len(result(home / "out")["requests"]["model"]) == said["traffic"]["requests"]
    newest, *_ = found = history(shop[0].registry, "shop")
    assert (newest.action, newest.after, newest.open) == ("kept", "1", False) and "tuneserve bench swap: 3 moves" in newest.grounds.reasons
    assert len(found) - entries <= 2  # the first notes, besides, a champion that was there before a history was kept
    journal = (home / ".tuneserve/logs/tuneserve.jsonl").read_text("utf-8")
    assert json.loads(journal.splitlines()[0])["command"] == "bench swap"


def test_swap_by_polling_tells_no_replica(home: Path, shop: tuple[Shop, str, str]) -> None:
    done = swap(home, shop, "shop/2", "--yes", "--poll", "--json")
    assert done.returncode == 0, done.stderr
    hints = [hint["version"] for hint in shop[0].replica.hints]
    assert hints == ["1"] and {each["live_seconds"] for each in json.loads(done.stdout.splitlines()[-1])["moves"]} == {None}


def test_without_yes_swap_says_what_it_would_do_and_starts_nothing(home: Path, shop: tuple[Shop, str, str]) -> None:
    done = swap(home, shop, "shop/2", "--json")
    assert done.returncode == 2 and "moves 3 times, also to shop/2" in faults(done) and "give --yes" in faults(done)
    assert shop[0].server.bodies == [] and not (home / "out").exists()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["shop"], 2, "each as NAME/VERSION"),
        (["shop/2", "toys/1"], 2, "versions of one model"),
        (["shop/2", "shop/2"], 2, "name each once"),
        (["shop/1"], 2, "is the champion"),
        (["shop/7"], 1, "look there for what is registered"),
        (["shop/2", "--ask", "toys"], 2, "toys not served at"),
    ],
)
def test_wrong_versions_are_refused_before_anything_moves(args: list[str], code: int, said: str, home: Path, shop: tuple[Shop, str, str]) -> None:
    done = swap(home, shop, *args, "--yes", "--json")
    assert done.returncode == code and said in faults(done), done.stderr
    assert shop[0].server.bodies == [] and not (home / "out").exists()


def test_an_interrupted_swap_first_puts_the_alias_back_and_writes_what_there_is(
    home: Path, shop: tuple[Shop, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moves, champions, write_results = 0, [], results.write_results

    def write(folder: Path) -> Any:
        champions.append(shop[0].registry.champion_number("shop"))
        return write_results(folder)

    monkeypatch.setattr(results, "write_results", write)

    def interrupt() -> None:
        nonlocal moves
        moves += 1
        if moves == 2:
            os.kill(os.getpid(), signal.SIGINT)

    shop[0].replica.on_hint = interrupt
    done = swap(home, shop, "shop/2", "--yes")
    assert done.returncode == 130, done.stderr
    said = result(home / "out")
    assert not said["complete"] and len(said["moves"]) == 1 and said["traffic"]["requests"] > 0
    assert champions == ["1"] and history(shop[0].registry, "shop")[0].action == "failed"
    assert "written to out" in done.stderr


def test_swap_without_a_replica_says_how_to_start_one(home: Path, registered: tuple[Registry, Version]) -> None:
    done = tuneserve(home, "swap", "shop/2", "--yes", "--json", mlflow=registered[0].uri)
    assert done.returncode == 1 and "no replica is ready that follows shop" in faults(done) and "tuneserve serve RECIPE" in faults(done)
