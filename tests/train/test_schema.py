"""The JSON schema of recipes: what the package ships is valid by it, and what `train` refuses is not."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from helpers.command_line import spikeloom

import spikeloom as package
from spikeloom.registry import list_recipes, recipe_text
from spikeloom.train.schema import recipe_schema

RECIPES = Path(package.__file__).parent / "recipes"


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads((RECIPES / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_file_is_that_of_today() -> None:
    result = spikeloom("schema")
    assert result.code == 0
    assert json.loads(result.out) == recipe_schema()
    assert result.out == (RECIPES / "schema.json").read_text(), (
        "run: spikeloom schema > src/spikeloom/recipes/schema.json"
    )


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_name_it_and_are_valid(name: str, validator: Any) -> None:
    text = recipe_text(name)
    assert text.startswith("#:schema ../schema.json\n")
    assert [error.message for error in validator.iter_errors(tomllib.loads(text))] == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("epoch = 190", "epochs = 190"),
        ('schedule = "steps"', 'schedule = "step"'),
        ("batch_size = 0", "batch_size = 128"),
        ('name = "cifar"', 'name = "cifar10"'),
        ('name = "report_vgg"', 'name = "report_vgg16"'),
        ("[budgets.tiny]", "[budgets.smoke]"),
        ("[setting]", "[settings]"),
        ("datas.subset = 64", "data.subset = 64"),
        ("systems =", "system ="),
    ],
)
def test_a_slip_is_found(wrong: str, right: str, validator: Any) -> None:
    text = recipe_text("report/table1")
    assert right in text
    assert list(validator.iter_errors(tomllib.loads(text.replace(right, wrong, 1))))
