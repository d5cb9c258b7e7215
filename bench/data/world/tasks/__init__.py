"""The nine tasks of the closed world."""

from bench.data.world.question import Ask
from bench.data.world.tasks import (
    arc,
    boolq,
    hellaswag,
    mathqa,
    openbookqa,
    piqa,
    rte,
    winogrande,
)

ASK: dict[str, Ask] = {
    "boolq": boolq.ask,
    "openbookqa": openbookqa.ask,
    "rte": rte.ask,
    "arc_easy": arc.ask_easy,
    "winogrande": winogrande.ask,
    "hellaswag": hellaswag.ask,
    "arc_challenge": arc.ask_challenge,
    "piqa": piqa.ask,
    "mathqa": mathqa.ask,
}
"""The function that draws a question, by lm-eval's name of the task."""
