"""Text: the embedded docstrings, own data, the tokenizer. Later stages read data through ``load_corpus``."""

from pipelines.corpus.fields import CorpusFields, PreferenceFields
from pipelines.corpus.local import load_corpus, load_preferences

__all__ = ["CorpusFields", "PreferenceFields", "load_corpus", "load_preferences"]
