"""Encoder-decoder core: the view, losses, supervised fine-tuning, reward model, DPO, PPO, generation and metrics."""
