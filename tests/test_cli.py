"""The command line: what it reads, what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.cli import main
from tests.zoo import make_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_config("llama", num_hidden_layers=2).save_pretrained(folder)
    return folder


def test_reports_on_a_directory(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--sp-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert "looked at for 4 ranks" in out


def test_json_of_a_config_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint / "config.json"), "--sp-size", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["header"]["sp_size"] == 2
    assert facts["sites"][0]["count"] == 2


def test_layer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--layer", "1"]) == 0
    assert "model.layers.1" in capsys.readouterr().out


def test_heads_that_do_not_divide(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--sp-size", "3"]) == 0
    shown = capsys.readouterr().out
    assert "2-3 of 8" in shown and "1-2 of 4" in shown


def test_refused_for_a_layer_that_is_not_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--layer", "9"]) == 1
    assert "expected a layer from 0 to 1" in capsys.readouterr().err


def test_refused_for_a_string_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "expected a hub name, a directory" in capsys.readouterr().err


def test_refused_for_a_model_without_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "vit"]) == 1
    assert "language model, found ViTConfig" in capsys.readouterr().err


WRONG_USAGE = [
    [],
    ["inspect"],
    ["inspect", "llama", "--sp-size", "0"],
    ["operate", "llama"],
    ["verify", "llama", "--device", "meta"],
    ["verify", "llama", "--device", "nowhere"],
]


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: surgery" in capsys.readouterr().err
