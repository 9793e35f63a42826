"""DeepSeek-V2 and V2-Lite: latent attention; softmax routers without a bias, whose weights are not renormalised."""

from __future__ import annotations

from typing import Any

from fourfold.weights.families import hugging_names, latent
from fourfold.weights.families.base import Family
from fourfold.weights.families.fields import Fields


def _read(fields: Fields) -> dict[str, Any]:
    method = fields.take("topk_method", str, "greedy")
    groups, kept = fields.take("n_group", int, 1), fields.take("topk_group", int, 1)
    if method not in ("greedy", "group_limited_greedy"):
        fields.fault("topk_method", f"is {method!r}, only 'greedy' or 'group_limited_greedy' is supported")
        method = "greedy"
    if method == "greedy":
        groups = kept = 1  # greedy looks at all experts, whatever the groups
    fields.expect("norm_topk_prob", False)
    moe = {"topk_method": method, "n_group": groups, "topk_group": kept, "norm_topk_prob": False}
    return latent.read(fields, "softmax", moe)


V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    read=_read,
    write=latent.write,
    plan=lambda cfg, dialect: hugging_names.plan(cfg, router_bias=False),
    ignored=hugging_names.ignored,
)
