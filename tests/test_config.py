from pathlib import Path

import pytest
import yaml

from gn_transfer.__main__ import main
from gn_transfer.config import NORMS, ConfigError, builtin_configs, find_config

PETS = ("pets_gnws", "pets_bn", "pets_bn_frozen", "pets_gn")


def flat(config, prefix=""):
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def load(name):
    return flat(yaml.safe_load(builtin_configs()[f"{name}.yaml"].read_text()))


def test_a_bare_name_finds_a_builtin_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config("pets_gnws.yaml") == find_config("pets_gnws") == builtin_configs()["pets_gnws.yaml"]


def test_a_file_wins_over_a_builtin_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("pets_gnws.yaml").write_text("{}")
    assert find_config("pets_gnws.yaml") == Path("pets_gnws.yaml")


def test_a_miss_lists_the_builtin_configs():
    with pytest.raises(ConfigError, match=r"did you mean 'pets_gnws.yaml'.*pets_bn\.yaml"):
        find_config("pets_gnw.yaml")


@pytest.mark.parametrize(
    ("name", "base", "allowed"),
    [
        ("pets_bn", "pets_gnws", {"model.norm"}),
    ],
)
def test_arms_differ_in_the_norm_and_what_it_implies_alone(name, base, allowed):
    ours, theirs = load(name), load(base)
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} == allowed


@pytest.mark.parametrize("path", builtin_configs().values(), ids=lambda path: path.name)
def test_each_config_begins_with_what_it_does_and_the_command(path):
    study = path.stem.startswith("sweep_")
    head = path.read_text().split("title:" if study else "seed_everything")[0]
    assert head.startswith("# ")
    assert f"gn-transfer {'sweep' if study else 'fit'} --config {path.name}" in head
    assert study or load(path.stem)["model.norm"] in NORMS


@pytest.mark.parametrize(
    ("command", "config", "message"),
    [
        ("fit", "sweep_blog.yaml", "is a study of many runs: gn-transfer sweep --config"),
        ("sweep", "sample_gnws.yaml", "configures one run: gn-transfer fit --config sample_gnws.yaml"),
    ],
)
def test_a_study_is_no_configuration_of_a_run(command, config, message, capsys):
    assert main([command, "--config", config]) == 2
    assert message in capsys.readouterr().err
