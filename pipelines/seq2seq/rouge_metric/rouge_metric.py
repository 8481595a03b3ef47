"""ROUGE as a local module of the ``evaluate`` library: ``evaluate.load(<this folder>)`` needs no network.

``evaluate.load("rouge")`` fetches its script from the hub; this one lies beside the code and adds a best-of-references
score for each example. The scores equal ``rouge_score``'s with its stemmer.
"""

import datasets
import evaluate

from pipelines.seq2seq.metrics import ROUGE_TYPES, one_sentence_a_line, rouge

_DESCRIPTION = "ROUGE-1, -2, -L and -Lsum F1 on 0-100, stemmed, against the best of each example's references."

_CITATION = """\
@inproceedings{lin-2004-rouge,
    title = "{ROUGE}: A Package for Automatic Evaluation of Summaries",
    author = "Lin, Chin-Yew",
    booktitle = "Text Summarization Branches Out",
    year = "2004",
    pages = "74--81",
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of texts.
    references: list of lists of texts.
    rouge_types: which of rouge1, rouge2, rougeL, rougeLsum (default: all).
    split_sentences: first put each sentence on its own line, as ROUGE-Lsum wants (default: texts as they are).
    use_aggregator: return means (default), or one value an example.
Returns:
    type -> mean, or type -> list of values; 0-100.
"""


class RougeMetric(evaluate.Metric):
    """ROUGE F1 against the best reference; see ``pipelines.seq2seq.metrics.rouge``."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://github.com/google-research/google-research/tree/master/rouge"],
        )

    def _compute(self, predictions, references, rouge_types=ROUGE_TYPES, split_sentences=False, use_aggregator=True):
        if split_sentences:
            predictions = [one_sentence_a_line(text) for text in predictions]
            references = [[one_sentence_a_line(text) for text in several] for several in references]
        scores = rouge(predictions, references, rouge_types)
        return {name: float(v.mean()) if use_aggregator else v.tolist() for name, v in scores.items()}
