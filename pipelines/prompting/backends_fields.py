"""Which models a stage asks: the fields that name them, the checks before any work, and how each is opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipelines.cache import cache_folder
from pipelines.config import INERT, Source, config
from pipelines.errors import Problem, UserError, problems_of
from pipelines.prompting.backends import Backend
from pipelines.prompting.endpoint import read_endpoint


@config
class BackendFields:
    """Which models are asked."""

    models: dict[str, Source] = Field(
        default_factory=dict,
        description="name -> folder or hub id of a causal or encoder-decoder model, or the folder of a PEFT adapter",
    )
    endpoints: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="name -> OpenAI-compatible endpoint: url, model, api (completions or chat), api_key_env (the "
        "environment variable that holds its key), system, concurrency, timeout, max_retries, log_probs, send_seed, "
        "extra",
    )
    chat_models: list[str] = Field(
        default_factory=list, description="names of models= that read a prompt through their chat template"
    )
    generation_batch_size: int = Field(16, ge=1, description="rows in one forward pass")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="arithmetic of models=; auto takes bf16 where it is measured to be faster on this device"
    )
    response_cache: str | None = Field(
        None, description="folder where endpoints' answers are kept; null: in genalign's cache", json_schema_extra=INERT
    )

    def problems(self) -> list[Problem]:
        parent = getattr(super(), "problems", None)  # a mixin: the stage's class brings the rest
        found: list[Problem] = parent() if parent is not None else []
        if not self.models and not self.endpoints:
            mend = "give models={name: FOLDER-or-id} or endpoints={name: {url: …, model: …}}"
            found.append(Problem("models", {}, "there is no model to ask", mend))
        found += name_problems("models", list(self.models)) + name_problems("endpoints", list(self.endpoints))
        for name in self.endpoints:
            if name in self.models:
                found.append(Problem(f"endpoints.{name}", name, "is a name in models= too", "give it another"))
        for name in self.chat_models:
            if name not in self.models:
                mend = f"give names of models= ({', '.join(self.models) or 'there are none'})"
                found.append(Problem("chat_models", name, "no such model", mend))
        found += problems_of(*(partial(check_local, path, f"models.{name}") for name, path in self.models.items()))
        return found + problems_of(*(partial(read_endpoint, *item) for item in self.endpoints.items()))

    @property
    def names(self) -> list[str]:
        """Every model's name, in order, local ones first."""
        return [*self.models, *self.endpoints]


def name_problems(what: str, names: Sequence[str]) -> list[Problem]:
    """Names that cannot stand in a metric's key, which is made of lower-case letters, digits and ``_``."""
    return [
        Problem(f"{what}.{name}", name, "cannot be part of a metric's name", "write a-z, 0-9 and _ only")
        for name in names
        if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
    ]


def check_local(path: str, field: str) -> None:
    """Refuse a local folder that holds no model or adapter; a hub id is not looked up.

    Raises:
        UserError: what is wrong with it.
    """
    from pipelines.seq2seq.models import REWARD_MODEL_TYPE, check_tokenizer, read_model_config

    adapter = adapter_config(path)
    if adapter is not None:
        if not (Path(path).expanduser() / "adapter_model.safetensors").is_file():
            raise UserError(field, path, "an adapter without adapter_model.safetensors", "save it with save_pretrained")
        base = adapter.get("base_model_name_or_path")
        if not base:
            raise UserError(field, path, "an adapter that does not name its base model", "mend its adapter_config.json")
        check_local(str(base), field)
        return
    found = read_model_config(path, field, "give a folder made by save_pretrained, or a hub id")
    if found is None:
        return
    if found.get("model_type") == REWARD_MODEL_TYPE:
        raise UserError(field, path, "is a reward model, which writes nothing", "give a language model")
    check_tokenizer(path, field)


def adapter_config(path: str) -> dict | None:
    """The ``adapter_config.json`` of a PEFT adapter's folder; None where it is another thing."""
    try:
        found = json.loads((Path(path).expanduser() / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def open_backend(fields: BackendFields, name: str) -> Backend:
    """The model or endpoint of this name, ready to be asked.

    Raises:
        UserError: it cannot be loaded.
    """
    if name in fields.endpoints:
        from pipelines.prompting.cache import ResponseCache
        from pipelines.prompting.endpoint import EndpointBackend

        folder = fields.response_cache or cache_folder("responses")
        return EndpointBackend(read_endpoint(name, fields.endpoints[name]), name=name, cache=ResponseCache(folder))
    from pipelines.prompting.backends_local import LocalBackend, load_local

    model, tokenizer = load_local(fields.models[name], f"models.{name}")
    return LocalBackend(
        model,
        tokenizer,
        name=name,
        batch_size=fields.generation_batch_size,
        precision=fields.precision,
        chat=name in fields.chat_models,
    )
