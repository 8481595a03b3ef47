"""Text: the embedded docstrings, own data, the tokenizer. Later stages read data through ``load_corpus``."""

from pipelines.corpus.fields import CorpusFields, PreferenceFields, RankingFields
from pipelines.corpus.local import load_corpus, load_preferences, load_rankings

__all__ = ["CorpusFields", "PreferenceFields", "RankingFields", "load_corpus", "load_preferences", "load_rankings"]
