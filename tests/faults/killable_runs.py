"""Runs in processes of their own, which can be killed: forked, so that they start at once.

What trains is forked from a server that has never trained: autograd refuses to work in a process
whose parent has used it, as some test before this one may have.
"""

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.cli.main import main
from bench.data import calibration
from bench.evaluation.response_cache import ResponseCache
from bench.records import Store
from bench.ui import Progress

# The whole text has five hundred windows, which would be most of a run's time.
SHORT_TEXT = Path(tempfile.mkdtemp(prefix="killable-")) / "calibration.txt"
SHORT_TEXT.write_text(calibration.test_text()[:4000], encoding="utf-8")
atexit.register(shutil.rmtree, SHORT_TEXT.parent)
SMALL = (
    "benchmark.tasks=[arc_easy,boolq]",
    "benchmark.perplexity.english.window=64",
    f"benchmark.perplexity.english.path={SHORT_TEXT}",
    "benchmark.limit=12",
    "benchmark.batch_size=4",
    "calibration.rows=4",
    "costs.length=32",
    "threads=1",
    "tracker=none",
)
TIMES = {"estimate", "started", "finished"}
# What trainings need, loaded once by the server and not again by each of its forks.
TRAINERS = (
    "bench.evaluation.images",
    "methods.wgsef.competitors",
    "methods.wgsef.fine_tuning",
)


@dataclass
class Child:
    """One `bench` command in a process of its own; what it says is in a file."""

    pid: int
    said: Path
    text: str = ""

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def wait(self):
        """Return the exit code, or minus the number of the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        self.text = self.said.read_text()
        self.said.unlink()
        return os.waitstatus_to_exitcode(status)

    def says(self, words):
        """Whether it has said this so far."""
        return words in self.said.read_text()


def start(results, *arguments, before=None, small=SMALL):
    """Start `bench run` on a results folder; `before` is called in the new process."""
    said, given = _said_and_given(arguments, small)
    pid = os.fork()
    if not pid:
        _become_run(said, given, results, before)
    return Child(pid, said)


def train(results, *arguments, before=None, small=SMALL):
    """Run a command that trains to its end; return exit code and what it said.

    `before` is a function of a module, or a partial of one, because it is sent to the server.
    """
    said, given = _said_and_given(arguments, small)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.faults.killable_runs", *TRAINERS])
    child = server.Process(target=_become_run, args=(said, given, results, before))
    child.start()
    child.join()
    text = said.read_text()
    said.unlink()
    return child.exitcode, text


def _said_and_given(arguments, small):
    handle, said = tempfile.mkstemp(prefix="said-")
    os.close(handle)
    given = [*arguments, *(each for each in small if each.split("=")[0] not in _keys(arguments))]
    return Path(said), given


def _become_run(said, given, results, before):
    """Run `bench run` in this process, and end it."""
    code = 99
    try:
        # A shell that runs the tests in its background has them ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        handle = os.open(said, os.O_WRONLY)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        if before is not None:
            before()
        code = main(["run", *given, f"results_dir={results}"])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(results, *arguments, before=None, small=SMALL):
    """Run a command to its end; return exit code and what it said."""
    child = start(results, *arguments, before=before, small=small)
    return child.wait(), child.text


def _keys(arguments):
    return {argument.split("=")[0] for argument in arguments}


def die_in(phase):
    """Return what makes a process kill itself in the middle of a phase."""

    def arm():
        enter = Progress.phase

        def deadly(self, name, total=None):
            if name == phase:
                os.kill(os.getpid(), signal.SIGKILL)
            return enter(self, name, total)

        Progress.phase = deadly

    return arm


def counting(file, pause=0.0):
    """Return what makes a process write down every request that it scored, a batch per line."""

    def arm():
        ResponseCache.get_or_compute = counted(ResponseCache.get_or_compute, file, pause)

    return arm


def counted(answers, file, pause=0.0):
    """Wrap `ResponseCache.get_or_compute`: write the key of each computed request to a file."""

    def counting_answers(self, keys, score, progress):
        def noted(missing):
            for batch in score(missing):
                given = list(batch)
                with file.open("a") as log:
                    log.write(" ".join(keys[place] for place, _ in given) + "\n")
                yield given
                time.sleep(pause)

        return answers(self, keys, noted, progress)

    return counting_answers


def scored_twice(log):
    """Return how many requests were scored more often than once."""
    counts = Counter(log.read_text().split())
    return sum(count - 1 for count in counts.values())


def largest_batch(log):
    """Return how many requests were scored together at most."""
    return max(len(line.split()) for line in log.read_text().splitlines())


def journals(results):
    """Return the journals of the runs that are not finished."""
    return list((results / "unfinished").glob("*/responses.journal"))


def lines(results):
    """Return how many entries the journals have."""
    return sum(path.read_bytes().count(b"\n") for path in journals(results))


def timeless(record):
    """Return all of a record but its times and where and from which commit it was written."""
    content = record.model_dump(exclude=TIMES)
    content["costs"] = [cost for cost in content["costs"] if cost["how"] != "measured"]
    for method in content["methods"]:
        method.pop("seconds")
        method["report"].pop("seconds", None)
    content["config"].pop("results_dir")
    content["provenance"].pop("git_commit")
    (content["provenance"]["backend"] or {}).pop("spent", None)  # of the last attempt only
    content["command"] = None
    return content


def only(results):
    """Return the one record of a results folder."""
    (record,) = Store(results).all()
    return record


def wait_for(condition, seconds=60):
    """Wait until something is the case."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
