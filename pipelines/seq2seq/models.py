"""Loading tokenizers and encoder-decoder models, with one clear line for each thing that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import Problem, UserError, problems_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REWARD_MODEL_TYPE = "encoder_decoder_reward"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "spiece.model", "vocab.json", "sentencepiece.bpe.model")


def _folder(path: str, field: str, mend: str) -> Path | None:
    """The local folder that ``path`` names; None where it is a hub id."""
    folder = Path(path).expanduser()
    if folder.is_file():
        raise UserError(field, path, "is a file", mend)
    return folder if path.strip() and folder.is_dir() else None


def read_model_config(path: str, field: str, mend: str) -> dict[str, Any] | None:
    """The ``config.json`` of a local model folder that also holds weights; None for a hub id.

    Reads only that file and the folder's names, so that a wrong folder is found before anything heavy is imported.

    Args:
        path: folder or hub id.
        field: the configuration field that named it, for messages.
        mend: what the user should give there.

    Raises:
        UserError: a file, without ``config.json``, with one that is not JSON, without weights, or with pickled ones.
    """
    folder = _folder(path, field, mend)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(field, path, "holds no model (no config.json)", mend) from None
    except (OSError, ValueError) as error:
        raise UserError(field, path, f"its config.json is not valid JSON ({error})", mend) from None
    if not isinstance(config, dict):
        raise UserError(field, path, "its config.json holds no object", mend)
    if not any(folder.glob("model*.safetensors")):
        pickles = sorted(file.name for file in folder.glob("*.bin") if "model" in file.name)
        if pickles:
            problem = f"holds its weights as a pickle only ({pickles[0]}), which is never loaded: it could run code"
            raise UserError(field, path, problem, "convert them to model.safetensors, or take a repository that has it")
        raise UserError(field, path, "holds no weights (no model.safetensors)", mend)
    return config


def check_model(path: str, field: str) -> None:
    """Refuse a local folder that cannot be loaded as an encoder-decoder; a hub id is not looked up.

    Raises:
        UserError: as ``read_model_config``; also for a model of another kind.
    """
    found = read_model_config(path, field, "give a folder made by save_pretrained, or a hub id")
    if found is None:
        return
    if found.get("model_type") == REWARD_MODEL_TYPE:
        raise UserError(field, path, "is a reward model, which writes nothing", "give the folder of a summarizer")
    if found.get("is_encoder_decoder") is True:
        return
    from transformers import AutoConfig

    # A configuration saved without the key has its class's default.
    try:
        config = AutoConfig.from_pretrained(str(Path(path).expanduser()))
    except Exception as error:
        raise loading_error(field, path, "model", error) from error
    _check_kind(config, path, field)


def check_reward_model(path: str, field: str) -> None:
    """Refuse a local folder that does not hold a reward model; a hub id is not looked up.

    Raises:
        UserError: as ``read_model_config``; also for a model of another kind.
    """
    mend = "give the folder of a reward stage"
    found = read_model_config(path, field, mend)
    if found is not None and found.get("model_type") != REWARD_MODEL_TYPE:
        raise UserError(field, path, f"is not a reward model (its model_type is {found.get('model_type')!r})", mend)


def check_tokenizer(path: str, field: str) -> None:
    """Refuse a local folder that does not hold a tokenizer; a hub id is not looked up.

    Raises:
        UserError: a file, or a folder without any of a tokenizer's files.
    """
    mend = "give a folder with a tokenizer, or a hub id"
    folder = _folder(path, field, mend)
    if folder is not None and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(field, path, "holds no tokenizer", mend)


def model_problems(models: Mapping[str, str | None]) -> list[Problem]:
    """What is wrong with the local folders, of a model with its tokenizer, that a configuration names.

    Args:
        models: field -> folder, hub id, or None. What does not exist is left to ``StageConfig.problems``.
    """

    def check(path: str, field: str) -> None:
        check_model(path, field)
        check_tokenizer(path, field)

    return problems_of(*(partial(check, path, field) for field, path in models.items() if path is not None))


def _check_kind(config: Any, path: str, field: str) -> None:
    if not config.is_encoder_decoder:
        raise UserError(
            field,
            path,
            f"{config.model_type} is not an encoder-decoder model",
            "give one such as T5, FLAN-T5, mT5, BART or Pegasus (TRL's own trainers serve decoder-only models)",
        )


def check_writes_from_text(config: Any, name: str, field: str) -> None:
    """Refuse the configuration of an encoder-decoder that transformers does not know as one from text to text.

    Args:
        config: of the model.
        name: what the user called it, for the message.
        field: the configuration field that did.

    Raises:
        UserError: a model of speech or images, or of a class without a language-model head.
    """
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        problem = f"{config.model_type} is not a model from text to text"
        mend = "give one such as T5, BART or Pegasus (Python's DPO and PPO trainers also take speech and images)"
        raise UserError(field, name, problem, mend)


def loading_error(field: str, path: str, kind: str, error: Exception) -> UserError:
    """What to tell when a library could not load the ``kind`` of thing that ``field`` names."""
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

    check_tokenizer(path, field)
    folder = Path(path).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else path)
    except Exception as error:
        raise loading_error(field, path, "tokenizer", error) from error
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
        UserError: missing, without weights, not an encoder-decoder from text to text, or not loadable without remote
            code or pickle.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    check_model(path, field)
    found = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
    try:
        config = AutoConfig.from_pretrained(found)
    except Exception as error:
        raise loading_error(field, path, "model", error) from error
    _check_kind(config, path, field)
    check_writes_from_text(config, path, field)
    try:
        # safetensors only: a pickle could run code.
        return AutoModelForSeq2SeqLM.from_pretrained(found, dtype=torch.float32, use_safetensors=True)
    except Exception as error:
        raise loading_error(field, path, "model", error) from error


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
