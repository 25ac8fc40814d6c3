"""The layering and completeness rules of docs/architecture.md, checked by reading the tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "flatquant"
DOC = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NOT_OURS = {".git", ".venv", "build", "dist", "out", "shared", "__pycache__"}
TEXT = {"", ".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".sh", ".yaml", ".jsonl"}


def files(*suffixes: str, under: str = ".") -> list[Path]:
    """The project's own files with one of the suffixes."""
    found = []
    for path in sorted((ROOT / under).rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part in NOT_OURS or part.endswith((".egg-info", "_cache")) for part in parts)
        if path.is_file() and path.suffix in suffixes and not hidden:
            found.append(path)
    return found


def block(name: str) -> list[str]:
    """The lines of a fenced block of docs/architecture.md."""
    match = re.search(rf"```{name}\n(.*?)```", DOC, re.DOTALL)
    assert match, f"docs/architecture.md has no block {name!r}"
    return match[1].splitlines()


def imports(path: Path, *, late: bool = True) -> Iterator[str]:
    """Full names of the modules a file imports; `late` counts those inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def matching(pattern: str, paths: list[Path]) -> list[str]:
    """Places "file:line" where a pattern stands."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def cpp() -> list[Path]:
    return files(".h", ".cuh", ".cpp", ".cu", under="csrc")


def test_torch_headers_stand_only_in_the_binding() -> None:
    outside = [path for path in cpp() if "torch" not in path.relative_to(ROOT / "csrc").parts]
    assert matching(r"#\s*include\s*[<\"](torch|ATen|c10)/", outside) == []


def test_cuda_headers_stand_only_with_the_cuda_kernels() -> None:
    allowed = {
        ROOT / "csrc" / "torch" / "ops_cuda.cpp",
        *files(".cu", ".cuh", ".h", under="csrc/cuda"),
    }
    outside = [path for path in cpp() if path not in allowed]
    assert matching(r"#\s*include\s*[<\"](cuda|cute|cutlass|cub|nv/)", outside) == []


def test_kernels_do_not_include_the_binding() -> None:
    kernels = [path for path in cpp() if path.parent.name in ("csrc", "cpu", "cuda")]
    assert matching(r"#\s*include\s*\"(\.\./)?torch/", kernels) == []


def test_no_unsafe_floating_point_flags() -> None:
    sources = [*cpp(), *files(".py", ".toml", ".txt", ".sh"), ROOT / "Makefile"]
    sources = [path for path in sources if path != Path(__file__).resolve()]
    allowed = r"(never|without|no|not) [`\"']?-?-?(use_fast_math|ffast-math)"
    found = matching(r"use_fast_math|ffast-math|Ofast|funsafe-math", sources)
    assert [line for line in found if not re.search(allowed, line)] == []


def test_ops_package_knows_nothing_of_the_method() -> None:
    for path in files(".py", under="flatquant_cuda"):
        names = [name.split(".")[0] for name in imports(path)]
        assert "flatquant" not in names, path
        assert "transformers" not in names, path


def test_argparse_stops_in_the_command_line() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in files(".py")
        if any(name.split(".")[0] == "argparse" for name in imports(path))
    }
    allowed = {"python/flatquant/cli.py", "flatquant_cuda/__main__.py"}
    scripts = ("bench/", "tests/")
    assert {user for user in users if not user.startswith(scripts)} <= allowed


def test_import_direction() -> None:
    ranks = {
        unit: rank for rank, line in enumerate(reversed(block("layers"))) for unit in line.split()
    }
    wrong = []
    for path in files(".py", under="python/flatquant"):
        relative = path.relative_to(PACKAGE)
        unit = relative.parts[0].removesuffix(".py")
        assert unit in ranks, f"docs/architecture.md does not say where {relative} stands"
        late = unit not in ("cli", "demo", "__main__")
        for name in imports(path, late=late):
            parts = name.split(".")
            if parts[0] != "flatquant" or len(parts) == 1:
                continue
            if ranks.get(parts[1], -1) > ranks[unit]:
                wrong.append(f"{relative} imports {name}")
    assert wrong == []


def test_import_layers_name_only_what_exists() -> None:
    named = {unit for line in block("layers") for unit in line.split()}
    present = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/*.py")
    }
    assert named == present


def test_hooks_stand_only_where_modules_are_watched_or_replaced() -> None:
    allowed = {PACKAGE / "surgery.py", PACKAGE / "capture.py"}
    others = [path for path in files(".py", under="python") if path not in allowed]
    assert matching(r"register_\w*(forward|backward)\w*hook", others) == []


def test_no_drawers() -> None:
    names = {"utils", "util", "helpers", "helper", "common", "misc"}
    everything = files(".py", ".h", ".cuh", ".cpp", ".cu")
    assert [path for path in everything if path.stem in names] == []


def test_tree_in_the_document_is_the_tree_on_disk() -> None:
    drawn = {match[1] for line in block("tree") if (match := re.match(r"(\w+)/", line))}
    code = files(".py", ".cpp", ".h", ".cu", ".sh", ".md")
    present = {parts[0] for path in code if len(parts := path.relative_to(ROOT).parts) > 1}
    assert drawn == {name for name in present if not name.startswith(".")}


def test_document_names_every_cuda_kernel() -> None:
    kernels = [path.name for path in files(".cu", under="csrc/cuda")]
    assert [name for name in kernels if f"`{name}`" not in DOC] == []


def test_project_text_names_no_machine() -> None:
    """A path in somebody's home or scratch folder works on one machine only."""
    sources = [path for path in files(*TEXT) if path != Path(__file__).resolve()]
    found = matching(r"(?<![\w.])/(home|root|work|Users|tmp|mnt)/\w", sources)
    assert found == []


def schemas() -> list[str]:
    text = (ROOT / "csrc" / "torch" / "schema.cpp").read_text(encoding="utf-8")
    return re.findall(r"m\.def\(\s*\"(\w+)\(", text)


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_schemas_are_found() -> None:
    assert len(schemas()) >= 10


@pytest.mark.parametrize("op", schemas())
def test_op_is_complete(op: str) -> None:
    """A new op needs all of these; the assertion names what is missing."""
    kernels = "\n".join(
        path.read_text(encoding="utf-8") for path in files(".cpp", under="csrc/cpu")
    )
    assert re.search(rf"\bvoid {op}\(const \w+& ", kernels), "csrc/cpu: no kernel"
    binding = (ROOT / "csrc/torch/ops_cpu.cpp").read_text(encoding="utf-8")
    assert f"FQ_CPU_OP({op});" in binding, "csrc/torch/ops_cpu.cpp: no line"
    wrappers = functions("flatquant_cuda/ops.py")
    assert op in wrappers, "flatquant_cuda/ops.py: no wrapper"
    text = (ROOT / "flatquant_cuda/ops.py").read_text(encoding="utf-8")
    has_fake = f"_fake_{op}" in wrappers or f'_register_fake("{op}", ' in text
    assert has_fake, "flatquant_cuda/ops.py: no fake"
    assert op in functions("flatquant_cuda/reference.py"), "flatquant_cuda/reference.py: nothing"
    cases = (ROOT / "tests/ops/cases.py").read_text(encoding="utf-8")
    assert re.search(rf"[\"']{op}[\"']", cases), "tests/ops/cases.py: no row"
    assert op in DOC, "docs/architecture.md: not in the table of kernels"


def test_every_method_is_explained() -> None:
    text = (PACKAGE / "methods" / "__init__.py").read_text(encoding="utf-8")
    table = text[text.index("METHODS:") :]
    names = re.findall(r'^    "([\w-]+)": ', table, re.MULTILINE)
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert len(names) >= 5
    assert [name for name in names if f"| `{name}` |" not in page] == []
