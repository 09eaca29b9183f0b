"""Make a sentence-embedding encoder smaller by its own embeddings: no labels are needed.

    python examples/distill_embeddings.py
    python examples/distill_embeddings.py --data-dir DIR --split-sentences --target-sparsity 0.7
    python examples/distill_embeddings.py --model FOLDER --train-file texts.txt --sts-file sts-dev.tsv \
        --retrieval-file squad-dev.parquet

The teacher is the model as it comes. What is distilled is the vector of a sentence, the mean of its token states or the
first of them: its direction, and its similarities to the teacher's vectors of the batch; beside it the token states, by
squared error. The width of the vectors stays as it is, so that an index which is filled already can still be searched;
--no-keep-hidden prunes it too.

Larger learning rates pay here than for a task: 5e-4 in pruning and 1e-3 in recovery by default, in batches of 16. With
gates, MiniLM-L6 at a sparsity of 0.5, after 2 and 1 epochs over 2,000 texts, one run each: with these rates the mean
cosine to the teacher's vectors was 0.84 and the Spearman correlation of all similarities 0.76; with 4e-5 and 8e-5 they
were 0.65 and 0.57.
Larger models may need smaller rates. Every field of `cofiprune.PruneConfig` is an option too.
"""

import argparse
import copy
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from bundled import docstring_rows, minilm, tiny_bert
from huggingface_hub import snapshot_download
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.data import find_text_columns, load_rows, tokenise

SETTINGS = "--learning-rate 5e-4 --finetune-learning-rate 1e-3 --batch-size 16"
TINY = "--epochs 1 --finetune-epochs 1 --batch-size 16"
FEWEST, MOST = 10, 1000
"""Held-out texts: the similarities of all pairs of them are compared, half a million at most."""
MODULES = ("*.json", "[0-9]*_*/*")
"""Files that come along with a model on the hub."""
OF_ANY_WIDTH = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that do not mind a width other than the one that they were saved with."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, cofiprune.PruneConfig]:
    """Read the command line; what is no option of this program is a setting of cofiprune."""
    epilog = "Every field of cofiprune.PruneConfig is an option too: --epochs 6 --units head intermediate."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="folder or hub name of an encoder (default: the packaged MiniLM-L6, all-MiniLM-L6-v2); of a "
        "sentence-transformers folder the files of its modules are copied along")  # fmt: skip
    add("--target-sparsity", type=float, default=0.5, help="share of the layers' parameters to remove (default: 0.5)")
    add("--data-dir", help="folder with train.* and, if there is one, validation.*")
    add("--train-file", help="txt (a text a line), csv, tsv, json, jsonl or parquet")
    add("--validation-file", help="texts to measure on (default: a tenth is held out)")
    add("--text-column", nargs="+", help="columns of texts (default: those of a known name)")
    add("--split-sentences", action="store_true", help="take sentences instead of whole texts; scraps are left out")
    add("--sts-file", help="pairs with a score, such as STS-B: sentence1, sentence2, score")
    add("--retrieval-file", help="questions with their paragraphs, such as SQuAD: question, context")
    add("--pooling", choices=("mean", "cls"), help="how a vector is measured (default: what the model's folder says, "
        "which is copied along; else the mean, as SentenceTransformer)")  # fmt: skip
    add("--keep-hidden", action=argparse.BooleanOptionalAction, default=True,
        help="keep the width of the vectors, so that they compare with the teacher's (default: on)")  # fmt: skip
    add("--max-length", type=int, default=64, help="tokens to which texts are cut (default: 64)")
    add("--train-rows", type=int, help="texts to learn from (default: all)")
    add("--eval-rows", type=int, default=MOST, help=f"texts to measure on (default: all, {MOST} at most)")
    add("--output-dir", type=Path, default=Path("runs/embeddings"), help="(default: runs/embeddings)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    add("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure the speed-up at the end")
    options, settings = parser.parse_known_args(argv)
    settings = [*(TINY if options.tiny else SETTINGS).split(), *settings]
    if options.tiny:
        options.train_rows, options.eval_rows = options.train_rows or 96, min(options.eval_rows, 40)
        options.max_length = min(options.max_length, 24)
    config = cofiprune.PruneConfig.from_arguments(settings)
    if options.keep_hidden and "hidden" in (config.units or ()):
        parser.error("--units hidden changes the width of the vectors; add --no-keep-hidden if that is meant")
    if options.keep_hidden and config.units is None:
        config = cofiprune.PruneConfig.create(config, units=("layer", "head", "intermediate"))
    return options, config


def load_texts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return texts to learn from and texts to measure on, in a random order that is always the same.

    Texts that occur twice are kept once. Where there is no file to hold out, a tenth of the texts is held out.
    """
    held_out: list[str] = []
    if options.data_dir:
        texts = texts_of(load_rows(options.data_dir, "train"), options)
        splits = ("validation", "dev", "test")
        if any(file.name.startswith(splits) for file in Path(options.data_dir).iterdir()):
            held_out = texts_of(load_rows(options.data_dir, *splits), options)
    elif options.train_file:
        texts = texts_of(load_rows(options.train_file), options)
        held_out = texts_of(load_rows(options.validation_file), options) if options.validation_file else []
    else:
        sides = docstring_rows(16, 8) if options.tiny else docstring_rows()
        texts, held_out = ([row["text"] for row in side] for side in sides)
    texts = list(dict.fromkeys(texts))
    texts = [texts[index] for index in np.random.RandomState(1234).permutation(len(texts))]
    seen = set(texts)
    held_out = [text for text in dict.fromkeys(held_out) if text not in seen]
    if not held_out:
        count = min(MOST, max(FEWEST, len(texts) // 10))
        texts, held_out = texts[count:], texts[:count]
    texts, held_out = texts[: options.train_rows], held_out[: min(options.eval_rows, MOST)]
    if not texts or len(held_out) < FEWEST:
        sys.exit(f"{len(texts)} texts to learn from and {len(held_out)} to measure on; the latter must be {FEWEST}")
    return texts, held_out


def texts_of(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """Return the texts in all text columns."""
    columns = options.text_column
    if columns is None:
        found = find_text_columns(rows[0], "embedding")
        columns = [name for name in (found.text, found.pair) if name is not None]
    texts = [row[name].strip() for name in columns for row in rows]
    return [part for text in texts for part in (sentences(text) if options.split_sentences else [text]) if part]


def sentences(text: str, fewest_words: int = 5) -> list[str]:
    """Return the sentences of a text, less headings and scraps.

    >>> sentences(" = A heading of a page = \\nA sentence of six words . Not one .")
    ['A sentence of six words .']
    """
    parts = [part for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+", line.strip())]
    return [part for part in parts if len(part.split()) >= fewest_words and not part.startswith("=")]


def vectors(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], pooling: str, max_length: int) -> Tensor:
    """Return the embeddings of texts, of length 1: [texts, dimensions], on the CPU."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), 128):
            part = [texts[index] for index in order[start : start + 128]]
            batch = tokenizer(part, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
            states = model(**batch.to(model.device)).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            found.append(F.normalize(pooled, dim=-1).cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


def agreement(teacher: Tensor, student: Tensor, kept: Sequence[int]) -> dict[str, float]:
    """Compare the vectors of the same texts; every figure is 1 for equal ones.

    :param teacher: [texts, H], of length 1.
    :param student: [texts, h], of length 1.
    :param kept: the teacher's dimensions that the student's are: h of them. The others count as 0.
    """
    cosines = (teacher[:, list(kept)] * student).sum(-1)
    ours, theirs = student @ student.T, teacher @ teacher.T
    upper = torch.triu(torch.ones_like(ours, dtype=torch.bool), diagonal=1)
    itself = torch.eye(len(ours), dtype=torch.bool)
    nearest = [one.masked_fill(itself, -2).argmax(1) for one in (ours, theirs)]
    found = {
        "cosine, mean": float(cosines.mean()),
        "cosine, 5th percentile": float(np.percentile(cosines.numpy(), 5)),
        "Spearman of all similarities": float(spearmanr(ours[upper], theirs[upper]).statistic),
        "same nearest neighbour": float((nearest[0] == nearest[1]).float().mean()),
    }
    if student.shape == teacher.shape:
        # What becomes of an index that was filled before.
        first = (student @ teacher.T).argmax(1) == torch.arange(len(student))
        found["found in the teacher's index"] = float(first.float().mean())
    return found


def retrieval(queries: Tensor, index: Tensor, wanted: Sequence[int], most: int = 10) -> float:
    """Return the mean reciprocal rank at 10 (MRR@10) of the text that each query is about, among all that are indexed.

    :param queries: [Q, H], of length 1, as `vectors` gives them.
    :param index: [texts, H], of the same model or of its teacher.
    :param wanted: Q rows of the index.
    """
    found = (queries @ index.T).topk(min(most, len(index))).indices == torch.tensor(wanted).unsqueeze(1)
    return float((found / torch.arange(1, found.shape[1] + 1)).sum(1).mean())


def retrieval_scores(file: str, teacher: Any, student: Any) -> dict[str, float]:
    """Let both models find the paragraphs of questions: each in its own index, and the student in the teacher's.

    :param teacher: makes vectors of texts; so does `student`.
    """
    rows = load_rows(file)
    if not rows or not {"question", "context"} <= rows[0].keys():
        sys.exit(f"{file} needs the columns question and context; it has {', '.join(rows[0] if rows else ())}")
    places = {text: place for place, text in enumerate(dict.fromkeys(row["context"] for row in rows))}
    rows = [rows[index] for index in np.random.RandomState(5).permutation(len(rows))[:MOST]]
    queries, wanted = [row["question"] for row in rows], [places[row["context"]] for row in rows]
    index, ours, theirs = student(list(places)), student(queries), teacher(list(places))
    found = {"MRR@10 of the teacher": retrieval(teacher(queries), theirs, wanted)}
    if index.shape == theirs.shape:
        found["MRR@10 in the teacher's index"] = retrieval(ours, theirs, wanted)
    return found | {"MRR@10 in its own index": retrieval(ours, index, wanted)}


def scores_of_files(options: argparse.Namespace, teacher: Any, student: Any) -> dict[str, float]:
    """Return what is measured on files of the user's.

    :param teacher: makes vectors of texts; so does `student`.
    """
    found: dict[str, float] = {}
    if options.sts_file:
        found["STS of the teacher"] = similarity_score(options.sts_file, teacher)
        found["STS"] = similarity_score(options.sts_file, student)
    if options.retrieval_file:
        found |= retrieval_scores(options.retrieval_file, teacher, student)
    return found


def similarity_score(file: str, embed: Any) -> float:
    """Return the rank correlation of the cosines of pairs with the similarities that people gave them (STS-B)."""
    rows = load_rows(file)
    score = next((name for name in ("score", "label", "similarity_score", "similarity") if name in rows[0]), None)
    if score is None or not {"sentence1", "sentence2"} <= rows[0].keys():
        sys.exit(f"{file} needs the columns sentence1, sentence2 and score or label; it has {', '.join(rows[0])}")
    first, second = (embed([row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    return float(spearmanr((first * second).sum(-1), [float(row[score]) for row in rows]).statistic)


def read_modules(source: str) -> list[dict[str, Any]]:
    """Return the modules of a sentence-transformers folder; none of another one."""
    file = Path(source, "modules.json")
    modules = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for module in modules:
        if not Path(source, module.get("path", "")).resolve().is_relative_to(Path(source).resolve()):
            sys.exit(f"{file} names {module['path']!r}, which is outside of its folder")
        module["kind"] = module["type"].rpartition(".")[2]
    return modules


def pooling_of(source: str, modules: Sequence[dict[str, Any]]) -> str:
    """Return the way of pooling that a sentence-transformers folder says, mean where it says none."""
    for module in modules:
        if module["kind"] == "Pooling":
            settings = json.loads(Path(source, module["path"], "config.json").read_text(encoding="utf-8"))
            old = [name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True]
            ways = [settings["pooling_mode"]] if "pooling_mode" in settings else old
            short = {"mean_tokens": "mean", "cls_token": "cls"}
            return "+".join(short.get(way, way) for way in ways if way != "include_prompt") or "mean"
    return "mean"


def copy_modules(source: str, target: Path, modules: Sequence[dict[str, Any]], width: int) -> None:
    """Copy the files that make a folder a sentence-transformers one, and tell the pooling the width of the vectors."""
    names = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
    for file in (Path(source, name) for name in names):
        if modules and file.is_file():
            shutil.copyfile(file, target / file.name)
    for module in modules:
        if module.get("path") and Path(source, module["path"]).is_dir():
            shutil.copytree(Path(source, module["path"]), target / module["path"], dirs_exist_ok=True)
        if module["kind"] == "Pooling":
            file = target / module["path"] / "config.json"
            settings = json.loads(file.read_text(encoding="utf-8"))
            widths = {"word_embedding_dimension", "embedding_dimension"} & settings.keys()
            file.write_text(json.dumps(settings | dict.fromkeys(widths, width), indent=2), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Prune, save, reload and compare."""
    options, config = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = options.output_dir
    source = options.model or (tiny_bert(folder / "tiny-model", config.seed) if options.tiny else minilm())
    beside = source if Path(source).is_dir() else snapshot_download(source, allow_patterns=MODULES)
    modules = read_modules(beside)
    pooling = options.pooling or pooling_of(beside, modules)
    if pooling not in ("mean", "cls"):
        sys.exit(f"the model pools by {pooling!r}; what can be measured is mean and cls (--pooling)")
    fixed = [module["kind"] for module in modules if module["kind"] not in OF_ANY_WIDTH]
    if fixed and not options.keep_hidden:
        sys.exit(f"{source} has a {fixed[0]} module, which needs vectors of their present width: --keep-hidden")
    texts, held_out = load_texts(options)
    print(f"{len(texts):,} texts to learn from, {len(held_out):,} held out")

    model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    teacher = copy.deepcopy(model)
    rows = tokenise([{"text": text} for text in texts], tokenizer, model, max_length=options.max_length)
    config = cofiprune.PruneConfig.create(config, embedding_pooling=pooling)
    goal = {"target_sparsity": options.target_sparsity, "teacher": "self", "config": config, "output_dir": folder}
    result = cofiprune.prune(model, rows, **goal, resume="auto" if options.resume else False)
    result.compact().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    student = AutoModel.from_pretrained(folder).to(model.device)

    def embed(texts: Sequence[str], model: PreTrainedModel = student) -> Tensor:
        return vectors(model, tokenizer, texts, pooling, options.max_length)

    dense, pruned = embed(held_out, teacher.to(model.device)), embed(held_out)
    copy_modules(beside, folder, modules, pruned.shape[1])
    kept = result.plan.keep.get("hidden", range(dense.shape[1]))
    found = {"sparsity": cofiprune.summary(student).sparsity, "dimensions": pruned.shape[1], "pooling": pooling}
    found |= agreement(dense, pruned, kept)
    found |= scores_of_files(options, lambda texts: embed(texts, teacher), embed)
    print(cofiprune.summary(student))
    for name, value in found.items():
        print(f"{name:34}{value:.4f}" if isinstance(value, float) else f"{name:34}{value}")
    if options.benchmark:
        settings = {"batch_size": (1, 32), "seq_len": options.max_length, "seconds": 0.2 if options.tiny else 5.0}
        speed = cofiprune.benchmark(student, teacher, **settings)
        found["speed"] = speed.to_dict()
        print(speed)
    (folder / "result.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"Saved in {folder}; after `import cofiprune`, AutoModel and SentenceTransformer load it")


if __name__ == "__main__":
    main()
