"""Prune an encoder for named entities (WNUT-17, NCBI-disease, your own): teach, prune, compact, save, reload, compare.

    python examples/run_ner.py --task wnut17 --target-sparsity 0.9
    python examples/run_ner.py --task ncbi_disease --data-dir DIR --metric-for-best-model f1
    python examples/run_ner.py --task mine --data-dir DIR --label-names O B-gene I-gene

The words and their tags, columns `tokens` and `ner_tags`, come from the files train.*, validation.* (or dev.*) and
test.* of a folder, or from the hub. Precision, recall and F1 are those of whole entities, as seqeval counts them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Task, load_model, load_tokenizer, subset
from common import main as run_example
from ner import MADE_UP_NAMES, Sentence, Tagged, encode, entity_scores, load_sentences, made_up
from transformers import AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.cli.labels import Head
from cofiprune.cli.options import Parser
from cofiprune.errors import DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; a user's mistake ends in one line and exit code 2."""
    return run_example("run_ner", (__doc__ or "").partition("\n")[0], add_options, make_task, argv)


def add_options(parser: Parser) -> None:
    """Add the options of named entities."""
    add = parser.add_argument
    add("--task", default="wnut17", metavar="NAME",
        help="wnut17, ncbi_disease, a data set of the hub, or any name with --data-dir (default: wnut17)")  # fmt: skip
    add("--data-dir", type=Path, metavar="DIR",
        help="folder with train.*, validation.* or dev.*, test.* (parquet, json, jsonl; default: the hub)")  # fmt: skip
    add("--label-names", nargs="+", default=(), metavar="TAG",
        help="names of the tags in the order of their ids (default: those of the data set)")  # fmt: skip


def make_task(options: argparse.Namespace) -> Task:
    """Read and tokenise the sentences, and say how a model is measured on them."""
    tokenizer = word_tokenizer(options)
    if options.tiny and options.data_dir is None:
        name, data = "made-up names", Tagged(MADE_UP_NAMES, made_up(128), made_up(64, seed=1))
    else:
        name = options.task
        data = load_sentences(name, options.data_dir, options.label_names, train=options.trains)
    train, _ = encode(subset(data.train, options, training=True), tokenizer, options.max_length)
    validation, test = (
        Measured(subset(side, options, training=False), tokenizer, options.max_length, data.label_names)
        for side in (data.validation, data.test)
    )

    def measure(model: PreTrainedModel) -> dict[str, float]:
        on_test = test.scores_of(model) if test.rows else {}
        return {**validation.scores_of(model), **{f"test_{name}": value for name, value in on_test.items()}}

    return Task(
        name=name,
        train=train,
        validation=validation.rows,
        new_model=lambda source: new_model(source, data.label_names),
        measure=measure,
        tokenizer=tokenizer,
        headline="f1",
        compute_metrics=validation.scores,
        settings={"label_names": data.label_names},
    )


class Measured:
    """Sentences on which a model is measured."""

    def __init__(self, sentences: Sequence[Sentence], tokenizer: Any, max_length: int, names: Sequence[str]) -> None:
        self.sentences, self.names = sentences, names
        self.rows, self.firsts = encode(sentences, tokenizer, max_length)

    def scores(self, prediction: Any) -> dict[str, float]:
        """Precision, recall and F1 of a `transformers.EvalPrediction` over the rows."""
        return entity_scores(self.sentences, self.firsts, prediction.predictions.argmax(-1), self.names)

    def scores_of(self, model: PreTrainedModel) -> dict[str, float]:
        """Precision, recall and F1 of a model."""
        found = cofiprune.evaluate(model, self.rows, compute_metrics=self.scores)
        return {name: found[name] for name in ("precision", "recall", "f1")}


def word_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer of the model; one of RoBERTa's kind must put a space before a word."""
    tokenizer = load_tokenizer(options)
    if getattr(tokenizer, "add_prefix_space", True):
        return tokenizer
    return AutoTokenizer.from_pretrained(tokenizer.name_or_path, add_prefix_space=True)


def new_model(source: str, names: Sequence[str]) -> PreTrainedModel:
    """Load a model with a head for these tags.

    :raises CofipruneError: when it cannot be loaded, or has a head for other tags.
    """
    model = load_model(source, "token-classification", Head(tuple(names)))
    found = [model.config.id2label[index] for index in range(model.config.num_labels)]
    numbers = [f"LABEL_{index}" for index in range(len(names))]
    if found not in (list(names), numbers):
        raise DataError(
            f"{source} has a head for the tags {', '.join(found)} and the data has {', '.join(names)}; "
            "take an encoder without such a head, or one for these tags"
        )
    return model


if __name__ == "__main__":
    sys.exit(main())
