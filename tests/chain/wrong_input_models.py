"""Wrong models, and users' own functions that fail."""

import json
import shutil

from tests.chain.wrong_input import At, Wrong, kind

NUMBERS = "return (documents, summaries, references) -> one finite number for each summary"


def sft(at: At, *words: str) -> list[str]:
    return at.recipe("sft", f"dataset={at.run}/corpus", "max_steps=2", "batch_size=8", *words)


def ppo(at: At, *words: str) -> list[str]:
    sizes = ["rollouts=2", "sources_per_rollout=8", "samples_per_source=2", "mini_batch_size=8", "precision=fp32"]
    lengths = ["max_source_length=40", "max_target_length=12"]
    return at.recipe("ppo", f"dataset={at.run}/corpus", f"model={at.run}/sft", *sizes, *lengths, *words)


def preferences(at: At, *words: str) -> list[str]:
    lengths = ["max_source_length=40", "max_target_length=12", "precision=fp32"]
    return at.recipe("preferences", f"dataset={at.run}/corpus", f"model={at.run}/sft", *lengths, *words)


@kind
def model_folder_missing(at: At) -> Wrong:
    says = f"model={at.folder}/none: no such file or folder; mend the path"
    return Wrong(sft(at, f"model={at.folder}/none"), [says])


@kind
def model_is_a_file(at: At) -> Wrong:
    file = at.write("model.safetensors", b"x")
    return Wrong(sft(at, f"model={file}"), [f"model={file}: is a file; give a folder made by save_pretrained, or …"])


@kind
def no_such_hub_model(at: At) -> Wrong:
    says = "model=owner/none: no such folder, and the hub gave no … of that name (…); give an existing folder, or …"
    return Wrong(sft(at, "model=owner/none"), [says])


@kind
def model_folder_without_a_model(at: At) -> Wrong:
    folder = at.run / "tokenizer"
    says = f"sft.model={folder}: holds no model (no config.json); give a folder made by save_pretrained, or a hub id"
    return Wrong(at.chain(f"sft.model={folder}"), [says])


@kind
def model_folder_without_weights(at: At) -> Wrong:
    folder = at.model(without="*.safetensors")
    says = f"dpo.model={folder}: holds no weights (no model.safetensors); give a folder made by …"
    return Wrong(at.chain(f"dpo.model={folder}"), [says])


@kind
def model_folder_without_tokenizer(at: At) -> Wrong:
    folder = at.model(without="tokenizer*")
    says = f"model={folder}: holds no tokenizer; give a folder with a tokenizer, or a hub id"
    return Wrong(sft(at, f"model={folder}"), [says])


@kind
def pickled_model(at: At) -> Wrong:
    import torch
    from safetensors.torch import load_file

    folder = at.model(without="*.safetensors")
    torch.save(load_file(at.run / "sft" / "model.safetensors"), folder / "pytorch_model.bin")
    says = f"model={folder}: holds its weights as a pickle only (pytorch_model.bin), which is never loaded…; convert …"
    return Wrong(sft(at, f"model={folder}"), [says])


@kind
def torn_weights(at: At) -> Wrong:
    folder = at.model()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    says = f"model={folder}: the model cannot be loaded (…); give a folder made by save_pretrained"
    return Wrong(sft(at, f"model={folder}"), [says])


@kind
def decoder_only_model(at: At) -> Wrong:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = at.folder / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(at.run / "sft").save_pretrained(folder)
    says = f"model={folder}: gpt2 is not an encoder-decoder model; give one such as T5, …"
    return Wrong(sft(at, f"model={folder}"), [says])


@kind
def decoder_only_model_in_a_chain(at: At) -> Wrong:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = at.folder / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    says = f"evaluate.systems.mine={folder}: gpt2 is not an encoder-decoder model; give one such as T5, …"
    return Wrong(at.chain(f"evaluate.systems.mine={folder}"), [says])


@kind
def tokenizer_larger_than_the_model(at: At) -> Wrong:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(at.run / "sft")
    tokenizer.add_tokens([f"word{i}" for i in range(400)])
    tokenizer.save_pretrained(at.folder / "tokenizer")
    says = f"tokenizer={at.folder}/tokenizer: it has … tokens, the model's embedding …; give the model's own …"
    return Wrong(sft(at, f"model={at.run}/sft", f"tokenizer={at.folder}/tokenizer"), [says])


@kind
def reward_model_with_another_tokenizer(at: At) -> Wrong:
    from transformers import AutoTokenizer

    folder = at.model(stage="reward")
    tokenizer = AutoTokenizer.from_pretrained(at.run / "reward")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    says = f"reward={folder}: its tokenizer differs from that of model (…); train it from the same model as model"
    return Wrong(ppo(at, f"reward={folder}"), [says])


@kind
def reward_model_as_a_policy(at: At) -> Wrong:
    folder = at.run / "reward"
    says = f"evaluate.systems.mine={folder}: is a reward model, which writes nothing; give the folder of a summarizer"
    return Wrong(at.chain(f"evaluate.systems.mine={folder}"), [says])


@kind
def reward_misspelt(at: At) -> Wrong:
    says = "ppo.reward=rogue: no such folder or reward function; give a reward model's folder or owner/name, rouge, …"
    return Wrong(at.chain("ppo.reward=rogue"), [says])


@kind
def reward_that_is_no_reward_model(at: At) -> Wrong:
    folder = at.run / "sft"
    says = f"reward={folder}: is not a reward model (its model_type is 't5'); give the folder of a reward stage"
    return Wrong(ppo(at, f"reward={folder}"), [says])


@kind
def reward_model_that_gives_nan(at: At) -> Wrong:
    from safetensors.torch import load_file, save_file

    folder = at.model(stage="reward")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor * float("nan") for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    says = f"reward={folder}: score 0 is nan; return finite numbers only"
    return Wrong(ppo(at, f"reward={folder}"), [says])


@kind
def reward_function_that_gives_nan(at: At) -> Wrong:
    name = at.judge("return [1.0] * (len(summaries) - 1) + [float('nan')]")
    return Wrong(ppo(at, f"reward={name}"), [f"reward={name}: score 15 is nan; return finite numbers only"])


@kind
def reward_function_that_raises(at: At) -> Wrong:
    name = at.judge("return [summary.upper.nothing for summary in summaries]")
    says = f"reward={name}: it raised AttributeError: …has no attribute 'nothing'; mend that function"
    return Wrong(ppo(at, f"reward={name}"), [says])


@kind
def reward_function_of_the_wrong_length(at: At) -> Wrong:
    name = at.judge("return [0.5]")
    return Wrong(ppo(at, f"reward={name}"), [f"reward={name}: it returned 1 scores for 16 summaries; {NUMBERS}"])


@kind
def reward_function_that_gives_texts(at: At) -> Wrong:
    name = at.judge("return summaries")
    return Wrong(ppo(at, f"reward={name}"), [f"reward={name}: score 0 is …, not a number; {NUMBERS}"])


@kind
def reward_module_missing(at: At) -> Wrong:
    says = "ppo.reward=nowhere:score: no module named 'nowhere' can be imported; start in the folder that holds it, …"
    return Wrong(at.chain("ppo.reward=nowhere:score"), [says])


@kind
def reward_function_missing(at: At) -> Wrong:
    at.judge("return [0.0] * len(summaries)")
    says = "ppo.reward=judge:scores: module judge has no 'scores'; mend the name after the colon"
    return Wrong(at.chain("ppo.reward=judge:scores"), [says])


@kind
def annotator_missing_everywhere(at: At) -> Wrong:
    shutil.copytree(at.run, at.out)
    mend = "no module named 'nowhere' can be imported; start in the folder that holds it, or install it"
    stages = ("preferences", "evaluate")
    return Wrong(at.chain("annotator=nowhere:judge"), [f"{stage}.annotator=nowhere:judge: {mend}" for stage in stages])


@kind
def annotator_module_that_cannot_be_imported(at: At) -> Wrong:
    at.write("judge.py", "import math\nmath.nothing\n")
    says = "evaluate.annotator=judge:score: importing judge raised AttributeError: …; mend that module"
    return Wrong(at.chain("evaluate.annotator=judge:score"), [says])


@kind
def annotator_that_raises(at: At) -> Wrong:
    name = at.judge("raise ValueError('no judgement today')")
    says = f"annotator={name}: it raised ValueError: no judgement today; mend that function"
    return Wrong(preferences(at, f"annotator={name}"), [says])


@kind
def annotator_of_the_wrong_length(at: At) -> Wrong:
    name = at.judge("return [0.5] * (len(summaries) + 1)")
    says = f"annotator={name}: it returned 97 scores for 96 summaries; {NUMBERS}"
    return Wrong(preferences(at, f"annotator={name}", "shard_size=24"), [says])


@kind
def annotator_that_exits(at: At) -> Wrong:
    name = at.judge("raise SystemExit(0)")
    return Wrong(
        preferences(at, f"annotator={name}"), [f"annotator={name}: it raised SystemExit: 0; mend that function"]
    )


@kind
def annotator_that_ranks_nothing(at: At) -> Wrong:
    name = at.judge("return [0.5] * len(summaries)")
    says = "samples=4: of … train documents none has two samples of different score; raise samples or temperature, or …"
    return Wrong(preferences(at, f"annotator={name}", "max_train=12", "max_validation=4", "max_test=4"), [says])


@kind
def length_beyond_the_models(at: At) -> Wrong:
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    tokenizer = AutoTokenizer.from_pretrained(at.run / "sft")
    folder = at.folder / "bart"
    BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    says = "max_source_length=100: BartForConditionalGeneration reads at most 64 tokens; give max_source_length=64 …"
    return Wrong(sft(at, f"model={folder}", "max_source_length=100"), [says])


@kind
def config_of_a_model_that_is_not_json(at: At) -> Wrong:
    folder = at.model()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"})[:-4])
    says = f"sft.model={folder}: its config.json is not valid JSON (…); give a folder made by save_pretrained, …"
    return Wrong(at.chain(f"sft.model={folder}"), [says])


DIVERGED = "learning_rate=1e+30: the loss became nan by step …; lower it"
TOO_FAST = ["learning_rate=1e30", "warmup_ratio=0", "max_grad_norm=0", "precision=fp32", "logging_steps=2"]


@kind
def learning_rate_at_which_fine_tuning_diverges(at: At) -> Wrong:
    return Wrong(sft(at, f"model={at.run}/sft", "max_steps=6", *TOO_FAST), [DIVERGED])


@kind
def learning_rate_at_which_the_reward_model_diverges(at: At) -> Wrong:
    words = [f"model={at.run}/sft", f"preferences={at.run}/preferences", "batch_size=8"]
    return Wrong(at.recipe("reward", *words, *TOO_FAST), [DIVERGED])


@kind
def learning_rate_at_which_dpo_diverges(at: At) -> Wrong:
    words = [f"model={at.run}/sft", f"preferences={at.run}/preferences", "batch_size=8"]
    return Wrong(at.recipe("dpo", *words, *TOO_FAST), [DIVERGED])
