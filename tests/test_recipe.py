"""Recipes: strict keys and values, nearest spellings, overrides, and a way back to YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from nab_defense.recipe import REFUSED, key_values, load_recipe, parse_recipe
from nab_defense.schema import Recipe

LEAST = {"name": "least", "data": {"source": "digits"}}


def parsed(*overrides: str, **sections: object) -> Recipe:
    return parse_recipe({**LEAST, **sections}, overrides, "least")


def test_defaults() -> None:
    recipe = parsed()
    assert (recipe.attack, recipe.baselines, recipe.rule, recipe.model.name) == (None, (), "expand", "resnet18")
    assert recipe.data.strict and recipe.stamp.value == "mean" and recipe.scan.detector == "lga"


def test_the_file_names_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {source: digits}")
    assert load_recipe(path).name == "mine"
    path.write_text("name: other\ndata: {source: digits}")
    assert load_recipe(path).name == "other" and load_recipe(path, ["name=third"]).name == "third"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {}}, "key 'data.source' is missing"),
        ({"data": None}, "key 'data' is missing"),
        ({"data": "digits"}, "data='digits': expected keys such as source, test"),
        ({"train": {"epcohs": 3}}, "no key 'train.epcohs'; known here: epochs, .*; did you mean 'epochs'?"),
        ({"detector": "knn"}, "no key 'detector'; .*; did you mean 'scan.detector'?"),
        ({"epcohs": 3}, "no key 'epcohs'; .*; did you mean 'train.epochs'?"),
        ({"trian": {"epochs": 3}}, "did you mean 'train'?"),
        ({"relabel": {"encoder": {"nam": "x"}}}, "no key 'relabel.encoder.nam'; known here: name, .*; did you mean 'name'?"),
        ({"scan": {"rank": 2}}, "settings of what it names go in 'scan.params.rank'"),
        ({"model": {"img_size": 32}}, "'model.kwargs.img_size'"),
        ({"data": {"source": "digits", "mean": ["a"]}}, "data.mean.0='a': input should be a valid number"),
        ({"stamp": {"value": "red"}}, "stamp.value='red': .*number.* or input should be 'mean' or 'noise'$"),
        ({"rule": "papre"}, "rule='papre': input should be 'expand' or 'paper'"),
        ({"seed": -1, "fraction": 0}, "seed=-1: .*greater than or equal to 0 \\(and 1 more\\)"),
        ({"baselines": ["oracel"]}, "baselines.0='oracel': input should be 'undefended' or 'oracle'"),
        ({"xyzzy": 1, "seed": -1}, "no key 'xyzzy'.* \\(and 1 more\\)"),
    ],
)
def test_mistakes(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^least: .*{message.replace('?', '[?]')}") as caught:
        parsed(**sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_smear_the_stamp_is_refused_with_the_reason(key: str) -> None:
    for recipe in ({key: 0.2}, {"train": {key: 0.2}}):
        with pytest.raises(ValueError, match=f"{key} cannot be used: .*stamp"):
            parsed(**recipe)


def test_overrides() -> None:
    recipe = parsed("train.epochs=3", "data.mean=[0.3]", "model.kwargs.stem.width=8", "seed=7", "train.clip_grad=null")
    assert (recipe.train.epochs, recipe.data.mean, recipe.seed, recipe.train.clip_grad) == (3, (0.3,), 7, None)
    assert recipe.model.kwargs == {"stem": {"width": 8}}
    assert recipe.data.source == "digits"  # the rest of a section stays


def test_attack_in_short() -> None:
    assert parsed("attack=blend", "attack.rate=.05").attack == parsed(attack={"name": "blend", "rate": 0.05}).attack
    assert parsed("attack.rate=.05", attack="blend").attack == parsed(attack={"name": "blend", "rate": 0.05}).attack
    assert parsed("attack=none", attack={"name": "blend"}).attack is None
    assert parsed("attack=null", attack={"name": "blend"}).attack is None
    assert parsed("attack.params.alpha=0.1", attack="blend").attack.params == {"alpha": 0.1}  # type: ignore[union-attr]


def test_overrides_leave_the_tree_they_start_from_alone() -> None:
    tree = {**LEAST, "train": {"epochs": 2}}
    before = json.dumps(tree)
    parse_recipe(tree, ["train.epochs=5", "data.limit=3", "seed=1"], "here")
    assert json.dumps(tree) == before


def test_numbers_that_yaml_takes_for_text() -> None:
    recipe = parsed("train.lr=1e-3", "attack.params.alpha=1E-1", attack="blend", model={"kwargs": {"drop": ["2e-1", "a"]}})
    assert recipe.train.lr == 1e-3 and recipe.attack is not None
    assert recipe.attack.params == {"alpha": 0.1} and recipe.model.kwargs == {"drop": [0.2, "a"]}
    assert key_values(["a=1e3", "b=e3", "c=x=y", "d="], example="k=v") == {"a": 1000.0, "b": "e3", "c": "x=y", "d": None}


@pytest.mark.parametrize("item", ["seed", "=3", ".=3", "seed=[", "seed={a"])
def test_overrides_that_are_none(item: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(item))):
        parsed(item)


def test_a_section_left_empty_keeps_its_defaults() -> None:
    assert parsed(train=None, runtime=None, attack=None) == parsed()


def test_there_and_back_through_yaml(tmp_path: Path) -> None:
    recipe = parsed(
        "train.lr=1e-5", "stamp.value=0.5", "baselines=[oracle, undefended]", "data.mean=[0.1]", "data.std=[0.2]",
        "relabel.encoder.name=vit_tiny_patch16_224", attack={"name": "blend", "params": {"alpha": 0.3}},
    )  # fmt: skip
    path = tmp_path / "back.yaml"
    path.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    assert load_recipe(path) == recipe


def test_settings_that_came_later_leave_no_trace_where_they_are_off() -> None:
    recipe = parsed("train.augment=crop_flip", "train.erase=0.25")
    left = recipe.model_dump(mode="json")["train"]
    assert left["erase"] == 0.25 and "color_jitter" not in left
    assert {"color_jitter", "erase"}.isdisjoint(parsed().train.model_dump())
    assert left["augment"] == "crop_flip" and left["warmup_epochs"] == 0
    assert Recipe.model_validate(recipe.model_dump()) == recipe and recipe.train.color_jitter == 0


def test_frozen() -> None:
    recipe = parsed()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 1
