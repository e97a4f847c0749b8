"""Trials of a study, counted by hand; choices from made-up results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gn_transfer.commands.sweep import check_values
from gn_transfer.config import ConfigError, builtin_configs
from gn_transfer.study.definition import Arm, Selection, Study, parse_value, read_study
from gn_transfer.study.planning import Outcome, foresee, plan_trials
from gn_transfer.study.trials import arguments_of, configurations


@pytest.fixture
def study(tmp_path):
    """Read a study from text."""

    def read(text: str, **overrides: object) -> Study:
        path = tmp_path / "sweep_x.yaml"
        path.write_text("base: sample_gnws.yaml\n" + text)
        return read_study(path, overrides=overrides)

    return read


def names(study: Study, outcomes: dict[str, Outcome] | None = None) -> list[str]:
    return [trial.name for trial in plan_trials(study, outcomes or {}).trials]


def test_a_grid_is_crossed_and_seeds_are_outermost(study):
    grid = "grid: {model.norm: [bn, gn_ws], data.batch_size: [1, 4]}\nseeds: 2"
    assert names(study(grid)) == [
        *("bn-bs1-seed0", "bn-bs4-seed0", "gn_ws-bs1-seed0", "gn_ws-bs4-seed0"),
        *("bn-bs1-seed1", "bn-bs4-seed1", "gn_ws-bs1-seed1", "gn_ws-bs4-seed1"),
    ]


def test_conditional_keys_stand_only_where_they_apply():
    arm = Arm(
        grid={"model.norm": ("none", "bn", "gn"), "model.num_groups": (2, 4, 8, 16), "data.batch_size": (1, 64)},
        where={"model.num_groups": {"model.norm": ("gn",)}},
    )
    found = configurations(arm, {})
    assert len(found) == (1 + 1 + 4) * 2
    assert all(("model.num_groups" in one.varying) == (one.varying["model.norm"] == "gn") for one in found)


def test_a_condition_on_the_base_configuration():
    arm = Arm(grid={"model.num_groups": (2, 4)}, where={"model.num_groups": {"model.norm": ("gn",)}})
    assert len(configurations(arm, {"model.norm": "gn"})) == 2
    assert len(configurations(arm, {"model.norm": "bn"})) == 1


def test_cases_are_crossed_with_their_own_lists_and_the_grid(study):
    text = """
cases:
  plain: {model.norm: bn, data.batch_size: [1, 2]}
  frozen: {model.norm: bn_frozen, data.batch_size: 1}
grid: {optimizer.lr: [0.1, 0.01]}
"""
    assert names(study(text)) == [
        *("plain-bs1-lr0.1-seed0", "plain-bs2-lr0.1-seed0", "plain-bs1-lr0.01-seed0", "plain-bs2-lr0.01-seed0"),
        *("frozen-lr0.1-seed0", "frozen-lr0.01-seed0"),
    ]


def test_arms_share_what_stands_above_them(study):
    text = """
set: {optimizer.lr: 0.5}
grid: {model.norm: [bn, gn_ws]}
arms:
  A: {set: {accumulation.effective_batch_size: 16}}
  B: {set: {accumulation.effective_batch_size: null, optimizer.lr: 0.25}}
"""
    trials = plan_trials(study(text), {}).trials
    assert [trial.name for trial in trials] == ["A-bn-seed0", "A-gn_ws-seed0", "B-bn-seed0", "B-gn_ws-seed0"]
    assert [trial.overrides["optimizer.lr"] for trial in trials] == [0.5, 0.5, 0.25, 0.25]
    assert trials[3].arguments() == [
        *("--optimizer.lr", "0.25", "--accumulation.effective_batch_size", "null"),
        *("--model.norm", "gn_ws", "--seed_everything", "0"),
    ]


def test_the_command_line_has_the_last_word(study):
    overridden = study(
        "grid: {model.norm: [bn, gn], optimizer.lr: [1, 2]}", **{"optimizer.lr": 3, "seeds": 2, "samples": 64}
    )
    trials = plan_trials(overridden, {}).trials
    assert [trial.name for trial in trials] == ["bn-seed0", "gn-seed0", "bn-seed1", "gn-seed1"]
    assert {trial.overrides["optimizer.lr"] for trial in trials} == {3}
    assert {trial.overrides["samples"] for trial in trials} == {64}


def test_paths_are_no_part_of_a_trials_identity(study):
    here, there = (study("grid: {model.norm: [bn]}", **{"data.root": root}) for root in ("/a", "/b"))
    assert [trial.identity() for trial in plan_trials(here, {}).trials] == [
        c.identity() for c in plan_trials(there, {}).trials
    ]


SELECT = """
grid: {model.norm: [bn, gn_ws]}
select: {values: [0.1, 0.2, 0.4], seeds: 2, extend: 1}
seeds: 3
"""


def scored(study: Study, accuracy: dict[str, float], loss: float = 1.0) -> dict[str, Outcome]:
    """Complete every trial known so far, the accuracy chosen by a part of its name."""
    return {
        trial.name: Outcome("complete", next((v for k, v in accuracy.items() if k in trial.name), 0.0), loss)
        for trial in plan_trials(study, {}).trials
    }


def test_candidates_come_first_on_seeds_of_their_own(study):
    planned = plan_trials(study(SELECT), {})
    assert len(planned.trials) == 2 * 3 * 2
    assert {trial.overrides["seed_everything"] for trial in planned.trials} == {1000, 1001}
    more = plan_trials(study(SELECT.replace("seeds: 3", "seeds: 12")), {})
    assert [trial.name for trial in more.trials] == [trial.name for trial in planned.trials]
    assert planned.open == 2
    assert planned.to_come == 2 * 3


def test_the_best_on_average_goes_on(study):
    read = study(SELECT)
    outcomes = scored(read, {"bn-lr0.2": 0.8, "bn-lr0.1": 0.7, "gn_ws-lr0.2": 0.9})
    planned = plan_trials(read, outcomes)
    finals = [trial for trial in planned.trials if trial.stage == "final"]
    assert [trial.name for trial in finals][:2] == ["bn-lr0.2-seed0", "gn_ws-lr0.2-seed0"]
    assert len(finals) == 2 * 3
    assert str(planned.choices[0]) == (
        "norm=bn: optimizer.lr 0.2, chosen by mean val/acc1 (0.1 70.0%, 0.2 80.0%, 0.4 0.0%)"
    )


def test_one_group_does_not_wait_for_the_other(study):
    read = study(SELECT)
    outcomes = {name: one for name, one in scored(read, {"lr0.2": 0.8}).items() if "gn_ws" not in name}
    planned = plan_trials(read, outcomes)
    assert {trial.name for trial in planned.trials if trial.stage == "final"} == {f"bn-lr0.2-seed{s}" for s in range(3)}
    assert planned.open == 1


def test_equal_accuracies_are_told_apart_by_the_loss(study):
    read = study(SELECT)
    outcomes = scored(read, {})
    better = {name: Outcome("complete", 0.0, 0.5) for name in outcomes if "lr0.2" in name}
    assert [choice.value for choice in plan_trials(read, outcomes | better).choices] == [0.2, 0.2]


def test_candidates_grow_at_the_edge_and_then_it_is_said(study):
    read = study(SELECT)
    outcomes = scored(read, {"gn_ws-lr0.2": 0.9, "bn-lr0.4": 0.9})
    planned = plan_trials(read, outcomes)
    fresh = [trial.name for trial in planned.trials if trial.name not in outcomes and trial.stage == "select"]
    assert fresh == ["select-bn-lr0.8-seed1000", "select-bn-lr0.8-seed1001"]
    outcomes |= {name: Outcome("complete", 0.95, 1.0) for name in fresh}
    [bn, gn_ws] = plan_trials(read, outcomes).choices
    assert (bn.value, bn.at_edge, gn_ws.at_edge) == (0.8, True, False)
    assert "at the edge of what was tried" in str(bn)


def test_a_candidate_that_fails_is_none(study):
    read = study(SELECT)
    outcomes = scored(read, {"lr0.4": 0.9, "lr0.2": 0.8})
    failed = {name: Outcome("failed") for name in outcomes if "lr0.4-seed1001" in name}
    planned = plan_trials(read, outcomes | failed)
    assert [(choice.value, choice.at_edge) for choice in planned.choices] == [(0.2, False)] * 2
    assert "(0.1 0.0%, 0.2 80.0%, 0.4 failed)" in str(planned.choices[0])
    nothing = plan_trials(read, {name: Outcome("failed") for name in outcomes})
    assert len(nothing.problems) == 2
    assert all(trial.stage == "select" for trial in nothing.trials)


def test_per_shares_a_choice_and_tries_it_on_the_first(study):
    read = study("""
cases:
  bn: {model.norm: bn, data.batch_size: [16, 1]}
  corrected: {model.norm: bn, data.batch_size: 1, batch_norm.momentum: corrected}
  gn_ws: {model.norm: gn_ws}
select: {values: [0.1, 0.2, 0.4], seeds: [7, 8, 9], per: [model.norm]}
""")
    planned = plan_trials(read, {})
    assert [c.name for c in planned.trials][:3] == [f"select-bn-bs16-lr{v}-seed7" for v in (0.1, 0.2, 0.4)]
    assert len(planned.trials) == 2 * 3 * 3
    finals = plan_trials(read, scored(read, {"lr0.2": 0.5})).trials[18:]
    assert [c.name for c in finals] == [
        *("bn-bs16-lr0.2-seed0", "bn-bs1-lr0.2-seed0", "corrected-lr0.2-seed0", "gn_ws-lr0.2-seed0")
    ]


def test_the_test_split_is_opened_when_everything_else_has_ended(study):
    read = study("grid: {model.norm: [bn, gn_ws]}\nseeds: 2\ntest: last")
    outcomes = scored(read, {})
    last = outcomes.popitem()[0]
    assert not any(trial.stage == "test" for trial in plan_trials(read, outcomes).trials)
    tests = [
        trial for trial in plan_trials(read, {**outcomes, last: Outcome("failed")}).trials if trial.stage == "test"
    ]
    assert [(trial.name, trial.run) for trial in tests][:1] == [("test-bn-seed0", "bn-seed0")]
    assert len(tests) == 3


def test_foreseeing_a_whole_study(study):
    assert len(foresee(study(SELECT + "test: last")).trials) == 2 * 3 * 2 + 2 * 3 + 2 * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {model.norm: []}", "grid.model.norm=.* is empty"),
        ("grid: {}", "varies nothing: its grid is empty"),
        ("grid: {model.norm: bn}", "is empty or no list"),
        ("gird: {}", "gird is not a key of a study; did you mean 'grid'"),
        ("arms: {A: {base: x}}", "arms.A: base is not a key"),
        ("seeds: 0", "seeds=0"),
        ("samples: -1", "samples=-1"),
        ("grid: {model.norm: [bn]}\ntest: twice", "test=twice is not allowed"),
        ("select: {values: [1]}", "two or more numbers"),
        ("select: {values: [1, 2], sedes: 3}", "did you mean 'seeds'"),
        ("seeds: 3\nselect: {values: [1, 2], seeds: [2, 3]}", "final runs have \\[2\\] too"),
        ("grid: [1]", "no mapping"),
        ("select: {values: [0, 1]}", "two or more numbers above 0"),
        ("select: {values: [1, 2], extend: -1}", "extend=-1: use 0 or more"),
        ("select: {values: [1, 2], extend: two}", "extend=two: use 0 or more"),
        ("seeds: [-1]", r"seeds=\[-1\]: give how many"),
        ("grid: {model.norm: [bn]}\nnotes: one", "notes=one is no list of sentences"),
    ],
)
def test_mistakes_in_the_file(study, text, message):
    with pytest.raises(ConfigError, match=message):
        study(text)


def test_a_chosen_key_is_not_set_as_well(study):
    with pytest.raises(ConfigError, match="both set and chosen"):
        plan_trials(study("set: {optimizer.lr: 1}\nselect: {values: [1, 2]}"), {})


@pytest.mark.parametrize(
    "text",
    [
        "grid: {" + ", ".join(f"optimizer.k{key}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" for key in range(9)) + "}",
        "grid: {model.norm: [bn, gn]}\nselect: {values: [1, 2, 3, 4, 5, 6], seeds: 10000}\nseeds: [1]",
        "grid: {model.norm: [" + ", ".join(f"n{number}" for number in range(20)) + "]}\nseeds: 10000",
    ],
)
def test_a_grid_that_was_not_meant(study, text):
    with pytest.raises(ConfigError, match=r"trials, and at most 100,000 can be run; give fewer values or seeds"):
        plan_trials(study(text), {})


def test_two_trials_of_one_name(study):
    with pytest.raises(ConfigError, match="two trials are called a_b-seed0"):
        plan_trials(study("cases: {a b: {model.norm: bn}, a/b: {model.norm: gn}}"), {})


def test_numbers_without_a_point():
    assert parse_value("3e-4") == 3e-4


@pytest.mark.parametrize("name", [name for name in builtin_configs() if name.startswith("sweep_")])
def test_the_studies_that_ship(name):
    read = read_study(builtin_configs()[name])
    trials = foresee(read).trials
    assert len(trials) > 5
    check_values(read, trials)


def test_the_headline_has_every_control():
    read = read_study(builtin_configs()["sweep_batch_size.yaml"])
    assert len(read.seeds) >= 8
    a, b = read.arms
    assert {"bn", "bn momentum corrected", "bn re-estimated", "bn batch statistics", "bn_frozen", "gn_ws"} == set(
        a.cases
    )
    assert a.fixed["accumulation.effective_batch_size"] == 16
    assert b.fixed["accumulation.effective_batch_size"] is None
    assert all(arm.select is not None and len(arm.select.seeds) >= 3 for arm in read.arms)
    assert Path(read.base).name == "pets_gnws.yaml"


def test_no_trial_may_name_any_class_unless_that_was_said(study):
    read = study("grid: {model.norm: [bn]}")
    [trial] = plan_trials(read, {}).trials
    assert Study.allow_class_path is read.allow_class_path is False
    assert "--allow_class_path" not in arguments_of(read, trial)
    assert arguments_of(replace(read, allow_class_path=True), trial)[-1] == "--allow_class_path"


def test_a_value_on_the_command_line_is_not_chosen_any_more(study):
    planned = plan_trials(study(SELECT, **{"optimizer.lr": 0.3}), {})
    assert {trial.stage for trial in planned.trials} == {"final"}


def test_what_a_study_holds(study):
    read = study("grid: {model.norm: [bn]}\nsamples: 1\nnotes: [one, 2]")
    assert (read.name, read.samples, read.notes, read.metric) == ("sweep_x", 1, ("one", "2"), "acc1")
    settings = read.shared_settings()
    assert settings["optimizer.lr"] == 0.01
    assert "data.root" not in settings
    assert read_study(builtin_configs()["sweep_segmentation.yaml"]).metric == "miou"


def test_a_choice_of_which_little_is_said(study):
    [arm] = study("select: {values: [1, 2]}").arms
    assert arm.select == Selection("optimizer.lr", (1.0, 2.0), (1000, 1001, 1002), per=None, extend=2)


def test_a_base_beside_the_study_and_another_name(tmp_path):
    path = tmp_path / "sweep_y.yaml"
    path.write_text("base: mine.yaml\ngrid: {data.batch_size: [1]}\n")
    (tmp_path / "mine.yaml").write_text("model: {norm: bn}\ndata: {class_path: Pets}\n")
    read = read_study(path, name="again")
    assert (read.name, read.base) == ("again", tmp_path / "mine.yaml")
    assert read.settings == {"model.norm": "bn", "data": "Pets"}
    with pytest.raises(ConfigError, match=r"--name \.\./x: a study names a folder"):
        read_study(path, name="../x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {model.norm: [bn]}", "say which configuration every run starts from"),
        ("- 1", "holds no keys"),
        ("model: {norm: bn}", r"configures one run: gn-transfer fit --config x\.yaml"),
        ("data: {class_path: Pets}", "configures one run"),
    ],
)
def test_files_that_are_no_study(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_study(path)


def test_each_case_chooses_for_itself(study):
    text = "cases: {a: {model.norm: bn}, b: {model.norm: gn_ws}}\nselect: {values: [0.1, 0.2], seeds: 1}"
    assert names(study(text)) == [f"select-{case}-lr{rate}-seed1000" for case in "ab" for rate in (0.1, 0.2)]


def test_what_is_to_come(study):
    assert plan_trials(study(SELECT + "test: last"), {}).to_come == 2 * 3 + 2 * 3  # final runs, and their tests
    assert plan_trials(study("grid: {model.norm: [bn, gn_ws]}\nseeds: 2\ntest: last"), {}).to_come == 4
    middle = foresee(study("select: {values: [1, 2, 3, 4, 5], seeds: 1}")).trials[-1]
    assert middle.name == "lr3-seed0"


def test_the_data_module_stands_before_its_keys(study):
    [trial] = plan_trials(study("set: {data.root: x}\ngrid: {model.norm: [bn]}", data="Folder"), {}).trials
    assert trial.arguments()[:4] == ["--data", "Folder", "--data.root", "x"]


def test_a_study_of_no_trials(study):
    with pytest.raises(ConfigError, match="the study sweep_x has no trials"):
        plan_trials(study("arms: {}\ngrid: {model.norm: [bn]}"), {})


def test_numbers_without_a_point_at_any_depth():
    assert parse_value("[3e-4, {a: 1e-3}]") == [3e-4, {"a": 1e-3}]
