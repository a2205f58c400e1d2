"""Configs: what a file says is what the parts get, and every mistake is one line that says what to do."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
from garment_files import make_garments
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hwsearch.config import RunConfig
from hwsearch.config_options import search_config
from hwsearch.errors import InputError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALLEST: dict[str, Any] = {
    "device": {"name": "simulated"},
    "model": {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"},
    "search": {"budget": "50%"},
}
WHOLE = """
[run]
name = "first"
seed = 3
threads = 2
folder = "elsewhere"
[device]
name = "x86-ort-1t"
[profile]
minutes = 2
[model]
factory = "hwsearch.models.resnet:resnet_small"
input = "1x1x28x28"
kwargs = { classes = 10 }
[data]
kind = "synthetic"
limit = 600
valid = 100
label_smoothing = 0.1
[search]
budget_ms = 3
quantum = 8
minimum = 0.25
offset = 2
patterns = 3
population = 10
generations = 4
candidates = 33
score_images = 200
score_patterns = 2
start = "supernet"
bins = "macs"
largest_bin = 16
sharing = "bilateral"
refinements = 1
finalists = 2
finalist_share = 0.25
floor = 0.9
[supernet]
steps = 50
batch_size = 64
learning_rate = 0.05
[train]
epochs = 1.5
precision = "bfloat16"
[deploy]
output = "bundle"
"""


def changed(path: str, value: Any) -> dict[str, Any]:
    """The smallest config with one field set; ``KeyError`` removes it."""
    data = copy.deepcopy(SMALLEST)
    *sections, name = path.split(".")
    place = data
    for section in sections:
        place = place.setdefault(section, {})
    if value is KeyError:
        del place[name]
    else:
        place[name] = value
    return data


def test_every_setting_arrives(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(WHOLE)
    config = RunConfig.load(tmp_path / "run.toml")
    assert config.run_folder == Path("elsewhere/first")
    assert config.bundle_folder == Path("bundle")
    assert config.model.input_shape == (1, 1, 28, 28)
    assert config.model.kwargs == {"classes": 10}
    assert config.search.max_ms(full_ms=100.0) == 3.0
    assert config.search.minimum == 0.25
    search = config.cafenet()
    assert (search.offset, search.patterns, search.start) == (2, 3, "supernet")
    assert (search.bins, search.largest_bin, search.sharing, search.refinements) == ("macs", 16, "bilateral", 1)
    assert (search.finalists, search.finalist_share, search.floor) == (2, 0.25, 0.9)
    assert (search.evolution.population, search.evolution.generations, search.evolution.evaluations) == (10, 4, 33)
    assert (search.scoring.images, search.scoring.patterns) == (200, 2)
    assert (search.training.steps, search.training.batch_size, search.training.learning_rate) == (50, 64, 0.05)
    assert (search.training.seed, search.training.threads) == (3, 2)
    assert search.winner == config.training()
    assert (config.training().epochs, config.training().precision) == (1.5, "bfloat16")
    task, test = config.data.load(config.run.seed)
    assert (len(task.train), len(task.valid), len(test)) == (500, 100, 1024)


def test_what_is_left_out_takes_the_default_of_its_part() -> None:
    from hwsearch.search.cafenet import CafeNetConfig

    config = RunConfig.from_dict(SMALLEST)
    assert config.cafenet() == CafeNetConfig()
    assert config.search.max_ms(full_ms=3.0) == 1.5
    assert config.run_folder == Path("runs/run")
    assert config.bundle_folder == Path("runs/run/bundle")
    assert RunConfig.from_dict({**SMALLEST, **{"search": {"budget": "12.5 %"}}}).search.max_ms(8.0) == 1.0


def test_the_other_method_has_its_own_settings() -> None:
    from hwsearch.search.conetv2_config import ConetConfig

    search = {"method": "conetv2", "budget": "50%"}
    ours = RunConfig.from_dict({**SMALLEST, "search": {**search, "trials": 4}, "trial": {"steps": 7}}).conetv2()
    assert (ours.accept, ours.trials, ours.training.steps) == ("metropolis", 4, 7)
    paper = RunConfig.from_dict({**SMALLEST, "search": {**search, "accept": "conetv2"}, "train": {"epochs": 3}})
    assert paper.conetv2() == ConetConfig.published(winner=paper.training())
    config = RunConfig.from_dict({**SMALLEST, "search": search, "trial": {"epochs": 0.5, "checkpoint_s": 9}})
    assert config.conetv2().training.epochs == 0.5
    quick = dataclasses.replace(config, trial=dataclasses.replace(config.trial, checkpoint_s=1.0))
    assert quick.identity() == config.identity()


def test_branches_of_a_file_become_a_search_of_them() -> None:
    from hwsearch.search.repnas import RepNASConfig
    from hwsearch.search.repnas_search import RepNASSearchConfig

    bare = RunConfig.from_dict({**SMALLEST, "search": {"method": "repnas"}})
    assert bare.repnas() == RepNASSearchConfig(RepNASConfig(training=bare.training()))
    assert not bare.search.has_budget
    assert bare.search.max_ms(2.0) == pytest.approx(2.1), "full widths keep what they took"
    settings = {"kinds": ["kxk", "1x1"], "limit": 9.0, "budget": "macs", "published": True, "search": 0.5}
    given = {**SMALLEST, "search": {"method": "repnas", "budget": "50%", "start": "model"}, "branches": settings}
    config = RunConfig.from_dict(given).repnas()
    assert (config.repnas.restart, config.repnas.search, config.repnas.budget.limit) == (False, 0.5, 9)
    assert (config.blocks.branches, config.blocks.start) == (("kxk", "1x1"), "model")
    steered = {**SMALLEST, "search": {"method": "repnas"}, "train": {"callback": "mine:Own"}}
    assert RunConfig.from_dict(steered).repnas().repnas.training.callback == "mine:Own"
    RunConfig.from_dict({**steered, "branches": {"published": True, "restart": True}})
    for branches in ({"restart": False}, {"published": True}):
        with pytest.raises(InputError, match=r"train\.callback: without a restart .* set branches\.restart = true"):
            RunConfig.from_dict({**steered, "branches": branches})
    with pytest.raises(InputError, match=r"\[branches\] is for method = .repnas., not cafenet"):
        RunConfig.from_dict({**SMALLEST, "branches": {"limit": 0.5}})
    with pytest.raises(InputError, match=r"\[branches\]: there is no branch 'kx': give some of kxk"):
        RunConfig.from_dict({**given, "branches": {"kinds": ["kx"]}}).repnas()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_is_a_config(path: Path) -> None:
    config = RunConfig.load(path)
    if config.search.budgets is not None:
        assert config.search.max_ms(full_ms=1.0) == pytest.approx({"pas_family": 0.28, "05_family": 0.5}[path.stem])
        assert config.pas().warmup == config.training()


def test_data_names_tasks_beyond_classes(tmp_path: Path) -> None:
    make_garments(tmp_path, train=30, test=30)
    data = {"kind": "detection", "folder": str(tmp_path), "limit": 20, "valid": 5}
    config = RunConfig.from_dict({**SMALLEST, "data": data})
    task, test = config.data.load(config.run.seed)
    assert (task.metric_name, len(task.train), len(task.valid), len(test)) == ("AP at IoU 0.5", 15, 5, 1000)
    with pytest.raises(InputError, match=r"data.flip is for classes of whole images, not detection"):
        RunConfig.from_dict({**SMALLEST, "data": {**data, "flip": True}})
    with pytest.raises(InputError, match="'segmentation', 'detection', 'translation'"):
        RunConfig.from_dict({**SMALLEST, "data": {"kind": "depth"}})
    named = search_config(method="pas", model="hwsearch.models.detector:detector_small", shape="1x1x56x56",
                          data="detection", budgets=["simulated:0.2"], folder=None)  # fmt: skip
    assert (named.data.kind, named.data.folder) == ("detection", None)


def test_masks_have_a_section_of_their_own() -> None:
    from hwsearch.search.pas_config import PasConfig

    search = {"method": "pas", "budget": "40%", "measured": 3}
    masks = {"steps": 90, "batch_size": 32, "learning_rate": 0.03, "rate": 4.0, "cost": "macs", "floor": 0.97}
    config = RunConfig.from_dict({**SMALLEST, "search": search, "masks": masks, "train": {"epochs": 3}})
    found = config.pas()
    assert (found.measured, found.mask_rate, found.cost, found.floor) == (3, 4.0, "macs", 0.97)
    assert (found.training.steps, found.training.batch_size) == (90, 32)
    assert (found.training.learning_rate, found.training.final_rate, found.training.warmup) == (0.03, 0.03, 0.0)
    assert found.warmup == config.training()
    assert found.winner is not None
    assert (found.winner.epochs, found.winner.learning_rate) == (3, 0.05)
    known = RunConfig.from_dict({**SMALLEST, "model": {**SMALLEST["model"], "weights": "own.safetensors"},
                                 "search": search})  # fmt: skip
    assert known.pas().warmup is None
    paper = RunConfig.from_dict({**SMALLEST, "search": search, "masks": {"published": True, "warmup": False}}).pas()
    assert dataclasses.replace(paper, measured=2) == PasConfig.published()
    quick = dataclasses.replace(config, masks=dataclasses.replace(config.masks, checkpoint_s=1.0))
    assert quick.identity() == config.identity()
    for wrong, words in (
        ({"search": {**search, "trials": 3}}, "search.trials is no setting of the method pas"),
        ({"search": {**search, "offset": 1}}, "search.offset is no setting of the method pas"),
        ({"search": search, "masks": {"steps": 1, "epochs": 2}}, "both epochs and steps"),
        ({"search": {"budget": "40%"}, "masks": {"rate": 3.0}}, '[masks] is for method = "pas", not cafenet'),
        ({"search": search, "masks": {"cost": "joules"}}, "masks.cost is 'joules': give one of 'ms', 'macs'"),
    ):
        with pytest.raises(InputError) as caught:
            RunConfig.from_dict({**SMALLEST, **wrong})
        assert words in str(caught.value)
    bad = RunConfig.from_dict({**SMALLEST, "search": search, "masks": {"jitter": 0.7}})
    with pytest.raises(InputError, match=r"\[masks\]: jitter is 0.7"):
        bad.pas()


def test_a_config_is_plain_values_and_back() -> None:
    config = RunConfig.from_dict(SMALLEST)
    assert RunConfig.from_dict(config.to_dict()) == config
    # Where files go and how often checkpoints are written decide no result.
    moved = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder="other"),
        deploy=dataclasses.replace(config.deploy, output="x"),
        train=dataclasses.replace(config.train, checkpoint_s=1.0),
    )
    assert moved.identity() == config.identity()
    assert dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1)).identity() != config.identity()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("search.population", 0, "search.population is 0: give a whole number of 2 or more"),
        ("search.population", "many", "search.population is 'many': give a whole number of 2 or more"),
        ("search.populaton", 3, "search.populaton is no setting: did you mean population?"),
        ("search.zzz", 3, "search.zzz is no setting: [search] has method, budget, budget_ms,"),
        ("serch", {"a": 1}, "serch is no setting: did you mean search?"),
        ("device.nam", "x", "device.nam is no setting: did you mean name?"),
        ("search.budget_ms", 2.0, "search needs either budget"),
        ("search.budget", KeyError, "search needs either budget"),
        ("search.budget", "0%", "search.budget is '0%': give a share above 0% and up to 100%"),
        ("search.budget", "150%", "search.budget is '150%'"),
        ("search.budget", "fast", "search.budget is 'fast': give a share of the full network's measured ms"),
        ("search.budget", 3.0, "search.budget is 3.0: give a share"),
        ("search.minimum", 0, "search.minimum is 0: give channels, or a share"),
        ("search.minimum", 1.5, "search.minimum is 1.5: give whole channels"),
        ("search.method", "random", "search.method is 'random': give one of 'cafenet'"),
        ("search.quantile", 1.0, "search.quantile is 1.0: give a number from 0.5"),
        ("search.bins", "flops", "search.bins is 'flops': give one of 'ms', 'macs', 'none'"),
        ("search.floor", "high", "search.floor is 'high': give a number, such as 0.9"),
        ("search.start", "none", "search.start is 'none': give one of 'scratch', 'model', 'supernet', 'all'"),
        ("search.trials", 3, "search.trials is no setting of the method cafenet"),
        ("search", {"budget": "50%", "method": "conetv2", "bins": "ms"}, "search.bins is no setting of the method"),
        ("model", KeyError, "the section [model] is missing: add it"),
        ("model", 3, "model is 3: give a section [model]"),
        ("model.factory", KeyError, "model.factory is missing: give package.module:factory"),
        ("model.factory", "vgg", "model.factory is 'vgg': give package.module:factory"),
        ("model.input", "1x0x28", "model.input is '1x0x28': give sizes joined by x"),
        ("model.input", [1, 1], "model.input is [1, 1]: give sizes joined by x"),
        ("model.kwargs", 3, "model.kwargs is 3: give a section [model.kwargs]"),
        ("run.name", "../up", "run.name is '../up': give up to 64 letters"),
        ("run.seed", -1, "run.seed is -1: give a whole number of 0 or more"),
        ("run.seed", True, "run.seed is True: give a whole number"),
        ("train.epochs", float("inf"), "train.epochs is inf: give a number above 0"),
        ("train.nesterov", 1, "train.nesterov is 1: give true or false"),
        ("supernet", {"steps": 1, "epochs": 1}, "both epochs and steps"),
    ],
)
def test_a_mistake_is_one_line_with_path_value_and_remedy(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict(changed(path, value), source="run.toml")
    assert str(caught.value).startswith("run.toml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "3 ms", True, [3.0]])
def test_a_budget_that_is_no_number_of_milliseconds(value: Any) -> None:
    with pytest.raises(InputError, match=r"search.budget_ms is .*: give a number of milliseconds above 0"):
        RunConfig.from_dict({**SMALLEST, "search": {"budget_ms": value}})


def test_all_wrong_fields_are_named_the_unknown_one_first() -> None:
    data = changed("device", {"nam": "x"}) | {"run": {"seed": -1}}
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict(data)
    assert "device.nam is no setting: did you mean name? (also wrong: " in str(caught.value)
    assert "device.name" in str(caught.value)
    assert "run.seed" in str(caught.value)


def test_settings_that_do_not_go_together_name_their_section() -> None:
    with pytest.raises(InputError, match=r"\[train\]: nesterov needs a momentum"):
        RunConfig.from_dict(changed("train.momentum", 0.0)).cafenet()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the config .*missing\.toml"):
        RunConfig.load(tmp_path / "missing.toml")
    with pytest.raises(InputError, match="cannot read"):
        RunConfig.load(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text('[run]\nname = "x\n')
    with pytest.raises(InputError, match=r"broken.toml is not valid TOML: .*line 2") as caught:
        RunConfig.load(broken)
    assert "\n" not in str(caught.value)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid TOML"):
        RunConfig.load(broken)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = st.sampled_from([f.name for f in dataclasses.fields(RunConfig)])


@settings(deadline=None)
@example(section="run", name="minimum", value={"QØ": [7e16], "\x95\n": {}})
@given(section=SECTIONS, name=st.sampled_from(["name", "input", "budget", "minimum", "steps", "kind"]), value=JSON)
def test_nothing_but_an_input_error_ever_comes_out(section: str, name: str, value: Any) -> None:
    for data in (changed(f"{section}.{name}", value), {**SMALLEST, section: value}):
        try:
            RunConfig.from_dict(data)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017


class TestSearchByOptions:
    GOOD: ClassVar[dict[str, Any]] = {
        "method": "cafenet",
        "model": "hwsearch.models.vgg:vgg_small",
        "shape": "1x1x28x28",
        "data": "synthetic",
        "budgets": ["simulated:0.2"],
        "folder": None,
    }

    def test_options_become_a_config(self, tmp_path: Path) -> None:
        config = search_config(**{**self.GOOD, "folder": tmp_path / "mine"})
        assert config.device.name == "simulated"
        assert config.search.budget_ms == 0.2
        assert config.run_folder == tmp_path / "mine"

    @pytest.mark.parametrize("budget", ["simulated", "simulated:", ":3", "simulated:x", "simulated:0", "simulated:nan"])
    def test_budgets_that_are_none(self, budget: str) -> None:
        with pytest.raises(InputError, match="DEVICE:MS"):
            search_config(**{**self.GOOD, "budgets": [budget]})

    @pytest.mark.parametrize(("name", "option"), [("model", "--model"), ("shape", "--input"), ("budgets", "--budget")])
    def test_a_missing_option_is_named(self, name: str, option: str) -> None:
        with pytest.raises(InputError, match=option):
            search_config(**{**self.GOOD, name: None})

    def test_an_unknown_method_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"search\.method"):
            search_config(**{**self.GOOD, "method": "magic"})


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"pattern": "a", "freeze": True}, {"pattern": "b"}], "the rule for 'b' says nothing"),
        ([{"patern": "a"}], "groups[1].patern is no setting: did you mean pattern?"),
        (
            [{"pattern": "a", "freeze": True}, {"pattern": "b", "quantum": 0}],
            "groups[2].quantum is 0: give a whole number",
        ),
        ([{"pattern": "a", "maximum": 1.5}], "the maximum for 'a' is 1.5"),
        ({"pattern": "a"}, "give sections [[groups]], with double brackets"),
        ([3], "groups[1] is 3"),
    ],
)
def test_rules_of_groups_are_checked_by_number(rules: Any, words: str) -> None:
    base = {"device": {"name": "simulated"}, "search": {"budget": "50%"}}
    model = {"factory": "hwsearch.models.vgg:vgg_small", "input": "1x1x28x28"}
    with pytest.raises(InputError) as caught:
        RunConfig.from_dict({**base, "model": model, "groups": rules})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
