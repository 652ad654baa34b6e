"""The Translator, precision and device, and the command line of translate.py."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from compute.device import choose_precision, get_device
from config import InputError
from corpora.toy import toy_pairs
from dataset import EOS, SOS, padding_mask
from model import causal_mask
from runs.folder import RunFolder
from search import greedy_decode
from translate import (
    CachedDecoder,
    Translator,
    load_translators,
    main,
    n_best_lines,
    repeat_run_dir,
    translate,
    translate_lines,
)

SENTENCES = [
    "I can eat an apple.",
    "She sleeps.",
    "",
    "Do they see the old horse every day?",
    "  ",
    "I can eat an apple.",
]


@pytest.fixture(scope="module")
def translator(trained_run) -> Translator:
    return Translator.load(trained_run, "cpu")


@pytest.mark.slow
@torch.inference_mode()
def test_greedy_search_equals_a_plain_loop_without_a_cache(translator):
    """The loop runs one sentence at a time and computes all target positions for each new token."""
    model = translator.model
    for sentence in SENTENCES[:2]:
        ids = translator.encode(sentence)
        source = torch.tensor([ids])
        target = torch.tensor([[SOS]])
        while target[0, -1] != EOS and target.size(1) <= 2 * len(ids) + 10:
            out = model(source, target, padding_mask(source), causal_mask(target.size(1)))
            target = torch.cat([target, out[:, -1:].argmax(-1)], 1)
        expected = [i for i in target[0].tolist() if i not in (SOS, EOS)]
        assert translator.search([ids])[0] == expected


def test_auto_precision_is_bf16_for_a_large_model_on_a_cpu_with_bf16_support(monkeypatch):
    cpu, large, small = torch.device("cpu"), torch.nn.Linear(2_000, 1_000), torch.nn.Linear(2, 2)
    for capabilities, expected in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert choose_precision("auto", cpu, large) == expected
        assert choose_precision("auto", cpu, small) == "fp32"
        assert choose_precision("fp32", cpu, large) == "fp32"
    with pytest.raises(InputError, match="no precision 'fp8'"):
        choose_precision("fp8", cpu, small)


@pytest.mark.slow
def test_translations_in_bf16_are_nearly_those_in_fp32(translator, trained_run):
    bf16 = Translator.load(trained_run, "cpu", precision="bf16")
    assert (translator.precision, bf16.precision) == ("fp32", "bf16")
    sentences = [pair.src_text for pair in toy_pairs("en", "it", "validation")[:40]]
    both = zip(translator.hypotheses(sentences, 4), bf16.hypotheses(sentences, 4), strict=True)
    same = [(a, b) for (a,), (b,) in both if a.ids == b.ids]
    assert len(same) >= 32  # after one epoch of training, hypotheses often have similar scores
    differences = [abs(a.log_probability - b.log_probability) / (len(a.ids) + 1) for a, b in same]
    assert 0 < max(differences) < 0.05  # bf16 rounds a logit between 8 and 16 by up to 1/32


@pytest.mark.slow
@torch.inference_mode()
def test_translating_a_batch_equals_translating_each_sentence_separately(translator):
    batched = translator.translate(SENTENCES)
    assert batched == [translator.translate([s])[0] for s in SENTENCES]
    assert batched[2] == batched[4] == ""
    assert batched[0] == batched[5] != batched[1]
    assert batched == translator.translate(SENTENCES, batch_tokens=1)
    beams = translator.translate(SENTENCES, beam_size=4)
    assert beams == [translator.translate([s], beam_size=4)[0] for s in SENTENCES]
    found = translator.hypotheses(SENTENCES, beam_size=4, n_best=2)
    assert [len(hypotheses) for hypotheses in found] == [2, 2, 0, 2, 0, 2]
    assert [translator.tokenizer_tgt.decode(h[0].ids) if h else "" for h in found] == beams


@pytest.mark.slow
def test_the_encoder_runs_once_per_translation(translator, monkeypatch):
    calls = []
    encode = translator.model.encode
    monkeypatch.setattr(translator.model, "encode", lambda *a: calls.append(1) or encode(*a))
    decoder = CachedDecoder(translator.model, torch.tensor([translator.encode("She sleeps.")]), 20)
    greedy_decode(decoder, torch.tensor([20]))
    assert len(calls) == 1


@pytest.mark.slow
def test_a_run_folder_can_be_moved_and_is_found_under_weights(trained_run, translator, tmp_path, monkeypatch):
    weights = RunFolder(trained_run).load_newest()[1]["model"]
    assert all(torch.equal(w, weights[name]) for name, w in translator.model.state_dict().items())
    moved = tmp_path / "weights" / "moved"
    moved.parent.mkdir()
    subprocess.run(["cp", "-r", str(trained_run), str(moved)], check=True)
    monkeypatch.chdir(tmp_path)
    assert (
        translate(SENTENCES[0]) == translate(SENTENCES[0], run_dir=str(moved)) == translator.translate(SENTENCES[:1])[0]
    )


@pytest.mark.slow
def test_unknown_words_and_too_long_sentences_are_reported(translator, capsys):
    assert translator.unknown_words("I can eat a pizza with Bob.") == ["pizza", "with", "Bob"]
    too_long = "I " * 100
    with pytest.raises(InputError, match="102 tokens exceeds the limit of 64"):
        translator.translate([too_long])
    lines = list(translate_lines(translator, iter(["She sleeps.", too_long, "He sleeps."]), chunk=2))
    assert (lines[0] != "", lines[1], lines[2] != "") == (True, "", True)
    assert "line 2 is left blank" in capsys.readouterr().err


@pytest.mark.parametrize("beam_size", [1, 3])
def test_an_ensemble_of_equal_runs_translates_like_one_of_them(trained_run, translator, beam_size):
    ensemble = load_translators((str(trained_run),) * 3, "cpu")
    assert ensemble.translate(SENTENCES, beam_size) == translator.translate(SENTENCES, beam_size)
    assert ensemble.weights == " + ".join([f"{trained_run.name}/{translator.weights}"] * 3)


def test_an_ensemble_differs_from_its_members_and_may_consist_of_epochs_of_one_run(trained_run, translator):
    ensemble = load_translators((str(trained_run),), "cpu", ("0", "best"))
    torch.manual_seed(0)
    for weight in ensemble.members[1].model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    encoded = [translator.encode(SENTENCES[0])]
    log_p = [
        t.beam_search(encoded, 2)[0][0].log_probability for t in (translator, ensemble.members[1], ensemble)
    ]  # of the best hypothesis, which all three agree on
    assert min(log_p[:2]) < log_p[2] < max(log_p[:2])


def test_runs_that_do_not_fit_together_are_no_ensemble(trained_run, german_run):
    with pytest.raises(InputError, match="different languages or tokenizers"):
        load_translators((str(trained_run), str(german_run)), "cpu")
    with pytest.raises(InputError, match="2 runs and 3 --weights"):
        load_translators((str(trained_run),) * 2, "cpu", ("best", "latest", "0"))


def test_several_runs_after_one_flag_are_told_from_a_sentence(trained_run):
    run = str(trained_run)
    flags = ["--run-dir", run, "--run-dir", run]
    assert repeat_run_dir(["--run-dir", run, run, "I sleep."]) == [*flags, "I sleep."]
    assert repeat_run_dir(["I sleep.", "--run-dir", run, run, "--beam-size", "5"]) == [
        "I sleep.",
        *flags,
        "--beam-size",
        "5",
    ]
    assert repeat_run_dir(["--run-dir", "missing", run]) == ["--run-dir", "missing", "--run-dir", run]
    assert repeat_run_dir(["--weights", "3", run]) == ["--weights", "3", run]


def test_each_translation_is_one_line_of_the_output():
    translator = Translator.load(ROOT / "pretrained" / "toy.en-it", "cpu")
    translator.tokenizer_tgt = SimpleNamespace(decode=lambda ids: "one\ntwo\tthree" if ids else "")
    assert list(translate_lines(translator, ["I sleep.", ""], 10)) == ["one two three", ""]
    (line,) = n_best_lines(translator, ["I sleep."], 10, beam_size=2)
    assert line.split("\t")[3] == "one two three"


def test_an_unknown_or_missing_device_is_an_error():
    assert get_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="tpu"):
        get_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no cuda device"):
            get_device("cuda")


def run_script(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "translate.py"), *arguments], capture_output=True, **options)


@pytest.mark.slow
def test_the_command_line_translates_arguments_and_lines_and_reports_errors(trained_run, translator, tmp_path):
    run = ["--run-dir", str(trained_run)]
    digits = run_script(*run, "5")
    assert digits.returncode == 0
    assert b"not in the vocabulary of this run: 5" in digits.stderr
    piped = run_script(*run, input="\r\n".join(SENTENCES).encode())
    assert piped.stdout.decode().splitlines() == translator.translate(SENTENCES)
    bad = run_script(*run, input=b"She sleeps.\n\xff\n")
    assert (bad.returncode, bad.stderr.count(b"\n")) == (2, 1)
    assert b"stdin line 2 is not UTF-8" in bad.stderr
    not_utf8 = run_script(*run, b"\xff\xfe ab")
    assert (not_utf8.returncode, not_utf8.stderr.count(b"\n")) == (2, 1)
    none = run_script("She sleeps.", cwd=tmp_path)
    assert (none.returncode, none.stdout, none.stderr.count(b"\n")) == (2, b"", 1)
    assert b"no trained run" in none.stderr
    n_best = run_script(*run, "--beam-size", "3", "--n-best", "2", "She sleeps.").stdout.decode().splitlines()
    numbers, scores, log_probabilities, texts = zip(*(line.split("\t") for line in n_best), strict=True)
    assert numbers == ("1", "1")
    assert float(scores[0]) > float(scores[1])
    assert max(map(float, log_probabilities)) < 0
    assert texts[0] == translator.translate(["She sleeps."], beam_size=3)[0] != texts[1]
    too_many = run_script(*run, "--beam-size", "2", "--n-best", "3", "She sleeps.")
    assert (too_many.returncode, too_many.stderr.count(b"\n")) == (2, 1)
    missing = run_script("--run-dir", "nowhere", "She sleeps.", cwd=tmp_path)
    assert (missing.returncode, missing.stderr.count(b"\n")) == (2, 1)
    assert b"nowhere" in missing.stderr


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("members", [1, 2])
def test_no_token_is_repeated_with_an_ngram_size_of_one(trained_run, translator, members, beam_size, capsys):
    sentence = "A horse hears my white horse."
    assert has_repeated_word(translator.translate([sentence], beam_size)[0])
    main(sentence, run_dir=(str(trained_run),) * members, beam_size=beam_size, no_repeat_ngram=1, device="cpu")
    assert not has_repeated_word(capsys.readouterr().out)


def has_repeated_word(text: str) -> bool:
    words = text.split()
    return len(set(words)) < len(words)


@pytest.mark.slow
def test_a_closed_pipe_ends_the_program_without_an_error(trained_run):
    command = (
        f'yes "She sleeps." | head -2000 | {sys.executable} {ROOT / "translate.py"} --run-dir {trained_run} | head -1'
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1
