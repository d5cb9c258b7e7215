"""What a model saw: special tokens, joins, truncation, ties, endings, repeated examples."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.data.tokenization import appended_tokens, encode_texts
from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan, rescore
from bench.evaluation.evidence import count_ties, settings_in_force, tokens_until_stop
from bench.evaluation.metrics import refuse_changed_questions
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.evaluation.text.perplexity import cut_windows
from bench.models.model import Model
from bench.schema import ModelConfig
from bench.ui import SILENT

FREE = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}


class Said:
    """A progress that keeps the warnings."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)

    def __getattr__(self, name):
        return getattr(SILENT, name)


def make_tokenizer(template="$A", joined=False):
    """A tokenizer of bytes and a few merges; `joined` ones go across spaces."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not joined)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<sep>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=inner.pre_tokenizer.alphabet()
    )
    inner.train_from_iterator(["Answer: yes", "Answer: no", "Question: is it so?"] * 50, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(each, inner.token_to_id(each)) for each in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def make_model(tokenizer, max_length=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return Model(
        config=ModelConfig(name="tiny", source="embedded:tiny", max_length=max_length),
        network=LlamaForCausalLM(config).eval().requires_grad_(False),
        tokenizer=tokenizer,
        fingerprint="0",
        revision=None,
        device=torch.device("cpu"),
    )


def asked(kind, *arguments):
    return [
        Instance(kind, {}, argument, 0, ("task", number, 1))
        for number, argument in enumerate(arguments)
    ]


def by_hand(model, context, answer):
    """The log-likelihood of an answer's tokens after those of a context."""
    ids = torch.tensor([[*context, *answer]])
    logp_TV = model.network(ids).logits[0].log_softmax(-1)
    rows = range(len(context) - 1, len(context) + len(answer) - 1)
    return sum(logp_TV[row, token].item() for row, token in zip(rows, answer, strict=True))


def boolq(tmp_path, questions, passage="The number is whole.", **settings):
    """A benchmark of boolq on rows of one's own."""
    file = tmp_path / "boolq.jsonl"
    rows = [
        {"question": text, "passage": passage, "idx": number, "label": number % 2}
        for number, text in enumerate(questions)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"num_fewshot": 0, **settings}
    return BenchmarkConfig(name="b", tasks=("boolq",), data={"boolq": str(file)}, **settings)


@pytest.mark.parametrize(
    ("template", "appended"),
    [
        ("$A", []), ("<s> $A", []), ("$A </s>", [1]), ("<s> $A </s>", [1]),
        ("<s> $A <sep>", [2]), ("$A <sep> </s>", [2, 1]),
    ],
)  # fmt: skip
def test_what_a_tokenizer_appends_is_left_out(template, appended):
    tokenizer = make_tokenizer(template)
    assert appended_tokens(tokenizer) == appended
    plain = make_tokenizer(template.partition("$A")[0] + "$A")
    texts = ["Answer: yes", "a", "ends </s>", ""]
    expected = [plain(text)["input_ids"] for text in texts]
    assert encode_texts(tokenizer, texts) == expected


@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> $A <sep>", "<s> $A </s> </s>"])
def test_an_answer_is_scored_after_its_context_and_not_after_its_end(template):
    model, said = make_model(make_tokenizer(template)), Said()
    adapter = LmEvalAdapter(model, 4, said)
    context, answers = "Question: is it so?\nAnswer:", (" yes", " no")
    found = adapter.loglikelihood(asked("loglikelihood", *((context, a) for a in answers)))
    ids = [0, *model.tokenizer(context, add_special_tokens=False)["input_ids"]]
    for (value, _), answer in zip(found, answers, strict=True):
        answer_ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert value == pytest.approx(by_hand(model, ids, answer_ids), abs=1e-4)
    assert found[0] != found[1]
    (warning,) = said.warnings
    assert "appends" in warning


def test_generation_and_windows_do_not_follow_an_end_either():
    ending, plain = (make_model(make_tokenizer(t)) for t in ("<s> $A </s>", "<s> $A"))
    texts = [
        LmEvalAdapter(model, 2, SILENT).generate_until(asked("generate_until", ("Answer:", FREE)))
        for model in (ending, plain)
    ]
    assert texts[0] == texts[1]
    benchmark = BenchmarkConfig(
        name="b", suite="micro", perplexity={"e": {"text": "english", "window": 64}}
    )
    (text,) = plan(benchmark, offline=True).harness.texts
    assert cut_windows(ending, text, 2) == cut_windows(plain, text, 2)


@pytest.mark.parametrize(
    ("context", "answer"),
    [("Answer:", " yes"), ("Answer: ", "no"), ("Ans", "wer")],
)
def test_an_answer_without_a_token_of_its_own_is_encoded_alone(context, answer):
    model = make_model(make_tokenizer(joined=True))
    whole = model.tokenizer(context + answer)["input_ids"]
    assert len(whole) <= len(model.tokenizer(context.rstrip())["input_ids"])
    adapter = LmEvalAdapter(model, 4, SILENT)
    ((value, _),) = adapter.loglikelihood(asked("loglikelihood", (context, answer)))
    spaces = context[len(context.rstrip()) :]
    ids = [model.tokenizer(text)["input_ids"] for text in (context.rstrip(), spaces + answer)]
    assert value == pytest.approx(by_hand(model, *ids), abs=1e-4)
    assert adapter.evidence.columns("task", 0)["spans_join"]


def test_joined_tokens_are_counted_and_end_no_benchmark(tmp_path):
    said = Said()
    model = make_model(make_tokenizer(joined=True))
    found = evaluate(model, plan(boolq(tmp_path, ["is it so"] * 4), offline=True), said)
    (evidence,) = found.evidence
    assert evidence.spanning == evidence.documents == 4
    (warning,) = (text for text in said.warnings if "spans the join" in text)
    assert "(boolq 4 of 4)" in warning
    assert "if it leaves nothing, the whole answer is encoded alone" in warning
    model = make_model(make_tokenizer())
    (evidence,) = evaluate(model, plan(boolq(tmp_path, ["is it so"]), offline=True)).evidence
    assert evidence.spanning == 0


@pytest.mark.parametrize("backend", ["prefix_sharing", "padded"])
def test_what_was_cut_is_counted_and_shown(backend, tmp_path):
    said, questions = Said(), ["is it so", "is " + "it so or " * 60 + "not", "no"]
    benchmark = boolq(tmp_path, questions, backend=backend)
    model = make_model(make_tokenizer(), max_length=120)
    found = evaluate(model, plan(benchmark, offline=True), said)
    rows = found.samples
    assert [row["truncated_tokens"] > 0 for row in rows] == [False, True, False]
    cut = rows[1]
    ids = model.tokenizer(cut["prompt"])["input_ids"]
    assert abs(len(ids) - cut["prompt_tokens"][0]) <= 1
    for kept, answered in zip(cut["prompt_tokens"], cut["answer_tokens"], strict=True):
        assert kept + answered == 121
    assert all(metric.truncated == 1 for metric in found.metrics)
    (evidence,) = found.evidence
    assert (evidence.truncated, evidence.longest_cut) == (1, cut["truncated_tokens"])
    (warning,) = (text for text in said.warnings if "cut on the left" in text)
    assert "boolq 1 of 3" in warning


@pytest.mark.parametrize("backend", ["prefix_sharing", "padded"])
def test_overlong_prompts_are_refused_or_left_out_by_name(backend, tmp_path):
    questions = ["is it so", "is " + "it so or " * 60 + "not", "no"]
    model = make_model(make_tokenizer(), max_length=120)
    refused = boolq(tmp_path, questions, backend=backend, overlong="refuse")
    with pytest.raises(UserError, match=r"task boolq, document 1: .*benchmark\.overlong=truncate"):
        evaluate(model, plan(refused, offline=True))
    skipped = boolq(tmp_path, questions, backend=backend, overlong="skip")
    found = evaluate(model, plan(skipped, offline=True))
    rows = found.samples
    assert [(metric.value, metric.missing) for metric in found.metrics] == [(None, 1)]
    (gap,) = found.missing
    assert "tokens do not fit: model tiny has room for 121 (row 1)" in gap.reason
    assert [bool(row.get("missing")) for row in rows] == [False, True, False]
    assert all(value != value for value in rows[1]["loglikelihoods"])


def test_a_generation_that_leaves_no_room_is_cut_refused_or_left_out():
    model = make_model(make_tokenizer(), max_length=40)
    requests = asked("generate_until", ("Answer: " * 30, FREE), ("Answer:", FREE))
    adapter = LmEvalAdapter(model, 2, SILENT)
    adapter.generate_until(requests)
    long, short = (adapter.evidence.columns("task", number) for number in (0, 1))
    assert long["prompt_tokens"] == [32]
    assert long["truncated_tokens"] > 0 == short["truncated_tokens"]
    assert ("Answer: " * 30).endswith(long["prompt"])
    with pytest.raises(UserError, match="task task, document 0"):
        LmEvalAdapter(model, 2, SILENT, overlong="refuse").generate_until(requests)
    skipping = LmEvalAdapter(model, 2, SILENT, overlong="skip")
    assert skipping.generate_until(requests)[0] == ""
    assert "do not fit" in skipping.evidence.unanswered("task", 0)
    assert skipping.evidence.unanswered("task", 1) is None


@pytest.mark.parametrize("answer", ["", " yes" * 600])
def test_an_answer_that_cannot_be_scored_ends_nothing(answer):
    adapter = LmEvalAdapter(make_model(make_tokenizer()), 2, SILENT)
    requests = asked("loglikelihood", ("Answer:", answer), ("Answer:", " no"))
    (value, _), (other, _) = adapter.loglikelihood(requests)
    assert value != value
    assert other < 0
    assert adapter.evidence.unanswered("task", 0)


@pytest.mark.parametrize("context", ["", " ", "\n\n"])
def test_a_context_without_tokens_is_the_first_token(context):
    """lm-eval stops at spaces alone where the tokenizer puts nothing in front."""
    model = make_model(make_tokenizer())
    ((value, _),) = LmEvalAdapter(model, 2, SILENT).loglikelihood(
        asked("loglikelihood", (context, " yes"))
    )
    ids = model.tokenizer(context + " yes")["input_ids"]
    assert value == pytest.approx(by_hand(model, [0], ids), abs=1e-4)


def test_an_answer_says_how_it_ended_and_how_long_it_is():
    model = make_model(make_tokenizer())
    once = {**FREE, "until": ["nothing"]}

    def ended(options):
        adapter = LmEvalAdapter(model, 2, SILENT)
        (text,) = adapter.generate_until(asked("generate_until", ("Answer:", options)))
        seen = adapter.evidence.columns("task", 0)
        return text, seen["finish_reasons"], seen["answer_tokens"]

    text, reasons, tokens = ended(once)
    assert (reasons, tokens) == (["length"], [8])
    stop = text[3:5]
    assert ended({**FREE, "until": [stop]})[:2] == (text.partition(stop)[0], ["stop"])
    first = model.tokenizer(text, add_special_tokens=False)["input_ids"][0]
    ending = replace(model, network=copy.deepcopy(model.network))
    ending.network.generation_config.eos_token_id = [1, first]
    model = ending
    assert ended(once)[1:] == (["eos"], [0])


def test_a_setting_of_the_checkpoint_is_recorded_and_said(tmp_path):
    file = tmp_path / "gsm.jsonl"
    rows = [
        {"question": f"What is {n} plus {n}?", "answer": f"It is #### {2 * n}"} for n in range(4)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = BenchmarkConfig(
        name="b", tasks=("gsm8k",), data={"gsm8k": str(file)}, num_fewshot=1, limit=3
    )
    model, said = make_model(make_tokenizer()), Said()
    model.network.generation_config.repetition_penalty = 1.3
    found = evaluate(model, plan(benchmark, offline=True), said)
    (evidence,) = found.evidence
    assert evidence.generation["from_checkpoint"] == {"repetition_penalty": 1.3}
    assert evidence.generation["max_gen_toks"] == 256
    assert sum("repetition_penalty=1.3" in text for text in said.warnings) == 1
    for row in found.samples:
        (raw,) = row["generations"]
        assert raw
        assert raw != "[invalid]"
    # The filters and metrics give the same numbers on the stored answers.
    again = rescore(plan(benchmark, offline=True), found.samples)
    assert [m.value for m in again.metrics] == [m.value for m in found.metrics]
    assert [row["response"] for row in again.samples] == [row["response"] for row in found.samples]
    old = [{**row, "generations": None} for row in found.samples]
    with pytest.raises(UserError, match="document 0: the run stored no generations"):
        rescore(plan(benchmark, offline=True), old)


def test_choices_windows_and_missing_answers_are_scored_again(tmp_path):
    model = make_model(make_tokenizer(), max_length=120)
    questions = ["is it so", "is " + "it so or " * 60 + "not", "no"]
    windows = {"e": {"text": "english", "window": 64}}
    left_out = {"overlong": "skip", "allow_missing": 0.5}
    benchmark = boolq(tmp_path, questions, perplexity=windows, limit=3, **left_out)
    found = evaluate(model, plan(benchmark, offline=True))
    again = rescore(plan(benchmark, offline=True), found.samples)
    for old, new in zip(found.metrics, again.metrics, strict=True):
        assert (new.task, new.n, new.missing) == (old.task, old.n, old.missing)
        assert new.value == pytest.approx(old.value)
    assert [row["missing"] for row in again.samples] == [row["missing"] for row in found.samples]
    # The scores follow the stored answers and nothing else.
    changed = [dict(row) for row in found.samples]
    changed[0]["loglikelihoods"] = changed[0]["loglikelihoods"][::-1]
    flipped = rescore(plan(benchmark, offline=True), changed).samples
    assert flipped[0]["acc"] == 1 - found.samples[0]["acc"]
    assert flipped[2]["acc"] == found.samples[2]["acc"]


@pytest.mark.parametrize(
    ("name", "edit", "different"),
    [
        ("doc_to_choice", "{{choices.text|reverse|list}}", "choices"),
        ("doc_to_choice", "{{choices.text + ['all of them']}}", None),
        ("doc_to_text", "Q: {{question}}\nA:", "prompt"),
    ],
)
def test_stored_answers_are_not_given_to_other_questions(name, edit, different):
    benchmark = BenchmarkConfig(name="b", suite="micro", tasks=("arc_easy",), limit=3)
    found = evaluate(make_model(make_tokenizer()), plan(benchmark, offline=True))
    edited = plan(benchmark, offline=True)
    (task,) = edited.harness.tasks
    setattr(task.tasks["arc_easy"].config, name, edit)
    reason = f"different: {different}" if different else "loglikelihoods, and the task asks for"
    with pytest.raises(UserError, match=f"task arc_easy, document 0: .*{reason}"):
        rescore(edited, found.samples)


def test_a_document_that_is_another_or_gone_is_refused():
    row = {"task": "t", "doc_id": 1, "doc_hash": "a", "prompt_hash": "b", "choices": ["c"]}
    refuse_changed_questions([row], [dict(row)])
    # Older records lack columns; windows of texts are not asked again.
    refuse_changed_questions([{**row, "doc_hash": None}, {**row, "task": "u"}], [row])
    with pytest.raises(UserError, match=r"task t, document 1: .* \(different: document\)"):
        refuse_changed_questions([row], [{**row, "doc_hash": "z"}])
    with pytest.raises(UserError, match=r"task t, document 2: .*different: document, prompt"):
        refuse_changed_questions([row, {**row, "doc_id": 2}], [row])


def test_ties_are_counted_and_said_once(tmp_path):
    said, model = Said(), make_model(make_tokenizer())
    model.network.lm_head.weight.zero_()
    benchmark = BenchmarkConfig(name="b", suite="micro", tasks=("arc_easy", "piqa"), limit=6)
    found = evaluate(model, plan(benchmark, offline=True), said)
    for evidence in found.evidence:
        tied = [row["tied_choices"] for row in found.samples if row["task"] == evidence.task]
        assert evidence.tied == sum(count > 1 for count in tied)
    assert sum("equally likely" in text for text in said.warnings) == 1


def test_documents_that_count_again_are_told(tmp_path):
    said, benchmark = Said(), boolq(tmp_path, ["is it so", "is it no"])
    file = Path(benchmark.data["boolq"])
    evaluate(make_model(make_tokenizer()), plan(benchmark, offline=True), said)
    assert not [text for text in said.warnings if "equal an earlier one" in text]
    file.write_text("\n".join([file.read_text(), *file.read_text().splitlines()[:1], ""]))
    found = evaluate(make_model(make_tokenizer()), plan(benchmark, offline=True), said)
    assert len(found.samples) == 3
    (told,) = [text for text in said.warnings if "equal an earlier one" in text]
    assert told.endswith("count again, as in the harness (boolq 1 of 3)")


def test_an_example_that_is_the_question_is_counted(tmp_path):
    said, model = Said(), make_model(make_tokenizer())
    benchmark = boolq(tmp_path, ["is it so"] * 3 + [f"is {n} so" for n in range(4)], num_fewshot=4)
    found = evaluate(model, plan(benchmark, offline=True), said)
    for row in found.samples:
        shown, _, question = row["prompt"].rpartition("\n\n")
        assert row["in_examples"] == (question in shown)
    assert any(row["in_examples"] for row in found.samples)
    (evidence,) = found.evidence
    assert evidence.repeated_examples == sum(row["in_examples"] for row in found.samples)
    zero = evaluate(model, plan(boolq(tmp_path, ["is it so"] * 3), offline=True))
    assert all(row["in_examples"] is None for row in zero.samples)


@given(st.lists(st.sampled_from([-1.5, -2.0, float("-inf")]), min_size=1, max_size=6))
def test_ties_are_those_of_the_greatest(values):
    assert count_ties(values) == values.count(max(values))


@given(st.text(alphabet="abc", max_size=12), st.text(alphabet="abc", min_size=1, max_size=3))
def test_a_stop_string_is_complete_after_its_last_token(text, stop):
    found = tokens_until_stop(list(text), "".join, [stop])
    place = text.find(stop)
    assert found == (len(text) if place < 0 else place + len(stop))


def test_only_what_is_read_is_in_force():
    own = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 3}
    greedy = settings_in_force(own, {"do_sample": False}, until=[])
    assert greedy["from_checkpoint"] == {"repetition_penalty": 1.1}
    drawn = settings_in_force(own, {"do_sample": True, "temperature": 0.8})
    assert drawn["from_checkpoint"] == {"repetition_penalty": 1.1, "top_k": 20}
