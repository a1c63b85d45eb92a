"Shared fixtures. Threads are limited before torch is imported: many small processes fight over two cores."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def cli(*words, cwd=None, timeout=600, input=None, **env):
    "Run the command line as a user does, in a process of its own."
    return subprocess.run([Path(sys.executable).with_name('finetune-nb'), *map(str, words)], cwd=cwd, timeout=timeout,
                          input=input, capture_output=True, text=True, env={**os.environ, **env})


@pytest.hookimpl(tryfirst=True)   # before the workers read the groups
def pytest_collection_modifyitems(items):
    "Tests that read the one complete run go to one worker, so that it is made once; slow tests begin first."
    items.sort(key=lambda item: item.path.name == 'test_notebooks.py')
    for item in items:
        if 'complete_run' in item.fixturenames: item.add_marker(pytest.mark.xdist_group('complete run'))


def public_data(name: str) -> Path:
    "A file of the public data, or a skip that says why."
    folder = Path(os.environ.get('FINETUNE_NB_DATA', ROOT.parent / 'shared' / 'data'))
    if not (folder / name).is_file(): pytest.skip(f'{name} is not in $FINETUNE_NB_DATA nor in ../shared/data')
    return folder / name


@pytest.fixture(scope='session')
def tiny_model(tmp_path_factory):
    "A random two-layer Llama with a small tokenizer, as a folder."
    from finetune_nb.model.tiny import tiny_model as make
    return make(tmp_path_factory.mktemp('tiny') / 'model')


@pytest.fixture(scope='session')
def recipe_of(tiny_model):
    "Writes a recipe for the demo's data and the tiny model into a folder; returns its path."
    def write(folder: Path, **changes) -> Path:
        from finetune_nb.demo.mail import write_demo
        write_demo(folder)
        path = folder / 'recipe.yaml'
        tree = yaml.safe_load(path.read_text())
        tree.update(name='tiny', base_models=[str(tiny_model)])
        tree['train'].update(max_steps=4, batch_size=4, max_tokens=640, evals=2, validation_rows=8)
        tree['evaluate'].update(max_rows=12, max_new_tokens=8)
        tree['deploy'] = {'check_rows': 4}
        tree['judge'] = {'model': 'none'}
        for dotted, value in changes.items():
            section, _, key = dotted.partition('__')
            if key: tree.setdefault(section, {})[key] = value
            else: tree[section] = value
        path.write_text(yaml.safe_dump(tree))
        return path
    return write


@pytest.fixture(scope='session')
def complete_run(recipe_of, tmp_path_factory):
    "One complete run on the tiny model, shared by the tests that only read."
    home = tmp_path_factory.mktemp('complete')
    judge = {'model': 'likelihood', 'sample': 20, 'exam_rows': 8}
    done = cli('run', recipe_of(home / 'recipe', judge=judge), '--name', 'whole', '--reports', home / 'reports')
    assert done.returncode == 0, done.stdout + done.stderr
    return home / 'reports' / 'whole', done
