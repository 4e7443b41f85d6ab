"""``import helix_gateway``: instant, and its public names come from the rooms that own them."""

import subprocess
import sys

import pytest

import helix_gateway


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
