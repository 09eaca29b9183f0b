"""The modelling file by which a compacted model's folder loads where this package is not installed.

transformers runs a file of a folder where it is told to, by `trust_remote_code=True`. The one written here builds the
stock classes by the configuration, which has the dense sizes, and cuts them as this package would: its code is that of
`removal` and `bypass`, word for word, and its tables are those of `slicing.table`, for every class of the family that
an Auto class stands for. Where this package is imported it stands back, and no folder needs it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _get_model_class

from cofiprune import bypass
from cofiprune.adapter import Adapter, adapter_for
from cofiprune.compaction import places, removal
from cofiprune.compaction.hub import building, part_of
from cofiprune.compaction.slicing import checked_sizes, table
from cofiprune.errors import CheckpointError, explained
from cofiprune.files import digest
from cofiprune.hooks import same_random_state
from cofiprune.record import recorded_parts, recorded_sizes
from cofiprune.versions import OLDEST

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SINCE = {
    (4, 57): (
        "albert", "bert", "bert-generation", "big_bird", "blip_2_vision_model", "blip_vision_model",
        "camembert", "clap_audio_model", "data2vec-text", "data2vec-vision", "deberta", "deberta-v2",
        "dinov3_vit", "donut-swin", "dpr", "electra", "ernie", "flava_image_model", "flava_text_model",
        "instructblip_vision_model", "instructblipvideo_vision_model", "internvl_vision", "janus_vision_model",
        "longformer", "luke", "maskformer-swin", "megatron-bert", "mpnet", "nystromformer", "pvt_v2",
        "qwen2_audio_encoder", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
        "sam_vision_model", "swinv2", "tapas", "umt5", "visual_bert", "voxtral_encoder", "wavlm", "whisper",
        "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
    ),
    (5, 9): (
        "aimv2_text_model", "aimv2_vision_model", "align_text_model", "altclip_text_model",
        "altclip_vision_model", "audio-spectrogram-transformer", "beit", "bros", "chinese_clip_vision_model",
        "clap_text_model", "clip_text_model", "clip_vision_model", "clipseg_text_model", "clipseg_vision_model",
        "convbert", "deit", "distilbert", "esm", "eurobert", "git_vision_model", "groupvit_text_model",
        "idefics3_vision", "ijepa", "jina_embeddings_v3", "layoutlm", "markuplm", "mlcd_vision_model",
        "modernbert", "nomic_bert", "owlv2_text_model", "owlv2_vision_model", "owlvit_text_model",
        "owlvit_vision_model", "pixio", "segformer", "siglip2_text_model", "siglip2_vision_model",
        "siglip_text_model", "siglip_vision_model", "smolvlm_vision", "splinter", "swin", "vit", "vit_mae",
        "vit_msn", "vivit", "vjepa2", "xclip_text_model",
    ),
}  # fmt: skip
"""Model types whose modules older releases call in the same way, by measurement with 4.57.6, 5.0.0, 5.9.0, 5.17.0."""
_WITH_ALL_BLOCKS = (
    "align_text_model", "bros", "clap_text_model", "convbert", "data2vec-audio", "distilbert", "hubert", "layoutlm",
    "markuplm", "splinter", "unispeech", "unispeech-sat", "wav2vec2",
)  # fmt: skip
"""Those that 4.57 calls in the same way while no block is gone: modules of blocks gave something else there."""
_DECODING = ("CausalLM", "Seq2Seq", "WithLMHead")
"""Auto classes of models that write text."""
Rows = dict[str, dict[str, Any]]
"""A `removal.Table` that is being put together."""

WRITER = "Written by cofiprune"
_RUNTIME = (
    bypass.entry_of, bypass.left_of, bypass.bypass, bypass.collected_attentions, bypass.shared_input,
    places.Places, places.narrow_to, removal.Passthrough, removal.nothing, removal.placed, removal.Pick, removal.pick,
    removal.cut, removal.shrink, removal.drop, removal.follow_shape, removal.module_at,
)  # fmt: skip
_FILE = r'''# SPDX-License-Identifier: Apache-2.0
"""{writer}: a pruned {family} model, for AutoModel*.from_pretrained(folder, trust_remote_code=True).

The classes are those of transformers, with fewer heads, dimensions and blocks: the configuration has the sizes of the
model before it was pruned, and the tables at the end say what is left. They belong to the weights beside this file and
are not to be edited. Where cofiprune is imported, the folder loads without this file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

{runtime}

class Compacted:
    """Builds a class of transformers with the sizes of its configuration, and cuts it to those of the tables."""

    compacted_rows = {{}}  # of the class alone, by the names in it

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if sys.modules.get("cofiprune.compaction.hub") and getattr(config, "quantization_config", None) is None:
            return  # it asks for the dense model
        encoder = self.base_model_prefix
        path = f"{{encoder}}." if isinstance(getattr(self, encoder, None), nn.Module) else ""
        table = {{kind: {{path + name: row for name, row in rows.items()}} for kind, rows in ENCODER.items()}}
        for kind, rows in self.compacted_rows.items():
            table[kind].update(rows)
        try:
            cut(self, table)
        except (AttributeError, LookupError, ValueError) as error:
            built = f"transformers {{transformers.__version__}} builds {{type(self).__name__}}"
            raise ImportError(f"{{built}} otherwise than {{RELEASE}}, which wrote this folder: {{error}}") from error
        self._cofiprune_cut = True
        self._encoder_path = path

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        if sys.modules.get("cofiprune.compaction.hub"):  # it cuts the stock class
            stock = getattr(transformers, cls.__name__)
            return stock.from_pretrained(*args, output_loading_info=output_loading_info, **kwargs)
        model, found = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        layers = re.compile(re.escape(model._encoder_path) + r".*\.\d+\.")
        names = {{*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}}
        lost = sorted(name for name in names if layers.match(name))
        if lost:  # a head may be new, a layer not
            raise OSError(f"{{len(lost)}} weights of layers are missing, or of another shape: {{', '.join(lost[:3])}}")
        return (model, found) if output_loading_info else model

    @classmethod
    def is_custom_code(cls):
        return False  # its files are read as those of the stock class, whose weights some releases rename


# Rows by the names in the encoder, whichever class it is in; shapes have None where nothing was cut.
ENCODER = {encoder}
# Rows of single classes, by the names in them.
CLASSES = {classes}
CHECKSUM = "{checksum}"
RELEASE, OLDEST = "{release}", {oldest}

if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"{{__file__}}: transformers {{transformers.__version__}} builds {family} models otherwise; this file works "
        f"with {{'.'.join(map(str, OLDEST))}} and newer"
    )
if hashlib.sha256(json.dumps([ENCODER, CLASSES], sort_keys=True).encode()).hexdigest() != CHECKSUM:
    raise ImportError(f"{{__file__}}: its tables are not those that were written with the weights of this folder")
for name, rows in CLASSES.items():
    if hasattr(transformers, name):  # this release may not have them all
        parents = (Compacted, getattr(transformers, name))
        globals()[name] = type(name, parents, {{"__module__": __name__, "compacted_rows": rows}})
'''


@dataclass(frozen=True)
class ModellingFile:
    """What a folder needs beside the weights."""

    name: str
    source: str
    auto_map: Mapping[str, str]
    """As in a configuration: `file.Class` by Auto class."""


def modelling_file(model: PreTrainedModel, *, alone: bool = False) -> ModellingFile:
    """Make the file of a compacted model.

    :param alone: for its class only, without the family's others.
    :raises CheckpointError: saying why there can be none.
    """
    saved = ("architectures", "auto_map", "dtype", "transformers_version")  # what saving changes, and no size
    settings = {name: value for name, value in model.config.to_dict().items() if name not in saved}
    adapter = None if recorded_parts(model.config) else adapter_for(model)
    text = json.dumps(settings, sort_keys=True, default=str)
    return _made(_Described(stock_class(model), model.config, adapter, text), alone)


@dataclass(frozen=True)
class _Described:
    """What decides about a file: equal where it is the same, so that the file is made once."""

    cls: type[PreTrainedModel]
    config: PretrainedConfig = field(compare=False)
    adapter: Adapter | None
    settings: str


@functools.lru_cache(maxsize=4)
def _made(model: _Described, alone: bool) -> ModellingFile:
    config = copy.deepcopy(model.config)
    config.architectures = [model.cls.__name__]  # which Auto classes for several go by
    named = {} if alone else _auto_classes(config)
    tables = {}
    for cls in {model.cls: None, **dict.fromkeys(named.values())}:
        try:
            tables[cls.__name__] = _tables(cls, config)
        except Exception as error:  # raised by a class that the family has, but which is no encoder
            if cls is model.cls:
                raise CheckpointError(f"no modelling file can be made of {cls.__name__}: {error}") from error
    encoder, rest = _common(tables)
    family = re.sub("[^A-Za-z0-9_-]", "_", config.model_type)  # it becomes a part of a program
    stem = f"modeling_{family.lower().replace('-', '_')}_compacted"
    with explained(CheckpointError, "the source of cofiprune, which goes into a modelling file, is not there", OSError):
        runtime = "\n\n".join(inspect.getsource(each) for each in _RUNTIME)
    source = _FILE.format(
        writer=WRITER, family=family, runtime=runtime, release=transformers.__version__,
        checksum=digest([encoder, rest]),
        encoder=_shown(encoder, 2), classes=_shown(rest, 3),
        oldest=_oldest(config.model_type, any(each.get("removed") for each in (encoder, *rest.values()))),
    )  # fmt: skip
    auto_map = {auto: f"{stem}.{cls.__name__}" for auto, cls in named.items() if cls.__name__ in tables}
    return ModellingFile(f"{stem}.py", source, auto_map)


def _oldest(model_type: str, removed: bool) -> tuple[int, int]:
    """Return the oldest release with which a file works, in which blocks may have been removed."""
    if not removed and model_type in _WITH_ALL_BLOCKS:
        return min(_SINCE)
    return next((since for since, types in _SINCE.items() if model_type in types), OLDEST["transformers"])


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of transformers that a model is of.

    :raises CheckpointError: when it is of another one.
    """
    own = type(model)
    stock = getattr(transformers, own.__name__, None)
    if own is stock or (isinstance(stock, type) and issubclass(own, stock) and hasattr(own, "compacted_rows")):
        return stock
    raise CheckpointError(
        f"{own.__module__}.{own.__qualname__} is no class of transformers: where cofiprune is not imported, nothing "
        "could build it but its own code"
    )


def _auto_classes(config: PretrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """The classes of transformers for a configuration, by the Auto classes that stand for them."""
    found: dict[str, type[PreTrainedModel]] = {}
    for name, auto in vars(modeling_auto).items():
        if not isinstance(auto, type) or any(word in name for word in _DECODING):
            continue
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and mapping.get(type(config), None) is not None:
            cls: type[PreTrainedModel] = _get_model_class(config, mapping)  # type: ignore[no-untyped-call]
            if getattr(transformers, cls.__name__, None) is cls:
                found[name] = cls
    return found


def _tables(cls: type[PreTrainedModel], config: PretrainedConfig) -> tuple[str, Rows]:
    """What is cut of a class, by the names in it, and how those in its encoder begin."""
    with same_random_state(), building(), torch.device("meta"):
        model = cls(copy.deepcopy(config))
    encoder = model.base_model_prefix
    return f"{encoder}." if isinstance(getattr(model, encoder, None), nn.Module) else "", _rows(model)


def _rows(model: PreTrainedModel) -> Rows:
    rows: Rows = {kind: {} for kind in removal.KINDS}
    own = recorded_sizes(model.config)
    if own is not None:
        structure = adapter_for(model).structure(model, dense=True)
        rows = {kind: dict(found) for kind, found in table(structure, checked_sizes(structure, own)).items()}
        # A structure names a tied parameter once; where a class is built without its tie, each name counts.
        first = {value: name for name, value in model.named_parameters()}
        for name, value in model.named_parameters(remove_duplicate=False):
            if first[value] in rows["shapes"]:
                rows["shapes"][name] = rows["shapes"][first[value]]
    for path, entry in recorded_parts(model.config).items():
        part = part_of(model, path)
        part.config.quantization_config = entry
        for kind, found in _rows(part).items():
            rows[kind].update({f"{path}.{name}": row for name, row in found.items()})
    return rows


def _common(tables: Mapping[str, tuple[str, Rows]]) -> tuple[Rows, dict[str, Rows]]:
    """Part the rows of classes into those of their encoder and their own."""
    encoder: Rows = {}
    rest: dict[str, Rows] = {}
    for cls, (path, rows) in tables.items():
        own: Rows = {}
        for kind, found in rows.items():
            shared = encoder.setdefault(kind, {})
            for name, row in found.items():
                inside = name.removeprefix(path)
                if not name.startswith(path) or shared.setdefault(inside, row) != row:
                    own.setdefault(kind, {})[name] = row
        rest[cls] = own
    return encoder, rest


def _shown(value: Any, levels: int, indent: str = "") -> str:
    """Write plain values as Python; of the outermost levels, an entry on each line."""
    if not value or not levels:
        return repr(value)
    rows = "".join(
        f"{indent}    {name!r}: {_shown(row, levels - 1, indent + '    ')},\n" for name, row in value.items()
    )
    return f"{{\n{rows}{indent}}}"
