"""``import helix_gateway``: instant, and its public names come from the rooms that own them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import helix_gateway

ROOT = Path(__file__).resolve().parent.parent


def test_importing_the_package_imports_nothing_else_of_weight():
    code = "import sys, helix_gateway; print({'torch', 'transformers', 'numpy', 'msgspec'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", sorted(set(helix_gateway.__all__) - {"__version__"}))
def test_every_public_name_is_the_one_of_its_room(name):
    thing = getattr(helix_gateway, name)
    assert thing.__name__ == name
    assert thing.__module__.startswith("helix_gateway.")
    assert name in dir(helix_gateway)


def test_an_unknown_name_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Heliks'"):
        _ = helix_gateway.Heliks


# Imported under another name than their package's, or by a library that leaves the choice to its users.
MODULES = {
    "typing-extensions": "typing_extensions",
    "huggingface-hub": "huggingface_hub",
    "prometheus-client": "prometheus_client",
    "prompt-toolkit": "prompt_toolkit",
    "pydantic-settings": "pydantic_settings",
}
OF_PYDANTIC = {"annotated_types", "pydantic_core"}  # pydantic cannot be without them
OPTIONAL = {"matplotlib", "opentelemetry", "torch_directml", "watchfiles"}  # extras, or development


def third_party_imports():
    for file in ROOT.glob("helix_gateway/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0]


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject, re.MULTILINE | re.DOTALL)[1]
    declared = {MODULES.get(name, name) for name in re.findall(r'^ +"([a-z0-9-]+)', block, re.MULTILINE)}
    imported = set(third_party_imports()) - sys.stdlib_module_names - {"helix_gateway"} - OPTIONAL
    assert imported - OF_PYDANTIC == declared
