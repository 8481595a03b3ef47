"""Tiny random encoder-decoders of several families, and preference pairs, for the tests of this folder."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from pipelines.seq2seq.view import decoder_inputs

VOCABULARY = 50
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "forced_eos_token_id": 1,
    "decoder_start_token_id": 1,
    "encoder_layerdrop": 0.1,
    "decoder_layerdrop": 0.1,
}
_GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "sliding_window": 3,  # shorter than sources and completions
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_VIT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
FAMILIES = ("t5", "t5-untied", "mt5", "bart", "pegasus", "marian", "t5gemma")
"""Those that read text."""
ALL_FAMILIES = (*FAMILIES, "whisper", "vision")
SIDES = [
    pytest.param(family, left, id=f"{family}-padded-{'left' if left else 'right'}")
    for family in ALL_FAMILIES
    for left in (False, True)
    if family in FAMILIES or not left
]
"""Each with its sources' padding on the right, and on the left where they have any."""


def tiny(family: str, seed: int = 0, vocabulary: int = VOCABULARY) -> transformers.PreTrainedModel:
    """A random model of a family in evaluation mode; no part of its path to the logits is neutral."""
    t, size = transformers, {"vocab_size": vocabulary}
    torch.manual_seed(seed)
    if family == "t5":
        model = t.T5ForConditionalGeneration(t.T5Config(**(_T5 | size)))
    elif family == "t5-untied":
        model = t.T5ForConditionalGeneration(
            t.T5Config(**(_T5 | size), tie_word_embeddings=False, feed_forward_proj="gated-gelu")
        )
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    elif family == "mt5":
        model = t.MT5ForConditionalGeneration(t.MT5Config(**(_T5 | size)))
    elif family == "bart":
        model = t.BartForConditionalGeneration(t.BartConfig(**(_BART | size)))
    elif family == "pegasus":
        # Embeddings times √d_model, as the released checkpoints of both have it.
        model = t.PegasusForConditionalGeneration(t.PegasusConfig(**(_BART | size), scale_embedding=True))
    elif family == "marian":
        model = t.MarianMTModel(t.MarianConfig(**(_BART | size), scale_embedding=True))
    elif family == "t5gemma":
        model = t.T5GemmaForConditionalGeneration(
            t.T5GemmaConfig(encoder=_GEMMA | size, decoder=_GEMMA | size, vocab_size=vocabulary)
        )
    elif family == "whisper":
        model = t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                **(_BART | size | {"encoder_layers": 3, "decoder_start_token_id": 3}),
                max_source_positions=20,
                max_target_positions=32,
                num_mel_bins=8,
                begin_suppress_tokens=[],
            )
        )
    elif family == "vision":
        # An encoder of another width than the decoder's, and a decoder with absolute positions and a head of its own.
        encoder = t.ViTConfig(**_VIT, image_size=8, patch_size=4)
        decoder = t.GPT2Config(
            **(_GPT2 | size), is_decoder=True, add_cross_attention=True, bos_token_id=3, eos_token_id=1, pad_token_id=0
        )
        config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            encoder, decoder, decoder_start_token_id=3, pad_token_id=0, eos_token_id=1
        )
        model = t.VisionEncoderDecoderModel(config)
    else:
        raise ValueError(family)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model.eval()


def loud(model: transformers.PreTrainedModel, size: float = 0.1) -> transformers.PreTrainedModel:
    """The model with weights large enough for every position, mask and bias to show in the logits."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_batch(left: bool = False) -> tuple[torch.Tensor, ...]:
    """Two ragged sources (padded on the left or right) and six ragged completions: ids and masks of both."""
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    source_mask = torch.ones_like(source)
    source_mask[1, :4] = 0
    if not left:
        source_mask = source_mask.flip(1)
    completion = torch.randint(3, VOCABULARY, (6, 5), generator=generator)
    lengths = torch.tensor([5, 3, 1, 4, 5, 2])
    completion_mask = (torch.arange(5) < lengths[:, None]).long()
    return source * source_mask, source_mask, completion * completion_mask, completion_mask


def tiny_sources(family: str, left: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Two sources of a family's own kind, and their mask where it has one."""
    shape = {"whisper": (2, 8, 40), "vision": (2, 3, 8, 8)}.get(family)
    if shape is None:
        return tiny_batch(left)[:2]
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)), None


def plain_log_probs(model, source, source_mask, completion, mask, rows):
    """Teacher-forced log-probabilities by the model's own forward, the source repeated for each completion."""
    given = {} if source_mask is None else {"attention_mask": source_mask[rows]}
    logits = model(
        **{model.main_input_name: source[rows]},
        **given,
        decoder_input_ids=decoder_inputs(model, completion),
        use_cache=False,
    ).logits
    return logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0] * mask


def save_pairs(folder: Path, corpus: Path) -> Path:
    """Preference pairs from the tiny corpus: the reference against another row's with words added, always longer."""
    from datasets import Dataset, DatasetDict, load_from_disk

    draw = random.Random(5)
    splits = {}
    for name, rows in load_from_disk(str(corpus)).items():
        others = rows["summary"]
        splits[name] = Dataset.from_list(
            [
                {
                    "id": row["id"],
                    "prompt": row["document"],
                    "chosen": row["summary"],
                    "rejected": f"{draw.choice(others)} {draw.choice(['file', 'table graph', 'token'])}",
                    "chosen_score": 1.0,
                    "rejected_score": 0.0,
                    "margin": 1.0,
                }
                for row in rows
            ]
        )
    DatasetDict(splits).save_to_disk(str(folder))
    return folder
