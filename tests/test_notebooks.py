"Each library notebook is a test of itself."
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parents[1]
LIBRARY = [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if p.parent.name not in ('stages', 'bench') and '.ipynb_checkpoints' not in p.parts]

ALONE = {'interrupt'}   # it sends signals to its own process


@pytest.mark.parametrize('notebook', LIBRARY, ids=lambda p: str(p.relative_to(ROOT / 'nbs').with_suffix('')))
def test_notebook(notebook, monkeypatch):
    monkeypatch.chdir(notebook.parent)
    if notebook.stem in ALONE:
        NotebookClient(nbformat.read(notebook, 4), timeout=300, kernel_name='python3', resources={'metadata': {'path': str(notebook.parent)}}).execute()
        return
    passed, _ = run_notebook(notebook, skip_flags=['notest', 'slow'], basepath=ROOT)
    assert passed
