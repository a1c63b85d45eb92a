"The README is a promise: its targets, commands and links are tried."
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
CODE = [line.split('#')[0].strip() for block in re.findall(r'```(?:bash|sh)\n(.*?)```', README, re.S) for line in block.splitlines()]


def test_it_is_short():
    assert len(README.splitlines()) < 100


@pytest.mark.parametrize('command', [line for line in CODE if line.startswith('make')])
def test_make_targets(command):
    done = subprocess.run(['make', '-n', *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_local_links():
    links = re.findall(r'\]\((?!http)([^)#]+)', README) + re.findall(r'src="(?!http)([^"]+)"', README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_commands_run_on_a_tiny_recipe(recipe_of, tmp_path):
    "Every `finetune-nb` line but the servers and the demo itself, with the README's own words."
    recipe_of(tmp_path / 'my-project')
    commands = [shlex.split(line)[1:] for line in CODE if line.startswith('finetune-nb')]
    assert any(words[0] == 'run' for words in commands)
    for words in commands:
        if words[0] in ('serve', 'chat', 'demo', 'init'):
            assert cli(words[0], '--help').returncode == 0, words
            continue
        done = cli(*words, cwd=tmp_path)
        assert done.returncode == 0, f'{words}: {done.stdout}{done.stderr}'
