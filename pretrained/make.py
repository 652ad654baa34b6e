"""Trains the toy runs and exports their weights into this folder, for whoever has not trained a run yet.

python pretrained/make.py     # about a minute for each run on two cores; replaces pretrained/toy.en-it and toy.en-de
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from config import get_config  # noqa: E402
from export import to_safetensors  # noqa: E402
from train import train_model  # noqa: E402
from translate import Translator  # noqa: E402

if __name__ == "__main__":
    for language in ("it", "de"):
        with tempfile.TemporaryDirectory() as run_dir:
            train_model(get_config("toy", lang_tgt=language, run_dir=run_dir))
            to_safetensors(Translator.load(run_dir, "cpu"), HERE / f"toy.en-{language}")
