"""A worker whose trials take a moment and leave a line each; started and killed by the tests of the store."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from gn_transfer.study.definition import read_study
from gn_transfer.study.planning import Outcome, plan_trials
from gn_transfer.study.store import Store
from gn_transfer.study.trials import Trial
from gn_transfer.study.worker import run_trials


def main(url: str, file: str, log: str, seconds: str) -> None:
    study = read_study(Path(file))
    store = Store(url, study.name)
    store.begin(study.shared_settings())
    store.enter(plan_trials(study, store.outcomes()).trials)
    stop = threading.Event()

    def run(trial: Trial) -> Outcome:
        with Path(log).open("a") as lines:
            lines.write(f"{trial.name} {os.getpid()}\n")
        time.sleep(float(seconds))
        return Outcome("complete", 0.5, 1.0, float(seconds))

    def watch() -> None:
        while not all(outcome.ended for outcome in store.outcomes().values()):
            time.sleep(0.1)
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    run_trials(store, study, run, stop)
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
