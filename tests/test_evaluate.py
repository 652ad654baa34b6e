"""Scores of known translations, and the command line of evaluate.py."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from config import InputError
from evaluate import format_scores, main, score, signature
from translate import Translator


def test_scores_of_perfect_and_partly_wrong_translations():
    references = ["the small cat sleeps now", "we eat two red apples"]
    perfect = score(references, references)
    assert perfect == pytest.approx({"bleu": 100, "chrf": 100, "cer": 0, "wer": 0, "exact": 100})
    half = score([references[0], "we eat two red pears"], references)
    assert half["exact"] == 50
    assert half["wer"] == pytest.approx(10)
    assert half["bleu"] < 100


@pytest.mark.parametrize("wanted", [True, False])
def test_tokenized_text_is_reported_only_if_wanted(caplog, wanted):
    lines = ["the small cat sleeps ."] * 100
    score(lines, lines, warn_tokenized=wanted)
    assert ("tokenized period" in caplog.text) == wanted


def test_printed_scores_have_names_and_units():
    printed = format_scores({"bleu": 99.96, "chrf": 100.0, "cer": 0.1, "wer": 0.2, "exact": 99.5})
    assert printed == "BLEU 100.0   chrF 100.0   CER 0.1%   WER 0.2%   exact match 99.5%"


def test_the_signature_includes_the_tokenizer():
    assert "tok:13a" in signature()
    assert "tok:none" in signature("none")
    assert "nc:6" in signature(metric="chrf")


@pytest.mark.slow
def test_json_scores_of_two_files(trained_run, tmp_path):
    (tmp_path / "a.en").write_text("She sleeps.\nHe sleeps.\n")
    (tmp_path / "a.it").write_text("Dorme.\nDorme.\n")
    run = [sys.executable, str(ROOT / "evaluate.py"), "--run-dir", str(trained_run), "--json"]
    done = subprocess.run(
        [*run, "--source", "a.en", "--reference", "a.it"], capture_output=True, text=True, cwd=tmp_path
    )
    found = json.loads(done.stdout)
    assert found["sentences"] == 2
    assert {"bleu", "chrf", "cer", "wer", "exact", "signature", "chrf_signature", "seconds"} <= set(found)


@pytest.mark.slow
def test_the_scores_of_a_split_are_printed(trained_run, capsys):
    main(run_dir=(str(trained_run),), split="test")
    out = capsys.readouterr().out
    assert "test split, 1,000 sentences, beam 1" in out
    assert "exact match" in out
    assert signature() in out


@pytest.mark.slow
def test_the_search_settings_are_applied_and_printed(trained_run, tmp_path, capsys):
    (tmp_path / "a.en").write_text("A horse hears my white horse.\n")
    (tmp_path / "a.it").write_text("Un cavallo sente il mio cavallo bianco.\n")
    files = {"source": str(tmp_path / "a.en"), "reference": str(tmp_path / "a.it"), "output": str(tmp_path / "out")}
    main(run_dir=(str(trained_run),), beam_size=2, no_repeat_ngram=1, **files)
    assert (tmp_path / "out").read_text(encoding="utf8").count("cavallo") == 1
    assert "1 sentence, beam 2, length penalty 0.6, no-repeat n-gram 1, " in capsys.readouterr().out


@pytest.mark.slow
def test_the_translations_are_saved_one_per_line(trained_run, tmp_path, capsys):
    (tmp_path / "a.en").write_text("She sleeps.\n\nI can eat an apple.\n")
    (tmp_path / "a.it").write_text("Dorme.\n\nPosso mangiare una mela.\n")
    files = {"source": str(tmp_path / "a.en"), "reference": str(tmp_path / "a.it"), "output": str(tmp_path / "out")}
    main(run_dir=(str(trained_run),), **files)
    expected = Translator.load(trained_run).translate(["She sleeps.", "", "I can eat an apple."])
    assert (tmp_path / "out").read_text(encoding="utf8").split("\n") == [*expected, ""]
    with pytest.raises(InputError, match=r"cannot write .*; give the name of a file in an existing folder"):
        main(run_dir=(str(trained_run),), output=str(tmp_path / "none" / "out"))


@pytest.mark.slow
def test_a_translation_is_saved_in_one_line_even_if_it_has_line_breaks(trained_run, tmp_path, monkeypatch):
    (tmp_path / "a.en").write_text("I sleep.\nWe sleep.\n")
    (tmp_path / "a.it").write_text("Dormo.\nDormiamo.\n")
    monkeypatch.setattr(Translator, "translate", lambda _, lines, *__, **___: [f"{line}\nand\tmore" for line in lines])
    monkeypatch.chdir(tmp_path)
    main(run_dir=(str(trained_run),), device="cpu", source="a.en", reference="a.it", output="a.out")
    assert (tmp_path / "a.out").read_text() == "I sleep. and more\nWe sleep. and more\n"


def test_a_sentence_longer_than_seq_len_counts_as_a_blank_translation(trained_run, tmp_path, capsys):
    (tmp_path / "a.en").write_text("She sleeps.\n" + "I " * 80 + "\n")
    (tmp_path / "a.it").write_text("Dorme.\nIo\n")
    main(run_dir=(str(trained_run),), source=str(tmp_path / "a.en"), reference=str(tmp_path / "a.it"))
    out = capsys.readouterr()
    assert "line 2 is left blank" in out.err
    assert "2 sentences" in out.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": "a.en"}, "--reference"),
        ({"source": "a.en", "reference": "none.it"}, "none.it"),
        ({"source": "a.en", "reference": "b.it"}, "2 lines and b.it has 1"),
        ({"source": "empty", "reference": "empty"}, "empty contains no sentences"),
        ({"source": "b.it", "reference": "blank"}, "all references of blank are blank"),
        ({"beam_size": 0}, "--beam-size is 0"),
        ({"length_penalty": -1.0}, "--length-penalty is -1"),
        ({"no_repeat_ngram": -1}, "--no-repeat-ngram is -1; give 0 to allow repetitions"),
        ({"weights": "7"}, r"no weights '7' in .*one of tmodel_00\.pt"),
        ({"average": 2}, "1 of the checkpoints .* --average needs 2"),
        ({"average": 0}, "--average is 0; give 1 or more"),
        ({"average": 2, "weights": "0"}, "goes with --weights best or latest"),
    ],
)
def test_bad_arguments_raise_one_line(trained_run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.en").write_text("1\n2\n")
    (tmp_path / "b.it").write_text("1\n")
    (tmp_path / "empty").touch()
    (tmp_path / "blank").write_text("\n")
    with pytest.raises(InputError, match=message):
        main(run_dir=(str(trained_run),), **flags)
