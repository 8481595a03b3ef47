"""``tests/chain/forkserver.py`` with the imports that the prompting stages need."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chain.forkserver import serve


def main() -> None:
    import accelerate.commands.launch
    import datasets
    import inflect
    import openai
    import torch.distributed.run
    import transformers
    from openai import AsyncOpenAI
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

    import pipelines.prompting.backends_local
    import pipelines.prompting.hard_measures

    _heavy = (accelerate, datasets, inflect, openai, torch, transformers, AsyncOpenAI, PeftModel, pipelines)
    _heavy += (AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast)
    serve()


if __name__ == "__main__":
    main()
