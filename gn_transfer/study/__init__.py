"""A study: many runs over configuration keys, planned from one file and kept in a database."""

from gn_transfer.study.cells import Cell, Stage
from gn_transfer.study.definition import Arm, Selection, Study, read_study
from gn_transfer.study.planning import Choice, Outcome, Planned, plan_cells
from gn_transfer.study.store import Claim, Store

__all__ = [
    "Arm",
    "Cell",
    "Choice",
    "Claim",
    "Outcome",
    "Planned",
    "Selection",
    "Stage",
    "Store",
    "Study",
    "plan_cells",
    "read_study",
]
