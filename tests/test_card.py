"""A model card says what is known, says what is not stated, and names the weakest part."""

from dataclasses import replace

from pipeline.assessment import assess
from pipeline.card import card
from pipeline.evaluation import Answer, Evaluation
from pipeline.example import Example
from pipeline.recipe import Judge, PromotionRules
from pipeline.registry import Version

VERSION = Version("shop", "2", "bb" * 32, "base", "template", "run")


def answers(right: dict[str, int], wrong: dict[str, int], text: str = "") -> Evaluation:
    given = [(kind, ok) for kind in ("name", "use") for ok, counts in ((True, right), (False, wrong)) for _ in range(counts.get(kind, 0))]
    examples = [
        (Example(({"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}), (), kind, row=row), ok) for row, (kind, ok) in enumerate(given)
    ]
    return Evaluation(tuple(Answer(example, "a" if ok else text, "m", 0.5) for example, ok in examples))


def test_the_card() -> None:
    own, champion = answers({"name": 18, "use": 12}, {"use": 8, "name": 2}), answers({"name": 17, "use": 12}, {"use": 8, "name": 3})
    known = {
        "base_model": "tiny",
        "dataset_train_rows": "1440",
        "dataset_eval_rows": "40",
        "training.max_steps": "None",
        "training.epochs": "8",
        "licence": "CC0",
    }
    text = card(VERSION, known, assess("shop/2", own, ("shop/1", champion), {}, PromotionRules()))
    assert text.startswith("# shop/2\n") and "bb" * 32 in text
    assert "- training rows, held-out rows: 1440, 40" in text and "- epochs, or steps: 8\n" in text and "- git commit: not stated" in text
    assert "- score: 75.0%" in text and "- name: 90.0% of 20 rows" in text and "- use: 60.0% of 20 rows" in text
    assert "- against shop/1: 75.0% against 72.5%" in text
    assert "- weakest on use: 60.0%" in text and "- 25.0% of its answers are empty" in text and "- not surely better than shop/1" in text
    assert text.rstrip().endswith("## Licence\nCC0")


def test_refusals_are_a_limit() -> None:
    found = assess("shop/1", answers({"name": 30}, {"name": 10}, "I cannot say."), None, {}, PromotionRules())
    text = card(VERSION, {}, found)
    assert "- 25.0% of its answers refuse" in text and "are empty" not in text and text.rstrip().endswith("not stated")


def test_the_judge_is_named() -> None:
    own = Evaluation(tuple(replace(answer, grade=0.5) for answer in answers({"name": 30}, {"name": 10}).answers))
    text = card(VERSION, {}, assess("shop/1", own, None, {}, PromotionRules(judge=Judge(url="http://j/v1", model="the-judge"))))
    assert "- score: 75.0%\n- judge: 50.0%\n- graded by the-judge\n" in text
