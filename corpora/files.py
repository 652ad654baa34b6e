"""Sentence pairs from local files: aligned text files, tables, JSON Lines, Parquet, Excel workbooks and TMX.

Each reader is a generator of one dictionary per pair, {"en": …, "it": …} or {"translation": {"en": …, "it": …}}: files
are streamed. Text formats may be compressed with gzip.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from xml.parsers import expat

import pyarrow as pa
import pyarrow.parquet as pq

from config import FREE_SPACE, REMEDIES, Config, InputError

if TYPE_CHECKING:
    from datasets import Dataset

DATA_VERSION = 1  # increment when reading or encoding changes: the cache of `datasets` does not detect code changes
PARQUET_ROWS = 1_000  # rows read at a time
XML_BYTES = 1 << 16  # bytes of a .tmx file parsed at a time
MAX_TAG_BYTES = 1 << 20  # longest tag of a .tmx file: the time that the parser takes grows with the square of it
TMX_CODE = ("bpt", "ept", "it", "ph", "ut")  # inline elements that hold formatting codes, not text


def format_of(path: str) -> str:
    """The suffix in lower case, without .gz: ".tsv" of A.TSV and of a.tsv.gz; of a.parquet.gz, none."""
    name, suffix = os.path.splitext(path.lower())
    if suffix != ".gz":
        return suffix
    inner = os.path.splitext(name)[1]
    return inner if inner in COMPRESSIBLE else ""


# ---------------------------------------------------------------------------- files to pairs


def load_file(path: Path, config: Config) -> Dataset:
    """The pairs of a file in one of FORMATS."""
    if not path.is_file():
        raise InputError(f"no file {path}; give the path of a corpus, or --datasource toy")
    return load_cached(read_rows, [path], config)


def text_file(prefix: str, lang: str) -> Path:
    """The file of a language of two aligned text files: PREFIX.en, or PREFIX.en.gz if only that exists."""
    plain, compressed = Path(f"{prefix}.{lang}"), Path(f"{prefix}.{lang}.gz")
    return compressed if compressed.exists() and not plain.exists() else plain


def load_aligned(prefix: str, config: Config) -> Dataset:
    """The pairs of two text files with one sentence per line, such as PREFIX.en and PREFIX.it."""
    paths = [text_file(prefix, lang) for lang in (config.lang_src, config.lang_tgt)]
    check_aligned(paths)
    return load_cached(read_aligned, paths, config)


def check_aligned(paths: list[Path]) -> None:
    """Raises InputError unless both text files exist and have the same number of lines."""
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"no file {path}; line n of {paths[0]} and line n of {paths[1]} must be translations of each other"
            )
    counts = []
    for path in paths:
        with opened(path) as file:
            counts.append(sum(1 for _ in file))
    if counts[0] != counts[1]:
        raise InputError(
            f"{paths[0]} has {counts[0]:,} lines and {paths[1]} has {counts[1]:,}; "
            "line n of both must be translations of each other"
        )


def load_cached(read: Callable[..., Iterator[dict]], paths: list[Path], config: Config) -> Dataset:
    """Streams the pairs that `read` yields into an Arrow file in the cache of `datasets`.

    A file is read again only if its path, size or modification time has changed.
    """
    import datasets  # imported here because it takes a second

    # A tuple, because `datasets` treats a list as shards.
    files = tuple((os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    arguments = {"files": files, "languages": (config.lang_src, config.lang_tgt), "version": DATA_VERSION}
    features = datasets.Features({"src": datasets.Value("string"), "tgt": datasets.Value("string")})
    try:
        return datasets.Dataset.from_generator(read, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, InputError) or REMEDIES.get(getattr(cause, "errno", 0)) == FREE_SPACE:
            raise cause from None
        raise InputError(f"{paths[0]} cannot be read ({error.__cause__}); fix or convert the file") from None
    except ValueError as error:
        if "no data" in str(error):  # raised by `datasets` if the generator yields nothing
            raise InputError(f"{paths[0]} contains no pairs; give a file with sentences") from None
        raise


def read_aligned(files: tuple[tuple, ...], languages: tuple[str, str], version: int) -> Iterator[dict]:
    for src, tgt in zip(*(read_text_file(path) for path, *_ in files), strict=True):
        yield {"src": src, "tgt": tgt}


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name ends with .gz. Raises InputError for a damaged .gz file."""
    try:
        with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged or not compressed with gzip ({error}); compress it again") from None


def read_text_file(path: str | Path) -> Iterator[str]:
    with opened(path) as file:
        yield from read_lines(file, str(path))


def read_lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a binary file, without line endings and byte-order mark. Only a newline ends a line.

    Raises InputError at the first line that is not UTF-8; the message names the file `name`.
    """
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise InputError(f"{name} line {number} is not UTF-8; convert it, e.g. with iconv -t utf8") from None
        yield text.removeprefix("\ufeff") if number == 1 else text


def read_rows(files: tuple[tuple, ...], languages: tuple[str, str], version: int) -> Iterator[dict]:
    path = files[0][0]
    for number, row in enumerate(FORMATS[format_of(path)](path, languages), start=1):
        src, tgt = (text_of(row, lang, f"{path} row {number}") for lang in languages)
        yield {"src": src, "tgt": tgt}


def read_table(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    """The rows of a .csv file, or of a .tsv file, which has no quoting."""
    lines = read_text_file(path)
    is_csv = format_of(path) == ".csv"
    rows = csv.reader(f"{line}\n" for line in lines) if is_csv else (line.split("\t") for line in lines)
    hint = ", separated by a comma; a quote that opens a cell must be closed" if is_csv else ", separated by a tab"
    try:
        yield from read_cells(rows, path, languages, hint)
    except csv.Error as error:
        raise InputError(f"{path} cannot be read ({error}); close the quote that opens a cell, or shorten it") from None


def read_cells(rows: Iterable[list[str]], path: str, languages: tuple[str, str], hint: str = "") -> Iterator[dict]:
    """One dictionary per row of cells. Raises InputError for a row of one cell; the message ends with `hint`.

    A first row that contains a language code is a header; so is one with both codes in upper case or with spaces.
    Without a header, the first column is the source.
    """
    header, code = list(languages), {language.lower(): language for language in languages}
    for number, cells in enumerate(rows, start=1):
        names = [cell.strip().lower() for cell in cells] if number == 1 else []
        if number == 1 and (set(cells) & set(languages) or set(code) <= set(names)):
            header = [code.get(name, cell) for name, cell in zip(names, cells, strict=True)]
        elif not any(cells):  # a blank line is a blank pair
            yield dict.fromkeys(languages, "")
        elif len(cells) < 2:
            raise InputError(f"{path} row {number} has one column; give two, source and target{hint}")
        else:
            yield dict(zip(header, cells, strict=False))


def read_jsonl(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    for number, line in enumerate(read_text_file(path), start=1):
        try:
            yield json.loads(line) if line.strip() else dict.fromkeys(languages, "")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON ({error}); give one object per line") from None


def read_parquet(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file ({error}); write it again") from None


def read_xlsx(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    """The rows of the first sheet of an Excel workbook; numbers and dates become their text."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise InputError(
            f"reading {path} needs the package openpyxl; run pip install openpyxl, or save the file as .csv"
        ) from None
    try:
        sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
        sheet.reset_dimensions()  # the size that the file declares may be too small, and the other cells would be lost
        yield from read_cells(texts_of(sheet.iter_rows(values_only=True)), path, languages)
    except InputError:
        raise
    except Exception as error:  # openpyxl raises errors of many classes for damaged files
        raise InputError(f"{path} is not an Excel workbook ({error}); save it again, or as .csv") from None


def texts_of(rows: Iterable[tuple]) -> Iterator[list[str]]:
    """The cells of a sheet as text. Rows end at their last cell, so they are extended to the widest row before them."""
    width = 0
    for row in rows:
        width = max(width, len(row))
        yield ["" if cell is None else str(cell) for cell in row] + [""] * (width - len(row))


class TmxReader:
    """The translation units of a TMX file (Translation Memory eXchange 1.4b), without inline formatting codes."""

    def __init__(self, path: str):
        self.path = path
        self.units: list[dict[str, str]] = []  # complete ones: language tag, such as en-us, to text
        self.tag, self.text, self.codes = "", None, 0  # of the open segment; the number of open elements of TMX_CODE

    def read(self) -> Iterator[dict[str, str]]:
        """Yields each unit. Raises InputError for a file that is not XML, or that declares entities."""
        parser = expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = self.start, self.end
        parser.CharacterDataHandler, parser.EntityDeclHandler = self.characters, self.reject_entity
        parser.SkippedEntityHandler = self.reject_skipped
        total = 0
        try:
            with opened(self.path) as file:
                while chunk := file.read(XML_BYTES):
                    parser.Parse(chunk)
                    total += len(chunk)
                    if total - parser.CurrentByteIndex > MAX_TAG_BYTES:
                        raise InputError(f"{self.path} has a tag of more than {MAX_TAG_BYTES:,} bytes; export it again")
                    yield from self.units[:-1]  # the last one may be incomplete
                    del self.units[:-1]
                parser.Parse(b"", True)
                yield from self.units
        except expat.ExpatError as error:
            raise InputError(f"{self.path} is not a TMX file ({error}); export it again") from None

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "tu":
            self.units.append({})
        elif name == "tuv":
            self.tag = attributes.get("xml:lang", attributes.get("lang", "")).lower().replace("_", "-")
        elif name == "seg":
            self.text = []
        self.codes += name in TMX_CODE

    def characters(self, data: str) -> None:
        if self.text is not None and not self.codes:
            self.text.append(data)

    def end(self, name: str) -> None:
        if name == "seg" and self.units and self.text is not None:
            self.units[-1].setdefault(self.tag, "".join(self.text))
            self.text = None
        self.codes -= name in TMX_CODE

    def reject_entity(self, *_) -> None:  # its expansion could have any size
        raise InputError(f"{self.path} declares XML entities, which are not read; remove them from its DOCTYPE")

    def reject_skipped(self, name: str, *_) -> None:
        raise InputError(f"{self.path} uses the undefined XML entity &{name}; replace it by its text")


def read_tmx(path: str, languages: tuple[str, str]) -> Iterator[dict]:
    """The units of a .tmx file. The language en includes en-US and other variants; the first one in a unit counts.

    A unit that lacks a language is a blank pair. Raises InputError if all units lack it.
    """
    tags: set[str] = set()
    for unit in TmxReader(path).read():
        tags.update(unit)
        yield {lang: next((unit[tag] for tag in unit if is_variant(tag, lang)), "") for lang in languages}
    for lang in languages:
        if tags and not any(is_variant(tag, lang) for tag in tags):
            available = ", ".join(sorted(tags))
            raise InputError(f"{path} has no language {lang!r}; it has {available}: change --lang-src or --lang-tgt")


def is_variant(tag: str, lang: str) -> bool:
    """Whether a lower-case language tag is that of a language or of a variant: en and en-us of en."""
    return f"{tag}-".startswith(f"{lang.lower()}-")


def text_of(row: dict, lang: str, where: str) -> str:
    """The text in one language of a row {"en": …} or {"translation": {"en": …}}; null counts as blank.

    Raises InputError if the row lacks the language or the text is not a string; the message begins with `where`.
    """
    texts = row.get("translation", row) if isinstance(row, dict) else {}
    texts = texts if isinstance(texts, dict) else {}
    if lang not in texts:
        available = ", ".join(map(str, texts)) or "none"
        raise InputError(f"{where} has no language {lang!r}; it has {available}: change --lang-src or --lang-tgt")
    text = texts[lang]
    if not isinstance(text, str | None):
        raise InputError(f"{where}: {lang} is {text!r}; give a string")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # JSON allows \ud83d, one half of an emoji
        raise InputError(f"{where}: {lang} is not valid Unicode ({error.reason}); fix or remove the row") from None
    return text or ""


FORMATS = {
    ".tsv": read_table,
    ".csv": read_table,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".xlsx": read_xlsx,
    ".tmx": read_tmx,
}
COMPRESSIBLE = (".tsv", ".csv", ".jsonl", ".tmx")
