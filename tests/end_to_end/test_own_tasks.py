"""A user's task files through the command line, from YAML to record."""

from bench.records import Store
from bench.runner.replay import recorded_config
from tests.evaluation.text.own_tasks import write_tasks


def test_a_users_tasks_run_and_are_named_in_the_record(bench, tmp_path):
    folder = write_tasks(tmp_path / "mine")
    (folder / "utils.py").write_text("def process_docs(rows):\n    return rows.select([0, 1])\n")
    (folder / "coded.yaml").write_text(
        "include: choice.yaml\ntask: colour_coded\nprocess_docs: !function utils.process_docs\n"
    )
    command = [
        "run", "benchmark=lm_eval", f"benchmark.include=[{folder}]", "benchmark.limit=0.5",
        "benchmark.tasks=[colour_coded,colour_written]", "benchmark.num_fewshot={colour_written:1}",
        "benchmark.gen_kwargs={max_gen_toks:3}", "benchmark.allow_missing=0.9",
    ]  # fmt: skip
    code, out, err = bench(*command)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "runs only with benchmark.trust_code=true" in err
    code, out, err = bench(*command, "benchmark.trust_code=true")
    assert code == 0, err
    (record,) = Store(bench.results).all()
    assert record.config["benchmark"]["name"] == "lm_eval:colour_coded+colour_written"
    shown = {m.task: (m.n, m.shots, m.filter) for m in record.metrics if m.headline}
    assert shown["colour_coded"] == (1, 0, "none")
    assert shown["colour_written"][1:] == (1, "strict")
    # A record grants nothing: its code runs again only if this command says so.
    allowed = recorded_config(record, ["benchmark.trust_code=true"])
    assert allowed.benchmark.trust_code
    code, _, err = bench("rescore", record.id[:8])
    assert code == 2 and "used benchmark.trust_code=true, which no record can allow" in err
    code, out, err = bench("rescore", record.id[:8], "benchmark.trust_code=true")
    assert code == 0, err


def test_wrong_names_and_settings_are_one_sentence(bench):
    for arguments, sentence in {
        ("benchmark=lm_eval",): "benchmark=lm_eval needs benchmark.tasks=[NAME,...]",
        ("benchmark.limit=1.5",): "benchmark.limit=1.5: a number of documents from 1 on is needed",
        ("benchmark.limit=0",): "benchmark.limit=0: a number of documents from 1 on is needed",
        ("benchmark.batch_size=many",): "benchmark.batch_size=many: 1 or more is needed, or auto",
        ("benchmark.num_fewshot=-1",): "benchmark.num_fewshot=-1: 0 to 1000 are needed",
        ("+benchmark.chat_template=true",): "has no chat template",
    }.items():
        code, out, err = bench("run", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert sentence in err
