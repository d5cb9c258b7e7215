"""Groups, chats, shots, limits and generation settings: equal to plain lm-eval per sample."""

import json

import lm_eval.evaluator
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan, rescore
from bench.evaluation.task_planning import quiet_lm_eval
from bench.models.model import Model
from bench.schema import ModelConfig
from bench.ui import Progress
from tests.evaluation.text.own_tasks import row, write_rows, write_tasks

SLOW = pytest.mark.slow


class Said(Progress):
    """A progress that keeps what it warns of."""

    def __init__(self):
        super().__init__(quiet=True)
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if thinking %}hm{% endif %}"
    "{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("mine"))


@pytest.fixture(scope="module")
def llama(tokenizer):
    return make_llama(tokenizer, TEMPLATE)


def make_llama(tokenizer, template) -> Model:
    chatting = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token
    )
    chatting.chat_template = template
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(chatting), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=chatting.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    return Model(
        config=ModelConfig(name="llama", source="embedded:tiny"),
        network=LlamaForCausalLM(config).eval().requires_grad_(False),
        tokenizer=chatting,
        fingerprint="0",
        revision=None,
        device=torch.device("cpu"),
    )


def configured(folder, *tasks, **settings):
    settings = {"num_fewshot": None, "include": (str(folder),), "batch_size": 3} | settings
    return BenchmarkConfig(name="mine", tasks=tasks, **settings)


def plainly(model, folder, monkeypatch, tasks, hf=(), **options):
    """Evaluate with lm-eval's own task manager, evaluator and `hf` model."""
    monkeypatch.chdir(folder)  # where lm-eval looks for the files that a task names
    # Descriptions of the machine, which take seconds and nobody reads.
    for name in ("add_env_info", "get_git_commit_hash"):
        monkeypatch.setattr(lm_eval.evaluator, name, lambda *_: None)
    with quiet_lm_eval():
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        lm = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=4, **dict(hf))
        return simple_evaluate(
            lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=1000, **options
        )


def assert_equal(found, theirs):
    """Compare every sample and every score, those of groups included."""
    ours = {(row["task"], row["doc_id"], row["filter"]): row for row in found.samples}
    assert len(ours) == sum(map(len, theirs["samples"].values())) > 0
    for name, samples in theirs["samples"].items():
        for sample in samples:
            mine = ours[name, sample["doc_id"], sample["filter"]]
            assert mine["prompt_hash"] == sample["prompt_hash"]
            responses = [each[0] for each in sample["resps"]]
            if isinstance(responses[0], str):
                assert list(mine["generations"]) == responses
                assert mine["response"] == sample["filtered_resps"][0]
            else:
                values = [each[0] if isinstance(each, tuple) else each for each in responses]
                assert list(mine["loglikelihoods"]) == pytest.approx(values, abs=1e-4)
    scores = {(m.task, f"{m.metric},{m.filter}"): m for m in found.metrics}
    compared = 0
    for name, results in theirs["results"].items():
        for key, value in results.items():
            if "," in key and "_stderr" not in key:
                metric = scores[name, key]
                assert metric.value == pytest.approx(value, rel=1e-5)
                error = results[key.replace(",", "_stderr,")]
                if not isinstance(error, str):
                    assert metric.stderr == pytest.approx(error, rel=1e-5)
                compared += 1
    assert compared


KINDS = ("colour_choice", "colour_written", "colour_last", "colour_whole")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"backend": "padded", "batch_size": "auto"}, {}),
        pytest.param({"num_fewshot": 2}, {"num_fewshot": 2}, marks=SLOW),
        pytest.param(
            {"chat_template": True, "backend": "padded"},
            {"apply_chat_template": True},
            marks=SLOW,
        ),
        (
            {"chat_template": True, "num_fewshot": 2, "system_prompt": "Be brief."},
            {"apply_chat_template": True, "num_fewshot": 2, "system_instruction": "Be brief."},
        ),
        (
            {"chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": False},
            {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": False},
        ),
        (
            {"limit": 0.3, "gen_kwargs": {"max_gen_toks": 3, "until": ["e"]}},
            {"limit": 0.3, "gen_kwargs": {"max_gen_toks": 3, "until": ["e"]}},
        ),
        pytest.param(
            {"system_prompt": "Be brief."}, {"system_instruction": "Be brief."}, marks=SLOW
        ),
    ],
    ids=["plain", "shots", "chat", "turns", "one_turn", "share", "system"],
)
def test_all_kinds_of_tasks_equal_plain_lm_eval(llama, folder, monkeypatch, settings, options):
    found = evaluate(llama, plan(configured(folder, *KINDS, **settings), offline=True))
    assert_equal(found, plainly(llama, folder, monkeypatch, KINDS, **options))


def test_a_group_equals_plain_lm_eval(llama, folder, monkeypatch):
    """Groups in groups, a tag, settings that a group gives a task, weights by size and not."""
    config = configured(folder, "colours", chat_template=True, batch_size="auto", backend="padded")
    found = evaluate(llama, plan(config, offline=True))
    theirs = plainly(llama, folder, monkeypatch, ["colours"], apply_chat_template=True)
    assert_equal(found, theirs)
    assert {m.task for m in found.metrics if m.headline} == {"colours"}
    shots = {m.task: m.shots for m in found.metrics}
    assert (shots["colour_choice"], shots["colour_odd"]) == (0, 1)


def test_shots_are_given_per_task_and_per_group(folder):
    shots = {"colours": 2, "colour_odd": 3}
    config = configured(folder, "colours", "colour_written", num_fewshot=shots)
    leaves = plan(config, offline=True).harness.leaves
    assert {task.task_name: task.get_config("num_fewshot") for task in leaves} == {
        "colour_choice": 2, "colour_odd": 3, "colour_tagged": 2, "colour_written": 0,
    }  # fmt: skip


def test_a_group_takes_a_folder_of_files(llama, folder, tmp_path):
    for task in ("colour_choice", "colour_odd", "colour_tagged"):
        write_rows(tmp_path / f"{task}.jsonl", map(row, range(4)))
    config = configured(folder, "colours", data={"colours": str(tmp_path)}, num_fewshot=0)
    found = plan(config, offline=True)
    assert [len(task.eval_docs) for task in found.harness.leaves] == [4, 4, 4]
    (tmp_path / "colour_odd.jsonl").unlink()
    with pytest.raises(UserError, match=r"benchmark.data.colours=.*there is no colour_odd.jsonl"):
        plan(config, offline=True)


def test_an_unlabelled_row_in_a_group_is_a_gap_of_the_group(llama, folder, tmp_path):
    rows = [row(number) | ({"answer": -1} if number == 1 else {}) for number in range(4)]
    file = str(write_rows(tmp_path / "odd.jsonl", rows))
    config = configured(folder, "colours", data={"colour_odd": file}, num_fewshot=0)
    with pytest.raises(UserError, match=r"task colour_odd: 1 of 4 rows have no answer"):
        plan(config, offline=True)
    allowed = config.model_copy(update={"allow_missing": 0.3})
    found = evaluate(llama, plan(allowed, offline=True))
    shown = {m.task: m for m in found.metrics if m.metric == "acc"}
    assert (shown["colour_odd"].n, shown["colour_odd"].missing) == (3, 1)
    assert shown["colours"].missing == 1 and shown["colours"].value is not None


def test_a_written_answer_without_a_label_is_found(llama, folder, tmp_path):
    rows = [row(number) | ({"label": " "} if number in (0, 3) else {}) for number in range(5)]
    file = str(write_rows(tmp_path / "written.jsonl", rows))
    config = configured(folder, "colour_written", data={"colour_written": file})
    with pytest.raises(UserError, match=r"colour_written: 2 of 5 rows .* no label \(rows 0, 3\)"):
        plan(config, offline=True)
    found = evaluate(llama, plan(config.model_copy(update={"allow_missing": 0.5}), offline=True))
    assert {(m.n, m.missing) for m in found.metrics} == {(3, 2)}


@pytest.mark.parametrize("end", ["e", "<|think|>"], ids=["text", "special"])
def test_thoughts_are_no_part_of_an_answer(llama, folder, monkeypatch, end):
    settings = {"max_gen_toks": 24, "until": []}
    config = configured(folder, "colour_written", think_end_token=end, gen_kwargs=settings)
    said = Said()
    found = evaluate(llama, plan(config, offline=True), said)
    theirs = plainly(
        llama, folder, monkeypatch, ["colour_written"], {"think_end_token": end},
        gen_kwargs=settings,
    )  # fmt: skip
    assert_equal(found, theirs)
    thoughts = {row["doc_id"]: row["thoughts"][0] for row in found.samples}
    assert any(thoughts.values()) == (end == "e")
    if end != "e":
        assert any("answers without <|think|> are scored whole" in each for each in said.warnings)


def test_stored_chats_are_scored_again(llama, folder):
    config = configured(folder, *KINDS, chat_template=True, num_fewshot=1)
    found = evaluate(llama, plan(config, offline=True))
    again = rescore(plan(config, offline=True), json.loads(json.dumps(found.samples)))
    assert [m.value for m in again.metrics] == [m.value for m in found.metrics]


def test_a_shot_that_repeats_the_question_is_seen_in_a_chat(llama, folder, tmp_path):
    rows = [row(0), row(0) | {"answer": 1}, row(2)]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    config = configured(
        folder, "colour_choice", data={"colour_choice": file}, chat_template=True, num_fewshot=2
    )
    found = evaluate(llama, plan(config, offline=True))
    assert [row["in_examples"] for row in found.samples] == [True, True, False]


def checked(model, config):
    plan(config, offline=True).harness.check_network(model.config, model.network, model.tokenizer)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"chat_template": True}, "benchmark.chat_template=true: .* has no chat template"),
        ({"think_end_token": "x", "tasks": ("colour_last",)}, "think_end_token: none .* generates"),
        (
            {"gen_kwargs": {"top_pp": 1}},
            "unknown setting 'top_pp' in benchmark.gen_kwargs.*'top_p'",
        ),
        ({"tasks": ("colour_choice",), "gen_kwargs": {"top_p": 1}}, "generates a text"),
        ({"num_fewshot": {"colour_writen": 1}}, "task in benchmark.num_fewshot 'colour_writen'"),
        ({"tasks": ("colours", "colour_odd")}, "colour_odd is in colours and in colour_odd"),
    ],
)
def test_wrong_settings_are_one_sentence(model, folder, settings, reason):
    tasks = settings.pop("tasks", ("colour_written",))
    with pytest.raises(UserError, match=reason):
        checked(model, configured(folder, *tasks, **settings))


def test_thoughts_before_a_given_answer_are_refused(llama, folder):
    settings = {"chat_template": True, "chat_template_args": {"enable_thinking": True}}
    checked(llama, configured(folder, "colour_written", **settings))
    with pytest.raises(UserError, match="colour_last scores given answers"):
        checked(llama, configured(folder, "colour_written", "colour_last", **settings))


def test_a_template_is_chosen_by_name_or_refused(tokenizer, folder):
    model = make_llama(tokenizer, {"default": TEMPLATE, "terse": "{{ messages[-1]['content'] }}"})
    config = configured(folder, "colour_last", chat_template="terse", limit=1)
    (row,) = evaluate(model, plan(config, offline=True)).samples
    assert row["prompt"] == "Which colour is number 30, light or dark?"
    with pytest.raises(UserError, match=r"template in benchmark.chat_template .*'ters'.*'terse'"):
        checked(model, config.model_copy(update={"chat_template": "ters"}))


def test_a_template_without_system_messages_is_told(tokenizer, folder, monkeypatch):
    model = make_llama(tokenizer, STRICT + TEMPLATE)
    config = configured(folder, "colour_choice", chat_template=True)
    said = Said()
    found = evaluate(model, plan(config, offline=True), said)
    assert sum("takes no system message" in each for each in said.warnings) == 1
    options = {"apply_chat_template": True}
    assert_equal(found, plainly(model, folder, monkeypatch, ["colour_choice"], **options))
    prompted = config.model_copy(update={"system_prompt": "Be brief."})
    with pytest.raises(UserError, match=r"benchmark.system_prompt: .* does not support a system"):
        checked(model, prompted)


@pytest.mark.parametrize("limit", [0, 0.0, -1, 1.0, 1.5, -0.2, True])
def test_a_limit_is_a_number_or_a_share(limit):
    with pytest.raises(ValueError, match="from 1 on is needed, or a share between 0 and 1"):
        BenchmarkConfig(name="b", limit=limit)


def test_the_name_says_what_is_run():
    names = [
        BenchmarkConfig(name="lm_eval", tasks=tuple("abcde"[:count])).name for count in (1, 3, 5)
    ]
    assert names == ["lm_eval:a", "lm_eval:a+b+c", "lm_eval:a+b+c+2 more"]
    with pytest.raises(ValueError, match=r"benchmark=lm_eval needs benchmark.tasks"):
        BenchmarkConfig(name="lm_eval")
