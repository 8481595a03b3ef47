"""Loading tokenizers and encoder-decoder models, with one clear line for each thing that can be wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def _check_folder(path: str, field: str, files: tuple[str, ...], problem: str, mend: str) -> None:
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(field, path, "is a file", "give the folder a model was saved into, or a hub id")
    if folder.is_dir() and not any((folder / name).exists() for name in files):
        raise UserError(field, path, problem, mend)


def _loading_error(field: str, path: str, kind: str, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(path).expanduser().is_dir():
        return UserError(field, path, f"the {kind} cannot be loaded ({first})", "give a folder made by save_pretrained")
    mend = "give an existing folder, or check the hub id, the network and your login"
    return UserError(field, path, f"no such folder, and the hub gave no {kind} of that name ({first})", mend)


def load_tokenizer(path: str, *, field: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer saved in a folder or on the hub.

    Args:
        path: folder or hub id.
        field: the configuration field that named it, for the message.

    Raises:
        UserError: missing, not a tokenizer, or without a padding or end token.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer_config.json", "tokenizer.json", "spiece.model", "vocab.json", "sentencepiece.bpe.model")
    _check_folder(path, field, names, "holds no tokenizer", "give a folder with a tokenizer, or set tokenizer=")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(path).expanduser()) if Path(path).exists() else path)
    except Exception as error:
        raise _loading_error(field, path, "tokenizer", error) from error
    for token in ("pad_token", "eos_token"):
        if getattr(tokenizer, token) is None:
            raise UserError(field, path, f"the tokenizer has no {token}", "give the tokenizer of a seq2seq model")
    return tokenizer


def load_seq2seq(path: str, *, field: str = "model") -> PreTrainedModel:
    """An encoder-decoder model from a folder or the hub, in float32.

    Args:
        path: folder or hub id.
        field: the configuration field that named it, for the message.

    Raises:
        UserError: missing, without weights, not an encoder-decoder, or not loadable without remote code or pickle.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    _check_folder(path, field, ("config.json",), "holds no model (no config.json)", "give a folder with a saved model")
    found = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
    try:
        config = AutoConfig.from_pretrained(found)
    except Exception as error:
        raise _loading_error(field, path, "model", error) from error
    if not config.is_encoder_decoder:
        raise UserError(
            field,
            path,
            f"{config.model_type} is not an encoder-decoder model",
            "give one such as T5, FLAN-T5, mT5, BART or Pegasus (TRL's own trainers serve decoder-only models)",
        )
    _check_folder(path, field, _WEIGHTS, "holds no weights (no model.safetensors)", "give a folder with saved weights")
    try:
        # safetensors only: a pickle could run code.
        return AutoModelForSeq2SeqLM.from_pretrained(found, dtype=torch.float32, use_safetensors=True)
    except Exception as error:
        raise _loading_error(field, path, "model", error) from error


def check_same_tokenizer(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, what_first: str, what_second: str
) -> None:
    """Refuse two parts that would read the same ids as different words.

    Raises:
        UserError: if the vocabularies differ.
    """
    if first.get_vocab() != second.get_vocab():
        raise UserError(
            what_second,
            getattr(second, "name_or_path", "") or type(second).__name__,
            f"its tokenizer differs from that of {what_first} ({len(second)} against {len(first)} tokens)",
            f"train it from the same model as {what_first}",
        )
