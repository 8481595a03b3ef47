"""Held-out means: each example once, whatever the batches and however many processes share them."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from pipelines.seq2seq.held_out import HeldOutMeans, SharedBatches


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_processes_share_the_examples_and_have_equally_many_steps(examples, size, processes):
    shares = [SharedBatches(examples, size, processes, process) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    seen = []
    for step in range(len(shares[0])):
        batches = [share.batches[step] for share in shares]
        assert len({len(batch) for batch in batches}) == 1  # or tensors could not be gathered
        assert 0 < len(batches[0]) <= size
        together = {index for batch in batches for index in batch}
        assert len(together) == shares[0].counts[step]
        assert len(together) in (len(batches[0]), processes * len(batches[0]))  # all different, or all the same
        seen += sorted(together)
    assert seen == list(range(examples))
    # No more steps than are needed, but for what cannot be shared out.
    assert len(shares[0]) <= -(-examples // (size * processes)) + 1 + processes // size


def test_the_mean_is_that_of_the_examples(tmp_path):
    """As a Trainer does it in one process: 23 values in batches of 8, the last one short."""
    from transformers import Trainer

    values = [float(n * n) for n in range(23)]

    class Held(HeldOutMeans, Trainer):
        def held_out(self, model, inputs):
            return {"loss": inputs["value"].mean(), "largest": inputs["value"].max()}

    trainer = Held(
        torch.nn.Linear(1, 1),
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True),
        eval_dataset=Dataset.from_dict({"value": values}),
        data_collator=lambda rows: {"value": torch.tensor([row["value"] for row in rows])},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(values) / 23)
    assert metrics["eval_largest"] == pytest.approx((8 * 49 + 8 * 225 + 7 * 484) / 23)
