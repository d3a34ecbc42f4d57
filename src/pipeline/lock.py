"""One change at a time: a lock that a file holds on this host, and the registry's PostgreSQL across hosts. Whoever dies lets go of it.

Across hosts it is a session's advisory lock (PostgreSQL manual, 9.28.10), which needs no table: it ends with its connection. $TUNESERVE_LOCK_DATABASE names the
database; without it other hosts are not held back.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pipeline.errors import Fault, InvalidInput, ServingError
from pipeline.process import locked
from pipeline.project import Project

DATABASE_VARIABLE = "TUNESERVE_LOCK_DATABASE"
CONNECT_SECONDS = 10
KEEPALIVE = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
"""Of the server: it notices a holder's host that is gone within 25 s, instead of the system's two hours."""

Check = Callable[[], None]
"""Raises ServingError if the lock was lost while it was held."""


@dataclass(frozen=True)
class Lock:
    """`key` is the same on every host, `file` is this host's. `database` is a PostgreSQL URL, which may hold a password; None: this host alone."""

    key: str
    file: Path
    database: str | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def held(self) -> Iterator[Check]:
        """Waits for whoever holds it, here or elsewhere, saying so on stderr, and holds it. Raises ServingError if the database cannot be asked.

        Call what it yields right before what must not be done twice: a connection may break without a word.
        """
        with locked(self.file, self._say_waiting):
            if self.database is None:
                yield lambda: None
            else:
                with _advisory_lock(self.database, self.key, self._say_waiting) as check:
                    yield check

    def _say_waiting(self) -> None:
        print(f"waiting for another command that holds {self.key}", file=sys.stderr, flush=True)


def model_lock(project: Project, purpose: Literal["promote", "trial"], name: str) -> Lock:
    """`promote` is held while an alias of the model is moved, `trial` while a version of it is on trial. Raises InvalidInput if the database's URL is none."""
    return Lock(f"tuneserve/{purpose}/{name}", project.services / f"{purpose}-{name}.lock", lock_database())


def lock_database() -> str | None:
    """What $TUNESERVE_LOCK_DATABASE says; None if it is not set. Raises InvalidInput, without quoting it, unless it is a PostgreSQL URL."""
    url = os.environ.get(DATABASE_VARIABLE, "").strip()
    if not url:
        return None
    scheme, _, driver = urlsplit(url).scheme.partition("+")  # as SQLAlchemy and MLflow write it: postgresql+psycopg2
    if scheme not in ("postgresql", "postgres"):
        raise InvalidInput([Fault(DATABASE_VARIABLE, "", "is no PostgreSQL URL; give postgresql://USER:PASSWORD@HOST/DATABASE, MLflow's own for example")])
    return url.replace(f"{scheme}+{driver}:", f"{scheme}:", 1) if driver else url


@contextlib.contextmanager
def _advisory_lock(database: str, key: str, waiting: Callable[[], None]) -> Iterator[Check]:
    import psycopg

    def lost(error: psycopg.Error) -> ServingError:
        # psycopg's words may quote the URL
        return ServingError(f"the lock database (${DATABASE_VARIABLE}) does not answer ({type(error).__name__}); start it, or correct the URL, and try again")

    try:
        connection = psycopg.connect(database, autocommit=True, connect_timeout=CONNECT_SECONDS, application_name="tuneserve", options=KEEPALIVE)
    except psycopg.Error as error:
        raise lost(error) from None
    with contextlib.closing(connection):
        try:
            taken = connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", (key,)).fetchone()
            if taken != (True,):
                waiting()
                connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", (key,))
        except psycopg.Error as error:
            raise lost(error) from None

        def check() -> None:
            try:
                connection.execute("SELECT 1")
            except psycopg.Error as error:
                raise lost(error) from None

        yield check
