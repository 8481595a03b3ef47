"""The policy of an alignment stage: loaded as a view, with LoRA adapters or without, merged when it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipelines.config import INERT, config
from pipelines.distributed import Strategy
from pipelines.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@config
class LoraFields:
    """Train adapters instead of all parameters."""

    lora_r: int = Field(0, ge=0, description="rank of LoRA adapters on all linear layers; 0 trains all parameters")
    lora_alpha: float = Field(16.0, gt=0, description="scale of the adapters (their effect is lora_alpha / lora_r)")
    push_adapter: bool = Field(
        False, description="push the adapter alone, not the model that it is merged into", json_schema_extra=INERT
    )

    def launch_problems(self, strategy: Strategy) -> list[Problem]:
        """What the stage has to say, and that adapters are not trained in parts."""
        found = super().launch_problems(strategy)
        if not found and self.lora_r and strategy != "ddp":
            problem = "adapters are trained beside a model that is whole in each process"
            found.append(Problem("lora_r", self.lora_r, problem, "give lora_r=0, or launch with ddp.yaml"))
        return found


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


def load_policy(path: str) -> PreTrainedModel:
    """The model that a stage's field ``model`` names, as a view.

    Args:
        path: folder or hub id.

    Raises:
        UserError: not an encoder-decoder that can be loaded and viewed.
    """
    from pipelines.seq2seq.models import load_seq2seq
    from pipelines.seq2seq.view import as_view

    model = load_seq2seq(path)
    if Path(path).expanduser().exists():
        # PEFT would write it into the adapter: a path of this machine, of no use elsewhere
        model.name_or_path = ""
    return as_view(model)


def merged(policy: Any, fields: LoraFields, folder: Path, *, save: bool = True) -> Any:
    """A trained policy with its adapters, if it has any, merged into it.

    Args:
        policy: the unwrapped model.
        fields: whether it has adapters.
        folder: the adapters are also saved by themselves, under ``folder/adapter``.
        save: whether this process saves them.
    """
    if not fields.lora_r:
        return policy
    if save:
        policy.save_pretrained(folder / "adapter")
    return policy.merge_and_unload()
