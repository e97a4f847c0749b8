import pytest

from gn_transfer.commands.parsing import explain

KEYS = ["model.norm", "optimizer.lr", "data.img_size", "trainer.max_epochs"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Subcommand 'fit' does not accept option 'model.nrom'", "model.nrom is not a key; did you mean 'model.norm'"),
        ("Unrecognized arguments: --xyz 3", "xyz is not a key; known: model, optimizer, data, trainer."),
        (
            "Parser key \"model.norm\":\n  Expected a typing.Literal['bn', 'gn_ws']. Got value: gnws",
            "model.norm=gnws is not allowed; did you mean 'gn_ws'? Allowed: bn, gn_ws.",
        ),
        ("something\n  else", "something else"),
    ],
)
def test_explain(message, expected):
    assert explain(message, KEYS, ["Pets"]).startswith(expected)
