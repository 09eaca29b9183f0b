"""Every family, with the settings of its published checkpoints: pruned on data, saved, loaded by another process.

The laws look at one forward pass of a random model. A run does more: it refits layers, differentiates, trains, cuts and
loads again. Sizes are small; every other setting is that of the checkpoint that a case is named after.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import cofiprune
from cofiprune.conformance import specimens
from cofiprune.data import batches

METHODS = ("one-shot", "cofi", "gates")

V3 = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "max_relative_positions": -1,
    "type_vocab_size": 0,
}
ROBERTA = {"type_vocab_size": 1, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "layer_norm_eps": 1e-5}
LARGE_SOUND = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}

# Name of the case: model type, what its checkpoint sets beside the sizes.
PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert-base-uncased": ("bert", {}),
    "rubert-tiny2": ("bert", {"hidden_size": 36, "num_attention_heads": 12, "num_hidden_layers": 3}),
    "roberta-base": ("roberta", ROBERTA),
    "xlm-roberta-base": ("xlm-roberta", ROBERTA),
    "camembert-base": ("camembert", ROBERTA),
    "distilbert-base-uncased": ("distilbert", {}),
    "distilbert-base-german-cased": ("distilbert", {"sinusoidal_pos_embds": True}),
    "deberta-base": (
        "deberta",
        {
            "relative_attention": True,
            "pos_att_type": "c2p|p2c",
            "position_biased_input": False,
            "max_relative_positions": -1,
            "type_vocab_size": 0,
        },
    ),
    "deberta-v3-base": ("deberta-v2", V3),
    "mdeberta-v3-base": ("deberta-v2", {**V3, "pooler_hidden_act": "gelu", "legacy": False}),
    "deberta-v2-xlarge": (
        "deberta-v2",
        {**V3, "conv_kernel_size": 3, "conv_act": "gelu", "pos_att_type": "c2p|p2c", "attention_head_size": 6},
    ),
    "electra-small-discriminator": ("electra", {"embedding_size": 12}),
    "electra-base-discriminator": ("electra", {}),
    "albert-base-v2": ("albert", {"embedding_size": 12, "hidden_act": "gelu_new"}),
    "albert-groups": ("albert", {"embedding_size": 12, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "mpnet-base": ("mpnet", {"relative_attention_num_buckets": 32}),
    "ernie-3.0-base-zh": ("ernie", {"use_task_id": True, "task_type_vocab_size": 3}),
    "ModernBERT-base": (
        "modernbert",
        {"num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": 4, "classifier_pooling": "mean"},
    ),
    "nomic-embed-text-v1.5": ("nomic_bert", {}),
    "gte-multilingual-base": ("gte", {}),
    "jina-embeddings-v3": ("jina_embeddings_v3", {}),
    "EuroBERT-210m": ("eurobert", {"num_key_value_heads": 2}),
    "esm2_t6_8M_UR50D": ("esm", {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 3}),
    "esm1b_t33_650M_UR50S": (
        "esm",
        {
            "position_embedding_type": "absolute",
            "emb_layer_norm_before": True,
            "token_dropout": True,
            "mask_token_id": 3,
        },
    ),
    "layoutlm-base-uncased": ("layoutlm", {}),
    "roformer_chinese_base": ("roformer", {"rotary_value": False}),
    "roformer_chinese_small": ("roformer", {"embedding_size": 12, "rotary_value": False}),
    "rembert": ("rembert", {"input_embedding_size": 10, "output_embedding_size": 14}),
    "xmod-base": (
        "xmod",
        {
            "default_language": "en_XX",
            "languages": ["de_DE", "en_XX"],
            "adapter_layer_norm": True,
            "ln_before_adapter": False,
            **ROBERTA,
        },
    ),
    "t5-small": ("t5", {}),
    "flan-t5-small": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5-small": ("mt5", {}),
    "splinter-base": ("splinter", {}),
    "markuplm-base": ("markuplm", {}),
    "YituTech-conv-bert-base": ("convbert", {"head_ratio": 2, "conv_kernel_size": 9}),
    "nystromformer-512": ("nystromformer", {"num_landmarks": 64, "segment_means_seq_len": 64}),
    "bigbird-roberta-base": ("big_bird", {"attention_type": "original_full"}),
    "vit-base-patch16-224": ("vit", {"qkv_bias": True}),
    "deit-base-distilled-patch16-224": ("deit", {}),
    "dinov2-base": ("dinov2", {"mlp_ratio": 2, "layerscale_value": 1.0}),
    "dinov2-giant": ("dinov2", {"use_swiglu_ffn": True}),
    "dinov2-with-registers-base": ("dinov2_with_registers", {"mlp_ratio": 2, "num_register_tokens": 4}),
    "beit-base-patch16-224": ("beit", {"use_relative_position_bias": True, "use_mean_pooling": True}),
    "data2vec-vision-base": ("data2vec-vision", {"use_relative_position_bias": True}),
    "clip-vit-base-patch32": ("clip_vision_model", {"hidden_act": "quick_gelu", "projection_dim": 10}),
    "siglip-base-patch16-224": ("siglip_vision_model", {}),
    "ast-finetuned-audioset": ("audio-spectrogram-transformer", {"frequency_stride": 3, "time_stride": 3}),
    "wav2vec2-base": ("wav2vec2", {"feat_extract_norm": "group", "conv_bias": False}),
    "wav2vec2-large-960h-lv60": ("wav2vec2", LARGE_SOUND),
    "hubert-base-ls960": ("hubert", {}),
    "hubert-large-ll60k": ("hubert", LARGE_SOUND),
    "wavlm-base-plus": ("wavlm", {}),
    "wavlm-large": ("wavlm", LARGE_SOUND),
    "sew-tiny-100k": ("sew", {"squeeze_factor": 2}),
    "wav2vec2-bert-base": ("wav2vec2-bert", {"position_embeddings_type": "relative_key"}),
    "whisper-small-encoder": ("whisper", {}),
}


def unpublished() -> Iterator[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """The other families that keep the law, with the defaults of their configuration."""
    path = Path(__file__).parents[2] / "docs" / "reference" / "families.json"
    done = {model_type for model_type, _ in PUBLISHED.values()}
    for model_type, entry in json.loads(path.read_text()).items():
        if model_type not in done and "difference" in entry and entry.get("groups"):
            yield model_type, (model_type, {})


CASES = {**PUBLISHED, **dict(unpublished())}


# Families with defaults for which no model is small, or none that runs.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bros": {"hidden_size": 192, "intermediate_size": 136},
    "vivit": {"tubelet_size": [2, 4, 4]},
}


def model_of(name: str) -> PreTrainedModel:
    """A random model of a case: a classifier where the family has one, else the encoder."""
    model_type, settings = CASES[name]
    settings = {**SETTINGS.get(model_type, {}), **settings}
    config = specimens.tiny_config(model_type, **settings)
    classes = specimens.head_classes(config)
    endings = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "Model", "")
    if "t5" in model_type:  # its classifiers have a decoder
        endings = ("EncoderModel",)
    cls = next(cls for ending in endings for cls in classes if cls.__name__.endswith(ending))
    model = specimens.specimen(cls(config), torch.Generator().manual_seed(0)).float()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.zeros_(module.weight[module.padding_idx].detach())  # as transformers loads it
    return model


def rows_of(model: PreTrainedModel, count: int = 36) -> list[dict[str, Any]]:
    """Rows without padding for a model's inputs; with labels of two classes where it has a head for them."""
    generator = torch.Generator().manual_seed(1)
    labelled = "labels" in batches.label_names(model)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        batch = specimens.inputs(model, generator)
        for index in range(3):
            row: dict[str, Any] = {key: value[index] for key, value in batch.items()}
            if "attention_mask" in row and row["attention_mask"].shape == row[model.main_input_name].shape[:1]:
                length = int(row["attention_mask"].sum())
                row = {
                    key: value[:length] if value.shape[:1] == row["attention_mask"].shape else value
                    for key, value in row.items()
                    if key != "attention_mask"
                }
            rows.append({**row, **({"labels": len(rows) % 2} if labelled else {})})
    return rows


READER = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, transformers, cofiprune
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
for line in sys.stdin:
    folder, name = line.split()
    try:
        model = getattr(transformers, name).from_pretrained(folder).eval()
        batch, outputs = torch.load(folder + "/expected.pt")
        with torch.no_grad():
            found = model(**batch)
        off = max(float((found[key] - value).abs().max()) for key, value in outputs.items())
        print("off", off, flush=True)
    except Exception as error:
        print("failed", type(error).__name__, str(error).replace("\\n", " "), flush=True)
"""


@pytest.fixture(scope="module")
def off_in_another_process() -> Iterator[Callable[[Path, str], str]]:
    """Load a folder in a process that has seen nothing but files: by how much its outputs differ, or what failed."""
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(folder: Path, name: str) -> str:
            print(folder, name, file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        yield ask
        process.stdin.close()


def cases() -> Iterator[Any]:
    """Every case with every method; by default published ones, one method each, in turns."""
    for number, (name, method) in enumerate(itertools.product(CASES, METHODS)):
        index, turn = divmod(number, len(METHODS))
        often = name in PUBLISHED and index % len(METHODS) == turn
        yield pytest.param(name, method, id=f"{name}-{method}", marks=() if often else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method"), list(cases()))
def test_family_is_pruned_on_data_and_loads_again(name, method, tmp_path, off_in_another_process):
    if CASES[name][0] not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    model = model_of(name)
    rows = rows_of(model)
    result = cofiprune.prune(
        model,
        rows,
        target_sparsity=0.4,
        method=method,
        teacher="self",
        **({} if method == "one-shot" else {"epochs": 1}),
        finetune_epochs=1,
        batch_size=8,
        progress=False,
    )
    small = result.compact().eval()
    assert result.sparsity == pytest.approx(0.4, abs=0.06)
    batch = specimens.inputs(small, torch.Generator().manual_seed(2))
    with torch.no_grad():
        outputs = {key: value for key, value in small(**batch).items() if isinstance(value, Tensor)}
    assert all(torch.isfinite(value).all() for value in outputs.values())
    small.save_pretrained(tmp_path)
    torch.save((batch, outputs), tmp_path / "expected.pt")
    kind, off, *_ = (answer := off_in_another_process(tmp_path, type(small).__name__)).split()
    assert kind == "off", answer
    assert float(off) <= 1e-5
