"Requirements against bases and hardware: what is missed is said, before anything starts where that can be known."
from types import SimpleNamespace

import pytest
from conftest import ROOT

from finetune_nb.core.files import BadInput
from finetune_nb.core.recipe import Recipe
from finetune_nb.core.rows import make_row
from finetune_nb.core.run import Run
from finetune_nb.model.loading import load_tokenizer
from finetune_nb.pipeline.runner import check_recipe
from finetune_nb.selection.choose import candidates_of, choose
from finetune_nb.selection.reading import read_template


def mails(count):
    "Questions and answers in plain English."
    things = ['bicycle', 'lamp', 'kettle', 'tent', 'guitar', 'printer', 'jacket', 'camera']
    said = lambda n: [{'role': 'user', 'content': f'My {things[n % 8]} from order {n} has not arrived. Where is it?'},
                      {'role': 'assistant', 'content': f'I am sorry for the delay. Your {things[n % 8]} left our warehouse yesterday and will be with you in {n % 5 + 1} days.'}]
    return [make_row(said(n), line=n) for n in range(count)]


@pytest.mark.parametrize('path', sorted((ROOT / 'tests' / 'templates').glob('*.jinja')), ids=lambda path: path.stem)
def test_templates_of_real_families_are_no_fault(path, tiny_model):
    "With a tokenizer that knows their marks."
    import re
    text, tokenizer = path.read_text(encoding='utf8'), load_tokenizer(tiny_model)
    marks = sorted(set(re.findall(r'<[|｜][^|｜<>{}\n\']{1,40}[|｜]>|<(?:start|end)_of_turn>|<turn\|>', text)))
    tokenizer.add_special_tokens({'additional_special_tokens': marks})
    tokenizer.chat_template = text
    assert not any('another tokenizer' in fault for fault in read_template(tokenizer)['faults'])


def recipe_with(tmp_path, requirements, judge='none'):
    (tmp_path / 'rows.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')
    return Recipe(name='r', data={'sources': [{'path': 'rows.jsonl', 'inflow': 'experts'}]}, folder=tmp_path, requirements=requirements, judge={'model': judge})


def test_a_private_recipe_with_an_endpoint_outside_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(BadInput, match='requirements.private.*judge.model'):
        check_recipe(recipe_with(tmp_path, {'private': True}, {'url': 'https://api.example.com/v1', 'model': 'x'}))
    check_recipe(recipe_with(tmp_path, {'private': True}, {'url': 'http://localhost:8000/v1', 'model': 'x'}))


def chosen(tiny_model, tmp_path, **requirements):
    rows = mails(16)
    recipe = Recipe(name='r', data={'sources': [{'path': 'x.jsonl'}]}, base_models=[str(tiny_model)], folder=tmp_path, requirements=requirements, selection={'rows': 2}, evaluate={'max_new_tokens': 4})
    return choose(Run(tmp_path / 'run', recipe), SimpleNamespace(train=rows[:12], validation=rows[12:]))


@pytest.mark.parametrize(('requirements', 'miss'), [({'context': 1_000_000}, 'context.*1e.06 wanted'), ({'seconds': 1e-9}, 'seconds.*allowed'),
                                                    ({'answers_per_second': 1e9}, 'answers_per_second.*wanted'), ({'hardware': '1x T4', 'memory_gb': 1e-6}, 'GB to train')])
def test_a_recipe_that_nothing_meets_gets_a_no_with_the_nearest_miss(tiny_model, tmp_path, requirements, miss):
    with pytest.raises(BadInput, match=f'(?s)none can be used.*Nearest miss.*{miss}'): chosen(tiny_model, tmp_path, **requirements)


def test_hardware_that_is_not_here_is_calculated_and_says_so(tiny_model, tmp_path):
    from finetune_nb.selection.design import designed
    from finetune_nb.selection.hardware import hardware_of
    from finetune_nb.selection.untrained import Untrained
    choice, there = chosen(tiny_model, tmp_path, hardware='1x A100 80GB'), hardware_of('1x A100 80GB')
    run = Run(tmp_path / 'run', Recipe(name='r', data={'sources': [{'path': 'x.jsonl'}]}, folder=tmp_path, gates={'Q6': {'floor': 1}}))
    lora = next(one for one in designed(run, SimpleNamespace(train=[{}] * 12), choice, [], Untrained({}, {}, []), hardware=there).advice['approaches'] if one['approach'] == 'lora')
    assert lora['seconds'] > 0 and 'EXTRAPOLATED' in lora['notes'][0] and 'data sheet' in lora['notes'][0] and {'seconds', 'memory_gb'} <= set(lora['by_formula'])
    assert candidates_of(choice)[0].memory_limit_gb == 80
