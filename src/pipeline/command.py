"""What the commands of `tuneserve` have in common: options, the project around a command's work, and the servers of a flow."""

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.errors import TuneserveError
from pipeline.journal import open_journal

if TYPE_CHECKING:
    from pipeline.project import Project

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on the last line of stdout.")
SERVING_RECIPE = "recipes/serving/tiny-cpu.yaml"
"""What the quickstart serves with, below the project."""
recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
logger = logging.getLogger("pipeline.cli")


@contextlib.contextmanager
def opened_project(*, uses_caches: bool = True) -> "Iterator[Project]":
    """The project, its environment set in this process, its journal open; what was started for the block is gone when this returns."""
    from pipeline import services
    from pipeline.project import find_project

    project = find_project()
    project.use_environment()
    begin_journal(project)
    with using_caches(project) if uses_caches else contextlib.nullcontext():
        try:
            yield project
        finally:
            services.wait_all_ended(project)


@contextlib.contextmanager
def using_caches(project: "Project") -> Iterator[None]:
    """Until the block ends `gc` removes no cache, and so no picture that was unpacked from a table."""
    from pipeline import process

    with contextlib.ExitStack() as stack:
        if project.state.is_dir() or (project.root / "recipes").is_dir():  # elsewhere a mere check would make a project
            try:
                stack.enter_context(process.shared(project.in_use, lambda: click.echo("waiting for tuneserve gc, which removes caches", err=True)))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # where nothing can be written, no cache is ours
                    raise TuneserveError(f"{project.in_use}: cannot be locked ({error.strerror}); free the disk or correct its rights") from error
        yield


def begin_journal(project: "Project") -> None:
    context = click.get_current_context(silent=True)
    open_journal(project.logs, command=_name_of(context) if context else "worker")
    logger.info("command started")


def _name_of(context: click.Context) -> str | None:
    """Such as `promote` or `bench serve`."""
    outer = _name_of(context.parent) if context.parent and context.parent.parent else None
    return f"{outer} {context.info_name}" if outer else context.info_name


@contextlib.contextmanager
def flow_servers(project: "Project") -> Iterator[tuple[str, str]]:
    """MLflow's and Prefect's URLs while both are up; only inside may flows be imported, since Prefect reads its server's URL at import."""
    from pipeline import services
    from pipeline.progress import progress

    with contextlib.ExitStack() as stack:
        with progress("MLflow and Prefect"):
            urls = stack.enter_context(services.tracking(project)), stack.enter_context(services.orchestration(project))
        from flows import flushed

        stack.enter_context(flushed())
        yield urls
