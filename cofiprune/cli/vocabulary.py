"""`cofiprune vocabulary`: a model and its tokenizer with the tokens that texts use."""

from __future__ import annotations

import argparse
import json

from cofiprune.cli.beside import Beside
from cofiprune.cli.loading import add_task_option, load_config, load_model, load_tokenizer, task_by_architecture
from cofiprune.cli.options import UsageError, at_least, writable_directory
from cofiprune.errors import suggest


def add_vocabulary_options(parser: argparse.ArgumentParser) -> None:
    """Add what `vocabulary` takes."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory or hub name, with a fast tokenizer")
    add("--texts", required=True, metavar="FILE", help="texts like those to come: .txt, .csv, .tsv, .json(l), .parquet")
    add("--columns", nargs="+", metavar="NAME", help="columns with texts (default: all that hold strings, but labels)")
    add("--output-dir", required=True, metavar="DIR", help="where model and tokenizer go")
    add("--min-count", type=at_least(1), default=1, metavar="N", help="times that a token must be used (default: 1)")
    add("--target-size", type=at_least(1), metavar="N", help="tokens to keep at most, the most used first")
    add("--keep", nargs="+", default=[], metavar="TEXT", help="further texts whose tokens stay")
    add("--json", action="store_true", help="print the result as JSON")
    add("--overwrite", action="store_true", help="write over a finished model in the output directory")
    add_task_option(parser)


def vocabulary(options: argparse.Namespace) -> None:
    """Prune the vocabulary, save what is left, and print the proof."""
    from cofiprune.data.files import load_rows
    from cofiprune.files import check_unfinished
    from cofiprune.vocabulary.prune import prune_vocabulary

    folder = writable_directory(options.output_dir, other_than=[options.model])
    if not options.overwrite:
        check_unfinished(folder)
    rows = load_rows(options.texts)
    known = [name for name, value in rows[0].items() if isinstance(value, str)]
    columns = options.columns or [name for name in known if not name.startswith("label")]
    for name in columns:
        if name not in known:
            raise UsageError(
                f"--columns: no column {name!r} with texts.{suggest(name, known)} There are: {', '.join(known)}"
            )
    texts = [row[name] for row in rows for name in columns]
    config, beside = load_config(options.model), Beside.of(options.model)
    stated = task_by_architecture(config)
    task = options.task or ("feature-extraction" if beside.pools else stated) or "feature-extraction"
    model, tokenizer = load_model(options.model, task, config=config), load_tokenizer(options.model)
    if tokenizer is None:
        raise UsageError(f"{options.model} has no tokenizer")
    model.train(False)
    result = prune_vocabulary(
        model, tokenizer, texts, min_count=options.min_count, target_size=options.target_size, keep=options.keep
    )
    result.save(folder)
    beside.for_task(task, stated, tokenised=True).copy_to(folder, result.model.config)
    if options.json:
        named = ("size_before", "coverage", "proof", "kept")
        print(json.dumps({**{name: getattr(result, name) for name in named}, "folder": str(folder)}))
        return
    print(f"{result}\n\nsaved in {folder}")
