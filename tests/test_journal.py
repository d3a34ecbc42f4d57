"""The journal: one JSON object a line, fields of the run on every line of it, bounded, shared by processes, and free of secrets and rows."""

import json
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import journal
from pipeline.errors import Fault, InvalidInput, ProcessFailed, RegistryError, ServingError
from pipeline.progress import progress


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Path]:
    """A folder with this process's journal; afterwards logging and context are as before."""
    loggers = [logging.getLogger(name) for name in journal.LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    token = journal._context.set({})
    journal.open_journal(tmp_path, command="test")
    yield tmp_path
    for logger, (logger.handlers, level, logger.propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
    journal._context.reset(token)


def lines(logs: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (logs / journal.FILE).read_text("utf-8").splitlines()]


def test_a_line_has_time_level_event_pid_and_its_fields(logs: Path) -> None:
    logging.getLogger("pipeline.promotion").info("alias moved", extra={"model": "shop", "version": "2", "digest": "d", "alias": "champion"})
    (line,) = lines(logs)
    assert str(line.pop("time")).endswith("+00:00") and int(str(line.pop("pid"))) > 0
    assert line == {"level": "INFO", "event": "alias moved", "name": "shop", "version": "2", "digest": "d", "alias": "champion", "command": "test"}


def test_every_line_of_a_run_names_it(logs: Path) -> None:
    logger = logging.getLogger("flows.finetune")
    with journal.about(run_id="r1"):
        logger.info("training started")
        with journal.about(version="3"):
            logger.info("registered")
    logger.info("after")
    assert [(line.get("run_id"), line.get("version")) for line in lines(logs)] == [("r1", None), ("r1", "3"), (None, None)]


def test_stages_are_journalled_with_their_end_and_seconds(logs: Path) -> None:
    with progress("base model"):
        pass
    with pytest.raises(RegistryError), progress("registering"):
        raise RegistryError("MLflow at http://me:secret@mlflow:5000 is away; start it\nrow 3: 'Rubio watch'")
    found = lines(logs)
    assert [(line["event"], line["stage"]) for line in found] == [
        ("stage started", "base model"),
        ("stage ended", "base model"),
        ("stage started", "registering"),
        ("stage failed", "registering"),
    ]
    assert isinstance(found[1]["seconds"], float)
    assert found[3]["error"] == "RegistryError" and found[3]["reason"] == "MLflow at http://mlflow:5000 is away; start it"


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (InvalidInput([Fault("rows.jsonl", "3", "'Rubio watch' is empty")]), {"error": "InvalidInput", "faults": 1}),
        (ProcessFailed("training failed; the log is x\n    Rubio watch"), {"error": "ProcessFailed", "reason": "training failed; the log is x"}),
        (ValueError("Rubio watch"), {"error": "ValueError"}),
        (ServingError("row 3 of e.jsonl (BadRequestError)\nRubio watch"), {"error": "ServingError", "reason": "row 3 of e.jsonl (BadRequestError)"}),
    ],
)
def test_rows_stay_out_of_it(error: Exception, fields: dict[str, object]) -> None:
    assert journal.failure_fields(error) == fields


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("http://me:p@ss@host:5000 is away", "http://host:5000 ..."),
        ("MLflow at http://me:p@ss/word@host:5: no (host='ss', url: /word@host:5/api)", "MLflow at http://host:5 ..."),
        ("http://me:ss/word@host:5000/api is wrong", "http://host:5000/api ..."),
        ("http://me:pass@host, https://you:secret@other/x", "http://host, https://other/x"),
        ("no row names it: /p/services/mlflow@12-34.lease, a@b", "no row names it: /p/services/mlflow@12-34.lease, a@b"),
        ("x" * 480 + " http://me:" + "pass" * 9 + "@host", "x" * 480 + " http://host"),
    ],
)
def test_passwords_stay_out_of_it_whole(said: str, written: str, logs: Path) -> None:
    assert journal.failure_fields(RegistryError(said)) == {"error": "RegistryError", "reason": written}
    logging.getLogger("pipeline.x").info(said, extra={"replicas": (said,), "url": said})
    (line,) = lines(logs)
    assert (line["event"], line["replicas"], line["url"]) == (written, [written], written)


def test_opening_it_twice_writes_each_line_once(logs: Path) -> None:
    journal.open_journal(logs)
    logging.getLogger("pipeline.x").info("once")
    assert len(lines(logs)) == 1


def write_many(logs: Path, number: int) -> None:
    journal.open_journal(logs)
    for line in range(200):
        logging.getLogger("pipeline.x").info("line", extra={"writer": number, "line": line})


def test_several_processes_share_it_and_rotation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 20_000)
    monkeypatch.setattr(journal, "BACKUPS", 50)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    files = sorted(tmp_path.glob(f"{journal.FILE}*"))
    written = [json.loads(line) for path in files for line in path.read_text("utf-8").splitlines()]
    assert len(files) > 3 and all(path.stat().st_size <= 20_000 for path in files)
    assert {(line["writer"], line["line"]) for line in written} == {(writer, line) for writer in range(4) for line in range(200)} and len(written) == 800


def test_a_journal_that_cannot_be_written_stops_nobody_and_says_so_once(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (logs / f".{journal.FILE}.lock").mkdir()
    for _ in range(2):
        logging.getLogger("pipeline.x").info("lost")
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_servers_print_the_same_kind_of_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("test.server")
    journal.write_to_stderr(logger)
    logger.warning("shop/1: trained on base x", extra={"event": "adapter refused", "model": "shop", "version": "1", "digest": "d"})
    line = json.loads(capsys.readouterr().err)
    assert list(line)[:3] == ["time", "level", "event"]
    assert (line["event"], line["message"], line["name"]) == ("adapter refused", "shop/1: trained on base x", "shop")
