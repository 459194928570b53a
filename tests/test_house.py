"""The house: which room may import which, what the decoder may know, how long a file may be, how light an import is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mini_forge

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mini_forge"
# A module imports only from its own room and from those to the left of it.
ROOMS = ["quick_imports", "errors", "json_faults", "durable", "user_cache", "config", "model", "data", "io",
         "inference", "training", "providers", "forms", "inputs", "prepare", "settings", "checkpoints", "stages",
         "resume", "run", "use", "export", "plots", "report", "memory_items", "memory_plan", "check", "bench",
         "progress", "cli", "__main__"]  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else ""


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mini_forge":
            yield from [node.module] if node.module != "mini_forge" else [f"mini_forge.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "mini_forge")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    own = "config" if own.startswith("config") else own
    for name in imports(path):
        room = "config" if room_of(name).startswith("config") else room_of(name)
        if room in ("", "__version__"):
            continue
        assert ROOMS.index(room) <= ROOMS.index(own), f"{path.name} ({own}) imports {name}"


def test_training_and_inference_do_not_know_each_other_or_the_config():
    for path in [*(PACKAGE / "training").glob("*.py"), *(PACKAGE / "inference").glob("*.py")]:
        rooms = {room_of(name) for name in imports(path)}
        assert not rooms & {"config"}, path
        assert not (path.parent.name == "training" and "inference" in rooms), path


def test_the_decoder_names_no_family():
    text = (PACKAGE / "model" / "decoder.py").read_text().lower()
    for family in ("llama", "mistral", "qwen", "gpt", "gemma", "phi", "mixtral", "smollm", "granite"):
        assert family not in text


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_under_400_lines(path):
    assert path.read_text().count("\n") <= 400


def test_kernels_is_not_an_importable_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_mini_forge_loads_no_torch():
    code = "import sys, mini_forge; mini_forge.ConfigError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize(("imports", "is_frozen"), [
    ("mini_forge.train", False), ("from mini_forge.cli import main; main(['check', 'no such file'])", False),
    ("from mini_forge.cli import main; sys.argv[1:] = ['check', 'no such file']; main()", True),
])  # fmt: skip
def test_imports_collect_no_garbage_and_a_command_leaves_aside_what_they_made(imports, is_frozen, collects):
    code = f"""
import gc, sys
import mini_forge
started = []
gc.callbacks.append(lambda phase, info: started.append("torch.nn" in sys.modules) if phase == "start" else None)
{"" if collects else "gc.disable()"}
{imports}
assert "torch.nn" in sys.modules
print(gc.get_freeze_count() > 100_000, gc.isenabled(), sum(started) <= 1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == f"{is_frozen} {collects} True\n"  # one at most: when they are allowed again


def test_every_public_name_resolves():
    import mini_forge

    assert all(getattr(mini_forge, name) is not None for name in mini_forge.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mini_forge.nonsense  # noqa: B018


def test_nothing_outside_the_declared_dependencies_is_imported():
    allowed = {"torch", "safetensors", "tokenizers", "bitsandbytes", "numpy", "jinja2", "huggingface_hub", "tqdm",
               "mini_forge", "mini_forge_kernels"} | set(sys.stdlib_module_names)  # fmt: skip
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            extra = {"gguf"} if path.parent.name == "export" else set()
            assert {n.split(".")[0] for n in names} <= allowed | extra, path


def test_type_checkers_are_told_of_every_public_name():
    told = {
        {"schedule": "schedules"}.get(alias.name, alias.asname): f"{node.module}.{alias.name}"
        for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {name: f"mini_forge.{place}.{name}" for name, place in mini_forge._WHERE.items()}
    assert told == names | {name: f"mini_forge.{place}" for name, place in mini_forge._MODULES.items()}
