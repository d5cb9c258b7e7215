"""The card of an exported model is the suite's own text, whatever the record holds."""

import re

import pytest
import yaml

from bench.reporting.model_card import Contents, model_card
from tests.records.test_store import make

EVIL = "owner/name\nlicense: mit\n---\n# Title `` [a](b)"


def card_of(source):
    record = make(ratio=0.5)
    return model_card(
        record.model_copy(
            update={
                "model": record.model.model_copy(update={"source": source}),
                "command": EVIL,
                "environment": {"versions": {"torch": EVIL}},
            }
        ),
        Contents("slimbench", 1000),
        [],
        stock=True,
    )


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_only_the_name_of_a_model_on_the_hub_is_a_base_model():
    assert front_matter(card_of("owner/name-1.5B"))["base_model"] == "owner/name-1.5B"
    for source in (EVIL, "/home/me/model", "./a/b", "local", "owner/name: x"):
        assert front_matter(card_of(source)).keys() == {"library_name", "tags"}


@pytest.mark.parametrize(("source", "architecture", "loads"), [
    ("module", "mine.nets.Net", "model=module model._target_=mine.nets.Net"),
    ("module", "mine.nets.Net; rm", "model=local model.kind=image_classifier"),
    ("embedded:micro_resnet", "micro_resnet", "model=local model.kind=image_classifier"),
])  # fmt: skip
def test_a_classifier_says_how_its_class_is_loaded(source, architecture, loads):
    record = make(ratio=0.5)
    model = record.model.model_copy(update={"source": source, "architecture": architecture})
    record = record.model_copy(update={"model": model})
    card = model_card(record, Contents("classifier", 1000), [], stock=False)
    assert loads in card
    assert front_matter(card)["library_name"] == "slimbench"


def test_text_of_the_record_is_code_in_one_line():
    card = card_of(EVIL)
    line = " ".join(EVIL.split())
    assert card.count(f"``` {line} ```") == 2
    assert f"``` torch {line} ```" in card
    assert not re.search("^(license|# Title)", card, re.MULTILINE)
