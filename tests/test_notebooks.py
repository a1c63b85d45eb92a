"Each library notebook is a test of itself."
import os
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parents[1]
LIBRARY = [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if p.parent.name not in ('stages', 'bench') and '.ipynb_checkpoints' not in p.parts]


@pytest.mark.parametrize('notebook', LIBRARY, ids=lambda p: str(p.relative_to(ROOT / 'nbs').with_suffix('')))
def test_notebook(notebook, monkeypatch):
    monkeypatch.chdir(notebook.parent)
    passed, _ = run_notebook(notebook, skip_flags=['notest', 'slow'], basepath=ROOT)
    assert passed
