"""The JSON schema of recipes, by which editors complete and check them: `spikeloom schema`."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from spikeloom.train.recipe import BUDGETS, SUPPLIED, Recipe, options_model
from spikeloom.train.settings import MeasureSettings, Settings

Json = dict[str, Any]
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _Lenient(GenerateJsonSchema):
    """Values that recipes cannot write, such as functions, may be anything."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Json:
        return {}


def recipe_schema() -> Json:
    """The schema of a recipe file, with the names and options of all registries."""
    schema = _of(Recipe)
    definitions: Json = schema.setdefault("$defs", {})
    settings = _of(Settings)
    measured = _of(MeasureSettings)
    definitions |= settings.pop("$defs", {}) | measured.pop("$defs", {})
    properties: Json = {**measured["properties"], **settings["properties"]}
    properties |= _named_parts()
    definitions["Overrides"] = {"type": "object", "additionalProperties": False, "properties": properties}
    _open_tables(definitions)
    overrides = {"$ref": "#/$defs/Overrides"}
    budgets = {"type": "object", "properties": dict.fromkeys(BUDGETS, overrides), "additionalProperties": False}
    row: Json = definitions["Row"]
    row["properties"] |= properties | {"budgets": budgets}
    row["additionalProperties"] = False
    schema["properties"] |= {"settings": overrides, "budgets": budgets}
    schema["required"] = [key for key in schema["required"] if key != "name"]  # the file's own
    del schema["properties"]["name"]
    return {"$schema": _DIALECT, "title": "Recipe of Spikeloom", **schema}


def _of(model: type[BaseModel]) -> Json:
    return copy.deepcopy(model.model_json_schema(schema_generator=_Lenient))


def _named_parts() -> Json:
    """Data set, model and neuron: their names, and any option of any of them."""
    from spikeloom.data import DATASETS
    from spikeloom.models import MODELS
    from spikeloom.neurons import NEURONS
    from spikeloom.train.settings import DataSettings

    parts: Json = {}
    for part, registry in (("data", DATASETS), ("model", MODELS), ("neuron", NEURONS)):
        options: Json = _of(DataSettings)["properties"] if part == "data" else {}
        for name in registry:
            found = _of(options_model(registry[name], frozenset(SUPPLIED[part]))).get("properties", {})
            options = {**{key: _loose(value) for key, value in found.items()}, **options}
        names: Json = {"enum": list(registry), "description": _lines(registry)}
        table = {"type": "object", "properties": {**options, "name": names}, "additionalProperties": False}
        parts[part] = {"anyOf": [table, names]}
    return parts


def _loose(option: Json) -> Json:
    """An option of one entry: others may have one of this name and another type."""
    return {key: value for key, value in option.items() if key in ("description", "title")}


def _lines(registry: Any) -> str:
    docs = ((name, inspect.getdoc(registry[name]) or "") for name in registry)
    return "\n".join(f"{name}: {doc.splitlines()[0]}" if doc else name for name, doc in docs)


def _open_tables(definitions: Json) -> None:
    """Nothing is required of a part of the settings, as another part may have it; a name may stand for its table."""
    for name, definition in definitions.items():
        if name != "Row":
            definition.pop("required", None)
    for name in ("Named", "PenaltySettings"):
        definitions[name] = {"anyOf": [definitions[name], {"type": "string"}]}
