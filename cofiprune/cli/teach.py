"""`cofiprune teach`: what a model puts out for the rows of a file, written beside them."""

from __future__ import annotations

import argparse
import json
import sys

from cofiprune.cli.beside import Beside
from cofiprune.cli.loading import (
    add_task_option,
    load_config,
    load_model,
    load_tokenizer,
    task_by_architecture,
    to_device,
)
from cofiprune.cli.options import UsageError, at_least, one_of


def add_teach_options(parser: argparse.ArgumentParser) -> None:
    """Add what `teach` takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or hub name")
    add("--train-file", required=True, metavar="FILE", help="rows, with labels or without: a data file")
    add("--output", required=True, metavar="FILE", help="a file that ends in .parquet (needs pyarrow) or .jsonl")
    kinds = "logits, embedding, hidden (default: logits, or the embedding of a model without a head)"
    add("--outputs", nargs="+", metavar="NAME", help=kinds)
    add("--layers", type=at_least(1), default=1, metavar="N", help="layers whose states are written (default: 1)")
    add("--dtype", type=one_of(("float16", "float32"), "dtype"), default="float16", help="(default: float16)")
    add("--batch-size", type=at_least(1), default=32, metavar="N", help="rows at a time (default: 32)")
    add("--text-column", metavar="NAME", help="text, or first text of a pair (default: by its name)")
    add("--text-pair-column", metavar="NAME", help="second text of a pair")
    add("--max-length", type=at_least(1), metavar="N", help="tokens after which a text is cut")
    add("--tokenizer", metavar="NAME", help="directory or hub name (default: that of the model)")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--overwrite", action="store_true", help="write over the file, and over parts of another call")
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress (default: on)")
    add("--json", action="store_true", help="print the result as JSON")
    add_task_option(parser)


def teach(options: argparse.Namespace) -> None:
    """Write the file, and say what comes next."""
    from cofiprune.training.teach import teach as write

    config, beside = load_config(options.model), Beside.of(options.model)
    beside.refuse_a_part()
    if beside.readers:
        raise UsageError(
            f"{options.model} has {' and '.join(beside.readers)} behind its encoder: from Python, "
            "cofiprune.teach(SentenceTransformer(...), ...) runs the whole of it"
        )
    task = options.task or ("feature-extraction" if beside.pools else task_by_architecture(config))
    model = to_device(load_model(options.model, task, config=config), options.device)
    file = write(
        model,
        options.train_file,
        options.output,
        outputs=[name for text in options.outputs for name in text.split(",")] if options.outputs else None,
        layers=options.layers,
        dtype=options.dtype,
        batch_size=options.batch_size,
        embedding_pooling="cls" if beside.pools_first else "mean",
        tokenizer=load_tokenizer(options.tokenizer or options.model),
        text_column=options.text_column,
        text_pair_column=options.text_pair_column,
        max_length=options.max_length,
        overwrite=options.overwrite,
        progress=options.progress and sys.stderr.isatty(),
    )
    size = file.stat().st_size
    if options.json:
        print(json.dumps({"file": str(file), "bytes": size}))
        return
    print(f"saved in {file}: {size / 1e6:.1f} MB\nnext: cofiprune prune STUDENT --train-file {file} --output-dir DIR")
