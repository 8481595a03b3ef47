"""Soft prompts, LoRA and full fine-tuning: what is trained and what is frozen, the loss, what plain PEFT loads."""

import math

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from pipelines.config import validate
from pipelines.errors import UserError
from pipelines.prompting.backends_local import load_local
from pipelines.prompting.soft import SoftConfig, fit
from pipelines.prompting.soft_methods import with_method
from pipelines.prompting.tasks import load_task
from tests.prompting.tiny_causal import save, tiny_causal, tiny_t5, tiny_tokenizer

METHODS = ["prompt_tuning", "prefix_tuning", "p_tuning", "lora", "full"]
FAMILIES = ["gpt2", "llama", "t5"]
LLAMA_SLOWLY = ["gpt2", "t5", pytest.param("llama", marks=pytest.mark.slow)]
SOME_SLOWLY = [m if m == "prefix_tuning" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS[:4]]
WIDTH, LAYERS = 32, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved random model of each family, without dropout."""
    tokenizer = tiny_tokenizer()
    made = {}
    for family in FAMILIES:
        model = tiny_t5(len(tokenizer)) if family == "t5" else tiny_causal(family, len(tokenizer))
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate"):
            if hasattr(model.config, name):
                setattr(model.config, name, 0.0)
        made[family] = save(tmp_path_factory.mktemp("models") / family, model, tokenizer)
    return made


def settings(folders, nouns_file, tmp_path, family: str, method: str, **more) -> SoftConfig:
    values = {"model": str(folders[family]), "dataset": str(nouns_file), "output_dir": str(tmp_path), "method": method}
    values |= {"batch_size": 4, "max_steps": 3, "logging_steps": 1, "save_steps": 100, "precision": "fp32"}
    values |= {"virtual_tokens": 3, "learning_rate": 1e-2, "report_to": "none", "warmup_ratio": 0.0}
    return validate(SoftConfig, values | more)


def fitted(config: SoftConfig):
    train = load_task(config).train
    return fit(config, train, len(train), config.seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", LLAMA_SLOWLY)
def test_the_backbone_is_frozen_to_the_last_bit_and_the_loss_is_that_of_the_answers(
    folders, nouns_file, tmp_path, family, method
):
    done = fitted(settings(folders, nouns_file, tmp_path, family, method))
    before = dict(load_local(str(folders[family]), "model")[0].named_parameters())
    after = done.model.get_base_model() if method != "full" else done.model
    after = {name.replace(".base_layer", ""): value for name, value in after.named_parameters() if "lora_" not in name}
    assert after.keys() == before.keys()
    same = {name: torch.equal(before[name], after[name]) for name in before}
    assert all(same.values()) == (method != "full")
    assert not any(same.values()) or method != "full"
    _check_loss(done)


def _check_loss(done):
    """The trainer's loss on a padded batch against each row alone, its answer's tokens picked by hand."""
    trainer, model = done.trainer, done.model
    rows = [trainer.train_dataset[i] for i in range(4)]
    assert len({len(row["input_ids"]) for row in rows}) > 1 or len({len(row["labels"]) for row in rows}) > 1
    batch = trainer.data_collator([dict(row) for row in rows])
    labels = batch.pop("labels")
    with torch.no_grad():
        padded = trainer._mean_loss(model(**batch), labels).item()
    nats, tokens = 0.0, 0
    for row in rows:
        source, answer = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = torch.full_like(answer[:, :1], model.config.decoder_start_token_id)
                inputs = torch.cat([start, answer[:, :-1]], 1)
                logits = model(input_ids=source, attention_mask=source * 0 + 1, decoder_input_ids=inputs).logits[0]
            else:
                whole = torch.cat([source, answer], 1)
                logits = model(input_ids=whole, attention_mask=whole * 0 + 1).logits[0, -len(answer[0]) - 1 : -1]
        log_probs = logits.double().log_softmax(-1)
        nats -= log_probs[torch.arange(len(answer[0])), answer[0]].sum().item()
        tokens += len(answer[0])
    assert padded == pytest.approx(nats / tokens, abs=2e-5)


def test_labels_are_the_answer_and_its_end(folders, nouns_file, tmp_path):
    done = fitted(settings(folders, nouns_file, tmp_path, "gpt2", "lora"))
    row, tokenizer = done.trainer.train_dataset[0], done.tokenizer
    word = tokenizer.decode(row["input_ids"]).removesuffix(" ->")
    target = {e.input: e.answer for e in load_task(settings(folders, nouns_file, tmp_path, "gpt2", "lora")).train}
    assert tokenizer.decode(row["labels"]) == f" {target[word]}\n"
    batch = done.trainer.data_collator([row])
    kept = batch["labels"][0] != -100
    assert batch["input_ids"][0][kept].tolist() == row["labels"]
    assert kept.sum() == len(row["labels"]) < len(batch["input_ids"][0])


def test_of_a_choice_only_its_token_is_learnt(folders, questions_file, tmp_path):
    more = {"task": "multiple_choice", "method": "prompt_tuning", "dataset": str(questions_file)}
    config = settings(folders, questions_file, tmp_path, "gpt2", **more)
    done = fitted(config)
    row = done.trainer.train_dataset[0]
    assert done.tokenizer.decode(row["labels"]) in {f" {label}" for label in "ABCDE"}
    assert done.tokenizer.decode(row["input_ids"]).endswith("Answer:")


def count(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_parameters_are_trained_as_the_papers_say(folders, nouns_file, tmp_path, family):
    def trained(method, **more):
        model, tokenizer = load_local(str(folders[family]), "model")
        config = settings(folders, nouns_file, tmp_path, family, method, **more)
        return count(with_method(model, config, tokenizer, seed=0))

    assert trained("prompt_tuning") == 3 * WIDTH
    assert trained("p_tuning") == 3 * WIDTH + 3 * (WIDTH * WIDTH + WIDTH)
    # two heads of eight hold Llama's keys and values, which four share
    keys = 16 if family == "llama" else WIDTH
    assert trained("prefix_tuning") == 3 * 2 * LAYERS * keys
    assert trained("full") == sum(p.numel() for p in load_local(str(folders[family]), "model")[0].parameters())
    if family == "t5":
        linear = 4 * (WIDTH + WIDTH) * 3 * LAYERS + 2 * (WIDTH + 64) * 2 * LAYERS
        assert trained("lora", lora_r=2) == 2 * linear


def test_prompts_begin_as_they_are_told(folders, nouns_file, tmp_path):
    def vectors(seed=0, **more):
        model, tokenizer = load_local(str(folders["gpt2"]), "model")
        rows = model.get_input_embeddings().weight
        config = settings(folders, nouns_file, tmp_path, "gpt2", "prompt_tuning", **more)
        made = with_method(model, config, tokenizer, seed=seed)
        return made.get_prompt(1)[0], rows, tokenizer

    drawn, rows, _ = vectors(virtual_tokens=5)
    assert all((row == rows).all(1).any() for row in drawn)
    assert not torch.equal(drawn, vectors(seed=1, virtual_tokens=5)[0])
    assert torch.equal(drawn, vectors(virtual_tokens=5)[0])
    noise, rows, _ = vectors(init="random", virtual_tokens=5)
    assert not any((row == rows).all(1).any() for row in noise)
    text = "cat -> cats\n"
    for tokens in (None, 2, 40):
        found, rows, tokenizer = vectors(init="text", init_text=text, virtual_tokens=tokens)
        ids = tokenizer(text)["input_ids"]
        wanted = (ids * 40)[: tokens or len(ids)]
        assert torch.equal(found, rows[wanted])


def test_a_prompt_may_begin_as_solved_training_examples(folders, nouns_file, tmp_path):
    more = {"init": "text", "init_shots": 2, "virtual_tokens": None, "learning_rate": 1e-30}
    config = settings(folders, nouns_file, tmp_path, "gpt2", "prompt_tuning", **more)
    task, done = load_task(config), fitted(config)
    rows, vectors = done.model.get_base_model().get_input_embeddings().weight, done.model.get_prompt(1)[0]
    ids = [int((vector == rows).all(1).nonzero()[0]) for vector in vectors]
    lines = done.tokenizer.decode(ids).splitlines()
    known = {f"{e.input} -> {e.answer}" for e in task.train}
    assert len(lines) == 2
    assert set(lines) <= known
    assert not set(lines) & {f"{e.input} -> {e.answer}" for e in (*task.test, *task.validation)}


@pytest.mark.parametrize("method", METHODS[:4])
def test_what_is_saved_loads_with_plain_peft(folders, nouns_file, tmp_path, method):
    more = {"init": "text", "init_text": "cats and dogs"} if method == "prompt_tuning" else {}
    done = fitted(settings(folders, nouns_file, tmp_path, "llama", method, **more))
    done.model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = done.model(input_ids=ids, attention_mask=ids * 0 + 1).logits
        base, _ = load_local(str(folders["llama"]), "model")
        for loaded in (
            PeftModel.from_pretrained(base, str(tmp_path / "adapter")),
            AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ):
            assert torch.equal(loaded.eval()(input_ids=ids, attention_mask=ids * 0 + 1).logits, wanted)


def test_a_flan_t5s_narrow_heads_take_a_prefix(nouns_file, tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_t5(len(tokenizer))
    config = model.config
    config.num_heads, config.d_kv = 3, 8  # 24 wide in all, the states are 32
    folder = save(tmp_path / "model", type(model)(config), tokenizer)
    done = fitted(settings({"t5": folder}, nouns_file, tmp_path / "run", "t5", "prefix_tuning"))
    assert count(done.model) == 3 * 2 * LAYERS * 24
    assert math.isfinite(done.trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"method": "lora", "init": "random"}, "init=random: lora has no such choice"),
        ({"init": "text"}, "init_text=None: init=text needs a text"),
        ({"init": "text", "init_text": "a", "init_shots": 2}, "init_text=a: both are given"),
        ({"init_text": "a"}, "init_text=a: init=vocabulary has no use for it"),
        ({"prefix_projection": True}, "prefix_projection=True: prompt_tuning has no such choice"),
        ({"strategy": {"like": "few_shot"}}, "strategy.shots=5: a soft prompt is trained without solved examples"),
        ({"strategy": {"query": "{noun}"}}, "strategy.query={noun}: unknown placeholder {noun}"),
        ({"strategy": {"like": "few_shots"}}, "strategy.like=few_shots: no such strategy; did you mean 'few_shot'?"),
        ({"train_sizes": [8, 2]}, "train_sizes.1=2: one step takes 4 examples; give 4 or more"),
        ({"train_sizes": [8, 8]}, "train_sizes=[8, 8]: names a size twice"),
        ({"model": "/nowhere"}, "model=/nowhere: no such file or folder"),
        ({"push_to_hub": True, "repo_id": "a/b"}, "push_to_hub=True: the adapter would name a folder of this machine"),
    ],
)
def test_a_wrong_field_is_one_line_before_anything_runs(folders, nouns_file, tmp_path, given, line):
    method = given.pop("method", "prompt_tuning")
    with pytest.raises(UserError) as error:
        settings(folders, nouns_file, tmp_path, "gpt2", method, **given)
    assert str(error.value).startswith(line)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"virtual_tokens": 128}, "virtual_tokens=128: GPT2LMHeadModel has 128 positions in all"),
        ({"virtual_tokens": 126}, "prompt=.*: with its longest choice it takes"),
        ({"batch_size": 99}, "dataset=16 training examples: one step takes 99 examples"),
    ],
)
def test_what_only_the_model_or_data_tell_is_one_line_too(folders, nouns_file, tmp_path, given, line):
    with pytest.raises(UserError, match=line):
        fitted(settings(folders, nouns_file, tmp_path, "gpt2", "prompt_tuning", **given))


@pytest.mark.parametrize("method", SOME_SLOWLY)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_reads_what_was_learnt_as_training_does(folders, nouns_file, tmp_path, family, method):
    done = fitted(settings(folders, nouns_file, tmp_path, family, method, learning_rate=0.1))
    ids = torch.tensor([done.trainer.train_dataset[0]["input_ids"]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        made = done.model.generate(**given, **more, eos_token_id=None)
        if family == "t5":
            again = done.model(**given, decoder_input_ids=made.sequences[:, :-1]).logits[0]
        else:
            whole = made.sequences[:, :-1]
            again = done.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, -4:]
    assert torch.stack(made.logits)[:, 0] == pytest.approx(again, abs=1e-4)
