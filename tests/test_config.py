"""Settings, presets, command lines, and the names of files in a run folder."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import combinations
from typing import get_args, get_type_hints

import pytest
from conftest import ROOT

from config import PRESETS, Config, InputError, get_config, parse
from runs.folder import RunFolder, get_weights_file_path, latest_weights_file_path
from train import parse_config
from training.resume import check_same_settings


def test_every_preset_is_valid_and_differs_from_the_defaults_and_the_other_presets():
    assert set(PRESETS) == {"opus_books", "tutorial", "toy", "multi30k", "wmt14"}
    assert set(PRESETS) == set(get_args(get_type_hints(Config)["preset"]))
    defaults = dataclasses.asdict(Config())
    for name, values in PRESETS.items():
        assert get_config(name).preset == name
        assert values
        assert values.keys() < defaults.keys()
    repeated = [(name, field) for name in PRESETS for field in PRESETS[name] if PRESETS[name][field] == defaults[field]]
    assert repeated == []  # a preset lists only what differs from the defaults
    for one, other in combinations(PRESETS, 2):
        assert dataclasses.replace(get_config(one), preset=other) != get_config(other)


def test_every_field_has_a_comment_on_its_line():
    lines = (ROOT / "config.py").read_text(encoding="utf8").splitlines()
    for field in dataclasses.fields(Config):
        (line,) = [line for line in lines if line.startswith(f"    {field.name}: ")]
        assert "  # " in line, field.name


def test_flags_override_values_of_the_preset():
    config = parse_config(["--preset", "toy", "--d-model=64", "--num_heads", "2"])
    assert (config.preset, config.d_model, config.num_heads) == ("toy", 64, 2)
    assert config.num_epochs == PRESETS["toy"]["num_epochs"] != Config().num_epochs


def test_a_run_folder_is_named_after_corpus_and_languages_unless_given():
    assert str(RunFolder.of(parse_config(["--lang-tgt", "de"]))) == os.path.join("weights", "opus_books.en-de")
    assert RunFolder.of(get_config(datasource="../my data/train.tsv")).path.name == "train.en-it"
    assert str(RunFolder.of(get_config(run_dir="elsewhere"))) == "elsewhere"


def test_an_existing_run_folder_supplies_the_config_also_when_moved(tmp_path):
    RunFolder(tmp_path).save_config(get_config("toy", d_ff=96))
    config = parse_config(["--run-dir", str(tmp_path), "--num-epochs", "9"])
    assert (config.preset, config.d_ff, config.num_epochs, config.run_dir) == ("toy", 96, 9, str(tmp_path))
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert RunFolder.of(RunFolder(moved).load_config()).path == moved


def test_runs_of_before_the_setting_norm_are_pre_norm(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_config(get_config("toy"))
    values = json.loads(folder.config_file.read_text(encoding="utf8"))
    del values["norm"]
    folder.config_file.write_text(json.dumps(values), encoding="utf8")
    assert folder.load_config().norm == "pre"
    check_same_settings(folder.load_config(), values, tmp_path)
    with pytest.raises(InputError, match="norm 'pre' there, 'post' now"):
        check_same_settings(dataclasses.replace(folder.load_config(), norm="post"), values, tmp_path)


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"d_modell": 8}, ["d_modell", "did you mean d_model?"]),
        ({"d_model": "8"}, ["d_model", "'8'", "int"]),
        ({"d_model": True}, ["d_model", "True"]),
        ({"d_model": 30}, ["d_model is 30", "num_heads", "8"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"lr": float("nan")}, ["lr", "nan"]),
        ({"lr": 0}, ["lr", "above 0"]),
        ({"num_epochs": 0}, ["num_epochs"]),
        ({"batch_size": -1}, ["batch_size", "-1"]),
        ({"seq_len": 2}, ["seq_len", "3"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"lr_schedule": "cosin"}, ["lr_schedule", "cosine"]),
        ({"lang_src": "../en"}, ["lang_src", "../en"]),
        ({"lang_src": ".."}, ["lang_src"]),
        ({"lang_tgt": "en"}, ["lang_tgt", "two different languages"]),
        ({"preload": "newest"}, ["preload", "latest"]),
        ({"shared_vocab": False}, ["share_embeddings", "--shared-vocab"]),
        ({"datasource": ""}, ["datasource", "toy"]),
    ],
)
def test_the_error_for_a_bad_value_is_one_line_that_names_it(values, fragments):
    with pytest.raises(InputError) as error:
        get_config(**values)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--presett", "toy"], ["--presett", "did you mean --preset?"]),
        (["--preset", "toyy"], ["toyy", "did you mean toy?"]),
        (["--preset"], ["--preset"]),
        (["--d-model", "wide"], ["--d-model", "wide"]),
        (["--lr-schedule", "steps"], ["steps", "cosine"]),
        (["toy"], ["extra argument toy"]),
    ],
)
def test_the_error_for_a_bad_flag_is_one_line_that_names_it(flags, fragments):
    with pytest.raises(InputError) as error:
        parse_config(flags)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_parse_calls_a_function_with_the_values_of_its_flags():
    def command(run_dir: str = "", count: int = 1) -> tuple:
        return run_dir, count

    assert parse(command, ["--count", "3"]) == ("", 3)
    with pytest.raises(InputError, match="did you mean --count"):
        parse(command, ["--coutn", "3"])


def test_checkpoints_are_sorted_by_number_and_the_end_of_an_epoch_after_its_steps(tmp_path):
    config = get_config("toy", run_dir=str(tmp_path))
    assert latest_weights_file_path(config) is None
    names = [
        "tmodel_02.pt",
        "tmodel_99.pt",
        "tmodel_100_step_00000900.pt",
        "tmodel_100.pt",
        "tmodel_101_step_00000950.pt",
    ]
    for name in [*names[::-1], "tmodel_x.pt", "other.pt", ".tmodel_102.pt.1.tmp"]:
        (tmp_path / name).touch()
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == names
    assert latest_weights_file_path(config).endswith(names[-1])
    assert get_weights_file_path(config, "7").endswith("tmodel_07.pt")


@pytest.mark.parametrize("content", ["{", '{"d_modell": 3}', '{"d_model": "3"}', "[1]"])
def test_the_error_for_a_corrupt_config_file_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        RunFolder(tmp_path).load_config()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "translate.py", "evaluate.py"])
def test_scripts_print_help_and_a_one_line_error_for_an_unknown_flag(script):
    command = [sys.executable, str(ROOT / script)]
    help_ = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert help_.returncode == 0
    assert "--run-dir" in help_.stdout
    bad = subprocess.run([*command, "--run-dirr", "x"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1
    assert "did you mean --run-dir?" in bad.stderr
