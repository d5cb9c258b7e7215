"""Records in a notebook: every text is shown and none is markup."""

from html.parser import HTMLParser

from bench.records.display import record_html, runs_html
from bench.runner.launch import Runs
from tests.records.test_store import make

HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J"


ALLOWED = {"table", "thead", "tbody", "tr", "th", "td", "p", "b", "br", "code"}


class Tags(HTMLParser):
    """The names of all tags."""

    def __init__(self, text):
        super().__init__()
        self.names = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)


def hostile():
    record = make(ratio=0.2)
    model = record.model.model_copy(update={"name": HOSTILE})
    metric = record.metrics[0].model_copy(update={"task": HOSTILE})
    return record.model_copy(update={"model": model, "metrics": (metric,), "command": HOSTILE})


def test_nothing_of_a_record_becomes_markup():
    for text in (record_html(hostile()), runs_html([hostile()])):
        assert Tags(text).names <= ALLOWED
        assert "\x1b" not in text
        assert "&lt;img" in text


def test_runs_stand_side_by_side_with_what_any_of_them_has():
    records = [make("a" * 12), make("b" * 12, ratio=0.4, value=0.25)]
    text = Runs(records)._repr_html_()
    assert text.count("<tr>") == 3
    for said in ("dense", "camera_p 0.4", "0.5 ± 0.1", "0.25 ± 0.1", "model parameters"):
        assert said in text
    assert text.count("<td>7</td>") == 2
    assert runs_html([]).count("<tr>") == 1


def test_a_record_is_one_line_at_the_prompt():
    record = make(ratio=0.4)
    assert repr(record) == str(record)
    assert repr([record]) == "[<Record aaaaaaaaaaaa: m camera_p 0.4; arc_easy acc 0.5 ± 0.1>]"
    assert "\x1b" not in repr(hostile())


def test_a_run_shows_its_methods_metrics_and_costs():
    text = make(ratio=0.4)._repr_html_()
    for said in ("camera_p 0.4", "zeroed", "arc_easy", "counted", "bench run"):
        assert said in text
