"""Questions in Parquet files, the form of data sets on the Hugging Face Hub: local ones, or fetched by its client."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from codebook.errors import CodebookError, install_command, quoted, unknown
from codebook.evaluation.consensus import Consensus
from codebook.evaluation.documents import CHOICE, LETTERS, SHORT
from codebook.evaluation.metrics import ACCURACY, CIRCULAR, HALLUSION, Metric, yes_or_no
from codebook.evaluation.scorers import anls, check_people, contains, exact, letter, relaxed, same, vqa
from codebook.inference.samples import Sample, Scorer, task_name
from codebook.models.finite import some
from codebook.store.hub import pull_data_set
from codebook.store.pictures import HEAD, LARGEST_PICTURE, is_picture
from codebook.store.reading import cannot_read, is_file, is_folder

RULES: dict[str, Scorer] = {
    "same": same, "vqa": vqa, "anls": anls, "relaxed": relaxed, "contains": contains, "yesno": yes_or_no,
    "letter": letter, "exact": exact,
}  # fmt: skip
"""Scorers by the names that `rule=` gives them."""
CIDER = "cider"
"""Name of the rule whose scorer depends on the captions of all pictures."""
ENDS = {"letter": CHOICE, "exact": "", CIDER: ""}
"""What a question ends with under a rule, where it is not SHORT: some say themselves what to answer."""
SAID = {"1": "yes", "0": "no"}
"""Numbers that stand for words under `yesno`, as HallusionBench has them."""
CONVERTED = re.compile(r"\d{4}\.parquet")
"""Name of a file of the Hub's own copy in Parquet, in the folder of its split."""
PARTIAL = "partial-"
"""How a split's folder begins there if it was too large for all of it."""
PLACE = re.compile(r"<image \d+>")
"""A picture's place within a text, as MMMU has it."""

MOST_ROWS = 2**22
"""Rows of a file."""
LARGEST_GROUP = 2**33
"""Bytes of a row group, unpacked."""
NO_TEXT = (None, "", "nan")
"""What stands in a column of options or hints where there is none; the last as MMBench has it on the Hub."""
WHOLE_PARQUET = "give a whole Parquet file"
ROWS_AT_ONCE = 16
"""Rows whose pictures are unpacked at once."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set are what: the text behind `?`, as in `?question=query&answer=label&rule=relaxed`.

    Attributes
    ----------
    image, question, answer
        Their names. Pictures are the Hub's (bytes in a struct), bytes, or a list of either; an answer is a text, a list
        of texts, or of structs with one as `answer`; with `options` they are all the texts, the letters, or the numbers
        from 0 of some.
    options
        Column of a list of texts, of which one is right, or columns of one text each, with commas between; empty: none.
    hint
        Column of a text that stands before the question, where there is one; empty: none.
    task
        Column that the questions are grouped by; empty: all are one task.
    rule
        Name among RULES, or CIDER; with `options` it is always the letter's.
    circular
        `yes`: each question is asked once for every rotation of its `options`, and is right if all its answers are.
    figure, pair
        Columns, with commas between them, that together name a question's figure, and a question that is asked about
        several figures: accuracies are also those of whole figures and of whole questions.
    split, config
        Which files of `hub:`, by their name's beginning (empty: test) and by their folder (empty: any). Files on disk
        are all read.
    """

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    options: str = ""
    hint: str = ""
    task: str = ""
    rule: str = "same"
    circular: str = ""
    figure: str = ""
    pair: str = ""
    split: str = ""
    config: str = ""

    @classmethod
    def parse(cls, text: str) -> Columns:
        """Columns from `key=name&...`.

        Raises
        ------
        CodebookError
            If a key or the rule is unknown, a key stands there twice, or a column is to be two things.
        """
        pairs, known = parse_qsl(text, keep_blank_values=True), [one.name for one in fields(cls)]
        given = dict(pairs)
        if len(given) < len(pairs):
            raise CodebookError(f"a key stands twice behind '?' in {quoted(text)}: leave one out")
        for key in given:
            if key not in known:
                raise unknown("no key behind '?' is called", key, known)
        found = cls(**given)
        if found.rule not in (*RULES, CIDER):
            raise unknown("no rule", found.rule, [*RULES, CIDER])
        if found.circular not in ("", "yes") or (found.circular and not found.options):
            raise CodebookError(
                "circular=yes asks with options in every order: name their columns, as in options=A,B,C,D"
            )
        if bool(found.figure) != bool(found.pair):
            raise CodebookError("figure and pair belong together: name the columns of both, or of none")
        own = [name for name in (found.image, found.question, found.answer, found.hint, *found.option_names) if name]
        if len(set(own)) < len(own):
            raise CodebookError(f"behind '?' one column is to be two things in {quoted(text)}: name another one")
        return found

    @property
    def option_names(self) -> list[str]:
        """Names of the columns of options."""
        return self.options.split(",") if self.options else []

    @property
    def unit_names(self) -> list[list[str]]:
        """Names of the columns that together name each kind of unit."""
        return [names.split(",") for names in (self.figure, self.pair) if names]

    @property
    def metric(self) -> Metric:
        """What is computed of the answers."""
        return CIRCULAR if self.circular else HALLUSION if self.figure else ACCURACY

    @property
    def option_cells(self) -> dict[str, Cell]:
        """What the columns of options hold."""
        names = self.option_names
        return dict.fromkeys(names, TEXTS_CELL if len(names) == 1 else TEXT_OR_NONE_CELL)


class PersonsAnswer(TypedDict):
    """One person's answer, as VQAv2 has them."""

    answer: str


class Cell(NamedTuple):
    """What a column holds: its type, and that in words."""

    kind: Any
    words: str


TEXT_CELL = Cell(str, "a text")
TEXT_OR_NONE_CELL = Cell(str | None, "a text or nothing")
NAME_CELL = Cell(str | int, "a text or a whole number")
TEXTS_CELL = Cell(list[str], "a list of texts")
ANSWER_CELL = Cell(str | int | list[str] | list[PersonsAnswer], "a text, a whole number or a list of texts")
PICTURES_CELL = Cell(list[Mapping[str, Any] | bytes] | Mapping[str, Any] | bytes, "a picture's bytes or a list of them")


def fetched_files(name: str, columns: Columns) -> list[Path]:
    """The Parquet files of a data set on the Hub, `OWNER/NAME` or `OWNER/NAME@REVISION`; fetched if they are not there.

    Those of one split and one config, as `files_of_split` chooses them.
    """
    repository, *revision = name.split("@", 1)
    return pull_data_set(repository, partial(files_of_split, columns), *revision)


def files_of_split(columns: Columns, names: Sequence[str]) -> list[str]:
    """The files whose names begin with the split, as in `test-00000-of-00001.parquet`, in the config's folder.

    In the Hub's own copy in Parquet, the revision `refs/convert/parquet`, they lie in the split's folder, as in
    `config/test/0000.parquet`.

    Raises
    ------
    CodebookError
        If no config is named where several have the split, or some of its files are missing.
    """
    split, found = columns.split or "test", dict[str, list[str]]()
    for name in names:
        folder, _, file = name.rpartition("/")
        if CONVERTED.fullmatch(file):
            folder, _, own = folder.rpartition("/")
            fits = own.removeprefix(PARTIAL) == split
        else:
            fits = re.fullmatch(rf"{re.escape(split)}(?:[-.].*)?\.parquet", file) is not None
        if fits and columns.config in ("", folder.rpartition("/")[2]):
            found.setdefault(folder, []).append(name)
    if len(found) > 1 and not columns.config:
        configs = some([folder.rpartition("/")[2] or "." for folder in sorted(found)])
        raise CodebookError(f"several configs have this split, {configs}: name one behind '?', as in config=NAME")
    chosen = [file for files in found.values() for file in files]
    if part := next((file for file in chosen if f"/{PARTIAL}{split}/" in f"/{file}"), None):
        raise CodebookError(
            f"{quoted(part)} has the beginning of the split alone: name a revision with the whole of it"
        )
    numbered = (re.match(r"(.*)-\d{5}-of-(\d{5})", file) for file in chosen)
    for (_, total), there in Counter(number.groups() for number in numbered if number).items():
        if there < int(total):
            raise CodebookError(f"of the {int(total)} files of this split {there} are here: connect, and fetch all")
    return chosen


def parquet_files(place: Path) -> list[Path]:
    """The Parquet files of a folder and the folders in it, in order of their names; or the file itself."""
    if is_file(place):
        return [place]
    if not is_folder(place):
        raise CodebookError(f"no file or folder {place}: give one with .parquet files")
    files = sorted(place.rglob("*.parquet"))
    if not files:
        raise CodebookError(f"{place} holds no .parquet files: give a file, or a folder with some")
    return files


def _open_table(file: Path) -> Any:
    """A Parquet file, its row groups within the limits."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise CodebookError(f"{file} is a Parquet file, which needs pyarrow: {install_command('datasets')}") from None
    try:
        found = parquet.ParquetFile(file)
        about = found.metadata
        largest = max((about.row_group(i).total_byte_size for i in range(about.num_row_groups)), default=0)
    except Exception as error:  # Arrow's errors are of a dozen types
        raise cannot_read(file, error, WHOLE_PARQUET) from None
    if about.num_rows > MOST_ROWS or largest > LARGEST_GROUP:
        raise CodebookError(
            f"{file} has {about.num_rows:,} rows and {largest:,} bytes in a group: at most {MOST_ROWS:,} and "
            f"{LARGEST_GROUP:,} are read"
        )
    return found


def read_columns(file: Path, columns: Mapping[str, Cell]) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file as dictionaries of these columns, each checked against its type.

    Raises
    ------
    CodebookError
        If the file cannot be read, lacks a column, or a value is of another type; the message names file and record.
    """
    opened, number = _open_table(file), 0
    if missing := [name for name in columns if name not in opened.schema_arrow.names]:
        there = ", ".join(opened.schema_arrow.names[:20])
        raise CodebookError(f"{file} has no column {quoted(missing[0])}, but {quoted(there)}: name one of these")
    checks = {name: TypeAdapter(cell.kind) for name, cell in columns.items()}
    try:
        for batch in opened.iter_batches(ROWS_AT_ONCE, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                for name, check in checks.items():
                    try:
                        check.validate_python(row[name], strict=True)
                    except ValidationError:
                        raise CodebookError(
                            f"{file}, record {number}: column {quoted(name)} holds {quoted(row[name])}, where "
                            f"{columns[name].words} is read; name another column, or correct the file"
                        ) from None
                yield row
    except (CodebookError, GeneratorExit):
        raise
    except Exception as error:
        raise cannot_read(file, error, WHOLE_PARQUET) from None
    finally:
        opened.close()


def load_parquet(files: Sequence[Path], columns: Columns, name: str, count: int | None, seed: int) -> list[Sample]:
    """The questions of Parquet files as samples.

    All texts are read first; then `count` questions of each task are drawn, and only their pictures are read.

    Parameters
    ----------
    files
        As `parquet_files` or `fetched_files` finds them.
    name
        What the task is called where no column says it.

    Raises
    ------
    CodebookError
        As `read_columns`, or if a row's picture or answer is missing.
    """
    kinds = {columns.task: TEXT_CELL} if columns.task else {}
    kinds |= dict.fromkeys(chain(*columns.unit_names), NAME_CELL)
    kinds |= {columns.question: TEXT_CELL, columns.answer: ANSWER_CELL}
    kinds |= columns.option_cells | ({columns.hint: TEXT_OR_NONE_CELL} if columns.hint else {})
    option = _meaning(files, columns) if columns.options else None
    drawn: dict[str, list[tuple[Path, int, list[Sample]]]] = {}
    for file in files:
        for number, row in enumerate(read_columns(file, kinds), 1):
            asked = _samples_of_row(f"{file}, record {number}", columns, row, name, option)
            drawn.setdefault(asked[0].task, []).append((file, number, asked))
    wanted: dict[Path, dict[int, list[Sample]]] = {}
    for every in drawn.values():
        if count is not None and count < len(every):
            every = [every[i] for i in sorted(random.Random(seed).sample(range(len(every)), count))]
        if columns.rule == CIDER and not columns.options:
            scorer = Consensus.of([sample.answers for _, _, asked in every for sample in asked])
            every = [(file, number, [replace(one, scorer=scorer) for one in asked]) for file, number, asked in every]
        for file, number, asked in every:
            wanted.setdefault(file, {})[number] = asked
    return [sample for file, own in wanted.items() for sample in _with_pictures(file, own, columns.image)]


def _samples_of_row(
    where: str, columns: Columns, row: Mapping[str, Any], name: str, option: Meaning | None
) -> list[Sample]:
    """The samples of a row, without its pictures; `option` says which option an answer names, where there are some.

    There is one, but for the rotations of options.
    """
    question, answer = row[columns.question], row[columns.answer]
    options = [] if option is None else _options(where, columns, row)
    if place := PLACE.search("\n".join([question, *options])):
        raise CodebookError(
            f"{where}: {quoted(place[0])} stands in its texts, and pictures within a text are not read: all of them "
            "are shown before it"
        )
    if columns.hint and row[columns.hint] not in NO_TEXT:
        question = f"{row[columns.hint]}\n{question}"
    task = task_name(row[columns.task] if columns.task else None, name, where)
    if option is not None:
        right = option(answer, options)
        assert right is not None
        found = []
        for shift in range(len(options) if columns.circular else 1):
            turned = options[shift:] + options[:shift]
            asked = "\n".join([question, *(f"{LETTERS[i]}. {text}" for i, text in enumerate(turned))]) + CHOICE
            sample = Sample((), asked, LETTERS[(right - shift) % len(options)], task, letter)
            found.append(replace(sample, units=(where,)) if columns.circular else sample)
        return found
    answers = answer if isinstance(answer, list) else [str(answer)]
    answers = [one["answer"] if isinstance(one, Mapping) else one for one in answers]
    if not answers:
        raise CodebookError(f"{where}: it has no answer; name the right column")
    if columns.rule != "vqa":  # there it is one of ten people who said nothing; elsewhere it would be right to do so
        answers = [text for text in answers if text.strip()] or answers
    if columns.rule == "yesno":
        answers = [SAID.get(text.strip(), text.strip().lower()) for text in answers]
        if not {"yes", "no"}.issuperset(answers):
            raise CodebookError(f"{where}: {quoted(str(answer))} is neither yes nor no; give another rule")
    if columns.rule == "vqa":
        try:
            check_people(answers)
        except ValueError as error:
            raise CodebookError(f"{where}: {error}; give rule=same") from None
    if columns.rule == "letter" and not all(len(text) == 1 and text in LETTERS for text in answers):
        raise CodebookError(f"{where}: {quoted(str(answer))} is no option's letter; give another rule")
    most, asked = max(answers, key=answers.count), question + ENDS.get(columns.rule, SHORT)
    units = tuple("_".join(str(row[column]) for column in names) for names in columns.unit_names)
    return [Sample((), asked, most, task, RULES.get(columns.rule, same), tuple(answers), units=units)]


def _options(where: str, columns: Columns, row: Mapping[str, Any]) -> list[str]:
    """The options of a row; of several columns the last ones may have none."""
    texts = [row[name] for name in columns.option_names]
    if len(texts) == 1:
        return list(texts[0])
    found = [text for text in texts if text not in NO_TEXT]
    if found != texts[: len(found)]:
        raise CodebookError(f"{where}: an option is missing before the last one; name the columns in their order")
    return found


Meaning = Callable[[object, Sequence[str]], int | None]
"""Which option an answer names; None: none."""


def _by_text(answer: object, options: Sequence[str]) -> int | None:
    return options.index(answer) if isinstance(answer, str) and answer in options else None


def _by_letter(answer: object, options: Sequence[str]) -> int | None:
    named = isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(options)]
    return LETTERS.index(str(answer)) if named else None


def _by_number(answer: object, options: Sequence[str]) -> int | None:
    if isinstance(answer, str) and answer.isascii() and answer.isdigit():
        answer = int(answer)
    return answer if isinstance(answer, int) and 0 <= answer < len(options) else None


def _meaning(files: Sequence[Path], columns: Columns) -> Meaning:
    """What the answers of a column are: the first of texts, letters and numbers from 0 that fits every row.

    A row alone does not tell: the answer 2 to the options 3, 2, 4, 5 is the second one, or the third.
    """
    left: list[Meaning] = [_by_text, _by_letter, _by_number]
    for file in files:
        rows = read_columns(file, {columns.answer: ANSWER_CELL, **columns.option_cells})
        for number, row in enumerate(rows, 1):
            answer, options = row[columns.answer], _options(f"{file}, record {number}", columns, row)
            left = [one for one in left if one(answer, options) is not None]
            if not left or len(options) > len(LETTERS):
                raise CodebookError(
                    f"{file}, record {number}: {quoted(str(answer))} is none of its options, read as the answers "
                    "before; name the right column"
                )
    return left[0]


def _with_pictures(file: Path, wanted: Mapping[int, Sequence[Sample]], column: str) -> Iterator[Sample]:
    last = max(wanted)
    for number, row in enumerate(read_columns(file, {column: PICTURES_CELL}), 1):
        if number not in wanted:
            continue
        cells = row[column] if isinstance(row[column], list) else [row[column]]
        pictures = []
        for cell in cells or [None]:
            data = cell.get("bytes") if isinstance(cell, Mapping) else cell
            if not isinstance(data, bytes) or len(data) > LARGEST_PICTURE or not is_picture(data[:HEAD]):
                raise CodebookError(f"{file}, record {number}: column {quoted(column)} holds no picture that is read")
            pictures.append(data)
        for sample in wanted[number]:
            yield replace(sample, images=tuple(pictures))
        if number == last:
            return
