"""The course: checks of empty, right and wrong solutions, the notebook, the script, training, and grading."""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import course_solutions
import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, put_project_beside
from course_mistakes import MISTAKES
from nbclient import NotebookClient

from course import grade, notebook
from course.checks import STEPS, CheckFailed, RandomModel, best_of_project, own_functions, run_step, sentences, step_of
from course.lessons import GLOSSARY, LESSONS, QUESTIONS
from dataset import EOS, PAD, SOS
from search import length_normalizer

SCRIPT, NOTEBOOK = ROOT / "build_it_yourself.py", ROOT / "Build_It_Yourself.ipynb"
NAMES = [name for step in STEPS for name in step.names]
RIGHT = {name: getattr(course_solutions, name) for name in NAMES}


def message_of(step, namespace: dict) -> str:
    with pytest.raises(CheckFailed) as failure:
        run_step(step, namespace)
    return str(failure.value)


@pytest.fixture(scope="module")
def empty() -> dict:
    """The functions of build_it_yourself.py, none of which is written."""
    return grade.load_functions(SCRIPT)


# ---------------------------------------------------------------------------- empty and right solutions


def test_there_are_twelve_steps_with_a_lesson_each():
    assert [step.number for step in STEPS] == list(range(1, 13))
    assert len(LESSONS) == 12


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title)
def test_an_empty_function_fails_with_its_own_message(step, empty):
    assert message_of(step, empty) == f"Step {step.number}, {step.names[0]}, is not written yet"


@pytest.mark.parametrize("name", NAMES)
def test_each_empty_function_is_named_if_the_others_are_right(name, empty):
    step = step_of(name)
    assert message_of(step, RIGHT | {name: empty[name]}) == f"Step {step.number}, {name}, is not written yet"


def test_a_function_that_returns_nothing_is_not_written_yet():
    message = message_of(STEPS[3], {"feed_forward": lambda x, linear_1, linear_2: ...})
    assert message == "Step 4, feed_forward: the result is of type ellipsis; return a tensor"
    message = message_of(STEPS[3], {"feed_forward": lambda x, linear_1, linear_2: None})
    assert message == "Step 4, feed_forward, is not written yet: it returns None"


def test_a_missing_function_is_named():
    assert message_of(STEPS[3], {}) == "Step 4, feed_forward, is missing: there is no function of that name"


def test_a_step_that_needs_an_empty_step_names_it(empty):
    def embed(ids, weight, dropout):
        return dropout(empty["embeddings"](ids, weight))

    message = message_of(STEPS[1], RIGHT | {"embed": embed})
    assert message == "Step 2, embed, needs Step 1, embeddings, which is not written yet"


def test_an_exception_is_reported_with_its_line():
    def feed_forward(x, linear_1, linear_2):
        return linear_1(linear_2(x))

    message = message_of(STEPS[3], {"feed_forward": feed_forward})
    assert message.startswith("Step 4, feed_forward: RuntimeError in the line `return linear_1(linear_2(x))`")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.title)
def test_the_solutions_pass_with_one_line(step, capsys):
    run_step(step, RIGHT)
    printed = capsys.readouterr().out
    assert printed.startswith(f"Step {step.number} passed: ")
    assert printed.count("\n") == 1


def other_layer_norm(x, gain, bias, eps=1e-5):
    return F.layer_norm(x, (x.size(-1),), gain, bias, eps)


def other_positional_encoding(seq_len, d_model):
    """As in the tutorial."""
    pe = torch.zeros(seq_len, d_model)
    position = torch.arange(0, seq_len, dtype=torch.float).unsqueeze(1)
    div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))
    pe[:, 0::2], pe[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
    return pe


def other_masked_attention(query, key, value, mask):
    """With a large negative number instead of -infinity, and in place."""
    scores = torch.einsum("...qd,...kd->...qk", query, key) / query.size(-1) ** 0.5
    scores.masked_fill_(mask == 0, -1e9)
    scores = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return [scores @ value, scores]


def other_residual(x, sublayer, norm, dropout):
    """With an addition in place, but not to the input."""
    y = dropout(sublayer(norm(x))).clone()
    y += x
    return y


def other_shift_labels(target):
    """As dataset.batch_of: the decoder does not read [EOS]."""
    label = target[:, 1:]
    return target[:, :-1].masked_fill(label == PAD, PAD), label


def other_smoothed_loss(logits, label, smoothing):
    return F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=PAD, label_smoothing=smoothing)


def other_greedy_decode(next_logits, max_length):
    """With a tensor of ids."""
    ids = torch.tensor([SOS])
    for _ in range(max_length):
        token = next_logits(ids).argmax(-1, keepdim=True)
        if token == EOS:
            break
        ids = torch.cat([ids, token])
    return ids[1:]


OTHERS = [
    other_layer_norm,
    other_positional_encoding,
    other_masked_attention,
    other_residual,
    other_shift_labels,
    other_smoothed_loss,
    other_greedy_decode,
]


@pytest.mark.parametrize("function", OTHERS, ids=lambda function: function.__name__)
def test_other_right_solutions_pass(function):
    name = function.__name__.removeprefix("other_")
    run_step(step_of(name), RIGHT | {name: function})


def test_double_precision_is_named():
    def positional_encoding(seq_len, d_model):
        return RIGHT["positional_encoding"](seq_len, d_model).double()

    assert "holds torch.float64" in message_of(STEPS[1], RIGHT | {"positional_encoding": positional_encoding})


def test_a_result_in_place_of_a_function_is_explained():
    def encoder_block(x, src_mask, block):
        return block.residual_connections[1](x, block.feed_forward_block(x))

    assert "give a function of x" in message_of(STEPS[8], RIGHT | {"encoder_block": encoder_block})


# ---------------------------------------------------------------------------- wrong solutions


def test_there_are_enough_mistakes_of_every_step():
    assert len(MISTAKES) >= 18
    assert {step_of(name).number for name, _, _ in MISTAKES.values()} == set(range(1, 13))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    name, function, words = MISTAKES[mistake]
    message = message_of(step_of(name), RIGHT | {name: function})
    assert message.startswith(f"Step {step_of(name).number}, {name}: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.slow
def test_no_two_mistakes_of_a_function_have_the_same_message():
    messages = {}
    for mistake, (name, function, _) in MISTAKES.items():
        messages.setdefault(message_of(step_of(name), RIGHT | {name: function}), []).append(mistake)
    assert [found for found in messages.values() if len(found) > 1] == [["norm_unbiased", "norm_unbiased_std"]]


def test_a_mistake_without_a_name_is_reported_with_a_number():
    message = message_of(STEPS[0], {"embeddings": lambda ids, weight: weight[ids] * 3})
    assert "where the reference has" in message


def test_a_constant_ratio_to_the_reference_is_reported():
    message = message_of(STEPS[0], {"embeddings": lambda ids, weight: weight[ids] * 3})
    assert message.endswith(": everywhere 0.75 times the reference")


def test_a_scalar_is_reported_without_a_place():
    def smoothed_loss(logits, label, smoothing):
        return 3 * RIGHT["smoothed_loss"](logits, label, smoothing)

    message = message_of(STEPS[10], RIGHT | {"smoothed_loss": smoothed_loss})
    assert "where the reference has" in message
    assert "at ()" not in message


def test_an_error_that_occurs_only_with_gradients_is_reported():
    def feed_forward(x, linear_1, linear_2):
        return torch.from_numpy(RIGHT["feed_forward"](x, linear_1, linear_2).numpy())

    message = message_of(STEPS[3], {"feed_forward": feed_forward})
    assert message.startswith("Step 4, feed_forward: RuntimeError in the line")


def test_the_source_cell_of_a_step_does_not_hold_a_later_answer():
    cells = [cell.source for cell in notebook.build().cells]
    before_masks = cells[: next(i for i, cell in enumerate(cells) if cell.startswith("## Step 6"))]
    assert not any("MultiHeadAttentionBlock" in cell for cell in before_masks if cell.startswith("show_source"))


def test_a_beam_that_holds_all_sentences_finds_the_best_of_them():
    """The reference of the check of beam search, against enumeration."""
    for seed in range(4):
        next_logits = RandomModel(seed)
        best = max(sentences(next_logits), key=lambda s: s.log_p / length_normalizer(s.length, 1.5))
        assert best_of_project(next_logits, 4, 400) == best.ids


# ---------------------------------------------------------------------------- notebook and script


def test_the_notebook_is_generated_from_the_script_and_the_lessons():
    assert nbformat.read(NOTEBOOK, as_version=4) == notebook.build()  # if not: python -m course.notebook


def test_the_notebook_is_small_and_without_outputs():
    assert NOTEBOOK.stat().st_size < 300_000
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


def test_the_script_and_the_notebook_hold_the_same_empty_functions():
    functions = notebook.function_sources()
    assert list(functions) == NAMES
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    for step in STEPS:
        assert "\n\n\n".join(functions[name] for name in step.names) in cells
    for name, source in functions.items():
        docstring, body = ast.parse(source).body[0].body
        assert ast.unparse(body) == "raise NotImplementedError", name
        assert isinstance(docstring, ast.Expr)


def test_the_solutions_have_the_signatures_of_the_exercises():
    def signatures(path: Path) -> dict[str, str]:
        nodes = ast.parse(path.read_text(encoding="utf8")).body
        return {node.name: ast.unparse(node.args) for node in nodes if isinstance(node, ast.FunctionDef)}

    assert signatures(Path(course_solutions.__file__)) == signatures(SCRIPT)


def test_there_are_ten_questions_and_thirty_terms():
    assert len(QUESTIONS) == 10
    assert len(GLOSSARY) >= 30
    assert all("\n" not in meaning for meaning in GLOSSARY.values())
    for question in QUESTIONS:
        assert len(question.code.strip().splitlines()) <= 12


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_stops_at_the_first_failure():
    done = run_script(SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "Step 1, embeddings, is not written yet\n")


@pytest.mark.slow
def test_the_script_checks_one_step_and_prints_hints():
    assert run_script(SCRIPT, "--step", "4").stderr == "Step 4, feed_forward, is not written yet\n"
    assert "torch.relu" in run_script(SCRIPT, "--hint", "4").stdout


@pytest.mark.slow
def test_the_script_passes_with_the_solutions(tmp_path):
    script = tmp_path / "solved.py"
    main = SCRIPT.read_text(encoding="utf8").partition('if __name__ == "__main__":')
    script.write_text(Path(course_solutions.__file__).read_text(encoding="utf8") + "".join(main[1:]), encoding="utf8")
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [f"Step {i} passed" for i in range(1, 13)]


# ---------------------------------------------------------------------------- grading


def solved_notebook() -> nbformat.NotebookNode:
    """The notebook with the solutions in its exercise cells."""
    text = Path(course_solutions.__file__).read_text(encoding="utf8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    solutions = {node.name: ast.get_source_segment(text, node) for node in nodes}
    solved = nbformat.read(NOTEBOOK, as_version=4)
    for cell in solved.cells:
        for name, source in notebook.function_sources().items():
            if cell.cell_type == "code":
                cell.source = cell.source.replace(source, solutions[name])
    return solved


@pytest.mark.slow
def test_a_class_is_graded_with_one_command(tmp_path):
    text = Path(course_solutions.__file__).read_text(encoding="utf8")
    files = [tmp_path / name for name in ("anna.py", "bo.py", "cleo.ipynb")]
    files[0].write_text(text + "\nraise SystemExit('not executed')\n", encoding="utf8")
    files[1].write_text(text.replace(" / math.sqrt(query.size(-1))", "", 1), encoding="utf8")
    nbformat.write(solved_notebook(), files[2])
    done = run_script(SCRIPT, "--grade", *map(str, files))
    assert done.returncode == 0, done.stderr
    header, anna, bo, mistake, cleo = done.stdout.splitlines()
    assert header.split() == ["passed", *map(str, range(1, 13))]
    assert anna.split()[:4] == ["anna.py", "12", "of", "12"]
    assert bo.split()[:4] == ["bo.py", "11", "of", "12"]
    assert bo.split()[4:] == ["-" if step == 5 else "+" for step in range(1, 13)]
    assert mistake.strip().startswith("Step 5, attention: scores are not divided by sqrt(d_k)")
    assert cleo.split()[:4] == ["cleo.ipynb", "12", "of", "12"]


def test_broken_cells_and_other_statements_do_not_stop_grading(tmp_path):
    path = tmp_path / "student.ipynb"
    cells = [
        "!pip install x\nprint(undefined)",
        "def f(:",
        "SCALE = 4",
        "%time\ndef embeddings(ids, weight):\n    return 1",
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    namespace = grade.load_functions(path)
    assert namespace["SCALE"] == 4
    messages = grade.grade_file(path)
    assert messages[0] == "Step 1, embeddings: the result is of type int; return a tensor"
    assert messages[3] == "Step 4, feed_forward, is missing: there is no function of that name"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "solution.py"
    path.write_text("def embeddings(ids, weight):\n    return weight[ids]\n", encoding="utf-8-sig")
    assert "embeddings" in grade.load_functions(path)


def test_files_with_the_same_name_are_told_apart(monkeypatch):
    monkeypatch.setattr(grade, "grade_in_process", lambda path: ["not finished"])
    lines = grade.table([Path("ann/solution.py"), Path("bob/solution.py"), Path("bob/other.py")]).splitlines()
    assert [line.split()[0] for line in lines[1::2]] == [
        *map(str, (Path("ann/solution.py"), Path("bob/solution.py"))),
        "other.py",
    ]


@pytest.mark.slow
def test_an_endless_loop_and_a_damaged_file_are_reported(tmp_path, monkeypatch):
    endless, damaged = tmp_path / "endless.py", tmp_path / "damaged.ipynb"
    endless.write_text("def embeddings(ids, weight):\n    while True:\n        pass\n")
    damaged.write_text("{")
    assert grade.grade_in_process(damaged)[0].startswith("cannot be read: ")
    monkeypatch.setattr(grade, "SECONDS", 15)
    assert grade.grade_in_process(endless) == ["not finished after 15 seconds: is there an endless loop?"]


@pytest.mark.slow
def test_a_missing_file_is_an_error():
    done = run_script(SCRIPT, "--grade", "nobody.py")
    assert (done.returncode, done.stderr) == (2, "error: no file nobody.py; give solution files, .py or .ipynb\n")


# ---------------------------------------------------------------------------- training


@pytest.mark.slow
def test_a_model_of_the_solutions_learns_the_toy_corpus(tmp_path, monkeypatch):
    from course import own_model

    monkeypatch.chdir(tmp_path)
    functions = own_functions(RIGHT)
    corpus = own_model.load_corpus(sentences=100)
    model = own_model.train(functions, corpus)
    assert own_model.bleu(functions, model, corpus) >= 90
    # The project's own model computes the same from these weights.
    translator = own_model.translator_of(own_model.with_own_weights(model, corpus), corpus)
    assert translator.translate(corpus.sources[:20]) == own_model.translate(
        functions, model, corpus, corpus.sources[:20]
    )
    trace = own_model.trace(functions, model, corpus, corpus.sources[0])
    assert trace.weights["cross"].shape[:2] == (2, 8)
    assert abs(trace.weights["cross"].sum(-1) - 1).max() < 1e-4


@pytest.mark.slow
def test_in_the_empty_notebook_every_check_fails_with_its_own_message(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    put_project_beside(tmp_path)
    empty = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(empty, timeout=600, resources=place, allow_errors=True).execute()
    checks = [cell for cell in empty.cells if cell.cell_type == "code" and cell.source.startswith("check_")]
    for step, cell in zip(STEPS, checks, strict=True):
        (error,) = cell.outputs
        sentence = f"Step {step.number}, {step.names[0]}, is not written yet"
        assert (error.evalue, error.traceback) == (sentence, [f"CheckFailed: {sentence}"])


@pytest.mark.slow
def test_the_notebook_runs_with_the_solutions(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    put_project_beside(tmp_path)
    solved = solved_notebook()
    for cell in solved.cells:
        cell.source = cell.source.replace("sentences=100", "sentences=40")
    client = NotebookClient(solved, timeout=600, resources={"metadata": {"path": str(tmp_path)}}, record_timing=True)
    client.execute()
    text = json.dumps([cell.get("outputs", []) for cell in solved.cells])
    assert all(f"Step {step.number} passed" in text for step in STEPS)
    assert float(text.partition("BLEU ")[2].split("\\n")[0]) >= 90
    assert "image/png" in text
