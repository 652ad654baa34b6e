"""Writes Build_It_Yourself.ipynb from build_it_yourself.py and lessons.py: `python -m course.notebook`."""

import ast
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course.checks import STEPS, Step
from course.lessons import GLOSSARY, LESSONS, QUESTIONS, Lesson
from runs.colab import FIRST_CELL, badge

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, NOTEBOOK = ROOT / "build_it_yourself.py", ROOT / "Build_It_Yourself.ipynb"

INTRODUCTION = f"""# Build it yourself

{badge(NOTEBOOK.name)}

You write the Transformer of "Attention Is All You Need" (Vaswani et al., 2017) in twelve steps, train it on a small
corpus of English and Italian sentences, and look at its attention. Each step has

- an explanation with the formula and the section of the paper,
- a cell with empty functions: replace `raise NotImplementedError` by your code and run it,
- a cell that checks them: it prints that the step has passed, or one sentence that names the mistake or a number that
  differs,
- a hint to unfold, and in most steps a cell that shows the project's own code. Run that cell when your step has passed.

The steps use the functions of earlier steps, so do them in order. If you prefer an editor, write the same functions in
`build_it_yourself.py` and run `python build_it_yourself.py`. Plan four to six hours.

**Names.** B batch (sentences), S source length, T target length, Q and K query and key positions, D width of the model
(`d_model`), H heads, d_k = D / H, V vocabulary. A shape (B, T, D) is that of a tensor with these dimensions."""

START = """import inspect
import math
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import compute.ops
import dataset
import model
import search
from course import checks
from course.checks import (
    check_attention,
    check_decoder,
    check_decoding,
    check_embeddings,
    check_encoder,
    check_feed_forward,
    check_layer_norm,
    check_loss,
    check_masks,
    check_multi_head_attention,
    check_positions,
    check_residual,
    own_functions,
)
from dataset import EOS, PAD, SOS


def show_source(*objects):
    print("\\n\\n".join(inspect.getsource(x) for x in objects))"""

THREE_WORDS = """for name, vectors in checks.THREE_WORDS.items():
    print(f"{name}: {vectors.tolist()}")
context, scores = attention(**checks.THREE_WORDS)
print("scores: rows are queries, columns are keys", scores, "context", context, sep="\\n")"""

TRAINING = """## Train your model

`own_model` puts your functions into a model: the parameters are in PyTorch modules, everything computed with them is
your code. It trains on the toy corpus, 24,000 sentence pairs from a grammar with 250 English and 589 Italian words and
punctuation marks. The test sentences combine words that occur together in no training sentence. Loading takes
some seconds, training half a minute to two minutes. If you change a function, run the next cells again."""

LOOP = "The training loop, which calls your functions:"

ATTENTION = """## Look at its attention

Rows are the target tokens that the decoder reads, columns the source tokens. The row of a token shows what the decoder
looks at when it predicts the *next* token."""

ANSWERS = """## Ten questions

Think of your own answer first. Each cell shows the answer on random numbers or on your model."""

ANSWERS_START = """from evaluate import score
from interpret import interventions
from interpret.trace import record_trace


def without_first(scores):
    others = scores.clone()
    others[..., 0] = 0
    total = others.sum(-1, keepdim=True)
    return torch.where(total > 0, others / total, scores)"""


def function_sources() -> dict[str, str]:
    """The functions of build_it_yourself.py by name."""
    text = SCRIPT.read_text(encoding="utf8")
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {function.name: ast.get_source_segment(text, function) for function in functions}


def hint_cell(hint: str):
    return new_markdown_cell(f"<details><summary>Hint</summary>\n\n{hint.strip()}\n\n</details>")


def step_cells(step: Step, lesson: Lesson, sources: dict[str, str]) -> list:
    check = f"{step.check.__name__}({', '.join(step.names)})"
    cells = [
        new_markdown_cell(f"## Step {step.number}: {step.title}\n\n{lesson.text.strip()}"),
        new_code_cell("\n\n\n".join(sources[name] for name in step.names)),
        new_code_cell(check),
    ]
    if step.names == ("attention",):
        cells.append(new_code_cell(THREE_WORDS))
    cells.append(hint_cell(lesson.hint))
    if lesson.references:
        cells.append(new_code_cell(f"show_source({', '.join(lesson.references)})"))
    return cells


def training_cells() -> list:
    return [
        new_markdown_cell(TRAINING),
        new_code_cell(
            "from course import own_model\n\n"
            "mine = own_functions(globals())\n"
            "corpus = own_model.load_corpus(sentences=100)\n"
            'print(f"{len(corpus.train):,} training pairs")'
        ),
        new_code_cell("own = own_model.train(mine, corpus, steps=280)"),
        new_code_cell(
            'print(f"BLEU {own_model.bleu(mine, own, corpus):.1f}")\n'
            "for source, target in zip(corpus.sources, own_model.translate(mine, own, corpus, corpus.sources[:5])):\n"
            '    print(f"{source}  ->  {target}")'
        ),
        new_markdown_cell(LOOP),
        new_code_cell("show_source(own_model.train, own_model.batch_loss)"),
        new_markdown_cell(ATTENTION),
        new_code_cell(
            "from interpret import charts\n\n"
            "charts.show_in_notebooks()\n"
            'SENTENCE = "I can eat an apple."\n'
            "own_model.draw_cross_attention(mine, own, corpus, SENTENCE)"
        ),
    ]


def question_cells() -> list:
    cells = [new_markdown_cell(ANSWERS), new_code_cell(ANSWERS_START)]
    for number, question in enumerate(QUESTIONS, 1):
        answer = f"<details><summary>Answer</summary>\n\n{question.answer.strip()}\n\n</details>"
        cells += [
            new_markdown_cell(f"### {number}. {question.question}\n\n{answer}"),
            new_code_cell(question.code.strip()),
        ]
    return cells


def glossary_cell():
    rows = [f"- **{term}**: {meaning}" for term, meaning in GLOSSARY.items()]
    return new_markdown_cell("\n".join(["## Glossary\n", *rows]))


def build() -> nbformat.NotebookNode:
    """The notebook, with empty exercises and without outputs."""
    sources = function_sources()
    cells = [new_markdown_cell(INTRODUCTION), new_code_cell(FIRST_CELL), new_code_cell(START)]
    for step, lesson in zip(STEPS, LESSONS, strict=True):
        cells += step_cells(step, lesson, sources)
    cells += [*training_cells(), *question_cells(), glossary_cell()]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:03}"
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return new_notebook(cells=cells, metadata=metadata)


if __name__ == "__main__":
    nbformat.write(build(), NOTEBOOK)
    print(f"wrote {NOTEBOOK.name}, {NOTEBOOK.stat().st_size / 1e3:.0f} KB")
