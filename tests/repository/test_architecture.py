"""The shape of the code: imports point downward, scripts stand alone, few files know Opacus, eval/ stands apart."""

import ast
import pathlib

import pytest

from helpers.processes import ROOT

SRC = ROOT / "src"
MODEL, SCRIPT = "model", "scripts"
# From the lowest to the highest. A folder of src/ is a layer of its name; the files beside the folders are scripts,
# which have a __main__ part, or of the model. A module may import from its own folder and from rows below.
ROWS = (("base",), (MODEL,), ("corpus", "decoding", "weights"), ("privacy",), ("run",), (SCRIPT,))
OPACUS = {"lora_grad_samplers", "privacy.opacus_engine"}
MOST_LINES, LONGEST_LINE = 450, 120


def imports(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, anywhere in it: for `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:
                package = ".".join([*path.relative_to(SRC).parts[:-node.level], *package.split(".")]).strip(".")
            found |= {package, *(f"{package}.{alias.name}" for alias in node.names)}
    return found


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_script(path: pathlib.Path) -> bool:
    return '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")


def python_files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = {module_name(path): path for path in python_files("src")}


def layer(name: str) -> str:
    """The folder of a module; scripts or model of those beside the folders. loralib is a part of the model."""
    folder, _, inside = name.partition(".")
    if inside or MODULES[name].name == "__init__.py":
        return MODEL if folder == "loralib" else folder
    return SCRIPT if is_script(MODULES[name]) else MODEL


def row(of: str) -> int:
    found = [number for number, layers in enumerate(ROWS) if of in layers]
    assert found, f"src/{of}: a folder of no row of this test: put it into one"
    return found[0]


def ours(name: str) -> set[str]:
    """The modules of src/ that `name` imports; a package's own parts do not count as imports of it."""
    found = {module for module in imports(MODULES[name]) if module in MODULES}
    return {module for module in found - {name} if not name.startswith(module + ".")}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    own = layer(name)
    for module in ours(name):
        other = layer(module)
        assert other != SCRIPT, f"src/{name} imports the script {module}"
        assert other == own or row(other) < row(own), f"src/{name} imports {module}, which is not of a layer below"


def test_nothing_imports_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        if name not in done:
            for module in ours(name):
                visit(module, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_nobody_imports_a_script():
    scripts = {path.stem for path in python_files("src", "eval") if is_script(path)}
    assert {"gpt2_ft", "gpt2_beam", "gpt2_decode", "measure_scores"} <= scripts
    for path in python_files("src", "eval", "scripts"):
        assert not imports(path) & scripts, f"{path.relative_to(ROOT)} imports a script"


def test_opacus_is_known_to_few():
    knowing = {name for name in MODULES if any(module.split(".")[0] == "opacus" for module in imports(MODULES[name]))}
    assert knowing <= OPACUS


def test_what_the_parts_of_privacy_may_know():
    """clipping knows layers, not privacy; accounting and ledger know numbers, not tensors; randomness knows neither."""
    known = {"privacy.unit_gradients"}
    assert {module for module in ours("privacy.clipping") if module.startswith("privacy.")} == known
    assert not {module for module in ours("privacy.unit_gradients") if module.startswith("privacy")}
    for name in ("privacy.accounting", "privacy.sampled_gaussian", "privacy.allocation", "privacy.loss_grid",
                 "privacy.attack_risk", "privacy.selection", "privacy.ledger", "privacy.auditing"):
        assert not any(module.split(".")[0] == "torch" for module in imports(MODULES[name]))
        assert {module for module in ours(name) if not module.startswith("base")} <= {
            "privacy", "privacy.accounting", "privacy.sampled_gaussian", "privacy.allocation", "privacy.loss_grid"}
    assert not {module for module in ours("privacy.ledger") if module.startswith("privacy.")}
    assert ours("privacy.randomness") <= {"base", "base.device", "base.errors"}
    assert {module for module in ours("privacy.sampling") if module.startswith("privacy.")} == {
        "privacy.randomness", "privacy.allocation", "privacy.sampled_gaussian"}
    for name in MODULES:  # one object owns the sampler, the mechanism and its noise
        if {"privacy.sampling", "privacy.mechanism", "privacy.randomness"} & ours(name):
            assert name.startswith("privacy"), f"src/{name} samples or adds noise beside the plan"


def test_eval_stands_apart():
    known = {name.split(".")[0] for name in MODULES}
    for path in python_files("eval"):
        imported = {module.split(".")[0] for module in imports(path)}
        assert not imported & known, f"{path.relative_to(ROOT)} imports of src/"


def test_no_test_imports_a_test():
    """What two tests share stands in tests/helpers, and not in a conftest.py either, of which there are several."""
    for path in python_files("tests"):
        found = {name for name in imports(path) if name.startswith("test_") or name.split(".")[0] == "conftest"}
        assert not found, f"{path.relative_to(ROOT)} imports {min(found)}: move what both need to helpers/"


@pytest.mark.parametrize("path", python_files("src", "eval", "scripts", "tests"), ids=lambda path: path.name)
def test_files_and_lines_stay_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    long = [number for number, line in enumerate(lines, start=1) if len(line) > LONGEST_LINE]
    assert not long, f"{path.relative_to(ROOT)}: lines {long} are longer than {LONGEST_LINE} characters"


def test_the_checks_catch_what_is_wrong(monkeypatch, tmp_path):
    """Negative controls: the same checks on a tree in which each rule is broken."""
    script = '\nif __name__ == "__main__":\n    pass\n'
    tree = {"model": "from run import loop", "run.loop": "import model", "base.errors": "from privacy import plan",
            "gpt2_ft": f"import gpt2_beam{script}", "gpt2_beam": script, "strange.thing": "x = 1",
            "corpus.texts": "from weights import files", "weights.files": "import model",
            "privacy.plan": "def f():\n    from base import errors\n"}
    for name, text in tree.items():
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        tree[name] = path
    monkeypatch.setattr("test_architecture.SRC", tmp_path)
    monkeypatch.setattr("test_architecture.MODULES", tree)
    for name in ("model", "base.errors", "gpt2_ft", "corpus.texts"):
        with pytest.raises(AssertionError, match="imports"):
            test_imports_point_downward(name)
    with pytest.raises(AssertionError, match="circle"):
        test_nothing_imports_in_a_circle()
    with pytest.raises(AssertionError, match="of no row"):
        row(layer("strange.thing"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_model.py").write_text("def test_it():\n    from test_losses import reference\n")
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    with pytest.raises(AssertionError, match="test_model.py imports test_losses"):
        test_no_test_imports_a_test()
