"""Requests for prefix sharing, and the slow results to compare with."""

import torch

from bench.evaluation.batching import TokenBudget
from bench.evaluation.harness import BackendReport
from bench.evaluation.text.prefix.forward import Forward
from bench.evaluation.text.prefix.packing import DEFAULT_LIMITS
from bench.evaluation.text.prefix.scorer import PrefixSharingScorer
from bench.evaluation.text.requests import Loglikelihood, LoglikelihoodRequest
from bench.ui import SILENT

CPU = torch.device("cpu")
VOCABULARY = 40


def score(network, questions, tokens=2048, window=None, limits=DEFAULT_LIMITS):
    """Score with prefix sharing; return the results in order and the backend report."""
    report = BackendReport("prefix_sharing")
    budget = TokenBudget(tokens, CPU, SILENT)
    scorer = PrefixSharingScorer(Forward(network, CPU), budget, report, window, limits)
    found = [answer for batch in scorer.score(questions) for answer in batch]
    assert sorted(number for number, _ in found) == list(range(len(questions)))
    return [answer for _, answer in sorted(found)], report


@torch.no_grad()
def one_by_one(network, questions):
    """Score every question in a forward of its own: the definition."""
    answers = []
    for inputs, targets in questions:
        logits = network(torch.tensor([inputs])).logits[0, -len(targets) :]
        logp = logits.double().log_softmax(-1)
        wanted = torch.tensor(targets)
        value = logp[torch.arange(len(targets)), wanted].sum()
        answers.append(Loglikelihood(float(value), bool((logp.argmax(-1) == wanted).all())))
    return answers


def assert_same(found, wanted, tolerance=1e-5):
    assert [answer.greedy for answer in found] == [answer.greedy for answer in wanted]
    off = [abs(ours.value - theirs.value) for ours, theirs in zip(found, wanted, strict=True)]
    assert max(off, default=0.0) <= tolerance


def tree(generator, documents, stem, depth, choices, most):
    """Draw documents on a common beginning, each with choices of up to `most` tokens."""
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    tokens = lambda count: torch.randint(VOCABULARY, (count,), generator=generator).tolist()  # noqa: E731
    beginning, questions = tokens(stem), []
    for _ in range(documents):
        context = [*beginning, *tokens(draw(1, depth))]
        for _ in range(choices):
            answer = tokens(draw(1, most))
            questions.append(LoglikelihoodRequest(context + answer[:-1], answer))
    return questions
