"""Prune an encoder for question answering on SQuAD 1.1 or 2.0: teach, prune, compact, save, reload, compare.

    python examples/run_squad.py --target-sparsity 0.9 --preset squad
    python examples/run_squad.py --data-dir DIR --version-2-with-negative --null-score-threshold 0.5

The questions come from the files train.* and validation.* (or dev.*) of a folder, or from the hub. Passages longer than
`--max-length` are cut into windows that overlap by `--doc-stride` tokens. Exact match and F1 are SQuAD's own.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Task, load_model, load_tokenizer, subset
from common import main as run_example
from squad import Question, SpanSettings, Window, encode, find_answers, squad_metrics
from squad_data import load_questions, made_up
from transformers import PreTrainedModel

import cofiprune
from cofiprune.cli.options import Parser, at_least, number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; a user's mistake ends in one line and exit code 2."""
    return run_example("run_squad", (__doc__ or "").partition("\n")[0], add_options, make_task, argv)


def add_options(parser: Parser) -> None:
    """Add the options of question answering."""
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="DIR",
        help="folder with train.* and validation.* or dev.* (parquet, json, jsonl; default: from the hub)")  # fmt: skip
    add("--version-2-with-negative", action="store_true", help="questions may have no answer, as in SQuAD 2.0")
    add("--null-score-threshold", type=number, default=0.0, metavar="X",
        help="no answer is given when its score is above the best answer's by more than this (default: 0)")  # fmt: skip
    add("--doc-stride", type=at_least(0), default=128, metavar="N",
        help="tokens of a passage that neighbouring windows share (default: 128)")  # fmt: skip
    add("--n-best", type=at_least(1), default=20, metavar="N",
        help="first tokens, last tokens and answers that are considered per question (default: 20)")  # fmt: skip
    add("--max-answer-length", type=at_least(1), default=30, metavar="N", help="in tokens (default: 30)")
    parser.set_defaults(max_length=384)


def make_task(options: argparse.Namespace) -> Task:
    """Read and tokenise the questions, and say how a model is measured on them."""
    version_2 = options.version_2_with_negative
    spans = SpanSettings(options.n_best, options.max_answer_length, version_2, options.null_score_threshold)
    tokenizer = load_tokenizer(options)
    if options.tiny and options.data_dir is None:
        train, validation = made_up(128, version_2=version_2), made_up(64, version_2=version_2, seed=1)
    else:
        train, validation = load_questions(options.data_dir, version_2=version_2, train=options.trains)
    train, validation = subset(train, options, training=True), subset(validation, options, training=False)
    lengths = {"max_length": options.max_length, "stride": options.doc_stride}
    train_rows, _ = encode(train, tokenizer, **lengths)
    rows, windows = encode(validation, tokenizer, **lengths)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return score(validation, windows, prediction, spans)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        found = cofiprune.evaluate(model, rows, compute_metrics=compute_metrics)
        return {name: value for name, value in found.items() if name.endswith(("exact_match", "f1"))}

    return Task(
        name="SQuAD 2.0" if version_2 else "SQuAD 1.1",
        train=train_rows,
        validation=rows,
        new_model=lambda source: load_model(source, "question-answering"),
        measure=measure,
        tokenizer=tokenizer,
        headline="f1",
        compute_metrics=compute_metrics,
        preset="squad",
        settings={"doc_stride": options.doc_stride, **dataclasses.asdict(spans)},
    )


def score(
    questions: Sequence[Question], windows: Sequence[Window], prediction: Any, spans: SpanSettings
) -> dict[str, float]:
    """Exact match and F1 of a `transformers.EvalPrediction` over the windows."""
    starts, ends = prediction.predictions[:2]
    answers = find_answers(questions, windows, starts, ends, spans)
    return squad_metrics(questions, [best[0].text for best in answers], version_2=spans.version_2)


if __name__ == "__main__":
    sys.exit(main())
