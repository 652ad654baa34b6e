"""Streamed corpora: each pair once per epoch, shuffling, resuming within an epoch, bad shards, whole runs."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_distributed import launch
from test_train import ROOT, checkpoints, final_state, flags_of, is_identical

from config import Config, InputError
from corpora import streams
from corpora.streams import HubShards, load_sample, local_files, open_stream
from corpora.toy import toy_pairs
from dataset import encode_splits
from runs.folder import RunFolder
from train import train_model
from training.streaming import Counts, Cursor, StreamedPairs, Work, prepare_worker

PAIRS = 400
IN_PROCESS_AND_2_WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


def write_jsonl(path: Path, rows: list) -> None:
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 8)


@pytest.fixture
def rows() -> list[dict]:
    return [{"en": pair.src_text, "it": pair.tgt_text} for pair in toy_pairs("en", "it", "train")[:PAIRS]]


@pytest.fixture
def folder(tmp_path, rows) -> Path:
    """The pairs in five shards of different sizes and formats."""
    path = tmp_path / "shards"
    path.mkdir()
    for i, (start, end) in enumerate([(0, 100), (100, 130), (130, 131), (131, 300)]):
        write_jsonl(path / f"part-{i}.jsonl{'.gz' * (i % 2)}", rows[start:end])
    pq.write_table(pa.table({"translation": rows[300:]}), path / "part-4.parquet")
    return path


@pytest.fixture
def config(tiny_config, folder) -> Config:
    source = {"datasource": str(folder), "validation_source": "toy:validation"}
    return replace(tiny_config, **source, stream=True, stream_buffer=48, max_steps=30, batch_tokens=128, seq_len=20)


def stream_of(config: Config) -> StreamedPairs:
    shards = open_stream(config)
    sample = load_sample(shards)
    train, _, *tokenizers = encode_splits(config, sample, sample.select(range(2)))
    return StreamedPairs(config, shards, len(sample), train, *tokenizers)


def texts_of(batches: Iterable[dict]) -> list[tuple[str, str]]:
    return [pair for batch in batches for pair in zip(batch["src_text"], batch["tgt_text"], strict=True)]


def steps_of(stream: StreamedPairs, epoch: int = 0) -> list[list[dict]]:
    """The batches of each step of an epoch, or of the rest of it."""
    stream.begin_epoch(epoch)
    return [batches for batches, _, _ in stream.steps(stream.config.accumulation_steps, pin_memory=False)]


@pytest.mark.parametrize("workers", IN_PROCESS_AND_2_WORKERS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_pair_is_in_one_batch_of_one_process(config, rows, monkeypatch, world, workers):
    found = []
    for rank in range(world):
        monkeypatch.setenv("WORLD_SIZE", "1")
        stream = stream_of(replace(config, num_workers=workers))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(rank))
        stream.begin_epoch(0)
        found.append(texts_of([item.batch for item in stream.items(pin_memory=False) if item.batch]))
    assert sorted(pair for own in found for pair in own) == sorted((row["en"], row["it"]) for row in rows)
    assert min(map(len, found)) > PAIRS / world / 2  # all processes have about the same number


def test_batches_keep_to_batch_tokens_with_little_padding(config):
    for dropout in (0.0, 0.3):
        bpe = replace(config, tokenizer="bpe", vocab_size=600, bpe_dropout=dropout, stream_buffer=200, seq_len=64)
        batches = [batch for step in steps_of(stream_of(bpe)) for batch in step]
        assert all(max(b["encoder_input"].numel(), b["decoder_input"].numel()) <= 128 for b in batches)
        if not dropout:
            positions = sum(batch["decoder_input"].numel() for batch in batches)
            assert sum(len(batch["target_tokens"]) for batch in batches) > 0.85 * positions


def test_the_order_differs_in_each_epoch_and_with_the_seed_and_is_otherwise_the_same(config):
    orders = []
    for epoch, seed in ((0, 42), (1, 42), (0, 43), (0, 42)):
        orders.append([texts_of(step) for step in steps_of(stream_of(replace(config, seed=seed)), epoch)])
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({str(sorted(chain(*order))) for order in orders}) == 1
    with_dropout = stream_of(replace(config, tokenizer="bpe", bpe_dropout=0.3, vocab_size=600))
    ids = [
        str(sorted(row for step in steps_of(with_dropout, epoch) for b in step for row in b["label"].tolist()))
        for epoch in (0, 1)
    ]
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("workers", "accumulation", "every"),
    [(0, 1, 3), (0, 3, 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 1, 16), (3, 2, 8)])],
)
def test_a_stream_resumed_at_any_step_yields_the_remaining_batches(config, workers, accumulation, every):
    config = replace(config, num_workers=workers, accumulation_steps=accumulation)
    stream, steps, states = stream_of(config), [], []
    stream.begin_epoch(0)
    for batches, *_ in stream.steps(stream.config.accumulation_steps, pin_memory=False):
        steps.append(batches)
        states.append(json.loads(json.dumps(stream.state_dict())))
    summary = stream.summary()
    assert f"pairs read in this epoch: {PAIRS}" in summary
    for done in range(1, len(steps), every):
        stream.load_state_dict(states[done - 1])
        assert is_identical(steps_of(stream), steps[done:]), done
        assert stream.summary() == summary
    assert not is_identical(steps_of(stream, epoch=1), steps)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_with_another_number_of_workers_a_resumed_stream_leaves_no_pair_out(config, rows, before, after):
    stream, done = stream_of(replace(config, num_workers=before)), []
    stream.begin_epoch(0)
    steps = stream.steps(stream.config.accumulation_steps, pin_memory=False)
    for batches, _, _ in islice(steps, 12):
        done += texts_of(batches)
    other = stream_of(replace(config, num_workers=after))
    other.load_state_dict(stream.state_dict())
    found = Counter(done + texts_of(chain(*steps_of(other))))
    assert set(found) == {(row["en"], row["it"]) for row in rows}
    assert found.total() - PAIRS <= 2 * config.stream_buffer * max(1, before)


def test_what_is_left_begins_at_the_parts_that_are_least_far():
    work = Work([(shard, 0) for shard in range(4)], parts=2)  # parts with shards of their own: 0, 2 and 1, 3
    assert [work.of(part) for part in (0, 1)] == [([(0, 0), (2, 0)], 0, 1), ([(1, 0), (3, 0)], 0, 1)]
    assert work.after([Cursor(0, 5), Cursor(1, 2)]) == [(0, 5), (2, 0), (3, 2)]
    shared = Work([(0, 3), (1, 0)], parts=4)
    assert shared.of(3) == ([(1, 0)], 1, 2)
    assert shared.after([Cursor(0, 7), Cursor(), Cursor(0, 6), Cursor(0, 1)]) == [(0, 6), (1, 0)]
    assert shared.after([Cursor()] * 4) == shared.shards


def test_blank_and_long_pairs_are_skipped_and_counted(config, folder, rows):
    bad = [
        {"en": "", "it": "x"},
        {"en": "x", "it": None},
        {"en": "a " * 30, "it": "b"},
        {"en": "a", "it": "b " * 9_999},
    ]
    write_jsonl(folder / "part-9.jsonl", bad * 3)  # more than a block, of which nothing remains
    write_jsonl(folder / "part-8.jsonl", [{"en": "one", "it": "word " * 9}])
    stream = stream_of(replace(config, max_length_ratio=8.0))
    found = texts_of(chain(*steps_of(stream)))
    assert sorted(found) == sorted((row["en"], row["it"]) for row in rows)
    counts = Counts()
    for cursor in stream.cursors:
        counts = counts.plus(cursor.counts)
    assert counts == Counts(read=PAIRS + 13, blank=6, long=0, length_ratio=7)
    assert (
        "413; skipped: 6 with a blank side, 0 with more than 20 tokens (--seq-len), 7 by --max-len" in stream.summary()
    )


# ---------------------------------------------------------------------------- sources


def test_shards_are_those_of_a_folder_a_pattern_a_list_or_a_split(config, folder, tmp_path):
    def names(source: str) -> list[str]:
        return open_stream(replace(config, datasource=source)).names

    (folder / "README.md").write_text("no shard", encoding="utf8")
    assert names(str(folder)) == [*(f"part-{i}.jsonl{'.gz' * (i % 2)}" for i in range(4)), "part-4.parquet"]
    assert names(f"{folder}/*.gz") == ["part-1.jsonl.gz", "part-3.jsonl.gz"]
    assert names(f"{folder}/part-4.parquet,{folder}/*-[01].*,{folder}/part-0.jsonl") == [
        "part-4.parquet",
        "part-0.jsonl",
        "part-1.jsonl.gz",
    ]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}-0.jsonl", [{"en": "a", "it": "b"}])
    assert [Path(path).name for path in local_files(f"{tmp_path}:validation")] == ["validation-0.jsonl"]
    assert "train-0.jsonl" in [Path(path).name for path in local_files(str(tmp_path))]
    assert "validation-0.jsonl" not in [Path(path).name for path in local_files(str(tmp_path))]


def test_a_hub_dataset_has_the_pairs_of_its_files(config, tmp_path, rows):
    """A local folder in the layout of the Hub stands for a dataset of the Hub."""
    (tmp_path / "hub").mkdir()
    for i in range(2):
        pq.write_table(pa.table({"translation": rows[i * 50 : i * 50 + 50]}), tmp_path / "hub" / f"train-{i}.parquet")
    hub, local = (
        HubShards(str(tmp_path / "hub"), "train", config),
        open_stream(replace(config, datasource=str(tmp_path / "hub"))),
    )
    assert len(hub.names) == len(local.names) == 2
    for shard in range(2):
        for first in (0, 2, 6, 9):
            assert list(hub.blocks(shard, first)) == list(local.blocks(shard, first))
    assert [len(block["src"]) for block in hub.blocks(1, 5)] == [8, 2]


BAD_SHARDS = {
    "empty": (b"", "part-5.jsonl.gz contains no pairs; restore or remove it"),
    "no gzip": (b"not compressed", "part-5.jsonl.gz is damaged or not compressed with gzip"),
    "missing language": (b'{"en": "a", "de": "b"}', "part-5.jsonl.gz row 1 has no language 'it'; it has en, de"),
    "number": (b'{"en": "a", "it": 7}', "part-5.jsonl.gz row 1: it is 7; give a string"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_bad_shard_is_named_before_training(config, folder, name):
    content, message = BAD_SHARDS[name]
    (folder / "part-5.jsonl.gz").write_bytes(content if name == "no gzip" else gzip.compress(content))
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        train_model(config)
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize("workers", IN_PROCESS_AND_2_WORKERS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"en": "a"', "part-0.jsonl line 51 is not JSON"),
        (b'{"en": "a"}', "part-0.jsonl row 51 has no language 'it'"),
        (rb'{"en": "\ud83d", "it": "a"}', "part-0.jsonl row 51: en is not valid Unicode"),
    ],
)
def test_a_bad_row_within_a_shard_is_named_when_it_is_reached(config, folder, workers, bad, message, monkeypatch):
    monkeypatch.setattr(streams, "SAMPLE", 100)
    lines = (folder / "part-0.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "part-0.jsonl").write_bytes(b"".join([*lines[:50], bad + b"\n", *lines[51:]]))
    with pytest.raises(InputError, match=message) as caught:
        steps_of(stream_of(replace(config, num_workers=workers)))
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_is_named(config, folder):
    path = folder / "part-4.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(300) + content[500:])
    with pytest.raises(InputError, match=r"part-4\.parquet"):
        stream_of(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0; with --stream give the number of steps"),
        ({"validation_source": ""}, "validation_source is ''; with --stream name a source"),
        ({"drop_duplicates": True}, "drop_duplicates is True; with --stream remove duplicates"),
        ({"stream_buffer": 0}, "stream_buffer is 0; give a number above 0"),
        ({"datasource": "toy"}, "the toy corpus is built in; leave out --stream"),
        ({"datasource": "none/*.jsonl"}, r"no shards at 'none/\*.jsonl'; give a folder"),
        ({"datasource": __file__}, "has another format; give shards of"),
    ],
)
def test_wrong_settings_are_one_line(config, settings, message):
    with pytest.raises(InputError, match=message):
        open_stream(replace(config, **settings))


# ---------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("workers", IN_PROCESS_AND_2_WORKERS)
def test_an_interrupted_run_on_a_stream_ends_bit_identical(config, tmp_path, capsys, workers):
    config = replace(config, lr_schedule="constant", num_workers=workers, max_steps=50)
    uninterrupted = replace(config, run_dir=str(tmp_path / "uninterrupted"))
    for steps in (7, 40, 50):  # the last one is in epoch 1
        train_model(replace(config, max_steps=steps))
    train_model(uninterrupted)
    assert final_state(config)["progress"]["epoch"] == 1
    assert is_identical(final_state(config), final_state(uninterrupted))
    output = capsys.readouterr().out
    assert "streamed from 5 shards; tokenizers from 400 of their first pairs" in output
    assert "pairs read in this epoch: 400" in output


def test_a_run_does_not_resume_on_other_shards(config, folder):
    train_model(replace(config, max_steps=2))
    (folder / "part-2.jsonl").rename(folder / "part-x.jsonl")
    with pytest.raises(InputError, match=r"the corpus has changed since .*5 shards then, 5 shards now"):
        train_model(config)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_workers_end_with_a_killed_training_and_leave_ctrl_c_to_it(config):
    config = replace(config, num_workers=2, save_every_steps=1, max_steps=10_000, num_epochs=400, preload="latest")
    command = [sys.executable, "train.py", *flags_of(config)]
    for stop, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        streams = {"stderr": subprocess.STDOUT, "stdout": subprocess.PIPE, "encoding": "utf8"}
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams) as process:
            before = checkpoints(config)
            while checkpoints(config) == before:
                time.sleep(0.1)
            os.kill(process.pid, stop) if stop == signal.SIGKILL else os.killpg(process.pid, stop)
            output, _ = process.communicate(timeout=60)  # ends with the last process that holds the pipe
        assert process.returncode == code, output
        assert "Traceback" not in output


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_worker_says_nothing_about_the_end_of_a_killed_training(monkeypatch, capsys, is_alive):
    parent = SimpleNamespace(join=lambda timeout: None, is_alive=lambda: is_alive)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # this and the next are restored after the test
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "Thread", Mock())  # which would end this process
    prepare_worker(0)
    sys.excepthook(ConnectionResetError, ConnectionResetError("reset by peer"), None)
    assert ("reset by peer" in capsys.readouterr().err) == is_alive


@pytest.mark.slow
def test_two_processes_that_die_resume_bit_identically_and_see_each_pair(config, tmp_path):
    config = replace(config, save_every_steps=2, max_steps=30, lr_schedule="constant")
    uninterrupted = replace(config, run_dir=str(tmp_path / "uninterrupted"))
    done = launch(uninterrupted, 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pairs read in this epoch: 400") >= 1
    assert launch(config, 2, DIE_AT_STEP="7").returncode != 0
    resumed = launch(config, 2)
    assert resumed.returncode == 0, resumed.stderr
    assert is_identical(final_state(config), final_state(uninterrupted))
    assert RunFolder.of(config).read_scores()
