"""Make a sentence-embedding encoder smaller by its own embeddings: no labels are needed.

    python examples/distill_embeddings.py
    python examples/distill_embeddings.py --data-dir DIR --split-sentences --target-sparsity 0.7
    python examples/distill_embeddings.py --model FOLDER --train-file texts.txt --sts-file sts-dev.tsv

The teacher is the model as it comes. What is distilled is the last state of each token that is no padding, by squared
error; the vector of a sentence is the mean of these (or the first of them), and follows. The width of the vectors stays
as it is, so that an index which is filled already can still be searched; --no-keep-hidden prunes it too.

Larger learning rates pay here than for a task: 5e-4 in pruning and 1e-3 in recovery by default. MiniLM-L6 at a
sparsity of 0.5, after 2 and 1 epochs over 2,000 texts, one run each: with these rates the mean cosine to the teacher's
vectors was 0.84 and the Spearman correlation of all similarities 0.76; with 4e-5 and 8e-5 they were 0.65 and 0.57.
Larger models may need smaller rates.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from embedding_modules import Modules
from embedding_quality import POOLING, Encoder, agreement, similarity_score
from embedding_texts import ScoredPairs, encode, read_scored_pairs, read_texts
from options import target_sparsity, tiny_model
from quickstart_model import ModelError, bundled_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, PreTrainedModel

import cofiprune
from cofiprune.cli.models import load_model, load_tokenizer
from cofiprune.cli.options import Parser, add_settings, at_least, one_of, prune_config, writable_directory
from cofiprune.errors import SettingsError

NAME = "distill_embeddings"
DEFAULTS = {"learning_rate": 5e-4, "finetune_learning_rate": 1e-3}
TINY = {"epochs": 1, "finetune_epochs": 1, "batch_size": 16}
TINY_ROWS, TINY_HELD_OUT, TINY_LENGTH = 96, 40, 24
WITHOUT_HIDDEN = ("layer", "head", "intermediate")
console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; a user's mistake ends in one line and exit code 2."""
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except (cofiprune.CofipruneError, ModelError, OSError) as error:
        print(f"{NAME}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prune, save, reload and compare; return what is in OUTPUT_DIR/result.json.

    :raises CofipruneError: for what cannot be done.
    """
    modules = Modules.of(options.model)
    pooling = way_of_pooling(options.pooling, modules)
    config = settings(options)
    if modules.fixed and (config.units is None or "hidden" in config.units):
        raise SettingsError(
            f"{options.model} has a {modules.fixed[0]} module, which needs vectors of their present width; keep the "
            "hidden dimensions (--keep-hidden)"
        )
    pairs = None if options.sts_file is None else read_scored_pairs(options.sts_file)
    with step("Reading the texts"):
        texts = read_texts(options)
    console.print(f"{len(texts.train):,} to learn from, {len(texts.held_out):,} held out: {texts.source}", markup=False)
    teacher = load_model(options.model, "feature-extraction")
    tokenizer = load_tokenizer(options.model)
    if tokenizer is None:
        raise SettingsError(f"{options.model} has no tokenizer")

    student = copy.deepcopy(teacher)
    with step(f"Pruning to {options.target_sparsity:.0%} sparsity by its own embeddings, then recovery"):
        result = cofiprune.prune(
            student,
            encode(texts.train, tokenizer, options.max_length),
            target_sparsity=options.target_sparsity,
            teacher="self",
            config=config,
        )
    folder = options.output_dir
    with step(f"Compacting, saving to {folder} and reloading"):
        small = result.compact()
        small.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reloaded = AutoModel.from_pretrained(folder)
    with step("Measuring both"):
        figures = measure(
            options, teacher, reloaded, tokenizer, pooling, texts.held_out, result.plan.keep.get("hidden"), pairs
        )
        copied = modules.copy(folder, figures["dimensions"]["student"])
        report = None
        if options.benchmark:
            seconds = 0.2 if options.tiny else 5.0
            report = cofiprune.benchmark(
                reloaded, teacher.to(reloaded.device), batch_size=(1, 32), seq_len=options.max_length, seconds=seconds
            )
    figures.update(pooling=pooling, texts=len(texts.train), held_out=len(texts.held_out), seconds=result.seconds)
    if report is not None:
        figures["speedup"] = {f"batch {row.batch_size}": row.speedup for row in report.rows}
    (folder / "result.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    console.print(make_table(figures, report))
    if copied:
        console.print(f"Also in {folder}: {', '.join(copied)}", markup=False)
        console.print(f"After `import cofiprune`, SentenceTransformer({str(folder)!r}) loads it.", markup=False)
    return figures


def measure(
    options: argparse.Namespace,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: Any,
    pooling: str,
    texts: Sequence[str],
    kept: Sequence[int] | None,
    pairs: ScoredPairs | None,
) -> dict[str, Any]:
    """Size of both models and how well the student's vectors agree with the teacher's on held-out texts.

    :param kept: dimensions of the teacher's vectors that the student has; None for all.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders = [Encoder(model.to(device), tokenizer, pooling, options.max_length) for model in (teacher, student)]
    before, after = (cofiprune.summary(model) for model in (teacher, student))
    vectors = [encoder.vectors(texts) for encoder in encoders]
    found: dict[str, Any] = {
        "sparsity": after.sparsity,
        "size": {"teacher": before.layer_parameters, "student": after.layer_parameters},
        "parameters": {"teacher": before.parameters, "student": after.parameters},
        "dimensions": {"teacher": vectors[0].shape[1], "student": vectors[1].shape[1]},
        **asdict(agreement(vectors[0], vectors[1], range(vectors[0].shape[1]) if kept is None else kept)),
    }
    if pairs is not None:
        scores = [similarity_score(encoder, pairs) for encoder in encoders]
        found["sts_spearman"] = dict(zip(("teacher", "student"), scores, strict=True))
    return found


def make_table(figures: dict[str, Any], report: cofiprune.BenchmarkReport | None) -> Table:
    """The teacher and the pruned model side by side, and what they agree on."""
    table = Table("", "teacher", "pruned and reloaded")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("parameters in the layers", *(f"{value:,}" for value in figures["size"].values()))
    table.add_row("parameters in all", *(f"{value:,}" for value in figures["parameters"].values()))
    table.add_row("sparsity of the layers", "", f"{figures['sparsity']:.1%}")
    table.add_row("dimensions of a vector", *(str(value) for value in figures["dimensions"].values()))
    if report is not None:
        for row in report.rows:
            times = [f"{timing.median_ms:.1f} ms" for timing in (row.baseline, row.model) if timing is not None]
            table.add_row(f"latency, batch {row.batch_size}, {row.seq_len} tokens", *times)
            table.add_row("  speed-up", "", f"{row.speedup:.1f}x")
    table.add_section()
    table.add_row("cosine of the two vectors of a text, mean", "1", f"{figures['cosine']:.4f}")
    table.add_row("  5th percentile", "1", f"{figures['cosine_p05']:.4f}")
    table.add_row("Spearman of the similarities of all pairs", "1", f"{figures['spearman']:.4f}")
    table.add_row("the same nearest neighbour", "", f"{figures['same_neighbour']:.1%}")
    if figures["found_in_index"] is not None:
        table.add_row("text found in the teacher's index", "", f"{figures['found_in_index']:.1%}")
    if "sts_spearman" in figures:
        table.add_row("STS, Spearman", *(f"{value:.4f}" for value in figures["sts_spearman"].values()))
    return table


def way_of_pooling(asked: str | None, modules: Modules) -> str:
    """mean or cls: what is asked for, else what the model's folder says, else mean.

    :raises SettingsError: when the folder says another way.
    """
    stated = modules.pooling
    if asked is None and stated is not None and stated not in POOLING:
        raise SettingsError(f"the model pools by {stated!r}; what can be measured is {', '.join(POOLING)} (--pooling)")
    return asked or stated or POOLING[0]


def settings(options: argparse.Namespace) -> cofiprune.PruneConfig:
    """The settings of the command line; the width of the vectors is left out of the units, unless it is asked for.

    :raises SettingsError: when the options contradict each other.
    """
    given = vars(options)
    if options.keep_hidden and "hidden" in ",".join(given.get("units", ())).split(","):
        raise SettingsError("--units hidden changes the width of the vectors; add --no-keep-hidden if that is meant")
    if options.keep_hidden:
        given.setdefault("units", list(WITHOUT_HIDDEN))
    return prune_config(options, None)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is done, and in how many seconds it was."""
    console.print(f"{title} ...", markup=False)
    start = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - start:.1f} s[/dim]")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and fill in what follows from it.

    :raises CofipruneError: for whatever cannot be understood.
    """
    parser = Parser(prog=NAME, description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", metavar="NAME", help="folder or hub name of an encoder (default: the packaged MiniLM-L6, which is "
        "all-MiniLM-L6-v2); of a sentence-transformers folder the module files are copied along")  # fmt: skip
    add("--target-sparsity", default="0.5", metavar="X",
        help="share of the layers' parameters to remove, in (0, 1) (default: 0.5)")  # fmt: skip
    add("--data-dir", type=Path, metavar="DIR", help="folder with train.* and, if there is one, validation.*")
    add("--train-file", type=Path, metavar="FILE", help="txt (a text a line), csv, tsv, json, jsonl or parquet")
    add("--validation-file", type=Path, metavar="FILE", help="texts to measure on (default: a tenth is held out)")
    add("--text-column", nargs="+", metavar="NAME", help="columns of texts (default: those of a known name)")
    add("--split-sentences", action="store_true", help="take sentences instead of whole texts; scraps are left out")
    add("--sts-file", type=Path, metavar="FILE", help="pairs with a score, such as STS-B: sentence1, sentence2, score")
    add("--pooling", type=one_of(POOLING, "pooling"), metavar="{mean,cls}",
        help="how a vector is made of token states (default: what the model's folder says, else mean)")  # fmt: skip
    add("--keep-hidden", action=argparse.BooleanOptionalAction, default=True,
        help="keep the width of the vectors, so that they compare with the teacher's (default: on)")  # fmt: skip
    add("--output-dir", default="runs/embeddings", metavar="DIR", help="(default: runs/embeddings)")
    add("--train-rows", type=at_least(1), metavar="N", help="texts to learn from (default: all)")
    add("--eval-rows", type=at_least(10), metavar="N", help="texts to measure on (default: all, at most 1000)")
    add("--max-length", type=at_least(8), default=64, metavar="N", help="tokens to which texts are cut (default: 64)")
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    add("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure the speed-up at the end")
    add_settings(parser, cofiprune.PruneConfig)
    options = parser.parse(list(argv))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options.target_sparsity = target_sparsity(options.target_sparsity)
    if options.target_sparsity is None:
        raise SettingsError("--target-sparsity none leaves nothing to do: the model is its own teacher")
    options.output_dir = writable_directory(options.output_dir, other_than=(options.model,))
    for setting, value in (TINY if options.tiny else DEFAULTS).items():
        vars(options).setdefault(setting, value)
    vars(options).setdefault("batch_size", 32)
    vars(options).setdefault("seed", 57)
    settings(options)  # says of a wrong value before anything is loaded
    if options.tiny:
        options.train_rows, options.eval_rows = options.train_rows or TINY_ROWS, options.eval_rows or TINY_HELD_OUT
        options.max_length = min(options.max_length, TINY_LENGTH)
    transformers.set_seed(options.seed)
    if options.model is None:
        options.model = tiny_model(options) if options.tiny else str(bundled_model())
    return options


if __name__ == "__main__":
    sys.exit(main())
