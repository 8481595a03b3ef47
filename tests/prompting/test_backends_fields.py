"""Models are opened from folders as people have them; what is none is refused in one line before any work."""

import pytest
import torch

from pipelines.config import StageConfig, config, validate
from pipelines.corpus import unigram
from pipelines.errors import UserError
from pipelines.prompting.backends import Sampling
from pipelines.prompting.backends_fields import BackendFields, open_backend
from pipelines.prompting.backends_local import LocalBackend, load_local
from tests.prompting.tiny_causal import TEXTS, save, tiny_causal, tiny_t5, tiny_tokenizer


@config
class Fields(BackendFields, StageConfig):
    """As a stage has them."""


def test_causal_encoder_decoder_and_adapter_are_opened_by_folder(tiny_folder, tmp_path):
    from peft import PromptTuningConfig, TaskType, get_peft_model

    unigrams = unigram.train(TEXTS * 30, 330, lowercase=False)
    t5 = save(tmp_path / "t5", tiny_t5(len(unigrams)), unigrams)
    base, tokenizer = load_local(str(tiny_folder), "models.x")
    torch.manual_seed(1)
    soft = get_peft_model(base, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).eval()
    soft.save_pretrained(tmp_path / "soft")
    fields = validate(Fields, {"models": {"small": str(tiny_folder), "t5": str(t5), "soft": str(tmp_path / "soft")}})
    answers = {
        name: open_backend(fields, name).generate(["cat ->"], Sampling(max_new_tokens=6))[0][0].text
        for name in fields.names
    }
    assert len(set(answers.values())) == 3
    expected = LocalBackend(soft, tokenizer).generate(["cat ->"], Sampling(max_new_tokens=6))[0][0]
    assert answers["soft"] == expected.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: None, None),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "config.json").unlink(), "holds no model"),
        (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "holds no tokenizer"),
        (lambda f: (f / "config.json").write_text('{"model_type": "encoder_decoder_reward"}'), "is a reward model"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter without adapter_model.safetensors"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(tmp_path, change, message):
    tokenizer = tiny_tokenizer()
    folder = save(tmp_path / "model", tiny_causal("gpt2", len(tokenizer)), tokenizer)
    change(folder)
    if message is None:
        assert validate(Fields, {"models": {"a": str(folder)}}).names == ["a"]
        return
    with pytest.raises(UserError, match=f"^models.a={folder}: {message}"):
        validate(Fields, {"models": {"a": str(folder)}})


def test_weights_of_another_kind_of_model_are_one_line(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaModel

    tokenizer = tiny_tokenizer()
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    plain = LlamaModel(LlamaConfig(**size, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    headless = save(tmp_path / "a", plain, tokenizer)
    # an untied head cannot come from nowhere
    with pytest.raises(UserError, match=r"models\.x=.*not those of a language model \(lm_head\.weight is missing\)"):
        load_local(str(headless), "models.x")
    config_ = GPT2Config(**size, n_embd=32, n_layer=1, n_head=2)
    tied = save(tmp_path / "b", GPT2ForSequenceClassification(config_), tokenizer)
    assert load_local(str(tied), "models.x")[0].can_generate()  # a tied head is the embedding


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "models={}: there is no model to ask"),
        ({"models": {"A-b": "gpt2"}}, "models.A-b=A-b: cannot be part of a metric's name"),
        ({"models": {"a": "./nothing"}}, r"models.a=./nothing: no such file or folder"),
        ({"models": {"a": "gpt2"}, "chat_models": ["b"]}, r"chat_models=b: no such model; give names of models= \(a\)"),
        ({"models": {"a": "gpt2"}, "endpoints": {"a": {"url": "http://h/v1", "model": "m"}}}, "is a name in models="),
        ({"endpoints": {"a": {"url": "http://h/v1"}}}, "endpoints.a.model=: a value is needed"),
        ({"endpoints": {"a": {"url": "h", "model": "m"}}}, "endpoints.a.url=h: not an address"),
        (
            {"endpoints": {"a": {"url": "http://h/v1", "model": "m", "api_key": "sk-1"}}},
            r"a.api_key=\(not shown\)",
        ),
    ],
)
def test_wrong_fields_are_one_line_each(values, message):
    with pytest.raises(UserError, match=message) as caught:
        validate(Fields, values)
    assert len(caught.value.problems) == 1, str(caught.value)
