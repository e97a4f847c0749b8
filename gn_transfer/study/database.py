"""The database of a study: opening it, locking it, and saying what is wrong with it."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
    TimeoutError,
)

from gn_transfer.config import ConfigError, shortened

_COMPUTES = {
    "table": re.compile(r"\b(AS|DEFAULT|VIRTUAL)\b|\bCHECK\s*\([^()]*\b(?!IN\b)\w+\s*\(", re.IGNORECASE),
    "index": re.compile(r'\((?![\w", ]*\)\s*$)'),
}
"""What the SQL of a table or an index holds, if opening the database can compute something."""

HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 360
"""After so long without a heartbeat, a trial of another machine is taken over."""

PATIENCE_SECONDS = 300.0
"""For so long a study that runs waits for a database that cannot be reached: less than :data:`GRACE_SECONDS`, since
no machine can tell the others that it lives."""

Result = TypeVar("Result")


class UnreachableDatabaseError(ConfigError):
    """The database cannot be used now."""


def patiently(action: Callable[[], Result], say: Callable[[str], object] = print) -> Result:
    """Do something with a database, and where it cannot be reached, again for some minutes.

    Args:
        action: What to do.
        say: Prints a line, once.

    Returns:
        What it gives.

    Raises:
        UnreachableDatabaseError: It still cannot.
    """
    until, pause = time.monotonic() + PATIENCE_SECONDS, 1.0
    while True:
        try:
            return action()
        except UnreachableDatabaseError as error:
            if time.monotonic() + pause > until:
                raise
            if pause == 1.0:
                say(f"warning: {error} It is tried again for {PATIENCE_SECONDS / 60:g} minutes.")
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


class Database:
    """Optuna's storage in SQLite or any database that SQLAlchemy reaches.

    Args:
        url: SQLAlchemy URL.

    Attributes:
        storage: Optuna's storage.
        shown: The URL without its password, for messages.

    Raises:
        ConfigError: The database cannot be reached or opened, or holds something else.
    """

    def __init__(self, url: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.url = normalized(url)
        parsed = sqlalchemy.make_url(self.url)
        on_file = parsed.get_backend_name() == "sqlite"
        self._file = parsed.database or ":memory:" if on_file else None
        self.shown = parsed.render_as_string(hide_password=True)
        with self.explain_errors():
            if self._file is not None:
                if self._file == ":memory:":
                    raise ConfigError(
                        f"--storage {self.shown}: a database in memory is lost with its process; name a file."
                    )
                Path(self._file).parent.mkdir(parents=True, exist_ok=True)
            with self._file_lock():
                self._refuse_foreign()
                self.storage = self._open(parsed.get_backend_name())

    def close(self) -> None:
        """Close the connections."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other workers of the database waiting; ends with the process, however that ends.

        A server locks the one row of Optuna's table of versions, which nobody writes. SQLite has no such lock that
        would let us write meanwhile, and two workers could claim one trial in it: a file beside it is locked instead.
        """
        if self._file is not None:
            with self._file_lock():
                yield
            return
        with self.storage.engine.begin() as connection:
            version = sqlalchemy.table("version_info", sqlalchemy.column("version_info_id"))
            connection.execute(sqlalchemy.select(version.c.version_info_id).with_for_update())
            yield

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        if self._file is None:
            yield
            return
        with FileLock(f"{self._file}.lock"):
            yield

    @contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Turn what a database cannot do into the user's words."""
        try:
            yield
        except ConfigError:
            raise
        except (LookupError, ValueError, TypeError) as error:  # what Optuna makes of rows that it has not written
            raise ConfigError(f"--storage {self.shown} is corrupt ({type(error).__name__}: {error}).") from error
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
            cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
            reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
            later = isinstance(cause, OSError | OperationalError | InterfaceError | TimeoutError)
            raise (UnreachableDatabaseError if later else ConfigError)(
                f"--storage {self.shown}: the database cannot be used ({reason}); check that it is there, running, "
                "writable and a database of Optuna's."
            ) from error
        except ImportError as error:
            raise ConfigError(
                f"--storage {self.shown}: the driver of this database is not installed ({error.__cause__ or error}); "
                "for PostgreSQL, pip install 'gn-transfer[postgresql]'."
            ) from error
        except RuntimeError as error:
            if "optuna" not in str(error).lower():
                raise
            raise ConfigError(f"--storage {self.shown}: {' '.join(str(error).split())}") from error

    def _open(self, backend: str) -> RDBStorage:
        """Open the storage; where several workers lay out a server's tables at once, all but one try again."""
        for attempt in range(5, 0, -1):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats: in Optuna since 2021
                    return RDBStorage(
                        self.url,
                        engine_kwargs={"connect_args": _patience(backend), "pool_pre_ping": True},
                        heartbeat_interval=HEARTBEAT_SECONDS,
                        grace_period=GRACE_SECONDS,
                    )
            except (IntegrityError, ProgrammingError):
                if attempt == 1:
                    raise
                time.sleep(1.0)
        raise AssertionError("unreachable")

    def _refuse_foreign(self) -> None:
        """Refuse a database of another program before Optuna lays its tables out in it."""
        if self._file is not None and not Path(self._file).exists():
            return
        engine = sqlalchemy.create_engine(
            self.url, connect_args=_patience(sqlalchemy.make_url(self.url).get_backend_name())
        )
        try:
            tables = sqlalchemy.inspect(engine).get_table_names()
            if self._file is not None:
                with engine.connect() as connection:
                    made = connection.execute(sqlalchemy.text("SELECT type, name, sql FROM sqlite_master")).all()
                for kind, name, sql in made:
                    if kind not in ("table", "index") or _COMPUTES[kind].search(sql or ""):
                        raise ConfigError(
                            f"--storage {self.shown} holds the {kind} {shortened(name)}, which computes something, and "
                            "Optuna makes no such thing; name another database."
                        )
        finally:
            engine.dispose()
        ours = {*BaseModel.metadata.tables, "alembic_version"}
        if not ({"studies", "trials", "version_info"} <= set(tables) or set(tables) <= ours):  # laid out, or begun to
            raise ConfigError(
                f"--storage {self.shown} holds tables of another program ({', '.join(sorted(tables)[:4])}); name "
                "an empty database, or one of Optuna's."
            )


def may_exist(url: str) -> bool:
    """Tell whether a database can be there already: the file of SQLite, or any server."""
    parsed = sqlalchemy.make_url(normalized(url))
    return parsed.get_backend_name() != "sqlite" or Path(parsed.database or "").is_file()


def normalized(url: str) -> str:
    """Name the driver that comes with the extra ``postgresql`` where a URL names none.

    Raises:
        ConfigError: It is no URL.

    Example:
        >>> normalized("postgresql://user@host/base")
        'postgresql+psycopg://user@host/base'
    """
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            f"--storage {url} is no database URL; write sqlite:///runs/study.db or postgresql://user@host/database."
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def _patience(backend: str) -> dict[str, Any]:
    """Wait for other writers of a file; do not wait long for a server that is not there."""
    return {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}, "mysql": {"connect_timeout": 10}}.get(
        backend, {}
    )
