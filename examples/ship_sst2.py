"""Make a classifier of a few megabytes: fewer tokens, fewer units, int8; and measure it next to the dense model.

    python examples/ship_sst2.py --data-dir DIR
    python examples/ship_sst2.py --data-dir DIR --teacher FOLDER --tokens 12000 --target-sparsity 0.95 --units hidden

A dense model is fine-tuned on some labelled rows. Its vocabulary is cut to what the texts use most, before all else, so
that what is trained afterwards makes up for it. Layers are pruned in one shot and recover by distillation, which needs
no labels and therefore takes more texts than those that have some; the longest, since many are parts of others. The
result is exported to ONNX in int8, table of tokens included, and refused where that costs accuracy.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bundled import minilm, tiny_bert
from run_glue import TASKS, load_glue, load_model, load_validation, made_up
from transformers import AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.data import Labels, tokenise
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.export.sessions import onnx_answers
from cofiprune.timing import cpu_threads, in_turn

FILES = ("onnx/model.onnx", "onnx/model_quantized.onnx")
Rows = list[dict[str, Any]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", help="folder with train.* and validation.* of SST-2 (default: the hub)")
    add("--teacher", help="folder of a dense model that knows the task (default: MiniLM-L6 is fine-tuned)")
    add("--labelled-rows", type=int, default=8000, help="rows to fine-tune the dense model on (default: 8000)")
    add("--tokens", type=int, default=9000, help="size of the vocabulary (default: 9000)")
    add("--target-sparsity", type=float, default=0.92, help="share of the layers' parameters to remove (default: 0.92)")
    add(
        "--units",
        nargs="+",
        default=[],
        help="kinds of units to prune beside layers, heads and feed-forward dimensions",
    )
    add("--texts", type=int, default=24_000, help="that are distilled on, the longest (default: 24,000)")
    add("--epochs", type=float, default=2.0, help="of recovery, over these texts (default: 2)")
    add("--int8-mode", choices=("static", "dynamic", "weights"), help="(default: the fastest that holds)")
    add("--max-drop", type=float, default=0.01, help="accuracy that int8 may cost, as a fraction (default: 0.01)")
    add("--threads", type=int, default=2, help="of the CPU, in timing (default: 2)")
    add("--seed", type=int, default=57)
    add("--output-dir", type=Path, default=Path("runs/ship-sst2"))
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    return parser.parse_args(argv)


def load_teacher(options: argparse.Namespace, train: Rows) -> tuple[PreTrainedModel, Any]:
    """Return the dense model and its tokenizer; it is fine-tuned where none is named."""
    source = options.teacher or (
        tiny_bert(options.output_dir / "tiny-model", options.seed) if options.tiny else minilm()
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    transformers.set_seed(options.seed)  # of a new head
    model = load_model(source, Labels(TASKS["sst2"][0]))
    if options.teacher is None:
        order = np.random.RandomState(1234).permutation(len(train))[: options.labelled_rows]
        rows = tokenise([train[index] for index in order], tokenizer, model, max_length=64)
        how = {"epochs": 5, "learning_rate": 5e-3} if options.tiny else {"epochs": 2, "learning_rate": 5e-5}
        cofiprune.finetune(model, rows, batch_size=32, seed=options.seed, **how)
    return model, tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Cut the vocabulary, prune, recover, export, measure."""
    options = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tiny = options.tiny and options.data_dir is None
    train = made_up("sst2", 0) if tiny else load_glue("sst2", options.data_dir, "train")
    validation = made_up("sst2", 128) if tiny else load_validation("sst2", options.data_dir)[""]
    dense, tokenizer = load_teacher(options, train)
    dense_rows = tokenise(validation, tokenizer, dense, max_length=64)

    texts = [row["sentence"] for row in train]
    vocabulary = cofiprune.prune_vocabulary(dense, tokenizer, texts, target_size=options.tokens, progress=False)
    print(vocabulary)
    teacher, tokenizer = vocabulary.model, vocabulary.tokenizer
    rows = tokenise(validation, tokenizer, teacher, max_length=64)
    longest = sorted(train, key=lambda row: -len(row["sentence"]))[: options.texts]
    unlabelled = [
        {name: value for name, value in row.items() if name != "labels"}
        for row in tokenise(longest, tokenizer, teacher, max_length=64)
    ]
    result = cofiprune.prune(
        copy.deepcopy(teacher),
        unlabelled,
        teacher=teacher,
        target_sparsity=options.target_sparsity,
        units=("layer", "head", "intermediate", *options.units),
        method="one-shot",
        finetune_epochs=options.epochs,
        seed=options.seed,
    )
    small = result.compact()
    print(cofiprune.summary(small))
    small.save_pretrained(options.output_dir)
    int8 = {"int8": options.int8_mode or True, "max_drop": options.max_drop}
    report = cofiprune.export(small, options.output_dir, tokenizer=tokenizer, dataset=rows, **int8)
    print(report)

    seconds = 0.2 if options.tiny else 10.0
    batches = {size: synthetic_inputs(small, batch_size=size, seq_len=128) for size in (1, 32)}
    times = {size: measured(dense, batch, options, seconds) for size, batch in batches.items()}
    accuracy = {"dense": cofiprune.evaluate(dense, dense_rows)["accuracy"], **report.score}
    sizes = {"dense": 4 * dense.num_parameters() / 1e6, **{name: report[name].megabytes for name in FILES}}
    for name in ("dense", *FILES):
        faster = ", ".join(f"batch {size} {each['dense'] / each[name]:.1f}x" for size, each in times.items())
        share = accuracy[name] / accuracy["dense"]
        print(f"{name:26} {sizes[name]:6.2f} MB  accuracy {accuracy[name]:.4f} ({share:.1%} of dense)  {faster}")
    found = {"megabytes": sizes, "accuracy": accuracy, "milliseconds": times, "options": vars(options)}
    found["notes"] = {name: file.note for name, file in report.items()}
    (options.output_dir / "result.json").write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")


def measured(dense: PreTrainedModel, batch: Any, options: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Return milliseconds for a batch: of the dense model in torch, and of the files, in turn."""
    folder, threads = options.output_dir, options.threads
    passes: list[Any] = [partial(dense.eval(), **batch)]
    passes += [partial(onnx_answers(folder / name, threads=threads), batch) for name in FILES]
    with cpu_threads(threads), torch.inference_mode():
        times = in_turn(passes, dense.device, seconds=seconds)
    return {name: 1e3 * float(np.median(each)) for name, each in zip(("dense", *FILES), times, strict=True)}


if __name__ == "__main__":
    try:
        main()
    except (cofiprune.CofipruneError, OSError) as error:
        print(f"ship_sst2: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
