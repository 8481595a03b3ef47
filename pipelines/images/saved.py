"""Saved pipelines: which family a folder is of, and how it is loaded or gone on from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

PIPELINES = {
    "VAEPipeline": ("vae", "pipelines.images.vae_pipeline"),
    "DDPMPipeline": ("ddpm", "diffusers"),
    "ClassConditionalDDPMPipeline": ("ddpm", "pipelines.images.ddpm_pipeline"),
    "BitFlipPipeline": ("bitflip", "pipelines.images.bitflip_pipeline"),
    "GANPipeline": ("gan", "pipelines.images.gan_pipeline"),
}
"""Class of a pipeline -> its family and module."""

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _class_of(folder: str | Path, field: str) -> str:
    """Name of the class of the pipeline saved in ``folder``, one of ``PIPELINES``.

    Args:
        folder: of a pipeline, as ``save_pretrained`` or a stage wrote it.
        field: configuration field that named it, for messages.

    Raises:
        UserError: there is no pipeline, or it is of no family here.
    """
    index = Path(folder).expanduser() / "model_index.json"
    families = dict.fromkeys(family for family, _ in PIPELINES.values())
    mend = f"give the folder of a stage {', '.join(families)}"
    if not index.is_file():
        raise UserError(field, folder, "no saved pipeline (it has no model_index.json)", mend)
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(field, index, "damaged", "make or copy it again") from None
    if not isinstance(name, str) or name not in PIPELINES:
        raise UserError(field, folder, f"holds a {name}", mend)
    return name


def family_of(folder: str | Path, field: str = "model") -> str:
    """Which family the pipeline saved in ``folder`` is of.

    Args:
        folder: of a pipeline, as ``save_pretrained`` or a stage wrote it.
        field: configuration field that named it, for messages.

    Raises:
        UserError: there is no pipeline, or it is of no family here.
    """
    return PIPELINES[_class_of(folder, field)][0]


def check_family(folder: str | Path, field: str, family: str) -> None:
    """Refuse a folder whose pipeline is of another family.

    Raises:
        UserError: it is, or holds none.
    """
    found = family_of(folder, field)
    if found != family:
        raise UserError(field, folder, f"holds a {found}, not a {family}", f"give the folder of a {family}")


def load_pipeline(folder: str | Path, field: str = "model") -> DiffusionPipeline:
    """The pipeline in a folder, whichever of the families it is of.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    name = _class_of(folder, field)
    cls = getattr(importlib.import_module(PIPELINES[name][1]), name)
    try:
        return cls.from_pretrained(str(Path(folder).expanduser()), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"the pipeline cannot be loaded ({' '.join(str(error).split())[:200]})"
        raise UserError(field, folder, problem, "make or copy it again") from None


def load_parts(parts: dict[str, nn.Module], folder: str, field: str = "model") -> None:
    """Fill the parts that a saved pipeline has with its weights.

    Raises:
        UserError: a file is missing or damaged, or the networks are of another size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = {name: file for name in parts if (file := Path(folder).expanduser() / name / _WEIGHTS).is_file()}
    if not found:
        problem = f"has no weights of {', '.join(parts)}"
        raise UserError(field, folder, problem, "give the folder of a finished stage of this family")
    for name, file in found.items():
        try:
            parts[name].load_state_dict(load_file(file))
        except SafetensorError as error:
            raise UserError(field, file, f"damaged ({error})", "make or copy it again") from None
        except RuntimeError as error:
            first = " ".join(str(error).splitlines()[1].split()) if "\n" in str(error) else str(error)
            problem = f"its {name} is not the network configured here ({first})"
            raise UserError(field, folder, problem, "give the fields it was made with") from None
