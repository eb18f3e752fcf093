"""Every configuration key has a meaning on the page of keys, and code that reads it."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from docs.generate import DOCS, configuration, key_table, keys, meanings, sections, value, with_tables
from grpo.config import RunConfig, known_keys
from grpo.config_sections import EnvConfig, LoggingConfig, ObjectiveConfig, RefModelConfig
from grpo.offline_config import OfflineConfig

ROOT = DOCS.parent
CLASSES = (RunConfig, OfflineConfig)


def test_a_key_has_the_comment_on_its_line_or_above_it_as_its_meaning():
    found = meanings(EnvConfig)
    assert found["repeats"] == "group size K: responses sampled for a prompt"
    assert meanings(RefModelConfig)["num_devices"].startswith("Processes that share the batch. 0: the training ranks")
    assert meanings(RefModelConfig)["num_devices"].endswith("null: 0 with LoRA in sync mode, else 1.")
    assert meanings(LoggingConfig)["wandb"].startswith("Weights & Biases")  # inherited


def test_a_row_says_key_type_default_and_meaning():
    rows = key_table(keys(ObjectiveConfig, "objective.")).splitlines()
    assert rows[0] == "| key | type | default | meaning |"
    assert "| `objective.clip_low` | float | `0.2` | ratio is clipped to [1 - clip_low, 1 + clip_high] |" in rows
    style = next(key for key in keys(EnvConfig, "env.") if key.name == "env.style")
    assert r"\<think>" in key_table([style])  # and not an HTML tag
    assert [value(of) for of in (None, True, (0.9, 0.99), {}, 1e-6, "x")] == [
        "null",
        "true",
        "[0.9, 0.99]",
        "{}",
        "1e-06",
        "x",
    ]


@pytest.mark.parametrize("cls", CLASSES)
def test_no_key_is_undocumented(cls):
    found = [key for prefix, section in sections(cls) for key in keys(section, prefix)]
    assert [key.name for key in found if not key.meaning] == []
    assert sorted(key.name for key in found) == sorted(known_keys(cls))


@pytest.mark.parametrize("page", ["configuration.md", "memory.md"])
def test_the_committed_page_is_what_the_code_gives(page):
    committed = (DOCS / page).read_text()
    assert committed == (configuration() if page == "configuration.md" else with_tables(committed)), "make docs"


class Types(ast.NodeVisitor):
    """Which classes of the package the expressions of its sources may be instances of, from annotations and assignments.

    Enough to tell `config.train.epochs` of a RunConfig from any other `.epochs`: names and attributes are followed through
    parameters, fields, `self`, calls, tuples and local variables, as a union where there are several.
    """

    def __init__(self, trees: list[ast.Module]) -> None:
        self.bases: dict[str, list[str]] = {}
        self.attributes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # types of a class's fields
        self.returns: dict[str, set[str]] = defaultdict(set)  # of functions
        self.aliases: dict[str, ast.expr] = {}
        self.fields: set[tuple[str, str]] = set()  # (class, field) of every annotated field
        self.reads: set[tuple[str, str]] = set()
        classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for node in classes:
            self.bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
        for tree in trees:
            for node in tree.body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    self.aliases[node.targets[0].id] = node.value
        for node in classes:
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    self.attributes[node.name][item.target.id] |= self.of_annotation(item.annotation)
                    self.fields.add((node.name, item.target.id))
                if isinstance(item, ast.FunctionDef):
                    self.attributes[node.name][item.name] |= self.of_annotation(item.returns)
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.returns[node.name] |= self.of_annotation(node.returns)
        for _ in range(3):  # what one pass learns of `self.x = ...`, the next one reads
            for tree in trees:
                self.scopes: list[dict[str, set[str]]] = [defaultdict(set)]
                self.owner = None
                self.visit(tree)

    def of_annotation(self, annotation: ast.expr | None) -> set[str]:
        found = set()
        for node in ast.walk(annotation) if annotation is not None else ():
            name = node.id if isinstance(node, ast.Name) else getattr(node, "value", None)
            if isinstance(name, str):
                found |= {name} & self.bases.keys()
                if isinstance(node, ast.Name) and isinstance(self.aliases.get(name), ast.BinOp):  # Config = A | B
                    found |= self.of_annotation(self.aliases[name])
        return found

    def family(self, name: str) -> set[str]:
        """A class with its bases and what derives from it: an attribute may be declared in any of them."""
        up, derived = {name}, {name}
        for _ in range(4):
            up |= {base for cls in up for base in self.bases.get(cls, ())}
            derived |= {cls for cls, bases in self.bases.items() if derived & set(bases)}
        return up | derived

    def of(self, node: ast.expr) -> set[str]:
        """The classes that `node` may be an instance of."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), set())
        if isinstance(node, ast.Attribute):
            owners = {cls for owner in self.of(node.value) for cls in self.family(owner)}
            if isinstance(node.ctx, ast.Load):
                self.reads |= {(owner, node.attr) for owner in owners}
            return set().union(*(self.attributes[owner][node.attr] for owner in owners))
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            if name in ("replace", "cast") and node.args:
                return self.of(node.args[0])
            return self.of(node.func) | self.returns.get(name, set()) | ({name} & self.bases.keys())
        if isinstance(node, ast.IfExp):
            return self.of(node.body) | self.of(node.orelse)
        return set()

    def bind(self, target: ast.expr, source: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(source, ast.Tuple):
            for one, its in zip(target.elts, source.elts, strict=True):
                self.bind(one, its)
        elif isinstance(target, ast.Name):
            self.scopes[-1][target.id] |= self.of(source)
        elif isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self" and self.owner:
            self.attributes[self.owner][target.attr] |= self.of(source)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.owner = self.owner, node.name
        self.generic_visit(node)
        self.owner = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if self.owner in CONFIGS and node.name == "__post_init__":  # a check of a value is no use of it
            return
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scopes.append(defaultdict(set, {a.arg: self.of_annotation(a.annotation) for a in arguments}))
        if self.owner and arguments and arguments[0].arg == "self":
            self.scopes[-1]["self"] = {self.owner}
        self.generic_visit(node)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self.bind(item.optional_vars, item.context_expr)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.of(node)
        self.generic_visit(node)


CONFIGS = {section.__name__ for cls in CLASSES for _, section in sections(cls)}


def unread(sources: list[str]) -> set[str]:
    """Keys, as Class.field, of the configuration classes in CONFIGS that none of the sources reads."""
    types = Types([ast.parse(source) for source in sources])
    own = {(cls, name) for cls, name in types.fields if cls in CONFIGS and not types.attributes[cls][name] & CONFIGS}
    return {f"{cls}.{name}" for cls, name in own if not any((its, name) in types.reads for its in types.family(cls))}


def package() -> list[str]:
    paths: list[Path] = [*(ROOT / "grpo").rglob("*.py"), *ROOT.glob("*.py")]
    return [path.read_text() for path in paths]


def test_every_key_is_read_by_code():
    assert unread(package()) == set()


@pytest.mark.parametrize(
    ("reader", "read"),
    [
        ("def f(config: RunConfig): return config.train.kl_margin", set()),  # no key of that section
        ("def f(config): return config.objective.kl_margin", set()),  # of nobody knows what
        ("def f(config: RunConfig): config.objective.kl_margin = 1", set()),  # written
        ("def f(config: RunConfig): return config.objective.kl_margin", {"ObjectiveConfig.kl_margin"}),
        ("def f(objective: ObjectiveConfig): return [objective.kl_margin for _ in 'ab']", {"ObjectiveConfig.kl_margin"}),
        ("def f(config: 'RunConfig'):\n  a, b = config.objective, 1\n  return a.kl_margin", {"ObjectiveConfig.kl_margin"}),
        (
            "class A:\n  def __init__(self, config: RunConfig): self.mine = config.objective\n"
            "class B(A):\n  def f(self): return self.mine.kl_margin",
            {"ObjectiveConfig.kl_margin"},
        ),
        ("def g() -> RunConfig: ...\ndef f(): return g().objective.kl_margin", {"ObjectiveConfig.kl_margin"}),
    ],
)
def test_a_read_is_known_by_the_type_of_what_it_is_read_from(reader, read):
    declared = [(ROOT / "grpo" / name).read_text() for name in ("config.py", "config_sections.py", "offline_config.py")]
    without, found = unread(declared), unread([*declared, reader])
    assert "ObjectiveConfig.kl_margin" in without
    assert without - found == read


def test_a_key_that_is_only_checked_is_not_read():
    extra = "    nobody: int = 1\n\n    def __post_init__(self) -> None:\n        assert self.nobody\n"
    sources = [source.replace("class RefModelConfig:\n", f"class RefModelConfig:\n{extra}") for source in package()]
    assert unread(sources) == {"RefModelConfig.nobody"}
