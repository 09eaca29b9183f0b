"""Files that users hand over: rows of every ending, options of the command line, and the parts of `teach`.

They carry no checksums: rows and options that were changed are other ones, and as valid. What is asked is that nothing
but an error of this package comes of them, and that of the command line it is one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers

import cofiprune
from cofiprune import cli
from cofiprune.errors import CofipruneError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
ROWS = [{"sentence": f"{one} {other} a", "label": number} for number, (one, other) in enumerate(("bc", "de"))] * 4
ANSWERS = {"text": ["c"], "answer_start": [2]}
QUESTIONS = [{"id": "1", "question": "a b", "context": "b c d e", "answers": ANSWERS}]
TAGGED = [{"tokens": ["a", "b", "c"], "ner_tags": [0, 1, 1]}, {"tokens": ["d"], "ner_tags": [1]}]
TAUGHT = [{"input_ids": [2, 7, number, 3], "label": number % 2, "teacher_logits": [0.5, -0.25]} for number in range(8)]


def tokenizer() -> Any:
    return transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the form that a file's ending says."""
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix in (".csv", ".tsv"):
        names, between = list(rows[0]), "," if file.suffix == ".csv" else "\t"
        lines = [names, *([str(row[name]) for name in names] for row in rows)]
        file.write_text("".join(between.join(line) + "\n" for line in lines))
    else:
        file.write_text("".join(f"{row['sentence']}\n" for row in rows))
    return file


def data_files(place: Path, model_of: Callable[[str], Any]) -> Iterator[tuple[str, Path, Callable[[Path], Any]]]:
    """Files of rows, and what reads them: an evaluation, or a finetuning where rows bring a teacher's outputs."""
    place.mkdir()
    kinds = {
        "SequenceClassification": (ROWS, (".json", ".jsonl", ".csv", ".tsv", ".parquet")),
        "QuestionAnswering": (QUESTIONS, (".json", ".jsonl")),
        "TokenClassification": (TAGGED, (".json", ".jsonl", ".parquet")),
    }
    for kind, (rows, endings) in kinds.items():
        model = model_of(f"BertFor{kind}")

        def evaluated(file: Path, model: Any = model) -> Any:
            return cofiprune.evaluate(model, str(file), tokenizer=tokenizer())

        for ending in endings:
            yield f"{kind}'s rows{ending}", written(place / f"{kind}{ending}", rows), evaluated

    def learned(file: Path) -> Any:
        settings = {"batch_size": 4, "epochs": 1, "progress": False}
        cofiprune.finetune(model_of("BertForSequenceClassification"), str(file), tokenizer=tokenizer(), **settings)

    for ending in (".json", ".jsonl", ".parquet"):
        yield f"taught rows{ending}", written(place / f"taught{ending}", TAUGHT), learned

    def pruned(file: Path) -> Any:
        model, settings = model_of("BertModel"), {"method": "one-shot", "batch_size": 4, "progress": False}
        cofiprune.prune(model, str(file), target_sparsity=0.3, tokenizer=tokenizer(), **settings)

    yield "texts.txt", written(place / "texts.txt", ROWS), pruned


class OneLineError(CofipruneError):
    """What the command line has said."""


def options_file(place: Path, model: Any) -> tuple[str, Path, Callable[[Path], Any]]:
    """A file for `--config`, read by a dry run."""
    model.save_pretrained(place / "model")
    tokenizer().save_pretrained(place / "model")
    rows = written(place / "rows.jsonl", ROWS)
    options = {
        "train-file": str(rows), "target_sparsity": 0.5, "epochs": 1, "units": ["head", "intermediate"],
        "batch_size": 4, "learning_rate": 1e-3, "method": "one-shot", "seed": 3, "progress": False,
        "output_dir": str(place / "out"),
    }  # fmt: skip
    file = place / "options.json"
    file.write_text(json.dumps(options))

    def read(file: Path) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(["prune", str(place / "model"), "--config", str(file), "--dry-run"])
        if code == 2 and "Traceback" not in said.getvalue():
            raise OneLineError(said.getvalue())
        if code != 0:
            raise RuntimeError(f"exit code {code}: {said.getvalue()[-200:]}")

    return "options of --config", file, read


def parts_of_teach(place: Path, model: Any) -> Iterator[tuple[str, Path, Callable[[Path], Any]]]:
    """What a call of `teach` that was cut off has left, and the call that goes on."""
    from cofiprune.training import teach as teaching

    teaching.PART = 4
    rows, name, folder = [{"sentence": row["sentence"]} for row in ROWS], "taught.jsonl", place / "taught.jsonl.parts"

    class CutOffError(Exception):
        pass

    def cut_off(*_: Any) -> None:
        raise CutOffError

    def taught(file: Path) -> str:
        return cofiprune.teach(model, rows, file, tokenizer=tokenizer(), progress=False).read_text()

    join, teaching._Parts.join = teaching._Parts.join, cut_off
    with contextlib.suppress(CutOffError):
        taught(place / name)
    teaching._Parts.join = join

    def gone_on(file: Path) -> Any:
        import shutil

        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(folder, Path(other, folder.name))
            return taught(Path(other, name))

    for file in sorted(folder.iterdir()):
        yield f"teach's {file.name}", file, gone_on
