"""What is trained: a soft prompt of one of three kinds, LoRA adapters, or every parameter.

Prompt tuning (Lester et al. 2021), prefix tuning (Li and Liang 2021), P-tuning (Liu et al. 2021) and LoRA (Hu et al.
2021) are PEFT's; here stand their fields, what PEFT leaves to be said for encoder-decoder models, and the checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.config import config
from pipelines.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full"]
LEARNT_PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")


@config
class MethodFields:
    """What is trained."""

    method: Method = Field(
        "prompt_tuning",
        description="prompt_tuning (vectors before the text), prefix_tuning (keys and values before every layer's), "
        "p_tuning (vectors that a small network makes), lora (adapters), full (every parameter)",
    )
    virtual_tokens: int | None = Field(
        None,
        ge=1,
        description="soft prompts: how many vectors, or keys and values, are learnt; null: 20, and with init=text as "
        "many as the text has tokens",
    )
    init: Literal["vocabulary", "random", "text"] = Field(
        "vocabulary",
        description="prompt tuning: the vectors begin as random tokens of the vocabulary, as noise, or as a text",
    )
    init_text: str | None = Field(None, description="init=text: that text, repeated or cut to virtual_tokens tokens")
    init_shots: int = Field(
        0, ge=0, description="init=text: instead of init_text so many solved training examples, drawn by the seed"
    )
    encoder_hidden_size: int | None = Field(
        None, ge=1, description="P-tuning: width of its network; null takes the model's"
    )
    prefix_projection: bool = Field(
        False, description="prefix tuning: make the keys and values by a two-layer network of width encoder_hidden_size"
    )
    lora_r: int = Field(8, ge=1, description="LoRA: rank of the adapters on all linear layers")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA: scale (their effect is lora_alpha / lora_r)")

    def problems(self) -> list[Problem]:
        parent = getattr(super(), "problems", None)  # a mixin: the stage's class brings the rest
        found: list[Problem] = parent() if parent is not None else []
        if self.init != "vocabulary" and self.method != "prompt_tuning":
            mend = "give method=prompt_tuning, or leave init out"
            found.append(Problem("init", self.init, f"{self.method} has no such choice", mend))
        given = [name for name in ("init_text", "init_shots") if getattr(self, name)]
        if self.init == "text" and len(given) != 1:
            problem = "both are given" if given else "init=text needs a text"
            found.append(Problem("init_text", self.init_text, problem, "give init_text=… or init_shots=4"))
        if self.init != "text":
            mend = "give init=text, or leave it out"
            found += [Problem(n, getattr(self, n), f"init={self.init} has no use for it", mend) for n in given]
        if self.prefix_projection and self.method != "prefix_tuning":
            mend = "give method=prefix_tuning, or leave it out"
            found.append(Problem("prefix_projection", True, f"{self.method} has no such choice", mend))
        return found


def virtual_tokens(fields: MethodFields, tokenizer: PreTrainedTokenizerBase, text: str | None) -> int:
    """How many virtual tokens a soft prompt has; 0 of what is none.

    Raises:
        UserError: an initial text without tokens.
    """
    if fields.method not in LEARNT_PROMPTS:
        return 0
    found = 20
    if fields.init == "text":
        found = len(tokenizer(text)["input_ids"])
        if not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError("init_text", text, "has no tokens", "give some text")
    return fields.virtual_tokens or found


def peft_config(
    fields: MethodFields, model: PreTrainedModel, tokens: int, text: str | None, tokenizer_path: str
) -> Any:
    """PEFT's configuration of a method; None where all parameters are trained.

    Args:
        fields: the method.
        model: what it is for.
        tokens: virtual tokens of a soft prompt.
        text: that it begins as, where ``fields`` say so.
        tokenizer_path: folder or hub id of the tokenizer, which PEFT reads that text with.
    """
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    encodes = model.config.is_encoder_decoder
    task_type = "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM"
    if fields.method == "full":
        return None
    if fields.method == "lora":
        return LoraConfig(
            task_type=task_type, r=fields.lora_r, lora_alpha=fields.lora_alpha, target_modules="all-linear"
        )
    common: dict[str, Any] = {"task_type": task_type, "num_virtual_tokens": tokens}
    hidden = fields.encoder_hidden_size or model.config.hidden_size
    if fields.method == "prefix_tuning":
        if fields.prefix_projection:
            common |= {"prefix_projection": True, "encoder_hidden_size": hidden}
        heads, width = getattr(model.config, "num_heads", None), getattr(model.config, "d_kv", None)
        if encodes and heads and width:
            # PEFT takes d_model / num_heads for the width of a head, which FLAN-T5's and mT5's is not.
            common |= {"token_dim": heads * width, "num_attention_heads": heads}
        return PrefixTuningConfig(**common)
    # By default PEFT makes vectors for the decoder as well, which it never uses.
    common["num_transformer_submodules"] = 1
    if fields.method == "p_tuning":
        return PromptEncoderConfig(encoder_hidden_size=hidden, **common)
    if fields.init == "text":
        common |= {"prompt_tuning_init_text": text, "tokenizer_name_or_path": tokenizer_path}
    kind = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM", "text": "TEXT"}[fields.init]
    return PromptTuningConfig(prompt_tuning_init=kind, **common)


def with_method(
    model: PreTrainedModel,
    fields: MethodFields,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    text: str | None = None,
) -> PreTrainedModel | Any:
    """The model ready to be trained by a method: all but what the method trains is frozen.

    Args:
        model: as loaded; it is changed.
        fields: the method.
        tokenizer: its tokenizer, loaded from a folder or the hub.
        seed: of the initial values.
        text: that the prompt begins as with init=text; by default ``fields.init_text``.

    Returns:
        A ``PeftModel`` around it, or the model itself for ``full``.

    Raises:
        UserError: more virtual tokens than the model has positions, or a text without tokens.
    """
    import os

    from transformers import set_seed

    text = fields.init_text if text is None else text
    tokens = virtual_tokens(fields, tokenizer, text)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens >= limit:
        problem = f"{type(model).__name__} has {limit} positions in all"
        raise UserError("virtual_tokens", tokens, problem, "give fewer, such as 20")
    chosen = peft_config(fields, model, tokens, text, tokenizer.name_or_path)
    set_seed(seed)
    if chosen is None:
        return model
    from peft import get_peft_model

    made = get_peft_model(model, chosen)
    if fields.init == "text" and os.path.exists(tokenizer.name_or_path):
        # The text has done its work; to be loaded, an adapter that names it would need the path of its tokenizer.
        chosen.prompt_tuning_init, chosen.prompt_tuning_init_text = "RANDOM", None
        chosen.tokenizer_name_or_path = None
    return made


def trainable_parameters(model: Any) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
