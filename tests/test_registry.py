"""Registries: order, names, and messages that help."""

from __future__ import annotations

import pytest

import spikeloom
from spikeloom.errors import DataFileError, UsageError
from spikeloom.layers import COMBINE
from spikeloom.models import MODELS
from spikeloom.neurons import NEURONS
from spikeloom.registry import Registry, nearest, recipe_text
from spikeloom.surrogates import SURROGATES


def test_entries_in_order_of_registration() -> None:
    registry: Registry[object] = Registry("thing")

    @registry.register
    def zebra() -> None: ...

    @registry.named("ape")
    def _() -> None: ...

    registry.register(int, "bee")
    assert list(registry) == ["zebra", "ape", "bee"]
    assert len(registry) == 3
    assert registry["zebra"] is zebra
    assert "bee" in registry
    assert "wasp" not in registry
    assert registry.names() == ["ape", "bee", "zebra"]
    assert registry.names("*e*") == ["ape", "bee", "zebra"]
    assert registry.names("b?e") == ["bee"]
    assert registry.names("none") == []


def test_names_are_taken_once() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register(1, "one")
    with pytest.raises(ValueError, match=r"a thing named 'one' cannot be registered"):
        registry.register(2, "one")
    with pytest.raises(ValueError, match=r"a thing named '' cannot be registered"):
        registry.register(3)
    assert registry["one"] == 1


def test_unknown_name_tells_the_nearest() -> None:
    registry: Registry[int] = Registry("thing")
    for n, name in enumerate(("report_vgg16", "report_vgg19", "mlp")):
        registry.register(n, name)
    with pytest.raises(
        UsageError, match=r"^unknown thing 'report_vgg61'; did you mean report_vgg1\d or report_vgg1\d\?$"
    ):
        registry["report_vgg61"]
    with pytest.raises(UsageError, match=r"^unknown thing 'MLP'; did you mean mlp\?$"):
        registry["MLP"]
    with pytest.raises(UsageError, match=r"^unknown thing 'qqq'; known: mlp, report_vgg16, report_vgg19$"):
        registry["qqq"]
    with pytest.raises(UsageError, match="known: none"):
        Registry("empty")["x"]


def test_long_lists_are_cut() -> None:
    assert nearest("?", [f"n{i:02}" for i in range(30)]).endswith("n10, n11, ...")


def test_usage_errors_are_value_errors() -> None:
    assert issubclass(UsageError, ValueError)
    assert issubclass(DataFileError, UsageError)
    assert spikeloom.UsageError is UsageError


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (NEURONS, {"IF", "LIF", "PLIF"}),
        (COMBINE, {"add", "and", "iand"}),
        (SURROGATES, {"ATan", "Sigmoid", "Triangle"}),
        (
            MODELS,
            {
                "report_vgg16",
                "report_vanilla_resnet34",
                "report_sew_resnet34",
                "report_ms_resnet34",
                "colored_mnist_net",
            },
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Registry) else "",
)
def test_public_names_exist(registry: Registry[object], names: set[str]) -> None:
    assert names <= set(registry)


def test_the_text_of_a_recipe_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"^unknown recipe 'quickstart/digts'; did you mean quickstart/digits"):
        recipe_text("quickstart/digts")
