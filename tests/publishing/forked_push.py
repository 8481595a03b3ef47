"""``tests/chain/forkserver.py`` with the imports of a small stage, whose children find the Hub that ``env`` names.

huggingface_hub reads its variables when it is imported, which the children have behind them.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chain import forkserver

_plain = forkserver.run


def run(request: dict) -> None:
    """As ``forkserver.run``, the client's settings made anew."""
    from huggingface_hub import constants

    variables = request.get("env") or {}
    constants.ENDPOINT = variables.get("HF_ENDPOINT", constants.ENDPOINT)
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    constants.HF_TOKEN_PATH = os.devnull
    _plain(request)


def main() -> None:
    import accelerate.commands.launch
    import accelerate.utils
    import datasets
    import huggingface_hub.hf_api
    import torch.distributed.run
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    _heavy = (accelerate, datasets, huggingface_hub, torch, AutoTokenizer, PreTrainedTokenizerFast)
    forkserver.run = run
    forkserver.serve()


if __name__ == "__main__":
    main()
