"""MLflow killed: traffic goes on, and a replica restarted meanwhile serves the last champion from the moment that it is ready. MLflow back: it converges within 3 s."""

import contextlib
import sqlite3
import time
from pathlib import Path

import httpx

from pipeline.registry import Version
from pipeline.version import CHAMPION
from tests.acceptance.figures import show
from tests.acceptance.load import CHAT, Answer, Plan, loading
from tests.acceptance.serving_environment import TEXT, OwnMlflow, Server, World, engine_name, wait_until

CONVERGED_SECONDS = 3.0
AWAY_SECONDS = 20.0


def move_in_database(mlflow: OwnMlflow, version: Version) -> None:
    """The alias as it stands once MLflow is back."""
    with contextlib.closing(sqlite3.connect(mlflow.database)) as database, database:
        changed = database.execute(
            "UPDATE registered_model_aliases SET version = ? WHERE name = ? AND alias = ?", (int(version.version), version.name, CHAMPION)
        )
        assert changed.rowcount == 1


def traffic(server: Server, folder: Path, seconds: float) -> list[Answer]:
    with loading(Plan(server.url, clients=2), folder) as load:
        time.sleep(seconds)
        return load.stop()


def first_answer(server: Server) -> tuple[str, float]:
    """What answers for `catalog` right after the replica says for the first time that it is ready, and the seconds until then; not ready means no wrong answer."""
    early = []
    while not server.ready():
        assert server.process.poll() is None, server.process.communicate()
        assert time.time() - server.began < 400
        with contextlib.suppress(httpx.TransportError):
            response = server.http.post(CHAT, json={"model": "catalog", "messages": TEXT, "max_tokens": 4})
            early += [response.json()["model"]] if response.status_code == httpx.codes.OK else []
        time.sleep(0.05)
    seconds = time.time() - server.began
    answered = server.answering("catalog")
    assert set(early) <= {answered}
    return answered, seconds


def test_mlflow_away(world: World, tmp_path: Path) -> None:
    mlflow = OwnMlflow(world.sandbox, tmp_path / "mlflow")
    mlflow.start()
    try:
        here = world.at(mlflow.url)
        one, other = here.variants("catalog", [0.9, 0.45], tmp_path)
        here.set_alias(one)
        with here.serving("mlflow-away", follow=["catalog"]) as server:
            server.wait_live(one)
            mlflow.kill()
            away = traffic(server, tmp_path, AWAY_SECONDS)
            said = server.adapters()
            recipe = server.recipe
        restarted = here.start(recipe)
        try:
            answered, start_seconds = first_answer(restarted)
            still_away = restarted.adapters()["mlflow_error"]
            away += traffic(restarted, tmp_path, AWAY_SECONDS / 2)
            move_in_database(mlflow, other)
            back_at = mlflow.start()
            wait_until(lambda: restarted.is_live(other), 60, lambda: str(restarted.adapters()), every=0.02)
            converged_seconds = time.time() - back_at
            assert restarted.answering("catalog") == engine_name(other)
            error_after = wait_until(lambda: restarted.adapters()["mlflow_error"] is None, 10, "MLflow's error gone")
        finally:
            restarted.end()
    finally:
        mlflow.kill()
    failed = [answer for answer in away if not answer.ok or answer.model != engine_name(one)]
    show(requests_while_away=len(away), failed=len(failed), said=said["mlflow_error"], restart_seconds=start_seconds, converged_seconds=converged_seconds)
    assert failed == [] and len(away) > 100
    assert said["mlflow_error"] and said["last_sync_age_seconds"] > 0.5 * AWAY_SECONDS
    assert still_away and error_after
    assert answered == engine_name(one)
    assert converged_seconds <= CONVERGED_SECONDS
