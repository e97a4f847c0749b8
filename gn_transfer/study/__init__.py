"""A study: many runs over configuration keys, planned from one file and kept in a database."""

from gn_transfer.study.definition import Arm, Selection, Study, read_study
from gn_transfer.study.planning import Choice, Outcome, Planned, plan_trials
from gn_transfer.study.store import Claim, Store
from gn_transfer.study.trials import Stage, Trial

__all__ = [
    "Arm",
    "Choice",
    "Claim",
    "Outcome",
    "Planned",
    "Selection",
    "Stage",
    "Store",
    "Study",
    "Trial",
    "plan_trials",
    "read_study",
]
