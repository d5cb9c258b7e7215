"""What was answered before a kill is not asked again; the rest is, as it would have been."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from bench.evaluation.batching import AdaptiveBatches
from bench.evaluation.response_cache import ResponseCache, request_key
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.records.journal import Journal
from bench.ui import SILENT


class Killed(Exception):
    pass


def kept(folder, name="answers"):
    return Journal(folder / name, "weights")


def killed_after(count):
    """Return a memory whose process dies once it has kept so many batches."""

    class Mortal(ResponseCache):
        def get_or_compute(self, keys, compute, progress):
            def until(missing):
                for number, batch in enumerate(compute(missing)):
                    if number == count:
                        raise Killed
                    yield batch

            return super().get_or_compute(keys, until, progress)

    return Mortal


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 7), st.integers(0, 9))
def test_every_request_is_scored_once_over_a_kill(tmp_path_factory, requests, size, kill):
    folder = tmp_path_factory.mktemp("memory")
    keys, scored = [request_key(request) for request in requests], []

    def score(missing):
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            scored.append([requests[place] for place in batch])
            yield [(place, requests[place] * 10) for place in batch]

    try:
        with kept(folder) as journal:
            killed_after(kill)(journal).get_or_compute(keys, score, SILENT)
    except Killed:
        in_flight = scored.pop()
        assert len(in_flight) <= size
    with kept(folder) as journal:
        assert ResponseCache(journal).get_or_compute(keys, score, SILENT) == [
            r * 10 for r in requests
        ]
    assert sorted(request for batch in scored for request in batch) == sorted(set(requests))


@pytest.mark.parametrize("kill", [0, 1, 3])
def test_the_batches_after_a_kill_are_those_there_would_have_been(tmp_path, kill):
    items = list("abcdefghij")
    keys = [request_key(item) for item in items]

    def worked(memory):
        seen = []

        def work(batch):
            seen.append("".join(batch))
            return [item.upper() for item in batch]

        batches = AdaptiveBatches(3, torch.device("cpu"), SILENT)
        try:
            memory.get_or_compute_batched(keys, items, [1] * len(items), batches, work, SILENT)
        except Killed:
            seen.pop()
        return seen

    whole = worked(ResponseCache())
    with kept(tmp_path) as journal:
        first = worked(killed_after(kill)(journal))
    with kept(tmp_path) as journal:
        assert first + worked(ResponseCache(journal)) == whole == ["abc", "def", "ghi", "j"]


def asked(kind, arguments):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


FREE = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
DRAWN = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.5}
TEXTS = ["The first", "A second one here", "", "Third", "The first", "And the last of them all"]
REQUESTS = {
    "loglikelihood": [(text, f" word{n % 2}") for n, text in enumerate(TEXTS)],
    "loglikelihood_rolling": [(text or "Empty",) for text in TEXTS],
    "generate_until": [(text or "Empty", FREE) for text in TEXTS],
    "sampled": [(text or "Empty", DRAWN) for text in TEXTS],
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_over_a_kill_a_model_gives_the_very_same_answers(model, tmp_path, kind):
    name = "generate_until" if kind == "sampled" else kind
    requests = asked(name, REQUESTS[kind])

    def answered(memory):
        return getattr(LmEvalAdapter(model, 2, SILENT, "padded", memory), name)(requests)

    whole = answered(ResponseCache())
    with kept(tmp_path) as journal, pytest.raises(Killed):
        answered(killed_after(1)(journal))
    torch.manual_seed(99)  # another process is elsewhere in its random numbers
    with kept(tmp_path) as journal:
        assert len(journal.entries) == 1
        assert answered(ResponseCache(journal)) == whole


def test_a_repeated_request_has_a_draw_of_its_own(model):
    requests = asked("generate_until", [("The first", DRAWN)] * 6)
    texts = LmEvalAdapter(model, 2, SILENT).generate_until(requests)
    assert len(set(texts)) > 2
    assert texts == LmEvalAdapter(model, 2, SILENT).generate_until(requests)


def test_other_weights_meet_no_answer_of_these(model, tmp_path):
    requests = asked("loglikelihood", REQUESTS["loglikelihood"])
    with kept(tmp_path) as journal:
        LmEvalAdapter(model, 2, SILENT, "padded", ResponseCache(journal)).loglikelihood(requests)
    with Journal(tmp_path / "answers", "other weights") as journal:
        assert journal.entries == []
        assert "different weights" in journal.notes[0]
