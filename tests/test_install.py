"An installed copy needs no repository."
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    home = tmp_path_factory.mktemp('wheel')
    skip = shutil.ignore_patterns('.venv', '.git', 'reports', '__pycache__', 'build', '*.egg-info', '.pytest_cache')
    shutil.copytree(ROOT, home / 'source', ignore=skip)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', home, home / 'source'], check=True, capture_output=True)
    return next(home.glob('*.whl'))


def test_the_wheel_ships_the_stage_notebooks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in sorted(names) if n.startswith('finetune_nb/stages/') and n.endswith('.ipynb')] == [
        f'finetune_nb/stages/{n}_{name}.ipynb' for n, name in enumerate(['curation', 'selection', 'training', 'evaluation', 'deployment', 'monitoring'], 1)]
    assert 'finetune_nb/py.typed' in names and not [n for n in names if n.startswith('tests/')]


def test_it_runs_in_any_folder(wheel, recipe_of, tmp_path):
    "Unpacked beside nothing, with the dependencies of this environment."
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    recipe = recipe_of(tmp_path / 'data')
    code = f'import sys; sys.path.insert(0, {str(tmp_path / "site")!r}); from finetune_nb.pipeline.cli import main; sys.exit(main())'
    words = [sys.executable, '-c', code, 'run', str(recipe), '--name', 'x', '--reports', str(tmp_path / 'reports'), '--to', 'curation']
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={'PYTHONPATH': str(tmp_path / 'site'), 'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / 'reports' / 'x' / 'report.html').is_file()
