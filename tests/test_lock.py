"""A lock's file holds back this host; where its database's URL comes from, and that it is said nowhere. tests/test_lock_contract.py has the database."""

import threading
from pathlib import Path

import pytest

from pipeline.errors import InvalidInput, ServingError
from pipeline.lock import DATABASE_VARIABLE, Lock, lock_database, model_lock
from pipeline.project import Project

SECRET = "postgresql://me:s3cret@127.0.0.1:9/mlflow"


def test_one_holder_at_a_time_and_the_other_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lock = Lock("tuneserve/promote/shop", tmp_path / "folder" / "lock")
    entered = threading.Event()

    def wait() -> None:
        with lock.held() as check:
            check()
            entered.set()

    with lock.held():
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not entered.wait(0.2)
    waiting.join(5)
    assert entered.is_set()
    assert capfd.readouterr().err == "waiting for another command that holds tuneserve/promote/shop\n"


def test_purposes_and_models_do_not_hold_each_other_back(project: Project) -> None:
    with model_lock(project, "promote", "shop").held(), model_lock(project, "trial", "shop").held(), model_lock(project, "promote", "other").held():
        pass


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("", None),
        (" postgresql://me@host/db ", "postgresql://me@host/db"),
        ("postgres://host/db", "postgres://host/db"),
        ("postgresql+psycopg2://me:a+b@host/db", "postgresql://me:a+b@host/db"),
    ],
)
def test_the_database_is_named_as_mlflow_names_it(monkeypatch: pytest.MonkeyPatch, given: str, read: str | None) -> None:
    monkeypatch.setenv(DATABASE_VARIABLE, given)
    assert lock_database() == read


@pytest.mark.parametrize("wrong", ["sqlite:///mlflow.db", "mysql://me:s3cret@host/db", "me:s3cret@host"])
def test_what_is_no_postgresql_url_is_refused_and_not_quoted(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv(DATABASE_VARIABLE, wrong)
    with pytest.raises(InvalidInput, match="give postgresql://") as error:
        lock_database()
    assert "s3cret" not in str(error.value)


def test_a_database_that_is_away_is_said_without_its_password(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATABASE_VARIABLE, SECRET)
    lock = model_lock(project, "promote", "shop")
    assert "s3cret" not in repr(lock)
    with pytest.raises(ServingError, match="does not answer .*start it") as error, lock.held():
        pass
    assert "s3cret" not in str(error.value) and error.value.__suppress_context__
