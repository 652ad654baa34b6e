"""Every kind of source gives the same pairs, bad sources give one clear line, and splits are seeded and disjoint."""

import gzip
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config import InputError, get_config
from corpora import files, sources
from corpora.sources import count_shared, load_pairs, load_split
from dataset import count_blank

ROWS = [("One.", "Uno."), ("Two, too.", "Due."), ("Three!", "Tre!")]


def tmx(*units: dict[str, str]) -> str:
    """A TMX file of units, each a dictionary of language tags and texts."""
    variants = (
        "".join(f'<tuv xml:lang="{tag}"><seg>{escape(text)}</seg></tuv>' for tag, text in u.items()) for u in units
    )
    body = "\n".join(f"<tu>{unit}</tu>" for unit in variants)
    return f'<?xml version="1.0"?><!DOCTYPE tmx SYSTEM "tmx14.dtd"><tmx><header/><body>{body}</body></tmx>'


def compress(path: Path) -> str:
    """Compresses a file with gzip, removes the original, and returns the new name."""
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return f"{path}.gz"


def write(folder: Path, kind: str) -> str:
    """Writes ROWS as one kind of source and returns the name of the source."""
    translations = [{"en": en, "it": it} for en, it in ROWS]
    path = folder / f"corpus.{kind}"
    if kind == "tsv":
        path.write_text("".join(f"{en}\t{it}\n" for en, it in ROWS))
    elif kind == "csv":  # the header reverses the columns, and a quoted cell contains a comma
        path.write_text("it,en\n" + "".join(f'{it},"{en}"\n' for en, it in ROWS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"translation": row}) + "\n" for row in translations))
    elif kind == "parquet":
        pq.write_table(pa.table({"translation": translations}), path)
    elif kind == "tmx":
        path.write_text(tmx(*({"en-US": en, "it-IT": it} for en, it in ROWS)))
    elif kind == "xlsx":
        workbook = pytest.importorskip("openpyxl").Workbook()
        for row in [("it", "en"), *((it, en) for en, it in ROWS)]:
            workbook.active.append(row)
        workbook.save(path)
    elif kind.startswith("aligned"):
        for i, lang in enumerate(("en", "it")):
            (folder / f"corpus.{lang}").write_text("".join(row[i] + "\n" for row in ROWS))
        if kind == "aligned, one compressed":
            compress(folder / "corpus.it")
        return str(folder / "corpus")
    elif kind.endswith(".gz"):
        return compress(Path(write(folder, kind.removesuffix(".gz"))))
    elif kind.isupper():
        return str(Path(write(folder, kind.lower())).rename(path))
    elif kind in ("hub", "hub with subsets"):
        subset = folder / "hub" / ("en-it" if "subsets" in kind else ".")
        subset.mkdir(parents=True)
        pq.write_table(
            pa.table({"id": ["0", "1", "2"], "translation": translations}), subset / "train-00000-of-00001.parquet"
        )
        if "subsets" in kind:
            entry = "- config_name: {}\n  data_files:\n  - split: train\n    path: en-it/train-*\n"
            card = f"---\nconfigs:\n{entry.format('en-it')}{entry.format('en-xx')}---\n"
            (folder / "hub" / "README.md").write_text(card)
        return str(folder / "hub")
    elif kind == "hub with columns":
        (folder / "hub").mkdir()
        (folder / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in translations))
        return str(folder / "hub")
    return str(path)


KINDS = ["tsv", "csv", "jsonl", "parquet", "xlsx", "tmx", "aligned", "hub", "hub with subsets", "hub with columns"]
KINDS += ["csv.gz", "jsonl.gz", "tmx.gz", "aligned, one compressed", "CSV", "JSONL", "PARQUET", "TMX", "XLSX"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_kind_of_source_gives_the_same_pairs(tmp_path, kind, reverse):
    source = write(tmp_path, kind)
    languages = {"lang_src": "it", "lang_tgt": "en"} if reverse else {}
    pairs = load_pairs(source, get_config("toy", **languages))
    # The tsv file has no header, so that its first column is the source whatever the languages are.
    sides = ("tgt", "src") if reverse and kind != "tsv" else ("src", "tgt")
    assert list(zip(*(list(pairs[side]) for side in sides), strict=True)) == ROWS


def test_a_header_may_be_in_upper_case_and_a_sentence_is_none(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("IT, EN ,note\nUno.,One.,x\n")
    pairs = load_pairs(str(path), get_config("toy"))
    assert (list(pairs["src"]), list(pairs["tgt"])) == (["One."], ["Uno."])
    path.write_text("It,Esso\nOne.,Uno.\n")
    assert list(load_pairs(str(path), get_config("toy"))["src"]) == ["It", "One."]


def test_a_null_translation_is_a_blank_pair(tmp_path):
    rows = pa.table({"translation": [{"en": "One.", "it": "Uno."}, None, {"en": "Two.", "it": None}]})
    pq.write_table(rows, tmp_path / "train.parquet")
    pairs = load_pairs(str(tmp_path), get_config("toy"))
    assert list(pairs["src"]) == ["One.", "", "Two."]
    assert count_blank(pairs) == 2


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_error_for_a_missing_language_lists_the_available_ones(tmp_path, kind):
    source = write(tmp_path, kind)
    with pytest.raises(InputError) as error:
        load_pairs(source, get_config("toy", lang_tgt="fr"))
    assert "fr" in str(error.value)
    assert "it" in str(error.value) or "aligned" in kind


@pytest.mark.parametrize(
    ("files", "source", "fragments"),
    [
        ({}, "none.tsv", ["none.tsv"]),
        ({}, "./none", ["none.en"]),
        ({"a.en": "1\n2\n"}, "a", ["a.it"]),
        ({"a.en": "1\n2\n", "a.it": "1\n"}, "a", ["2 lines", "1;"]),
        ({"a.en": "1\n2\n", "a.it": b"1\n\xff\n"}, "a", ["a.it line 2", "UTF-8"]),
        ({"a.tsv": "one\n"}, "a.tsv", ["row 1", "tab"]),
        ({"a.jsonl": '{"en": "1", "it": "1"}\n{"en": \n'}, "a.jsonl", ["line 2", "JSON"]),
        ({"a.jsonl": '{"en": 1, "it": "1"}\n'}, "a.jsonl", ["row 1", "string"]),
        ({"a.jsonl": '[1]\n'}, "a.jsonl", ["row 1", "en"]),
        ({"a.txt": "1\n"}, "a.txt", ["another format", ".tsv", ".tmx"]),
        ({"a.parquet.gz": "1\n"}, "a.parquet.gz", ["another format"]),
        ({"a.en.gz": "1\n"}, "a.en.gz", ["common prefix, a"]),
        ({}, "a:b.tsv", ["no file a:b.tsv"]),
        ({"a.tsv.gz": "1\t2\n"}, "a.tsv.gz", ["a.tsv.gz is damaged", "gzip"]),
        ({"a.tsv.gz": gzip.compress(b"1\t2\n" * 99)[:-9]}, "a.tsv.gz", ["a.tsv.gz is damaged"]),
        ({"a.en": "1\n", "a.it.gz": "1\n"}, "a", ["a.it.gz is damaged"]),
        ({"a.en.gz": gzip.compress(b"1\n2\n"), "a.it": "1\n"}, "a", ["a.en.gz has 2 lines", "1;"]),
        ({"a.tmx": tmx({"en": "1", "it": "1"})[:-9]}, "a.tmx", ["a.tmx is not a TMX file", "line 1"]),
        ({"a.tmx": tmx({"en": "1", "fr": "1"})}, "a.tmx", ["no language 'it'", "en, fr"]),
        ({"a.tmx": "<tmx/>"}, "a.tmx", ["contains no pairs"]),
        ({"a.tmx": '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'}, "a.tmx", ["declares XML entities"]),
        ({"a.parquet": "no"}, "a.parquet", ["Parquet"]),
        ({"a.tsv": ""}, "a.tsv", ["a.tsv contains no pairs"]),
        ({"a.en": "", "a.it": ""}, "a", ["contains no pairs"]),
        ({"a.jsonl": '{"translation": null}\n'}, "a.jsonl", ["row 1", "en"]),
        ({"a.jsonl": '{"translation": "en it"}\n'}, "a.jsonl", ["row 1", "en"]),
        ({}, ":train", ["no name"]),
    ],
)  # fmt: skip
def test_the_error_for_a_bad_source_names_the_place_and_the_problem(tmp_path, monkeypatch, files, source, fragments):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        load_pairs(source, get_config("toy"))
    for fragment in fragments:
        assert fragment in str(error.value)


def test_the_error_for_an_unreachable_hub_suggests_the_toy_preset():
    # conftest.py sets HF_ENDPOINT to a closed port.
    with pytest.raises(InputError, match=r"Helsinki-NLP/opus_books.*--preset toy"):
        load_pairs("Helsinki-NLP/opus_books", get_config())


def test_only_newlines_end_lines_and_byte_order_marks_and_carriage_returns_are_removed(tmp_path):
    (tmp_path / "a.en").write_bytes("\ufeffone\u2028more\r\ntwo\r\n".encode())
    (tmp_path / "a.it").write_text("uno\ndue\n")
    pairs = load_pairs(str(tmp_path / "a"), get_config("toy"))
    assert list(pairs["src"]) == ["one\u2028more", "two"]


@pytest.mark.parametrize(("name", "text"), [("a.tsv", "one\tuno\n\n"), ("a.jsonl", '{"en": "one", "it": "uno"}\n\n')])
def test_blank_lines_are_blank_pairs(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    pairs = load_pairs(str(tmp_path / name), get_config("toy"))
    assert list(pairs["src"]) == ["one", ""]
    assert count_blank(pairs) == 1


def test_a_tmx_file_may_have_inline_codes_variants_of_languages_and_incomplete_units(tmp_path):
    units = [
        {"EN-GB": "A & b.", "en-US": "Another.", "IT": "A e b."},
        {"fr": "Oui.", "it": "Sì."},
        {"en_us": "Bold.", "it": "Grassetto."},
    ]
    text = tmx(*units).replace(
        "Bold.", '<bpt i="1">&lt;b&gt;<sub>note</sub></bpt><hi>Bo</hi>ld<ept i="1">&lt;/b&gt;</ept>.'
    )
    (tmp_path / "a.tmx").write_text(text, encoding="utf16")  # with a byte-order mark
    pairs = load_pairs(str(tmp_path / "a.tmx"), get_config("toy"))
    assert list(zip(pairs["src"], pairs["tgt"], strict=True)) == [
        ("A & b.", "A e b."),
        ("", "Sì."),
        ("Bold.", "Grassetto."),
    ]


def test_units_of_a_tmx_file_are_read_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "XML_BYTES", 7)
    assert files.format_of("A.Tmx.GZ") == ".tmx"
    (tmp_path / "a.tmx").write_text(tmx(*({"en": f"word {i}", "it": f"parola {i}"} for i in range(5))))
    rows = list(files.read_tmx(str(tmp_path / "a.tmx"), ("en", "it")))
    assert rows == [{"en": f"word {i}", "it": f"parola {i}"} for i in range(5)]


def test_numbers_and_empty_cells_of_a_workbook_are_texts(tmp_path):
    workbook = pytest.importorskip("openpyxl").Workbook()
    for row in [("One.", 1), (None, None), ("Two.", None)]:
        workbook.active.append(row)
    workbook.save(tmp_path / "a.xlsx")
    pairs = load_pairs(str(tmp_path / "a.xlsx"), get_config("toy"))
    assert list(zip(pairs["src"], pairs["tgt"], strict=True)) == [("One.", "1"), ("", ""), ("Two.", "")]
    (tmp_path / "a.xlsx").write_bytes(b"no")
    with pytest.raises(InputError, match=r"a\.xlsx is not an Excel workbook .*save it again"):
        load_pairs(str(tmp_path / "a.xlsx"), get_config("toy"))


def test_without_openpyxl_a_workbook_gives_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match="needs the package openpyxl; run pip install openpyxl, or save"):
        load_pairs(str(tmp_path / "a.xlsx"), get_config("toy"))


def test_a_quoted_csv_cell_keeps_its_newline(tmp_path):
    (tmp_path / "a.csv").write_text('"one\ntwo",uno\n')
    assert list(load_pairs(str(tmp_path / "a.csv"), get_config("toy"))["src"]) == ["one\ntwo"]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("one\tuno\n")
    assert list(load_pairs(str(path), get_config("toy"))["src"]) == ["one"]
    path.write_text("three\ttre\n")
    assert list(load_pairs(str(path), get_config("toy"))["src"]) == ["three"]


def test_the_split_is_seeded_disjoint_and_complete(pairs_file):
    config = get_config("toy", datasource=str(pairs_file), validation_source="")
    train, validation = (list(load_split(config, split)["src"]) for split in ("train", "validation"))
    assert len(validation) == 40
    assert set(train) | set(validation) == set(load_pairs(str(pairs_file), config)["src"])
    assert not set(train) & set(validation)
    assert validation == list(load_split(config, "validation")["src"])
    other = get_config("toy", datasource=str(pairs_file), validation_source="", seed=7)
    assert validation != list(load_split(other, "validation")["src"])


def test_a_large_corpus_is_split_in_blocks_of_consecutive_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_VALIDATION_PAIRS", 300)
    (tmp_path / "a.tsv").write_text("".join(f"{i}\tn{i}\n" for i in range(5_000)))
    config = get_config("toy", datasource=str(tmp_path / "a.tsv"), validation_source="")
    train, validation = ([int(i) for i in load_split(config, split)["src"]] for split in ("train", "validation"))
    assert len(validation) == 300
    assert sorted(train + validation) == list(range(5_000))
    assert all(validation[i : i + 3] == list(range(validation[i], validation[i] + 3)) for i in range(0, 300, 3))
    assert max(validation) > 4_500
    assert min(validation) < 500


def test_validation_pairs_that_occur_in_training_are_counted():
    def pairs(*rows):
        return datasets.Dataset.from_dict(dict(zip(("src", "tgt"), zip(*rows, strict=True), strict=True)))

    train = pairs(("a", "1"), ("b", "2"), ("a", "1"), ("c", "3"), ("c", "4"))
    assert count_shared(train, pairs(("a", "1"), ("b", "3"), ("c", "4"), ("d", "1"))) == 2


def test_too_few_pairs_to_split_off_validation(tmp_path):
    (tmp_path / "a.tsv").write_text("one\tuno\n" * 5)
    with pytest.raises(InputError, match="5 pairs are too few"):
        load_split(get_config("toy", datasource=str(tmp_path / "a.tsv"), validation_source=""), "train")


def test_the_gold_pairs_of_a_built_in_corpus_are_its_test_pairs_and_others_have_none():
    for name, lang_tgt in (("toy", "it"), ("patterns", "de")):
        config = get_config("toy", datasource=name, lang_tgt=lang_tgt)
        test = sources.load_pairs(f"{name}:test", config)
        gold = sources.gold_pairs(config)
        assert [pair.src_text for pair in gold[: len(test)]] == test["src"][:]
        assert len(gold) >= 200
        assert all(pair.alignment for pair in gold)
    assert sources.gold_pairs(get_config()) == []
