"""Task files of a user's own, one of each kind, over JSON Lines beside them."""

import json
from pathlib import Path

WORDS = [
    "red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "teal", "navy",
]  # fmt: skip
CHOICE = """
task: colour_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl, train: shots.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
description: "These are questions about {{topic}}.\\n\\n"
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
ODD_CHOICE = """
include: choice.yaml
task: colour_odd
dataset_kwargs: {data_files: {test: odd.jsonl, train: shots.jsonl}}
"""
WRITTEN = """
task: colour_written
dataset_path: json
dataset_kwargs: {data_files: {test: written.jsonl, train: shots.jsonl}}
output_type: generate_until
test_split: test
fewshot_split: train
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{label}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]
  - name: loose
    filter: [{function: regex, regex_pattern: "(.)", group_select: -1}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
metadata: {version: 2.0}
"""
LAST_WORD = """
task: colour_last
dataset_path: json
dataset_kwargs: {data_files: {test: written.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{' ' + label}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
WHOLE = """
task: colour_whole
dataset_path: json
dataset_kwargs: {data_files: {test: written.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
GROUP = """
group: colours
task:
  - group: colour_choices
    task: [colour_choice, {task: colour_odd, num_fewshot: 1}]
    aggregate_metric_list:
      - {metric: acc, aggregation: mean, weight_by_size: false}
  - colour_tag
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 3.0}
"""
TAGGED = """
include: choice.yaml
task: colour_tagged
tag: [colour_tag]
dataset_kwargs: {data_files: {test: odd.jsonl, train: shots.jsonl}}
"""
FILES = {
    "choice.yaml": CHOICE, "odd.yaml": ODD_CHOICE, "written.yaml": WRITTEN, "last.yaml": LAST_WORD,
    "whole.yaml": WHOLE, "group.yaml": GROUP, "tagged.yaml": TAGGED,
}  # fmt: skip


def row(number: int) -> dict:
    options = [WORDS[(number + step) % len(WORDS)] for step in (0, 3, 7)]
    answer = number % 3
    return {
        "topic": "colours", "question": f"Which colour is number {number}, light or dark?",
        "options": options, "answer": answer, "label": options[answer],
    }  # fmt: skip


def write_rows(file: Path, rows) -> Path:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def write_tasks(folder: Path) -> Path:
    """Write all task files and their data; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_text(content)
    write_rows(folder / "choice.jsonl", map(row, range(7)))
    write_rows(folder / "odd.jsonl", map(row, range(20, 23)))
    write_rows(folder / "written.jsonl", map(row, range(30, 35)))
    write_rows(folder / "shots.jsonl", map(row, range(50, 60)))
    return folder
