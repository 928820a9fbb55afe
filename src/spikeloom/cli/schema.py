"""`spikeloom schema`: what a recipe may hold, for editors."""

from __future__ import annotations

import json


def schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them.

    \b
    spikeloom schema > recipe.schema.json      # then, at the top of a recipe: #:schema ./recipe.schema.json
    """
    from spikeloom.train.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))
