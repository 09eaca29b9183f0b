"""Compaction: a smaller model in place of a masked one.

Slicing, placeholders of removed blocks, uniform configurations, and loading by `from_pretrained` have a module each.
"""

from __future__ import annotations

from cofiprune.adapter import structure as structure_of
from cofiprune.compaction.slicing import compacted
from cofiprune.compaction.uniform_config import uniform_copy
from cofiprune.errors import names_checked
from cofiprune.inference.fusion import fuse as fuse_linears
from cofiprune.masking import masks_of
from cofiprune.plan import Plan
from cofiprune.whole import Model, Whole

__all__ = ["compact"]


@names_checked
def compact(
    model: Model,
    plan: Plan | None = None,
    *,
    uniform: bool = False,
    fuse: bool = False,
    plain: bool = False,
) -> Model:
    """Return a smaller copy of a model, without the units that a plan removes.

    :param model: a transformers model, a `SentenceTransformer` or a `CrossEncoder`.
    :param plan: what to keep; by default the masks attached to the model, or everything where there are none.
    :param uniform: write the smaller sizes into the configuration itself, so that the result loads without cofiprune.
        All layers that stay must have the same shape, and the adapter must name the sizes in the configuration.
    :param fuse: for inference: linear layers that read the same tensor are computed in one product, and float32
        products on a CPU by the faster library. Weights, names and saved files are the same, outputs equal within
        rounding. A model loaded from a file is not fused; compact it again to fuse it.
    :param plain: an earlier name of `uniform`.
    :return: a model of the same class, dtype, device and train/eval mode, without masks. Its outputs are those of the
        masked model; `model` itself is left as it was.
    :raises SettingsError: when something behind a SentenceTransformer's encoder needs all of its hidden dimensions.
    :raises PlanError: when the plan belongs to another model, or cannot be written into a configuration.
    """
    whole = Whole.of(model)
    structure = structure_of(whole.model)
    if plan is None:
        plan = Plan.from_values(structure, masks_of(whole.model) or {})
    plan.check(structure)
    hidden = plan.keep.get("hidden", ())
    if len(hidden) < plan.sizes.get("hidden", 0):
        whole.check_width()
    small = (uniform_copy if uniform or plain else compacted)(whole.model, structure, plan)
    if fuse:
        fuse_linears(small, structure.layers)  # of a uniform model, the first ones
    found: Model = whole.around(small, hidden=hidden)
    return found
