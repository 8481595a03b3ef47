"""The in-context word tasks: verbs found in text, answers, and that held-out nouns stand nowhere."""

import inspect

import pytest

from pipelines.prompting.strategies import load_strategies, render
from pipelines.prompting.tasks import Example
from pipelines.prompting.words import LINE, Vocabulary, inflected, read_vocabulary, word_tasks

TEXT = """We stop here; it stopped; stopping. They copy and copied, copying. Compute computed computing compute.
They visit, visited, visiting. The comput of it. compute compute. x_visit camelCase Visit"""


def test_verbs_are_those_whose_forms_stand_in_the_text():
    found = read_vocabulary([TEXT, TEXT])
    assert found.past == {"compute": "computed", "copy": "copied", "stop": "stopped", "visit": "visited"}
    assert found.participle == {"compute": "computing", "copy": "copying", "stop": "stopping", "visit": "visiting"}


def test_words_are_whole_lower_case_and_frequent_enough():
    assert "visit" in read_vocabulary([TEXT], at_least=1).words
    assert not {"camel", "ase", "case", "Visit", "it", "computing"} & set(read_vocabulary([TEXT], longest=8).words)
    assert "here" not in read_vocabulary([TEXT]).words  # once
    assert read_vocabulary(["b a", "c c c"], at_least=1).words == ()  # three letters at least


@pytest.mark.parametrize(
    ("verb", "suffix", "seen", "form"),
    [
        ("bake", "ed", {"baked": 1, "bakeed": 5}, "baked"),
        ("bake", "ing", {"baking": 1, "bakeing": 5}, "baking"),
        ("try", "ed", {"tried": 1, "tryed": 3}, "tried"),
        ("play", "ed", {"played": 1}, "played"),
        ("stop", "ed", {"stopped": 3, "stoped": 1}, "stopped"),
        ("open", "ed", {"opened": 3, "openned": 1}, "opened"),
        ("go", "ed", {"went": 9}, None),
    ],
)
def test_the_form_that_the_text_uses_most(verb, suffix, seen, form):
    assert inflected(verb, suffix, seen) == form


def test_tasks_do_what_they_are_called_and_hide_what_is_held_out():
    words = Vocabulary(
        ("apple", "boxes", "city", "hour", "mapped", "walk", "walked"), {"walk": "walked", "map": "mapped"},
        {"walk": "walking", "map": "mapping"},
    )  # fmt: skip
    held_out = {"box": "boxes", "map": "maps", "walked": "walkeds", "paw": "elppa", "hour glass": "hours"}
    tasks = word_tasks(words, {"city": "cities"}, held_out)
    seen = {word for pairs in tasks.values() for word in pairs}
    assert seen == {"apple", "city", "hour", "mapped", "walk"}
    assert not {"box", "boxes", "map", "maps", "walked"} & (seen | set(tasks["past"].values()))
    for name, word, answer in (
        ("plural", "city", "cities"), ("article", "apple", "an apple"), ("article", "hour", "an hour"),
        ("add_s", "city", "citys"), ("copy", "city", "city"), ("reverse", "city", "ytic"), ("upper", "city", "CITY"),
        ("capitalize", "city", "City"), ("first_letter", "city", "c"), ("last_letter", "city", "y"),
    ):  # fmt: skip
        assert tasks[name][word] == answer
    assert "apple" not in tasks["reverse"]  # it would write a held-out plural
    assert "hour" not in tasks["add_s"]
    assert tasks["past"] == tasks["participle"] == {}  # map is held out, and so is the form walked


def test_a_line_is_written_as_the_strategies_write_it():
    strategy = load_strategies({"few_shot": {"shots": 1}}, "words")["few_shot"]
    prompt = render(strategy, Example("1", "box", "boxes"), [Example("2", "city", "cities")])
    asked, answer = LINE.split("{word}")[1].split(" {answer}")
    assert prompt.text == LINE.format(word="city", answer="cities") + "box" + asked
    assert prompt.answer == " boxes"
    assert answer == strategy.stop


def test_it_needs_no_model():
    import pipelines.prompting.words as module

    assert "torch" not in inspect.getsource(module)
