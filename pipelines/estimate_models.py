"""Sizes of well-known encoder-decoders, so that an estimate needs neither the Hub nor weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def _t5(d_model: int, d_ff: int, layers: int, heads: int, d_kv: int = 64, **others: Any) -> dict[str, Any]:
    sizes = {"d_model": d_model, "d_kv": d_kv, "d_ff": d_ff, "num_layers": layers, "num_heads": heads}
    return {"model_type": "t5", "vocab_size": 32128, "decoder_start_token_id": 0, **sizes, **others}


def _flan(*sizes: int, **others: Any) -> dict[str, Any]:
    return _t5(*sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **others)


def _bart(d_model: int, ffn: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": layers, f"{side}_ffn_dim": ffn, f"{side}_attention_heads": heads}
    return {"model_type": "bart", "vocab_size": 50265, "d_model": d_model, **sides, **others}


def _gemma(hidden: int, inner: int, layers: int, heads: int, key_heads: int, head: int) -> dict[str, Any]:
    side = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "vocab_size": 256000,
    }
    return {"model_type": "t5gemma", "encoder": dict(side), "decoder": dict(side), "vocab_size": 256000}


_MT5 = {"model_type": "mt5", "vocab_size": 250112, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}

# By the name without its owner. T5: Raffel et al. 2020, §3.7; v1.1 and FLAN: Chung et al. 2022; T5Gemma: Zhang et al.
# 2025, table 1 (https://arxiv.org/abs/2504.06225).
KNOWN: dict[str, dict[str, Any]] = {
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, 128),
    "flan-t5-small": _flan(512, 1024, 8, 6),
    "flan-t5-base": _flan(768, 2048, 12, 12),
    "flan-t5-large": _flan(1024, 2816, 24, 16),
    "flan-t5-xl": _flan(2048, 5120, 24, 32),
    "mt5-small": _t5(512, 1024, 8, 6) | _MT5,
    "mt5-base": _t5(768, 2048, 12, 12) | _MT5,
    "mt5-large": _t5(1024, 2816, 24, 16) | _MT5,
    "bart-base": _bart(768, 3072, 6, 12),
    "bart-large": _bart(1024, 4096, 12, 16),
    "bart-large-cnn": _bart(1024, 4096, 12, 16, vocab_size=50264),
    "bart-large-xsum": _bart(1024, 4096, 12, 16, vocab_size=50264),
    "t5gemma-s-s": _gemma(512, 1024, 8, 8, 8, 64),
    "t5gemma-b-b": _gemma(768, 2048, 12, 12, 12, 64),
    "t5gemma-l-l": _gemma(1024, 2816, 24, 16, 16, 64),
    "t5gemma-2b-2b": _gemma(2304, 9216, 26, 8, 4, 256),
}
# Trained otherwise, of the same size.
_VARIANT = re.compile(r"-(ul2|prefixlm)(-it)?$")


def _plain(name: str) -> str:
    last = _VARIANT.sub("", name.rpartition("/")[2].lower())
    return f"flan-t5-{last.removeprefix('t5-v1_1-')}" if last.startswith("t5-v1_1-") else last


def model_config(name: str, field: str = "model") -> PretrainedConfig:
    """The configuration of a model: of a folder, of a name in ``KNOWN``, or from the Hub.

    Args:
        name: folder or hub id.
        field: the configuration field that named it, for messages.

    Raises:
        UserError: none of the three.
    """
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    known = KNOWN.get(_plain(name))
    if known is not None and not folder.exists():
        plain = dict(known)
        return AutoConfig.for_model(plain.pop("model_type"), **plain)
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.exists() else name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"its sizes are not known here, and neither folder nor hub gave them ({reason})"
        mend = f"give a folder with a config.json, or one of {', '.join(KNOWN)}"
        raise UserError(field, name, problem, mend) from None


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose parameters have shapes and no values: no memory is taken, whatever its size.

    Raises:
        UserError: it is no encoder-decoder.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    try:
        with torch.device("meta"):
            return AutoModelForSeq2SeqLM.from_config(config)
    except ValueError:
        mend = "give an encoder-decoder such as T5, BART or T5Gemma"
        raise UserError("model", config.model_type, "is not an encoder-decoder model", mend) from None
