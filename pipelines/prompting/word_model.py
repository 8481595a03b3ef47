"""The small decoder-only model on which prompting is shown offline: a Llama of characters, trained on word tasks.

It is trained on episodes of many tasks whose names it never reads (``words.word_tasks``), so a bare word is ambiguous,
solved examples before it help, and a learned prompt can stand for the task. What it learns to do with in-context
examples is what Garg et al. (2022), "What Can Transformers Learn In-Context?", train on functions of numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pipelines.config import INERT, Source, config
from pipelines.corpus.fields import EMBEDDED, CorpusFields
from pipelines.distributed import Strategy
from pipelines.errors import Problem, UserError
from pipelines.prompting.tasks import Task, TaskFields
from pipelines.seq2seq.training import TrainingConfig

if TYPE_CHECKING:
    from pipelines.prompting.words import Vocabulary

NOUNS_FOLDER = "nouns"
SHOTS = (0, 1, 2, 4, 8)
_EPISODES = 512  # that the trained model is measured on
_HELD_OUT = 400  # words of the other tasks that are kept for these


@config
class WordModelConfig(TaskFields, TrainingConfig):
    """Train a small Llama on in-context word tasks."""

    parallelism: ClassVar[tuple[Strategy, ...]] = ("ddp", "fsdp")

    output_dir: str = Field("runs/word_model", description="folder the stage writes into", json_schema_extra=INERT)
    text: Source = Field(
        EMBEDDED, description="where the words of the other tasks come from: pydocs, a data file, a folder or a hub id"
    )
    longest_word: int = Field(10, ge=3, le=64, description="letters of a word at most; longer ones are left out")
    at_least: int = Field(2, ge=1, description="how often a word must stand in the text")
    row_length: int = Field(192, ge=32, description="tokens of an episode; a solved example takes some 20")
    hidden_size: int = Field(128, ge=8, description="width of the states")
    intermediate_size: int = Field(512, ge=8, description="width of the feed-forward layers")
    num_layers: int = Field(4, ge=1, description="layers")
    num_heads: int = Field(4, ge=1, description="attention heads")
    max_positions: int = Field(1024, ge=64, description="tokens that the model reads at most")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.task != "words":
            found.append(Problem("task", self.task, "the model is one of word tasks", "give task=words"))
        if self.hidden_size % (2 * self.num_heads):
            mend = f"give a multiple of {2 * self.num_heads} (twice num_heads)"
            found.append(Problem("hidden_size", self.hidden_size, "does not divide into even heads", mend))
        if self.row_length > self.max_positions:
            mend = f"give at most max_positions={self.max_positions}"
            found.append(Problem("row_length", self.row_length, "the model has no positions for it", mend))
        if self.max_steps < 1:
            mend = "give max_steps=1000 or so: every episode is new, there are no epochs"
            found.append(Problem("max_steps", self.max_steps, "says not how long to train", mend))
        return found

    def environment(self) -> dict[str, str]:
        """The versions of the packages read for words."""
        return super().environment() | CorpusFields(dataset=self.text).environment()


def _vocabulary(settings: WordModelConfig) -> Vocabulary:
    from pipelines.corpus import load_corpus
    from pipelines.prompting.words import read_vocabulary

    corpus = load_corpus(CorpusFields(dataset=settings.text))
    texts = (text for part in corpus.values() for column in ("document", "summary") for text in part[column])
    found = read_vocabulary(texts, longest=settings.longest_word, at_least=settings.at_least)
    if len(found.words) < 100 or not found.past:
        problem = f"gives {len(found.words)} words and {len(found.past)} verbs"
        raise UserError("text", settings.text, problem, "give more English text, or at_least=1")
    return found


def _tasks(
    settings: WordModelConfig, task: Task
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]], dict[str, float]]:
    """The tasks trained on; the same on words that are held out of training; and what was counted."""
    import random

    from pipelines.prompting.words import word_tasks

    vocabulary = _vocabulary(settings)
    hidden = {example.input: example.answer for example in (*task.validation, *task.test)}
    plurals = {example.input: example.answer for example in task.train}
    whole = word_tasks(vocabulary, plurals, hidden)
    words = sorted(whole["copy"])
    count = min(_HELD_OUT, len(words) // 10)
    apart = set(random.Random(f"words {settings.split_seed}").sample(words, count)) - plurals.keys()
    train = {
        name: pairs if name == "plural" else {w: a for w, a in pairs.items() if w not in apart}
        for name, pairs in whole.items()
    }
    held_out = {name: {w: a for w, a in pairs.items() if w in apart} for name, pairs in whole.items()}
    held_out["plural"] = {example.input: example.answer for example in task.validation}
    counts = {"words": len(train["copy"]), "verbs": len(train["past"]), "nouns": len(plurals)}
    return train, {n: p for n, p in held_out.items() if p}, {f"word_model/{k}": float(v) for k, v in counts.items()}


def _often(tasks: Mapping[str, Mapping[str, str]]) -> dict[str, set[str]]:
    """What half of the words are: nouns, so that a noun does not betray the plural; of these, those that need more
    than an s behind them, so that the rarer endings are learnt too."""
    rare = {noun for noun, plural in tasks["plural"].items() if plural != noun + "s"}
    return {name: rare if name == "plural" else set(tasks["plural"]) for name in tasks}


def _usable(task: Task, longest: int) -> Task:
    """The task without words longer than so many letters, and without training nouns that share a held-out plural."""
    splits = {s: [e for e in getattr(task, s) if len(e.input) <= longest] for s in ("train", "validation", "test")}
    hidden = {e.answer for s in ("validation", "test") for e in splits[s]}
    splits["train"] = [e for e in splits["train"] if e.answer not in hidden]
    return dataclasses.replace(task, **splits)


def _save_nouns(task: Task, folder: Path) -> None:
    """The splits as files: what comes after must ask the very words that were held out here."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = [{"id": e.id, "word": e.input, "plural": e.answer} for e in getattr(task, split)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def word_model(config: WordModelConfig) -> dict[str, float]:
    """Train the model and save it with its tokenizer, its nouns (``nouns/<split>.jsonl``) and ``log_history.json``.

    No validation or test noun and no plural of one stands in an episode. What is measured is measured on new episodes:
    of the validation nouns, and for the other tasks of words that are held out too.

    Returns:
        ``word_model/accuracy_<k>``: share of answers that are wholly right (each token given those before it) after k
        solved examples of an episode, over all tasks; ``word_model/eval_loss`` (nats an answer's token) on the same;
        ``word_model/parameters``, ``word_model/steps``, ``word_model/words``, ``word_model/verbs``,
        ``word_model/nouns``.

    Raises:
        UserError: unusable data, no ``inflect``, a text with too few words, a row too short for nine lines.
    """
    from accelerate import PartialState
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

    from pipelines.prompting.tasks import load_task
    from pipelines.prompting.word_model_data import Episodes, character_tokenizer
    from pipelines.seq2seq.sharded import TrainerInParts, save_whole, whole
    from pipelines.seq2seq.training import (
        checkpoint_marker,
        last_checkpoint,
        optimizer_choice,
        save_history,
        training_arguments,
    )

    state = PartialState()
    task = _usable(load_task(config), config.longest_word)
    tasks, held_out, metrics = _tasks(config, task)
    tokenizer = character_tokenizer(config.max_positions)
    set_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    batch = config.batch_size * config.gradient_accumulation * state.num_processes
    rows = {"often": _often(tasks), "length": config.row_length}
    episodes = Episodes(tasks, tokenizer, count=config.max_steps * batch, seed=config.seed, **rows)
    arguments = training_arguments(
        config,
        TrainingArguments,
        # With 0.999 the abilities that come suddenly (copying, telling tasks apart) come a third later.
        adam_beta2=0.98,
        num_train_epochs=1,
        # Every episode is drawn by its number: shuffling would only make resuming harder.
        train_sampling_strategy="sequential",
        eval_strategy="no",
    )
    trainer = TrainerInParts(
        model=model, args=arguments, train_dataset=episodes, processing_class=tokenizer, callbacks=[checkpoint_marker()]
    )
    trainer.optimizer_cls_and_kwargs = optimizer_choice(config)
    trainer.train(resume_from_checkpoint=last_checkpoint(config))
    save_history(trainer, config)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    rows["often"] = {}
    fresh = Episodes(held_out, tokenizer, count=_EPISODES, seed=config.seed + 2**32, **rows)
    with whole(trained):
        metrics |= _measured(trained, fresh, tokenizer, config.eval_batch_size)
    folder = Path(config.output_dir)
    save_whole(trained, folder, main=state.is_main_process)
    if state.is_main_process:
        tokenizer.save_pretrained(folder)
        _save_nouns(task, folder / NOUNS_FOLDER)
    state.wait_for_everyone()
    return metrics | {
        "word_model/parameters": float(sum(p.numel() for p in trained.parameters())),
        "word_model/steps": float(config.max_steps),
    }


def _measured(model, episodes, tokenizer, batch_size: int) -> dict[str, float]:
    """Accuracy by the number of solved examples before, and the loss, on new episodes."""
    import torch
    import torch.nn.functional as F

    from pipelines.prompting.word_model_data import answers_right, by_position
    from pipelines.seq2seq.generation import inference

    line_end = tokenizer.convert_tokens_to_ids("\n")
    rows, nats, tokens = [], 0.0, 0
    with inference(model):
        for start in range(0, len(episodes), batch_size):
            items = [episodes[i] for i in range(start, min(start + batch_size, len(episodes)))]
            labels = torch.stack([item["labels"] for item in items]).to(model.device)
            logits = model(input_ids=torch.stack([item["input_ids"] for item in items]).to(model.device)).logits
            rows += answers_right(logits, labels, line_end)
            flat = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            nats += F.cross_entropy(*flat, reduction="sum").item()
            tokens += int((labels[:, 1:] >= 0).sum())
    reached = max(map(len, rows))
    shares = by_position(rows, [k for k in SHOTS if k < reached])
    return {f"word_model/accuracy_{k}": share for k, share in shares.items()} | {"word_model/eval_loss": nats / tokens}
