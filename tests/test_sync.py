"Notebooks and package are one thing: an edit by hand on either side is found here and named."
import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
STAGES = sorted((ROOT / 'nbs' / 'stages').glob('*.ipynb'))


def differences(a: Path, b: Path) -> list[str]:
    "Files of two trees that are not the same, compiled ones apart."
    compared = filecmp.dircmp(a, b, ignore=['__pycache__', '.ipynb_checkpoints'])
    here = [str(a / name) for name in compared.left_only + compared.right_only + compared.funny_files]
    here += [str(a / name) for name in filecmp.cmpfiles(a, b, compared.common_files, shallow=False)[1]]
    return here + [d for name in compared.common_dirs for d in differences(a / name, b / name)]


@pytest.fixture(scope='module')
def rebuilt(tmp_path_factory):
    "A copy of the repository, exported and cleaned anew."
    copy = tmp_path_factory.mktemp('rebuilt')
    for name in ('nbs', 'finetune_nb'): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT / name, copy)
    for command in ('nbdev-export', 'nbdev-clean'):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True)
    return copy


def test_package_is_what_the_notebooks_export(rebuilt):
    assert differences(ROOT / 'finetune_nb', rebuilt / 'finetune_nb') == [], 'run nbdev-export'


def test_notebooks_are_clean(rebuilt):
    assert differences(ROOT / 'nbs', rebuilt / 'nbs') == [], 'run nbdev-clean'


@pytest.mark.parametrize('path', STAGES, ids=lambda p: p.stem)
def test_stage_notebook_uses_and_defines_nothing(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert sum('parameters' in cell.metadata.get('tags', []) for cell in code) == 1
    assert not any(cell.outputs or cell.execution_count for cell in code), 'stage notebooks are committed without outputs'
    assert not any(line.startswith(('def ', 'class ', '%', '!')) for cell in code for line in cell.source.splitlines())


def test_functions_fit_on_a_screen():
    import ast
    long = []
    for path in sorted((ROOT / 'finetune_nb').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 40: long.append(f'{path.name}: {node.name}')
    assert long == []


def test_light_rooms_stay_light():
    "Curation, monitoring, the report and the command line must not pay for importing torch."
    code = ('import sys, importlib, pkgutil, finetune_nb\n'
            'rooms = ("core", "curation", "monitoring", "report", "pipeline", "demo")\n'
            'for room in rooms:\n'
            '    package = importlib.import_module(f"finetune_nb.{room}")\n'
            '    for module in pkgutil.iter_modules(package.__path__): importlib.import_module(f"finetune_nb.{room}.{module.name}")\n'
            'print(sorted({"torch", "transformers", "datasets", "papermill"} & set(sys.modules)))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_stages_import_only_what_precedes_them():
    "One direction: no stage's module imports a later stage's."
    order = ['core', 'model', 'curation', 'selection', 'training', 'evaluation', 'deployment', 'monitoring', 'report', 'demo', 'pipeline']
    against = []
    for place, room in enumerate(order):
        for path in (ROOT / 'finetune_nb' / room).glob('*.py'):
            text = path.read_text()
            against += [f'{room}/{path.name} imports {later}' for later in order[place + 1:]
                        if f'from ..{later}' in text or f'finetune_nb.{later}.' in text and f'from finetune_nb.{later}.' in text]
    assert against == []
