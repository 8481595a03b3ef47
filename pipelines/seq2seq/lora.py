"""LoRA adapters: the fields that ask for them, and PEFT's settings made from those."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipelines.config import config


@config
class LoraFields:
    """Train adapters instead of all parameters."""

    lora_r: int = Field(0, ge=0, description="rank of LoRA adapters on all linear layers; 0 trains all parameters")
    lora_alpha: float = Field(16.0, gt=0, description="scale of the adapters (their effect is lora_alpha / lora_r)")


def lora_settings(fields: LoraFields) -> Any:
    """PEFT's ``LoraConfig``, or None where no adapters are wanted.

    They go on all linear layers of the attention and feed-forward blocks and not on the output head: TRL's fused head
    reads its weight directly, and with the adapters off the reference's head must be the policy's.
    """
    if not fields.lora_r:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=fields.lora_r, lora_alpha=fields.lora_alpha, target_modules="all-linear"
    )
