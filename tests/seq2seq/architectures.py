"""A tiny random model of every encoder-decoder class that transformers registers, and sources for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_models import VOCABULARY, tiny, tiny_batch
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from pipelines.seq2seq.stacks import source_name

TASKS = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")

# What a configuration calls the sizes of a model.
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "max_source_positions": 64, "num_mel_bins": 8}
_SIZES |= dict.fromkeys(("d_model", "hidden_size", "hidden_dim", "output_hidden_size", "decoder_hidden_size"), 16)
_SIZES |= dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim"), 32)
_SIZES |= dict.fromkeys(("speech_encoder_intermediate_size", "speech_encoder_attention_heads"), 2)
_SIZES |= dict.fromkeys(("num_layers", "num_decoder_layers", "num_encoder_layers", "encoder_layers"), 2)
_SIZES |= dict.fromkeys(("decoder_layers", "num_hidden_layers", "speech_encoder_layers", "num_experts"), 2)
_SIZES |= dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_adapter_layers"), 2)
_SIZES |= dict.fromkeys(("num_heads", "encoder_attention_heads", "decoder_attention_heads"), 2)
_SIZES |= dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_encoder_attention_heads"), 2)
_SIZES |= dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 2)
_SIZES |= dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 2)
_SIZES |= dict.fromkeys(("num_decoder_attention_heads",), 2)
_SIZES |= dict.fromkeys(("d_kv", "head_dim"), 8)
_SIZES["sliding_window"] = 3


def registered() -> dict[str, str]:
    """Class -> model type of everything that writes text from another text, from speech or from images."""
    found: dict[str, str] = {}
    for task in TASKS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return found


def encoder_decoders() -> dict[str, str]:
    """Those of them whose configuration says that they are encoder-decoders (all of them are asked: slow)."""
    return {n: k for n, k in registered().items() if getattr(CONFIG_MAPPING[k](), "is_encoder_decoder", False)}


def _default(kind: str) -> Any:
    """A configuration whose sizes ``_shrunk`` knows how to shrink."""
    t = transformers
    if kind == "florence2":
        quarters = {"embed_dim": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "num_groups": (1, 1, 2, 2)}
        vision = t.Florence2VisionConfig(depths=(1, 1, 1, 1), projection_dim=16, window_size=2, **quarters)
        return t.Florence2Config(vision_config=vision)
    if kind == "pp_formulanet":
        convolutions = {"output_channels": 8, "post_conv_in_channels": 8, "post_conv_mid_channels": 8}
        sizes = {"image_size": 32, "patch_size": 4, "window_size": 2, "post_conv_out_channels": 16}
        return t.PPFormulaNetConfig(vision_config=t.PPFormulaNetVisionConfig(**convolutions, **sizes))
    if kind == "moonshine_streaming":
        return t.MoonshineStreamingConfig(num_key_value_heads=2)
    return CONFIG_MAPPING[kind]()


def _shrunk(config: Any) -> Any:
    for name in getattr(type(config), "sub_configs", None) or {}:
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            _shrunk(inner)
    for name, size in _SIZES.items():
        if isinstance(vars(config).get(name), int):
            setattr(config, name, size)
    return config


def _composite(name: str) -> Any:
    """Two models put together: BERT to BERT, wav2vec 2.0 to GPT-2."""
    t = transformers
    if name == "EncoderDecoderModel":
        bert = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        decoder = t.BertConfig(**bert, num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
        both = (t.BertConfig(**bert, num_hidden_layers=1), decoder)
        return t.EncoderDecoderModel(t.EncoderDecoderConfig.from_encoder_decoder_configs(*both))
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    encoder = _shrunk(t.Wav2Vec2Config(**layers, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))
    decoder = t.GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=1, n_head=2, is_decoder=True, add_cross_attention=True
    )
    return t.SpeechEncoderDecoderModel(t.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))


def build(name: str) -> Any:
    """A random model of the class, in evaluation mode."""
    known = {"T5GemmaForConditionalGeneration": "t5gemma", "VisionEncoderDecoderModel": "vision"}
    if name in known:
        return tiny(known[name])
    torch.manual_seed(0)
    if name in ("EncoderDecoderModel", "SpeechEncoderDecoderModel"):
        model = _composite(name)
        config = model.config
    else:
        config = _shrunk(_default(registered()[name]))
    for each in (config, *(getattr(config, part, None) for part in ("text_config", "decoder", "decoder_config"))):
        for token, number in (("decoder_start_token_id", 2), ("pad_token_id", 0), ("eos_token_id", 1)):
            if isinstance(each, transformers.PreTrainedConfig):
                setattr(each, token, number)
    if name not in ("EncoderDecoderModel", "SpeechEncoderDecoderModel"):
        model = getattr(transformers, name)(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model.eval()


def sources_of(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two sources of the kind that the model reads, ragged where it has a mask of them."""
    generator = torch.Generator().manual_seed(4)
    name = source_name(model)
    if name == "input_ids":
        return tiny_batch()[:2]
    shape = {
        "WhisperForConditionalGeneration": (2, 8, 128),
        "SeamlessM4TForSpeechToText": (2, 24, 160),
        "SeamlessM4Tv2ForSpeechToText": (2, 24, 160),
        "Speech2TextForConditionalGeneration": (2, 24, 80),
        "VisionEncoderDecoderModel": (2, 3, 8, 8),
        "PPFormulaNetForConditionalGeneration": (2, 3, 32, 32),
    }.get(type(model).__name__, (2, 2400) if name == "input_values" else (2, 64, 8))
    return torch.randn(shape, generator=generator), None
