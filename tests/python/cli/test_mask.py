"""``longspan mask``."""

from pathlib import Path

import pytest

from longspan.cli import main

COMMANDS = {
    "window --length 700 --left 100 --right 0 --dilation 2": "heads 1",
    "longformer --length 1024 --window 128": "density  0.2891",
    "longformer --length 700 --window 64 --global-tokens 3,99 --dilation 2 --causal": "heads 1",
    "bigbird --length 1000 --random-blocks 2 --heads 3 --seed 5 --head 2": "heads 3",
    "bigbird --length 1000 --block-size 24 --extra-tokens 7": "of 64 x 64",
    "sparse-transformer --length 500 --stride 22": "heads 1",
    "sparse-transformer --length 500 --stride 22 --mode fixed --heads local,summary": "heads 2",
    "sparse-transformer --length 500 --stride 22 --mode fixed --summary 3": "heads 1",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_facts_and_picture(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "mask.png"
    assert main(["mask", *command.split(), "--png", str(picture)]) == 0
    assert COMMANDS[command] in capsys.readouterr().out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("longformer --length 100 --window 3", "window: expected an even number"),
        ("longformer --length 100 --window 4 --global-tokens 100", "global_tokens: expected positions"),
        ("window --length 100 --block-size 65", "block_size: expected a multiple of 64"),
        ("bigbird --length 100 --head 1", "--head: expected 0 to 0, got 1"),
        ("bigbird --length 100 --png /no/such/folder/x.png", "--png: expected a file in a folder"),
    ],
)
def test_errors(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask", *command.split()]) == 2
    assert message in capsys.readouterr().err


def test_an_option_of_another_pattern_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["mask", "bigbird", "--length", "100", "--window", "4"])
    assert "--window" in capsys.readouterr().err
