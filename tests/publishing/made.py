"""One finished stage of every kind that can be pushed, tiny and untrained, as the stages save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.publishing.conftest import write_stage

DOCUMENTS = ["The small file is read by the server.", "A nested list is sorted, then merged."]
SUMMARIES = ["Read the file.", "Sort it."]


def make_all(run: Path) -> dict[str, tuple[Path, bool]]:
    """Name of a repository -> stage and whether its adapter is pushed, in the order in which they can be pushed."""
    tokenizer = _tokenizer(run / "tokenizer")
    sft = _seq2seq(run / "sft", tokenizer)
    base = _causal(run / "word_model", tokenizer)
    return {
        "tokenizer": (run / "tokenizer", False),
        "sft": (sft, False),
        "reward": (_reward(run / "reward", sft, tokenizer), False),
        "dpo": (_lora(run / "dpo", sft, tokenizer), False),
        "dpo-lora": (run / "dpo", True),
        "word-model": (base, False),
        "prompt": (_soft(run / "prompt", base, tokenizer), False),
        "pairs": (_pairs(run / "pairs"), False),
        "ddpm": (_ddpm(run / "ddpm"), False),
        "gan": (_gan(run / "gan"), False),
        "classifier": (_classifier(run / "classifier"), False),
    }


def _tokenizer(folder: Path) -> Any:
    from pipelines.corpus.unigram import train

    write_stage(folder, "summarization/tokenizer", {"dataset": "pydocs"}, metrics={"tokenizer/vocab_size": 320})
    made = train([*DOCUMENTS, *SUMMARIES, "abcdefghijklmnopqrstuvwxyz ?:"], 320, lowercase=True)
    made.save_pretrained(folder)
    return made


def _seq2seq(folder: Path, tokenizer: Any) -> Path:
    from tests.seq2seq.tiny_models import tiny

    write_stage(folder, "summarization/sft", {"dataset": "pydocs", "max_source_length": 32, "max_target_length": 6})
    tiny("t5", vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _causal(folder: Path, tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    write_stage(folder, "prompting/word_model", {"task": "words", "max_new_tokens": 4})
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _reward(folder: Path, sft: Path, tokenizer: Any) -> Path:
    from pipelines.seq2seq.reward_model import EncoderDecoderRewardModel
    from pipelines.seq2seq.training import LengthConfig

    metrics = {"reward/accuracy": 0.75, "reward/accuracy_ci_low": 0.7, "reward/accuracy_ci_high": 0.8}
    write_stage(folder, "summarization/reward", {"model": str(sft), "preferences": "pairs"}, metrics=metrics)
    torch.manual_seed(2)
    model = EncoderDecoderRewardModel.from_seq2seq(str(sft), LengthConfig(max_source_length=32, max_target_length=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _lora(folder: Path, sft: Path, tokenizer: Any) -> Path:
    """As a DPO stage with ``lora_r`` saves it: the merged model, and the adapter by itself."""
    from peft import get_peft_model

    from pipelines.seq2seq.lora import LoraFields, lora_settings, merged
    from pipelines.seq2seq.models import load_seq2seq

    fields = LoraFields(lora_r=2)
    write_stage(
        folder, "summarization/dpo", {"model": str(sft), "preferences": "pairs", "lora_r": 2, "max_target_length": 6}
    )
    model = load_seq2seq(str(sft))
    model.name_or_path = ""
    model = get_peft_model(model, lora_settings(fields))
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5)
    merged(model, fields, folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _soft(folder: Path, base: Path, tokenizer: Any) -> Path:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from pipelines.prompting.soft import run_name

    config = {"model": str(base), "task": "words", "method": "prompt_tuning", "strategy": None, "max_new_tokens": 4}
    write_stage(folder, "prompting/soft", config, metrics={"soft/accuracy": 0.5})
    runs = [{"examples": 8, "seed": seed} for seed in (0, 1)]
    (folder / "results.json").write_text(json.dumps({"runs": runs, "inputs": ["held out"]}))
    for run in runs:
        torch.manual_seed(10 + run["seed"])
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
        model.save_pretrained(folder / run_name(**run))
        tokenizer.save_pretrained(folder / run_name(**run))
        (folder / run_name(**run) / "predictions.jsonl").write_text("{}\n")
    return folder


def _pairs(folder: Path) -> Path:
    from datasets import Dataset, DatasetDict

    write_stage(folder, "summarization/preferences", {"dataset": "pydocs", "annotator": "rouge"})
    rows = [
        {"id": str(i), "prompt": DOCUMENTS[i % 2], "chosen": f"good {i}", "rejected": f"bad {i}", "margin": i / 3}
        for i in range(7)
    ]
    lists = [{"id": "0", "prompt": "x", "completions": ["a", "b", "c"], "ranking": [2, 0, 1]}]
    splits = {
        "train": Dataset.from_list(rows),
        "validation": Dataset.from_list(rows[:2]),
        "test": Dataset.from_list(rows[2:4]),
    }
    DatasetDict(splits).save_to_disk(folder)
    DatasetDict({"train": Dataset.from_list(lists)}).save_to_disk(folder / "rankings")
    (folder / "samples.jsonl").write_text("{}\n")
    return folder


def _ddpm(folder: Path) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    metrics = {"ddpm/denoising_error": 0.2, "ddpm/denoising_error_ci_low": 0.1, "ddpm/denoising_error_ci_high": 0.3}
    write_stage(folder, "images/ddpm", {"dataset": "digits", "channels": [8, 8]}, metrics=metrics)
    torch.manual_seed(4)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "layers_per_block": 1}
    DDPMPipeline(UNet2DModel(**sizes, **blocks, norm_num_groups=4), DDPMScheduler(6)).save_pretrained(folder)
    (folder / "samples.png").write_bytes(b"a picture")
    (folder / "samples").mkdir()
    (folder / "samples" / "step-4.png").write_bytes(b"a picture")
    return folder


def _gan(folder: Path) -> Path:
    from pipelines.images.gan_networks import GANDiscriminator, GANGenerator
    from pipelines.images.gan_pipeline import GANPipeline

    write_stage(folder, "images/gan", {"dataset": "digits"})
    torch.manual_seed(5)
    sizes = {"sample_size": 8, "hidden": 8, "width": 8}
    GANPipeline(GANGenerator(**sizes, latent_dim=4), GANDiscriminator(**sizes)).save_pretrained(folder)
    return folder


def _classifier(folder: Path) -> Path:
    from pipelines.images.classifier_network import ImageClassifier

    write_stage(folder, "images/classifier", {"dataset": "digits"}, metrics={"classifier/accuracy": 0.9})
    torch.manual_seed(6)
    ImageClassifier(sample_size=8, width=4, features=4).save_pretrained(folder)
    return folder


# --- what each gives, whether loaded from its folder or from the Hub ---


def output_of(kind: str, place: str | Path, second: str | Path | None = None, **words: Any) -> Any:
    """Numbers and texts that what was loaded from a folder or the Hub gives; the same for the same weights.

    Args:
        kind: name of ``make_all``.
        place: folder or hub id.
        second: of an adapter, the folder or hub id of the tokenizer.
        words: passed to ``from_pretrained``.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        return _OUTPUTS[kind](str(place), str(second or place), words)


def _of_tokenizer(place: str, second: str, words: dict) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, **words)(DOCUMENTS)["input_ids"]


def _batch(tokenizer_at: str, words: dict) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_at, **words)
    return tokenizer(DOCUMENTS, padding=True, return_tensors="pt", return_token_type_ids=False)


def _of_seq2seq(place: str, second: str, words: dict, loader: Any = None) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    batch = _batch(second, {} if loader else words)
    model = (loader or AutoModelForSeq2SeqLM).from_pretrained(place, **words).eval()
    logits = model(**batch, decoder_input_ids=torch.tensor([[0, 5, 6], [0, 7, 8]])).logits
    return [logits.tolist(), model.generate(**batch, max_new_tokens=5, do_sample=False).tolist()]


def _of_causal(place: str, second: str, words: dict, loader: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    model = (loader or AutoModelForCausalLM).from_pretrained(place, **words).eval()
    return model(**_batch(second, {} if loader else words)).logits.tolist()


def _of_reward(place: str, second: str, words: dict) -> Any:
    from pipelines.seq2seq.reward_model import RewardScorer

    return RewardScorer(place)(DOCUMENTS, SUMMARIES)


def _of_lora(place: str, second: str, words: dict) -> Any:
    from peft import AutoPeftModelForSeq2SeqLM

    return _of_seq2seq(place, second, words, _OnBase(second) if Path(place).exists() else AutoPeftModelForSeq2SeqLM)


class _OnBase:
    """Loads an adapter from a folder, which does not name its base, on a model from another."""

    def __init__(self, base: str):
        self.base = base

    def from_pretrained(self, place: str) -> Any:
        """The two together."""
        from peft import PeftModel
        from transformers import AutoModelForSeq2SeqLM

        return PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(self.base), place)


def _of_prompt(place: str, second: str, words: dict) -> Any:
    from peft import AutoPeftModelForCausalLM

    return _of_causal(place, second, words, AutoPeftModelForCausalLM)


def _of_pairs(place: str, second: str, words: dict) -> Any:
    from datasets import load_dataset, load_from_disk

    if Path(place).exists():
        found = [load_from_disk(place), load_from_disk(f"{place}/rankings")]
    else:
        found = [load_dataset(place, name, **words) for name in ("default", "rankings")]
    return [{split: data.to_list() for split, data in one.items()} for one in found]


def _of_pipeline(place: str, second: str, words: dict) -> Any:
    from pipelines.images.gan_pipeline import GANPipeline

    if not Path(place).exists():
        from huggingface_hub import snapshot_download

        place = snapshot_download(place, **words)
    pipeline = GANPipeline.from_pretrained(place)
    return pipeline(3, torch.Generator().manual_seed(1), output_type="np").images.tolist()


def _of_ddpm(place: str, second: str, words: dict) -> Any:
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(place, **words)
    drawn = pipeline(3, torch.Generator().manual_seed(1), num_inference_steps=6, output_type="np")
    return drawn.images.tolist()


def _of_classifier(place: str, second: str, words: dict) -> Any:
    from pipelines.images.classifier_network import ImageClassifier

    images = torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)
    return ImageClassifier.from_pretrained(place, **words).eval()(images).tolist()


_OUTPUTS = {
    "tokenizer": _of_tokenizer,
    "sft": _of_seq2seq,
    "reward": _of_reward,
    "dpo": _of_seq2seq,
    "dpo-lora": _of_lora,
    "word-model": _of_causal,
    "prompt": _of_prompt,
    "pairs": _of_pairs,
    "ddpm": _of_ddpm,
    "gan": _of_pipeline,
    "classifier": _of_classifier,
}
