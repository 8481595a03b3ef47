"""genalign: alignment of encoder-decoder language models on today's Hugging Face stack."""

import os

__version__ = "0.1.0"

# Nothing is reported to anyone: TRL sends usage data by default through huggingface_hub, which honours this switch.
# It must be set before huggingface_hub is imported, hence here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
