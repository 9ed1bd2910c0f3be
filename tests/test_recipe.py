"""Recipes: what is refused, what a pattern skips, and that they can key a compiled function."""

import dataclasses

import pytest

from jfp4.recipe import RECIPES, Recipe, get_recipe


def test_presets():
    assert set(RECIPES) == {"bf16", "fp8", "fp4", "fp4_cast"}
    assert RECIPES["fp4"] == Recipe()
    assert not RECIPES["bf16"].quantizes
    cast = RECIPES["fp4_cast"]
    assert (cast.x_format, cast.w_format, cast.grad_format) == ("e2m1", "e2m1", "e5m2")
    assert cast.dge_k is None and cast.occ_alpha is None and cast.quantizes
    assert RECIPES["fp8"] == dataclasses.replace(cast, x_format="e4m3", w_format="e4m3")


def test_the_default_is_the_paper():
    r = Recipe()
    assert (r.x_format, r.w_format, r.grad_format) == ("e2m1", "e2m1", "e5m2")
    assert (r.x_scale, r.w_scale, r.x_shift, r.w_shift) == ("token", "channel", None, None)
    assert (r.dge_k, r.dge_cap, r.occ_alpha, r.occ_compensation) == (5.0, 3.0, 0.99, "operand")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"x_format": None}, ["x_format", "w_format"]),
        ({"w_format": None}, ["x_format", "w_format"]),
        ({"x_format": "e9m9", "occ_alpha": None}, ["e9m9"]),
        ({"w_format": "e9m9"}, ["e9m9"]),
        ({"dge_k": 0.5}, ["k=0.5"]),
        ({"dge_k": float("nan")}, ["k=nan"]),
        ({"dge_k": float("inf")}, ["k=inf"]),
        ({"dge_cap": float("inf")}, ["cap=inf"]),
        ({"dge_cap": 0.0}, ["cap=0"]),
        ({"dge_cap": float("nan")}, ["cap=nan"]),
        ({"w_format": "e4m3"}, ["dge_k", "w_format", "e4m3"]),
        ({"occ_alpha": 0.5}, ["alpha=0.5"]),
        ({"occ_alpha": 1.01}, ["alpha=1.01"]),
        ({"occ_alpha": float("nan")}, ["alpha=nan"]),
        ({"occ_sample": 0}, ["sample=0"]),
        ({"occ_sample": 1.5}, ["sample=1.5"]),
        ({"x_format": "e4m3"}, ["occ_alpha", "x_format", "e4m3"]),
        ({"x_shift": "midrange"}, ["x_shift", "occ_alpha"]),
        ({"skip": "*lm_head*"}, ["skip='*lm_head*'", "tuple"]),
        ({"skip": (1,)}, ["skip=(1,)", "tuple"]),
    ],
    ids=str,
)
def test_refuses_what_has_no_meaning_and_names_it(fields, named):
    with pytest.raises(ValueError) as error:
        Recipe(**fields)
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    "fields",
    [
        {"dge_k": 1.0, "dge_cap": 1e-3},
        {"occ_alpha": 1.0, "occ_sample": None},
        {"occ_alpha": None, "x_shift": "midrange", "occ_sample": 0},
        {"x_shift": "mean", "w_shift": "midrange"},
        {"x_format": "e1m2", "w_format": "e3m0"},
        {"x_format": "e5m2", "w_format": "e5m2", "dge_k": None, "occ_alpha": None},
        {"x_format": None, "w_format": None, "dge_k": 0.0, "occ_alpha": 7.0},
        {"dge_k": None, "dge_cap": -1.0},
    ],
    ids=str,
)
def test_accepts(fields):
    Recipe(**fields)


@pytest.mark.parametrize(
    ("path", "applies"),
    [
        ("layers.0.attention.q", True),
        ("embed", False),
        ("model.embed.table", False),
        ("lm_head", False),
        ("decoder.lm_head", False),
        ("Embed", True),
        ("lm.head", True),
        ("", True),
    ],
)
def test_applies_to_by_default(path, applies):
    assert Recipe().applies_to(path) is applies
    assert RECIPES["bf16"].applies_to(path) is False


def test_skip_patterns_match_whole_paths():
    r = Recipe(skip=("layers.0.*", "*.w[12]"))
    assert not r.applies_to("layers.0.mlp.up") and not r.applies_to("layers.3.w2")
    assert r.applies_to("layers.10.mlp.up") and r.applies_to("layers.3.w3")
    assert r.applies_to("embed") and Recipe(skip=()).applies_to("lm_head")


def test_inert_fields_are_those_that_another_switches_off():
    assert Recipe().inert == {}
    assert RECIPES["fp8"].inert == {
        "dge_cap": "dge_k is None",
        "occ_sample": "occ_alpha is None",
        "occ_compensation": "occ_alpha is None",
    }
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert RECIPES["bf16"].inert.keys() == fields - {"x_format", "w_format"}


def test_hashable_and_frozen():
    assert hash(Recipe()) == hash(Recipe()) and Recipe() == Recipe()
    assert len({Recipe(), Recipe(dge_k=3.0), RECIPES["fp4"]}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().dge_k = 3.0


def test_get_recipe():
    r = Recipe(dge_k=3.0)
    assert get_recipe(r) is r
    assert get_recipe("fp4_cast") is RECIPES["fp4_cast"]


@pytest.mark.parametrize("recipe", [None, 4])
def test_what_is_neither_a_name_nor_a_recipe(recipe):
    with pytest.raises(TypeError, match=f"recipe is {type(recipe).__name__}; expected a Recipe or"):
        get_recipe(recipe)


@pytest.mark.parametrize(("name", "near"), [("fp4cast", "fp4_cast"), ("bf61", "bf16"), ("FP8", "")])
def test_unknown_recipe_offers_near_names(name, near):
    with pytest.raises(ValueError, match=f"recipe='{name}' is unknown") as error:
        get_recipe(name)
    message = str(error.value)
    assert all(preset in message.split("expected one of")[1] for preset in RECIPES)
    assert (f"did you mean {near}" in message) if near else ("did you mean" not in message)


@pytest.mark.parametrize("field", ["x_format", "grad_format", "x_scale", "w_shift"])
def test_choices_are_held_to(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}='none'; expected one of "):
        dataclasses.replace(RECIPES["fp4"], **{field: "none"})
