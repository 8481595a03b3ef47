"""The trainer of soft prompts, LoRA and full fine-tuning: loss on the answer, checkpoints of what is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.seq2seq.sft_trainer import SFTTrainer

TRAINED_FILE = "model.safetensors"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Name -> value of every parameter that is trained."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


class PromptTrainer(SFTTrainer):
    """The trainer of fine-tuning on prompts and answers, for causal models as well, PEFT's or plain.

    A checkpoint holds the trained parameters as they are: what PEFT saves of P-tuning and of a projected prefix is what
    their network made, from which training cannot go on.
    """

    def _mean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy over the answers' tokens of the whole step, nats a token."""
        logits = outputs["logits"].float()
        if not self.accelerator.unwrap_model(self.model).config.is_encoder_decoder:
            # Prompt tuning's outputs begin with those of its vectors; place p predicts token p + 1.
            logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = trained_state(self.accelerator.unwrap_model(self.model))
        save_file({name: value.contiguous() for name, value in found.items()}, folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        loaded = load_file(os.path.join(resume_from_checkpoint, TRAINED_FILE))
        expected = trained_state(model)
        if loaded.keys() != expected.keys():
            raise RuntimeError(
                f"the checkpoint's parameters are not the model's: {sorted(loaded.keys() ^ expected)[:3]}"
            )
        for name, value in expected.items():
            value.copy_(loaded[name])
