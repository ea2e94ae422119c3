"""Recipes, recorded results and the command line, on digits and in a temporary folder."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bpfree import fit, recipes, results
from bpfree.experiments import cli
from bpfree.experiments.recipe import Recipe
from bpfree.experiments.record import record

pytestmark = pytest.mark.processes
SMALL = Recipe(
    name="small",
    data="digits",
    network=("mlp", (64, 16, 10), {"dropout": 0.1}),
    rule="FeedbackAlignment",
    options={"feedback_scale": 0.5},
    epochs=2,
    lr=0.1,
    seeds=(0, 1),
    milestones=(1,),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "small", SMALL)
    return tmp_path


def run(folder, *args):
    return cli.main(["run", "small", "--quiet", "--jobs=1", "--results", str(folder), *args])


def test_every_recipe_builds_its_rule_and_forward_pass():
    for recipe in (r for r in recipes.RECIPES.values() if r.rule != "Stages"):
        rule = recipe.make(torch.Generator().manual_seed(0))
        x = torch.rand(2, *rule.net.input_shape)
        assert rule.net(x).shape == (2, rule.net.num_classes)
        assert recipe.optimizer(rule.net.parameters()).defaults["lr"] == recipe.lr


def test_schedule_divides_the_rate_by_ten_at_each_milestone():
    recipe = dataclasses.replace(SMALL, milestones=(2, 3))
    assert [recipe.schedule(e) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_run_records_curves_and_manifest_of_each_seed(folder):
    assert run(folder) == 0
    result = results.read("small", folder)
    assert list(result["runs"]) == ["0", "1"]
    one = result["runs"]["0"]
    assert len(one["test_accuracy"]) == len(one["train_loss"]) == SMALL.epochs
    assert len(one["angle"]) == SMALL.epochs + 1
    assert one["angle"][0][-1] == 0  # the last block's update is backprop's
    assert {"seconds", "device", "torch", "python", "commit"} <= set(one)
    assert len(result["data_checksum"]) == 64


def test_recorded_seeds_are_not_trained_again_and_new_ones_are_added(folder):
    run(folder, "--seeds", "1")
    before = results.read("small", folder)["runs"]["1"]
    run(folder, "--seeds", "0:3")
    runs = results.read("small", folder)["runs"]
    assert list(runs) == ["0", "1", "2"]
    assert runs["1"] == before
    assert runs["0"]["train_loss"] != runs["1"]["train_loss"]


def test_same_seed_gives_the_same_record(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    run(folder, "--seeds", "0")
    run(other, "--seeds", "0")
    a, b = (results.read("small", f)["runs"]["0"] for f in (folder, other))
    assert {k: v for k, v in a.items() if k != "seconds"} == {
        k: v for k, v in b.items() if k != "seconds"
    }


def test_file_of_other_settings_is_refused_and_left_alone(folder, monkeypatch, capsys):
    run(folder, "--seeds", "0")
    before = results.path("small", folder).read_bytes()
    monkeypatch.setitem(recipes.RECIPES, "small", dataclasses.replace(SMALL, lr=0.2))
    assert run(folder, "--seeds", "0:2") == 2
    message = capsys.readouterr().err
    assert "lr=0.1" in message
    assert "0.2" in message
    assert results.path("small", folder).read_bytes() == before


def without(field, file):
    """The recorded file as it was before the recipe had a field."""
    result = json.loads(file.read_text())
    del result["recipe"][field]
    file.write_text(json.dumps(result))


@pytest.mark.parametrize("field", ["shift", "milestones"])
def test_a_field_newer_than_the_file_is_good_at_its_default_alone(
    field, folder, monkeypatch, capsys
):
    known = dataclasses.replace(SMALL, milestones=())
    monkeypatch.setitem(recipes.RECIPES, "small", known)
    run(folder, "--seeds", "0")
    without(field, results.path("small", folder))
    assert run(folder, "--seeds", "0:2") == 0
    result = results.read("small", folder)
    assert list(result["runs"]) == ["0", "1"]
    assert field in result["recipe"]
    without(field, results.path("small", folder))
    other = {"shift": -0.5, "milestones": (1,)}[field]
    monkeypatch.setitem(recipes.RECIPES, "small", dataclasses.replace(known, **{field: other}))
    assert run(folder, "--seeds", "0") == 2
    assert f"recorded with {field}=" in capsys.readouterr().err


def test_a_missing_field_without_default_is_another_recipe(folder, capsys):
    run(folder, "--seeds", "0")
    without("lr", results.path("small", folder))
    assert run(folder, "--seeds", "0") == 2
    assert "lr=None (now 0.1)" in capsys.readouterr().err


def test_recorded_results_of_the_book_are_of_its_recipes():
    """Nothing is trained: ``record`` returns what is there if the settings are the same."""
    for name, recipe in recipes.RECIPES.items():
        if results.path(name).exists():
            seeds = [int(seed) for seed in results.read(name)["runs"]]
            assert record(recipe, seeds)["runs"], name


def test_inputs_are_shifted_as_the_recipe_says(folder, monkeypatch):
    seen = []

    def spy(make, data, **options):
        seen.append(data)
        return fit(make, data, **options)

    monkeypatch.setattr("bpfree.experiments.recipe.fit", spy)
    monkeypatch.setitem(recipes.RECIPES, "small", dataclasses.replace(SMALL, shift=-0.5))
    run(folder, "--seeds", "0")
    (data,) = seen
    x = data.inputs(data.train_x)
    assert (x.min(), x.max()) == (-0.5, 0.5)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"format": "another"}', '{"a": 1}', "\x00\xff",
        '{"format": "bpfree-result/1"}',
        '{"format": "bpfree-result/1", "recipe": "small", "runs": {}}',
        '{"format": "bpfree-result/1", "recipe": {"name": "small"}, "runs": {"0": {}}}',
    ],
)  # fmt: skip
def test_file_that_is_not_ours_is_named_and_left_alone(folder, capsys, content):
    file = results.path("small", folder)
    file.write_text(content)
    assert run(folder) == 2
    message = capsys.readouterr().err
    assert str(file) in message
    assert "not a result of bpfree" in message
    assert file.read_text() == content


def test_a_seed_that_another_process_recorded_meanwhile_stays(folder, monkeypatch):
    fit = Recipe.fit

    def slow(recipe, data, seeds, **options):
        if list(seeds) == [0]:
            record(recipe, [1], folder=folder)
        return fit(recipe, data, seeds, **options)

    monkeypatch.setattr(Recipe, "fit", slow)
    record(recipes.get("small"), [0], folder=folder)
    assert set(results.read("small", folder)["runs"]) == {"0", "1"}


def test_many_seeds_together_have_a_checkpoint_with_a_short_name(folder, monkeypatch):
    names = []

    def stop(recipe, data, seeds, checkpoint, **options):
        names.append(checkpoint.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "fit", stop)
    for seeds in (range(100), range(101)):
        with pytest.raises(KeyboardInterrupt):
            record(recipes.get("small"), seeds, folder=folder, device="meta")
    assert max(map(len, names)) < 100
    assert len(set(names)) == 2


def test_a_record_that_lost_epochs_is_refused(folder):
    run(folder, "--seeds", "0")
    file = results.path("small", folder)
    content = json.loads(file.read_text())
    content["runs"]["0"]["test_accuracy"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="incomplete"):
        results.read("small", folder)


def test_result_of_another_recipe_is_refused(folder):
    run(folder, "--seeds", "0")
    results.path("small", folder).rename(results.path("mnist-fc-bp", folder))
    with pytest.raises(ValueError, match=r"holds the recipe 'small', not 'mnist-fc-bp'"):
        results.read("mnist-fc-bp", folder)


def test_write_that_fails_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "x.json"
    results.write_json(file, {"a": 1})
    with pytest.raises(ValueError):
        results.write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_without_git_a_run_is_recorded_without_a_commit(folder, monkeypatch):
    monkeypatch.setattr(results.shutil, "which", lambda name: None)
    assert run(folder, "--seeds", "0") == 0
    assert results.read("small", folder)["runs"]["0"]["commit"] is None


def test_every_name_of_the_cpu_trains_seeds_one_by_one(folder):
    assert run(folder, "--seeds", "0:2", "--device", "cpu:0") == 0
    (file,) = folder.iterdir()
    assert [r["seeds_together"] for r in json.loads(file.read_text())["runs"].values()] == [1, 1]


def test_what_decides_no_number_may_change_after_recording(folder, monkeypatch):
    assert run(folder, "--seeds", "0") == 0
    small = dataclasses.replace(SMALL, source="a paper", paper="99.99 ± 0.01")
    monkeypatch.setitem(recipes.RECIPES, "small", small)
    assert run(folder, "--seeds", "0:2") == 0
    assert results.read("small", folder)["recipe"]["paper"] == small.paper


def test_a_row_that_no_paper_has_says_so():
    for name in ("pepita-fc-mnist-frozen", "pepita-conv-cifar10-released"):
        assert " | none | " in results.table([name])
    assert " | not verified | " in results.table(["pepita-fc-mnist-fa"])
    assert "| BP | mnist, shifts 2 |" in results.table(["lfnn-fc-mnist-bp-shifts"])


def test_undefined_angles_are_null_not_nan(folder, monkeypatch):
    monkeypatch.setitem(
        recipes.RECIPES, "small", dataclasses.replace(SMALL, rule="Frozen", options={})
    )
    run(folder, "--seeds", "0")
    assert results.read("small", folder)["runs"]["0"]["angle"][0] == [None, 0]


def test_list_and_report_show_what_is_recorded_and_what_is_missing(folder, capsys):
    run(folder, "--seeds", "0:2")
    final = [r["test_accuracy"][-1] for r in results.read("small", folder)["runs"].values()]
    capsys.readouterr()
    assert cli.main(["list", "--results", str(folder)]) == 0
    listed = capsys.readouterr().out
    assert "seeds 0, 1" in listed
    assert "not recorded" in listed
    names = ["small", "mnist-fc-bp", "pepita-fc-mnist-bp", "mnist-fc-fa"]
    assert cli.main(["report", *names, "--results", str(folder)]) == 0
    report = capsys.readouterr().out
    assert f"{sum(final) / 2:.2f} ± {torch.tensor(final).std().item():.2f}" in report
    *rows, blank, missing = report.splitlines()[2:]
    assert [row.count("|") for row in rows] == [10, 10]
    assert "| 98.63 ± 0.03 | not run |" in rows[1]  # the paper's number is shown all the same
    assert missing == "Not run yet: `bpfree run mnist-fc-bp pepita-fc-mnist-bp mnist-fc-fa`"
    assert blank == ""
    assert cli.main(["report", "mnist-fc-bp", "--results", str(folder)]) == 0
    assert capsys.readouterr().out == "Not run yet: `bpfree run mnist-fc-bp`\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "mnist-fc-bb"], ["'mnist-fc-bb'", "mnist-fc-bp"]),
        (["report", "nothing"], ["'nothing'"]),
        (["run", "mnist-fc-bp", "--data", "/nowhere"], ["/nowhere", "download=True"]),
    ],
)
def test_mistakes_are_one_clear_error(args, words, tmp_path, capsys):
    assert cli.main([*args, "--results", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(word in captured.err for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seeds", ["3:1", "a", "", "0,x", "-1", "0,0", "9" * 30])
def test_malformed_seeds_are_refused(seeds, capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "mnist-fc-bp", f"--seeds={seeds}"])
    assert repr(seeds) in capsys.readouterr().err


@pytest.mark.parametrize(
    "experiment",
    [
        "mnist-fc",
        "ekdaa-fc-fashion-mnist",
        "ekdaa-narrow-fashion-mnist",
        "attention-mnist",
        "attention-fashion-mnist",
        "attention-cifar10",
    ],
)
def test_tuned_rates_are_the_best_of_the_recorded_grid(experiment):
    grid = json.loads(results.path(f"tuning-{experiment}").read_text())["grid"]
    names = {name for name in recipes.RECIPES if name.startswith(f"{experiment}-")}
    assert {row["recipe"] for row in grid} == names
    for name in names:
        rows = [row for row in grid if row["recipe"] == name and row["accuracy"] is not None]
        best = max(rows, key=lambda row: row["accuracy"])
        recipe = recipes.get(name)
        assert (recipe.lr, recipe.options) == (best["lr"], best["options"]), name


def test_interruption_is_one_line_that_says_how_to_go_on(folder, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bpfree.experiments.recipe.fit", interrupt)
    assert run(folder) == 130
    assert "`bpfree run` goes on where it was" in capsys.readouterr().err


def test_rows_of_one_rule_are_told_apart_by_their_options():
    names = ["pepita-fc-mnist-pepita", "pepita-fc-mnist-pepita-mirrored"]
    plain, mirrored = results.table(names).splitlines()[2:]
    assert plain.startswith("| PEPITA |")
    assert mirrored.startswith("| PEPITA, mirroring 20 |")


def test_a_reader_who_has_seen_enough_is_no_error():
    command = f"'{sys.executable}' -m bpfree list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
