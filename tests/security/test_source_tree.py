"""What no source file may do: unpickle, run text as code, load YAML that builds objects."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for folder in ("bench", "methods", "hydra_plugins", "conf")
    for file in (ROOT / folder).rglob("*.py")
)  # fmt: skip
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "pandas.read_pickle", "pd.read_pickle", "joblib.load", "tarfile.open", "zipfile.ZipFile",
    "shutil.unpack_archive",
}  # fmt: skip


def faults(source):
    """Yield the line and the fault of everything that is forbidden in a module's text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name.partition(".")[0] in MODULES:
                yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in CALLS:
            yield node.lineno, f"calls {called}"
        if called.endswith("torch.load") and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if called.endswith(("np.load", "numpy.load")) and given.get("allow_pickle") != "False":
            yield node.lineno, "numpy.load that may unpickle"
        for name, value in (("trust_remote_code", "True"), ("shell", "True"),
                            ("allow_pickle", "True"), ("weights_only", "False")):  # fmt: skip
            if given.get(name) == value:
                yield node.lineno, f"{called} with {name}={value}"


def test_no_source_file_runs_what_a_file_holds():
    # One test for all: hundreds of parameters take longer than the reading.
    found = {str(file.relative_to(ROOT)): list(faults(file.read_text())) for file in FILES}
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.parametrize("text", [
    "import pickle", "from dill import loads", "torch.load(p)", "torch.load(p, weights_only=False)",
    "yaml.load(text)", "eval(text)", "A.from_pretrained(f, trust_remote_code=True)",
    "subprocess.run(c, shell=True)", "np.load(p)", "tarfile.open(p).extractall()",
])  # fmt: skip
def test_the_scan_sees_what_it_looks_for(text):
    assert list(faults(text))


def test_no_weights_of_another_format_are_shipped():
    suffixes = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"}
    shipped = [
        file for folder in ("bench", "methods", "conf") for file in (ROOT / folder).rglob("*")
    ]
    assert not [file for file in shipped if file.suffix in suffixes]
