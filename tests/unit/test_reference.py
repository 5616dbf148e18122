"""docs/reference.md has every public name; each has a docstring and an example that runs."""

import inspect
import re

import pytest

import aiohttp_smg_routing
from aiohttp_smg_routing import testing
from aiohttp_smg_routing.config import OPTIONS

from ..reference import PUBLIC, examples, examples_of, page, run, texts

HERE = examples(on_a_gateway=False)  # tests/gateway has the others


def of_a_base(name: str) -> bool:
    """Tell whether a base class outside the package defines a member, and so documents it."""
    owner, _, member = name.partition(".")
    cls = getattr(aiohttp_smg_routing, owner, None) or getattr(testing, owner)
    bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith("aiohttp_smg")]
    return any(member in vars(base) for base in bases)


MEMBERS = [name for name in texts() if "." in name and not of_a_base(name)]


def test_the_page_has_every_public_name_and_no_other() -> None:
    assert sorted(page()) == sorted(PUBLIC)


@pytest.mark.parametrize("name", sorted({name.partition(".")[0] for name in MEMBERS}))
def test_the_page_has_every_member_of_a_class_but_those_it_names(name: str) -> None:
    assert re.search("^:members:$", page()[name], re.MULTILINE)


@pytest.mark.parametrize("name", [*PUBLIC, *MEMBERS])
def test_it_has_a_text(name: str) -> None:
    assert texts()[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_its_default(name: str) -> None:
    assert re.search(r"Default:|\(the default\)|Required", texts()[f"RoutingConfig.{name}"])


@pytest.mark.parametrize("name", PUBLIC)
def test_a_name_has_an_example(name: str) -> None:
    value = getattr(aiohttp_smg_routing, name, None) or getattr(testing, name, None)
    its = examples_of(name)
    assert its
    # The example of install() calls nothing: it would reach the apps of other tests.
    assert f"{name}(" in its or not inspect.isfunction(value)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_has_an_example(name: str) -> None:
    owner, _, member = name.partition(".")
    assert re.search(rf"\.{member}\b|\b{member}=", examples_of(owner))


@pytest.mark.parametrize("name", HERE)
async def test_an_example_does_what_it_says(name: str) -> None:
    await run(HERE[name])
