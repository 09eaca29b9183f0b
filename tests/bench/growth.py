"""Time and memory of stages, each in a process of its own: `python tests/bench/growth.py STAGE,ROWS,LAYERS,WIDTH ...`.

Weights are random and rows of 16 tokens, so that what grows is seen and little is computed. Time is that of the
processor, on one thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from fresh_process import forget_peak, resident

LENGTH, WORDS, BATCH = 16, 2000, 32


def one_shot(rows: int, layers: int, width: int) -> dict[str, float]:
    """All of one shot to half of the parameters, in one round."""
    import cofiprune

    model, data = new_model(layers, width), new_rows(rows)
    return timed(
        lambda: cofiprune.prune(
            model, data, target_sparsity=0.5, method="one-shot", progress=False, batch_size=BATCH, target_seq_len=LENGTH
        )
    )


def recovery(rows: int, layers: int, width: int) -> dict[str, float]:
    """An epoch of training with a teacher."""
    import cofiprune

    model, data = new_model(layers, width), new_rows(rows)
    return timed(
        lambda: cofiprune.finetune(
            model, data, teacher="self", epochs=1, progress=False, batch_size=BATCH, teacher_memory_mb=0
        )
    )


def stream(rows: int, layers: int, width: int) -> dict[str, float]:
    """The same for rows that are made one after the other."""
    from torch.utils.data import IterableDataset

    import cofiprune

    class Rows(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            for start in itertools.count():
                yield from new_rows(64, start)

    model, settings = new_model(layers, width), {"progress": False, "batch_size": BATCH}
    return timed(lambda: cofiprune.finetune(model, Rows(), teacher="self", max_steps=-(-rows // BATCH), **settings))


def batches(rows: int, layers: int, width: int) -> dict[str, float]:
    """Making all batches of an epoch, beside whatever they are for."""
    from cofiprune.data.prepare import prepare

    made = prepare(new_rows(rows), new_model(layers, width), batch_size=BATCH, shuffle=True)
    return timed(lambda: sum(1 for _ in made))


def stream_batches(rows: int, layers: int, width: int) -> dict[str, float]:
    """The same of a stream."""
    from cofiprune.data.prepare import prepare
    from cofiprune.data.streams import Stream

    made = prepare(Stream(new_rows(rows), endless=True), new_model(layers, width), batch_size=BATCH)
    made.steps = rows // BATCH
    return timed(lambda: sum(1 for _ in made))


def reading(rows: int, layers: int, width: int) -> dict[str, float]:
    """Checking rows of tokens and bringing them into the form in which they are held; nothing is computed of them."""
    from cofiprune.data.prepare import prepare

    model, data = new_model(layers, width), new_rows(rows)
    return timed(lambda: prepare(data, model, batch_size=BATCH, shuffle=True))


def vocabulary(rows: int, layers: int, width: int) -> dict[str, float]:
    """Counting the tokens of texts, and pruning the vocabulary to them."""
    import numpy as np
    from transformers import BertTokenizerFast

    import cofiprune

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(WORDS - 5))]
    tokenizer = BertTokenizerFast(vocab={name: index for index, name in enumerate(names)})
    chosen = np.random.default_rng(0).zipf(1.4, (rows, LENGTH - 2)) % (WORDS - 5)
    model, texts = new_model(layers, width), [" ".join(f"w{word}" for word in row) for row in chosen]
    return timed(lambda: cofiprune.prune_vocabulary(model, tokenizer, texts, progress=False))


def new_model(layers: int, width: int) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
    )  # fmt: skip


def new_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    import numpy as np

    ids = np.random.default_rng(seed).integers(5, WORDS, (count, LENGTH))
    return [{"input_ids": row, "labels": number % 2} for number, row in enumerate(ids)]


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and MiB that it had at most beyond those before it."""
    forget_peak()
    before, begun = resident(), time.process_time()
    kept = run()
    found = {"seconds": time.process_time() - begun, "peak": resident("VmHWM") - before}
    del kept
    return found


STAGES = {each.__name__: each for each in (one_shot, recovery, stream, reading, batches, stream_batches, vocabulary)}


def apart(case: str) -> dict[str, float]:
    """Measure a case in a copy of this process, which has imported all that is needed."""
    stage, *sizes = case.split(",")
    begin, end = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(end, "w") as out:
                json.dump(STAGES[stage](*map(int, sizes)), out)
        finally:
            os._exit(0)
    os.close(end)
    with os.fdopen(begin) as found:
        result: dict[str, float] = json.load(found)
    os.waitpid(child, 0)
    return result


if __name__ == "__main__":
    import warnings

    import torch

    import cofiprune
    import cofiprune.training.prune
    import cofiprune.vocabulary.prune  # noqa: F401  # what is imported is no part of what is measured

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for stage in STAGES.values():  # what is set up once is neither
        stage(64, 1, 64)
    print(json.dumps({case: apart(case) for case in sys.argv[1:]}))
