"The command line: what it refuses, and how it says so."
import pytest
import yaml
from conftest import cli


def test_version():
    done = cli('--version')
    assert done.returncode == 0 and done.stdout.strip().endswith('0.1.0')


def test_a_misspelt_key_names_the_nearest(recipe_of, tmp_path):
    recipe = recipe_of(tmp_path, train__learning_rte=0.001)
    done = cli('run', recipe, '--name', 'x', '--reports', tmp_path / 'reports')
    assert done.returncode == 2
    assert "learning_rte: unknown key; did you mean 'learning_rate'?" in done.stderr
    assert not (tmp_path / 'reports' / 'x').exists(), 'nothing may start before the recipe is checked'


def test_a_misspelt_gate_threshold_is_found_before_the_start(recipe_of, tmp_path):
    done = cli('run', recipe_of(tmp_path, gates={'Q6': {'flor': 100}}), '--name', 'x', '--reports', tmp_path / 'reports')
    assert done.returncode == 2 and 'floor' in done.stderr


@pytest.mark.parametrize('words', [['rnu', 'r.yaml'], ['run'], ['run', 'absent.yaml'], ['run', 'r.yaml', '--set', 'train'], ['serve', 'absent']])
def test_bad_usage_exits_2_without_a_traceback(words, tmp_path):
    done = cli(*words, cwd=tmp_path)
    assert done.returncode == 2 and 'Traceback' not in done.stderr and done.stderr.strip()


def test_set_wins_over_the_recipe(recipe_of, tmp_path):
    done = cli('run', recipe_of(tmp_path), '--name', 'set', '--reports', tmp_path / 'reports', '--set', 'train.max_steps=3', '--to', 'curation')
    assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load((tmp_path / 'reports' / 'set' / 'recipe.yaml').read_text())['train']['max_steps'] == 3


def test_init_makes_a_recipe_that_is_valid_and_never_overwrites(tmp_path):
    from finetune_nb.core.recipe import load_recipe
    assert cli('init', tmp_path / 'mine').returncode == 0
    assert load_recipe(tmp_path / 'mine' / 'recipe.yaml').data.sources
    again = cli('init', tmp_path / 'mine')
    assert again.returncode == 2 and 'recipe.yaml' in again.stderr


def test_check_locates_errors(tmp_path):
    bad = tmp_path / 'bad.jsonl'
    good = '{"instruction": "Name a colour", "input": "", "output": "Blue"}\n'
    bad.write_text(good * 4 + '{"instruction": "Name a colour", "input": ""}\n{oops\n' + good)
    done = cli('check', bad)
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert 'bad.jsonl:5' in said and 'output' in said and 'bad.jsonl:6' in said
    good_file = tmp_path / 'good.jsonl'
    good_file.write_text(good * 3)
    assert cli('check', good_file).returncode == 0
