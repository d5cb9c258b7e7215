"""Every architecture with experts: what runs on it, and what is refused with which sentence.

`python -m tests.methods.moe.architectures` writes the table of docs/camera.md.
"""

from pathlib import Path

from bench.errors import UserError
from bench.models.structure.model_structure import inspect_model
from methods.baselines.expert_scores import Reap
from methods.camera.pruning import CameraP
from methods.quantization.uniform import Rtn
from tests.models.moe_zoo import NAMES, build

METHODS = {
    "camera_p": CameraP(ratio=0.4),
    "reap": Reap(ratio=0.3),
    "rtn": Rtn(bits=4, group=8),
}


def refusal(method, network):
    """Return the sentence by which a method refuses a network, or None."""
    try:
        method.check(inspect_model(network))
    except UserError as refused:
        return str(refused)
    return None


DOCUMENT = Path(__file__).parents[3] / "docs/camera.md"
START, END = "<!-- architectures: written by tests -->\n", "<!-- end -->\n"


def table():
    """Return the table of all architectures, in Markdown."""
    outcomes = {}
    for name in NAMES:
        network = build(name)
        said = tuple(_cell(refusal(method, network), network) for method in METHODS.values())
        outcomes.setdefault(said, []).append(f"`{name}`")
    rows = ["| `model_type` | removal | dropping | quantization |", "|---|---|---|---|"]
    for said, names in sorted(outcomes.items(), key=lambda row: -len(row[1])):
        cells = ["as removal" if cell == said[0] != "yes" else cell for cell in said[1:]]
        rows.append(f"| {', '.join(names)} | {' | '.join([said[0], *cells])} |")
    return "\n".join(rows) + "\n"


def _cell(sentence, network):
    if sentence is None:
        return "yes"
    # One row per reason: names of classes and places are all that differs.
    for module in network.modules():
        sentence = sentence.replace(f"{type(module).__name__} ", "… ")
    for name, _ in network.named_modules():
        if name.count(".") > 1:
            sentence = sentence.replace(f" {name} ", " … ").replace(f" {name},", " …,")
    return sentence.replace("|", "\\|")


def main():
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + START + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
