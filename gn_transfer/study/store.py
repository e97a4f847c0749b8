"""Where a study is stored: as an Optuna study, in SQLite or any database that SQLAlchemy reaches.

A trial is entered once and claimed by one worker at a time, under a lock that all workers share. A claim holds while
its owner lives: on the owner's machine that is asked of the system, elsewhere it is told by Optuna's heartbeats.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from gn_transfer.config import ConfigError
from gn_transfer.study.database import HEARTBEAT_SECONDS, Database
from gn_transfer.study.planning import Outcome
from gn_transfer.study.trials import Trial

_MARK = "gn_transfer"
_STATES = {TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "complete"}


@dataclass(frozen=True)
class Claim:
    """A trial that this process may run.

    Attributes:
        trial_id: Its trial in the database.
        trial: The trial.
    """

    trial_id: int
    trial: Trial


class Store:
    """The database of a study.

    Args:
        url: SQLAlchemy URL.
        name: Name of the study.

    Raises:
        ConfigError: The database cannot be reached or opened, or holds something else.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self._database = Database(url)
        self._storage = self._database.storage
        self._explain_errors, self._locked = self._database.explain_errors, self._database.locked

    # -- the plan's side ----------------------------------------------------------------------------------------

    def knows_study(self) -> bool:
        """Tell whether the database holds a study of this name."""
        with self._explain_errors():
            return bool(self.name in optuna.get_all_study_names(self._storage))

    def begin(self, settings: Mapping[str, Any]) -> bool:
        """Open the study, or create it.

        Args:
            settings: What all trials start from; a study goes on only with the same.

        Returns:
            Whether it is new.

        Raises:
            ConfigError: The study is another program's, or was begun with other settings.
        """
        text = json.dumps(settings, sort_keys=True)
        with self._explain_errors(), self._locked():
            new = not self.knows_study()
            self._study = optuna.create_study(
                storage=self._storage, study_name=self.name, direction="maximize", load_if_exists=True
            )
            known = self._study.user_attrs.get(_MARK)
            empty = not self._study.user_attrs and not self._study.get_trials(deepcopy=False)
            if new or (known is None and empty and self._study.direction == StudyDirection.MAXIMIZE):
                self._study.set_user_attr(_MARK, text)  # also where a kill came between the study and its mark
            elif known is None:
                raise ConfigError(
                    f"{self._database.shown} holds a study {self.name} that is not gn-transfer's; "
                    "choose another --name."
                )
            elif known != text:
                difference = _difference(json.loads(known), settings)
                raise ConfigError(
                    f"the study {self.name} was begun with other settings ({difference}); "
                    "choose another --name, or go back to those."
                )
        return new

    def enter(self, trials: Sequence[Trial], *, retry_failed: bool = False) -> int:
        """Enter the trials that are not there yet.

        Args:
            trials: The plan.
            retry_failed: Enter those again that have failed.

        Returns:
            How many were entered.

        Raises:
            ConfigError: A trial of that name was entered with other values.
        """
        entered = 0
        with self._explain_errors(), self._locked():
            for trial in self._to_enter(trials, retry_failed=retry_failed):
                attributes = {
                    "trial": trial.name,
                    "stage": trial.stage,
                    "arm": trial.arm,
                    "case": trial.case,
                    "identity": trial.identity(),
                }
                self._study.enqueue_trial(trial.identity(), user_attrs=attributes)
                entered += 1
        return entered

    def check(self, trials: Sequence[Trial]) -> None:
        """Refuse a plan that does not fit what was entered.

        Raises:
            ConfigError: A trial of that name was entered with other values.
        """
        with self._explain_errors():
            self._to_enter(trials, retry_failed=False)

    def outcomes(self) -> dict[str, Outcome]:
        """Read what became of all trials, by name; of a trial that was retried, the last time counts."""
        with self._explain_errors():
            return {name: _outcome(entry) for name, entry in self._latest().items()}

    # -- the worker's side --------------------------------------------------------------------------------------

    def claim(self, trials: Mapping[str, Trial]) -> Claim | None:
        """Take a trial: one that is this process's already, one whose owner is gone, else the first that waits.

        Args:
            trials: The plan by name, with this machine's paths.

        Returns:
            The claim; None where there is nothing to do now.
        """
        with self._explain_errors(), self._locked():
            entries = [t for t in self._entries() if not t.state.is_finished() and t.user_attrs["trial"] in trials]
            for entry in entries:  # an earlier call has written this, and then lost the database
                if entry.state == TrialState.RUNNING and entry.user_attrs.get("owner") == _me():
                    return Claim(entry._trial_id, trials[entry.user_attrs["trial"]])
            begun = [entry for entry in entries if entry.state == TrialState.RUNNING and self._abandoned(entry)]
            for entry in (entry for entry in begun if "given_up" in entry.user_attrs):
                self._end(entry._trial_id, Outcome("failed", reason=entry.user_attrs["given_up"]))
            begun = [entry for entry in begun if "given_up" not in entry.user_attrs]
            found = begun or [entry for entry in entries if entry.state == TrialState.WAITING]
            if not found:
                return None
            entry = found[0]
            if "owner" in entry.user_attrs:
                before = [*entry.user_attrs.get("died", []), entry.user_attrs["owner"]]
                self._storage.set_trial_user_attr(entry._trial_id, "died", before)
            # The heartbeat comes first: a trial that runs without one would never be missed.
            self._storage.record_heartbeat(entry._trial_id)
            self._storage.set_trial_user_attr(entry._trial_id, "owner", _me())
            if entry.state == TrialState.WAITING:
                self._storage.set_trial_state_values(entry._trial_id, TrialState.RUNNING)
        return Claim(entry._trial_id, trials[entry.user_attrs["trial"]])

    @contextmanager
    def alive(self, claim: Claim) -> Iterator[None]:
        """Tell other machines every few seconds that this process is at work on a trial."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                with suppress(StorageInternalError, SQLAlchemyError):  # the next one comes before the trial is missed
                    self._storage.record_heartbeat(claim.trial_id)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def finish(self, claim: Claim, outcome: Outcome) -> bool:
        """Note what became of a trial.

        Args:
            claim: The trial.
            outcome: Complete or failed.

        Returns:
            False where it was taken over meanwhile, and another's result counts.
        """
        with self._explain_errors(), self._locked():
            entry = self._storage.get_trial(claim.trial_id)
            if entry.state.is_finished() or entry.user_attrs.get("owner") != _me():
                return False
            self._end(claim.trial_id, outcome)
        return True

    def fail(self, name: str, reason: str) -> None:
        """Give a trial up whose workers die of it; one that another has taken over gets its one last chance."""
        with self._explain_errors(), self._locked():
            entry = self._latest()[name]
            if entry.state == TrialState.RUNNING and self._abandoned(entry):
                self._end(entry._trial_id, Outcome("failed", reason=reason))
            elif entry.state == TrialState.RUNNING:
                self._storage.set_trial_user_attr(entry._trial_id, "given_up", reason)

    def owned_by(self, pid: int) -> str | None:
        """Name the trial that a process of this machine is at work on, or was when it died."""
        with self._explain_errors():
            for entry in self._entries():
                owners = [entry.user_attrs.get("owner", {}), *entry.user_attrs.get("died", [])]
                ours = any((owner.get("host"), owner.get("pid")) == (_host(), pid) for owner in owners)
                if entry.state == TrialState.RUNNING and ours:
                    return str(entry.user_attrs["trial"])
        return None

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def _to_enter(self, trials: Sequence[Trial], *, retry_failed: bool) -> list[Trial]:
        known = self._latest()
        fresh = []
        for trial in trials:
            entry = known.get(trial.name)
            if entry is None or (retry_failed and entry.state == TrialState.FAIL):
                fresh.append(trial)
            elif entry.user_attrs["identity"] != trial.identity():
                raise ConfigError(
                    f"the trial {trial.name} of the study {self.name} was entered with other settings "
                    f"({_difference(entry.user_attrs['identity'], trial.identity())}); choose another --name, "
                    "or go back to those."
                )
        return fresh

    def _entries(self) -> list[FrozenTrial]:
        with self._explain_errors():
            entries: list[FrozenTrial] = self._study.get_trials(deepcopy=False)
        if strange := next((entry for entry in entries if not _is_whole(entry)), None):
            raise ConfigError(f"{self._database.shown} is corrupt: trial {strange.number} is not as we write them.")
        return entries

    def _latest(self) -> dict[str, FrozenTrial]:
        return {entry.user_attrs["trial"]: entry for entry in self._entries() if "trial" in entry.user_attrs}

    def _abandoned(self, entry: FrozenTrial) -> bool:
        owner = entry.user_attrs.get("owner", {})
        if owner.get("host") == _host():
            return bool(_started(owner["pid"]) != owner["started"])
        return bool(entry._trial_id in self._storage._get_stale_trial_ids(self._study._study_id))

    def _end(self, trial_id: int, outcome: Outcome) -> None:
        for key, value in (("seconds", round(outcome.seconds, 2)), ("loss", outcome.loss), ("reason", outcome.reason)):
            self._storage.set_trial_user_attr(trial_id, key, value if value == value else None)
        complete = outcome.state == "complete"
        self._storage.set_trial_state_values(
            trial_id, TrialState.COMPLETE if complete else TrialState.FAIL, [outcome.value] if complete else None
        )


def _is_whole(entry: FrozenTrial) -> bool:
    """Say whether a trial has what :meth:`Store.enter`, claiming and ending write; one of another program has none."""
    kinds: dict[str, Any] = {"trial": str, "identity": dict, "owner": dict, "reason": str, "given_up": str}
    kinds |= {"died": list, "loss": int | float, "seconds": int | float}
    given = entry.user_attrs
    owner = given.get("owner", {"host": "", "pid": 0, "started": 0})
    return (
        all(given.get(key) is None or isinstance(given[key], kind) for key, kind in kinds.items())
        and ("trial" in given) == ("identity" in given)
        and isinstance(owner, dict)
        and {"host", "pid", "started"} <= owner.keys()
        and all(isinstance(before, dict) for before in given.get("died") or ())
        and (entry.state != TrialState.COMPLETE or bool(entry.values))
    )


def _outcome(entry: FrozenTrial) -> Outcome:
    attributes = entry.user_attrs
    loss = attributes.get("loss")
    return Outcome(
        _STATES.get(entry.state, "failed"),  # type: ignore[arg-type]
        value=float("nan") if entry.state != TrialState.COMPLETE else float(entry.values[0]),
        loss=float("nan") if loss is None else float(loss),
        seconds=float(attributes.get("seconds") or 0.0),
        reason=str(attributes.get("reason") or ""),
    )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in sorted({**before, **now}) if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)} and is {now.get(key)}" for key in keys[:4])


def _me() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def _host() -> str:
    """Name this machine as long as it runs, and where process numbers are its own, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()} {boot}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Tell when a process started, so that a number given out again is not taken for it; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return "unknown"
    return None if fields[0] == "Z" else fields[19]
