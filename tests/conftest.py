import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Private caches and an unreachable Hub, so that no test depends on a network.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
# A process in the background may ignore Ctrl-C, and one under nohup the hang-up signal; so would all commands that the
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # not on Windows
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
import torch  # noqa: E402

from config import Config, get_config  # noqa: E402
from corpora.toy import toy_pairs  # noqa: E402
from model import Transformer, build_transformer  # noqa: E402
from runs.folder import RunFolder  # noqa: E402


def run_path(config: Config) -> Path:
    """The folder of a run."""
    return RunFolder.of(config).path


def checkpoints(run: Config | Path | str) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return (RunFolder.of(run) if isinstance(run, Config) else RunFolder(run)).checkpoints()


def put_project_beside(notebook_folder: Path) -> None:
    """Makes the first cell of a notebook in this folder do nothing, as on a laptop; PYTHONPATH holds the project."""
    (notebook_folder / "runs").mkdir()
    (notebook_folder / "runs" / "colab.py").touch()


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """400 pairs of the toy corpus as a .tsv file."""
    path = tmp_path / "pairs.tsv"
    pairs = toy_pairs("en", "it", "train")[:400]
    path.write_text("".join(f"{p.src_text}\t{p.tgt_text}\n" for p in pairs), encoding="utf8")
    return path


@pytest.fixture
def tiny_config(tmp_path: Path, pairs_file: Path) -> Config:
    """A run that trains in less than a second: 360 pairs, one small layer, with dropout."""
    return get_config(
        "toy",
        run_dir=str(tmp_path / "run"),
        datasource=str(pairs_file),
        validation_source="",
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        num_heads=2,
        d_ff=64,
        dropout=0.1,
        num_epochs=2,
        batch_tokens=512,
        warmup_steps=5,
        validation_sentences=8,
        validation_examples=1,
        device="cpu",
    )


@pytest.fixture(params=["pre", "post"])
def tiny_model(request) -> Transformer:
    """Random weights, 3 encoder and 2 decoder layers, 4 heads, vocabularies of 50 and 60 tokens, 40 positions."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "N": 3, "h": 4, "d_ff": 64, "decoder_N": 2}
    return build_transformer(50, 60, 40, 40, dropout=0.1, norm=request.param, **sizes).eval()


def train_one_epoch(folder: Path, lang_tgt: str) -> Path:
    """Trains the toy preset for one epoch into `folder`."""
    from train import train_model

    quick = {"num_epochs": 1, "warmup_steps": 100, "validation_sentences": 50, "device": "cpu"}
    train_model(get_config("toy", run_dir=str(folder), lang_tgt=lang_tgt, **quick))
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """An English-Italian run of one epoch, shared by all tests that need a trained model (about 15 s)."""
    return train_one_epoch(tmp_path_factory.mktemp("trained") / "run", "it")


@pytest.fixture
def run_with_odd_pairs(tmp_path: Path) -> Path:
    """A trained run whose corpus has a blank sentence and one that is too long."""
    pairs = tmp_path / "odd.tsv"
    pairs.write_text(f"I sleep.\tDormo.\n\tDormo.\n{'I sleep. ' * 100}\tDormo.\n", encoding="utf8")
    run = tmp_path / "odd_run"
    shutil.copytree(ROOT / "pretrained" / "toy.en-it", run)
    (run / "model.safetensors.sha256").unlink()
    config = json.loads((run / "config.json").read_text(encoding="utf8"))
    config |= dict.fromkeys(("datasource", "validation_source", "test_source"), str(pairs))
    (run / "config.json").write_text(json.dumps(config), encoding="utf8")
    return run


@pytest.fixture(scope="session")
def german_run(tmp_path_factory) -> Path:
    """The same from English to German."""
    return train_one_epoch(tmp_path_factory.mktemp("german") / "run", "de")
