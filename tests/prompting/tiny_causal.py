"""Tiny random models with real tokenizers, made in process, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Question: what do birds eat? seeds. Answer: B",
    "cat -> cats\ndog -> dogs\nbox -> boxes\nchild -> children\ncity -> cities",
    "The quick brown fox jumps over the lazy dog, as foxes do; TL;DR: it jumps.",
    "A. water B. stone C. fire D. wind E. earth",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CAUSAL = ("gpt2", "llama", "opt", "bloom", "neox")
"""Learned positions, rotary ones, learned ones read off the mask, biases, rotary ones of another kind."""


def tiny_tokenizer(chat: bool = False) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of some merges, as GPT-2's; id 0 is both padding and end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0], pad_token=special[0]
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def tiny_causal(family: str, vocabulary: int, seed: int = 0, positions: int = 128) -> transformers.PreTrainedModel:
    """A random decoder-only model whose answers differ from prompt to prompt."""
    t = transformers
    torch.manual_seed(seed)
    size = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    plain = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = plain | {"intermediate_size": 64, "max_position_embeddings": positions}
    if family == "gpt2":
        config = t.GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, n_positions=positions)
    elif family == "llama":
        config = t.LlamaConfig(**size, **wide, num_key_value_heads=2)
    elif family == "opt":
        config = t.OPTConfig(**size, **plain, ffn_dim=64, max_position_embeddings=positions, word_embed_proj_dim=32)
    elif family == "bloom":
        config = t.BloomConfig(**size, hidden_size=32, n_layer=2, n_head=4)
    elif family == "neox":
        config = t.GPTNeoXConfig(**size, **wide)
    else:
        raise ValueError(family)
    model = t.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_t5(vocabulary: int, seed: int = 0) -> transformers.PreTrainedModel:
    """A random T5."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def save(folder: Path, model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> Path:
    """A folder as ``save_pretrained`` makes it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
