"A plan on a tiny model: measured, foretold, written down, and carried out by its own recipe."
import json
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import cli

from finetune_nb.core.recipe import Recipe, load_recipe
from finetune_nb.core.rows import make_row
from finetune_nb.core.run import Run
from finetune_nb.selection.forecasts import read_ledger, settle, write_forecasts


def turn(role, text): return {'role': role, 'content': text}


@pytest.mark.slow
def test_a_plan_from_rows_to_recipe(tiny_model, tmp_path):
    "The stage's steps in one process: tried, asked, advised, foretold, written as a recipe, settled."
    from finetune_nb.selection.choose import choose
    from finetune_nb.selection.design import designed, foretold, try_approaches
    from finetune_nb.selection.planned import write_planned
    from finetune_nb.selection.untrained import ask_untrained
    from finetune_nb.training.short import short_training, usual_rate
    rows = [make_row([turn('user', f'How many is {n} and one?'), turn('assistant', f'It is {n + 1}.')], line=n) for n in range(24)]
    curated = SimpleNamespace(train=rows[:18], validation=rows[18:], test=[])
    recipe = Recipe(name='sums', data={'sources': [{'path': 'sums.jsonl'}]}, base_models=[str(tiny_model)], folder=tmp_path, gates={'Q6': {'floor': 10}},
                    selection={'rows': 4, 'steps': 3}, evaluate={'max_new_tokens': 4},
                    train={'approach': 'auto', 'max_steps': 4, 'batch_size': 4, 'validation_rows': 4, 'panel_rows': 0, 'rank': 4, 'dtype': 'float32', 'forgetting': {'rows': 0}})
    run = Run(tmp_path / 'plan', recipe)
    choice, untrained = choose(run, curated), ask_untrained(run, curated, str(tiny_model))
    probes = try_approaches(run, choice, partial(short_training, run, curated), minutes=5.0)
    plan = designed(run, curated, choice, probes, untrained)
    tried = {one['approach']: one for one in plan.advice['approaches']}
    for name in ('lora', 'full', 'prompt_tuning'): assert tried[name]['probed_steps'] == 3 and tried[name]['seconds'] > 0
    assert tried['preference']['verdict'].startswith('not possible') and set(untrained.scores) == {'zero_shot', 'few_shot', 'nearest_neighbour'}
    best = plan.advice['recommendation']
    path = write_planned(run, plan.base, plan.advice, usual_rate)
    assert load_recipe(path).train.approach == best and load_recipe(path).name == 'sums-planned'
    ledger = write_forecasts(run, plan.base, '', foretold(plan, probes, untrained))
    done = Run.open(tmp_path / 'done', path)
    done.path('training').mkdir()
    done.path('training', 'training.json').write_text(json.dumps({'approach': best, 'steps': 4, 'seconds': 1.0, 'memory': {'measured': 2.0}}))
    assert settle(done) == 2
    assert {(line.what, line.measured) for line in read_ledger(ledger) if line.measured} == {('step_seconds', 1.0), ('memory_gb', 2.0)}


@pytest.fixture(scope='module')
def planned(recipe_of, tmp_path_factory):
    "A plan with everything tried, for two approaches' worth of time."
    home = tmp_path_factory.mktemp('planned')
    recipe = recipe_of(home / 'recipe', selection={'rows': 4, 'steps': 3, 'tunability': 0})
    done = cli('plan', recipe, '--name', 'plan', '--reports', home / 'reports')
    assert done.returncode == 0, done.stdout + done.stderr
    return home / 'reports', done


@pytest.mark.slow
def test_every_possible_approach_is_tried_and_the_untrained_ones_answer(planned):
    reports, _ = planned
    advice = json.loads((reports / 'plan' / 'selection' / 'advice.json').read_text())
    records = {one['approach']: one for one in advice['approaches']}
    for name in ('lora', 'full', 'prompt_tuning'):
        assert records[name]['probed_steps'] == 3 and records[name]['seconds'] > 0, records[name]
    assert not records['preference']['feasible'] and records['few_shot']['seconds'] == 'NOT MEASURED'
    measured = json.loads((reports / 'plan' / 'selection' / 'probes.json').read_text())['untrained']
    assert set(measured['scores']) >= {'zero_shot', 'nearest_neighbour'} and measured['scores']['zero_shot'][3] == 4


@pytest.mark.slow
def test_the_command_says_what_is_recommended_and_how_to_do_it(planned):
    reports, done = planned
    assert 'carry it out: finetune-nb run' in done.stdout and 'what would change it' in done.stdout
    plan = load_recipe(reports / 'plan' / 'selection' / 'planned.yaml')
    assert len(plan.base_models) == 1 and plan.train.approach == 'lora' and plan.name == 'tiny-planned'
    for source in plan.data.sources: assert (plan.folder / source.path).is_file()


@pytest.mark.slow
def test_a_training_as_planned_settles_what_was_foretold(planned):
    "Without training again: what a training leaves is put into a run of the planned recipe."
    reports, _ = planned
    foretold = {(line.what, line.approach): line for line in read_ledger(reports / 'forecasts.jsonl')}
    assert {('memory_gb', 'lora'), ('memory_gb', 'full')} <= set(foretold)
    run = Run.open(reports / 'done', reports / 'plan' / 'selection' / 'planned.yaml')
    for part in ('data/train.jsonl', 'selection/choice.json'):
        run.path(part).parent.mkdir(parents=True, exist_ok=True)
        run.path(part).write_bytes((reports / 'plan' / part).read_bytes())
    run.path('training').mkdir()
    run.path('training', 'training.json').write_text(json.dumps({'approach': 'lora', 'steps': 4, 'seconds': 1.0, 'memory': {'measured': 2.0}}))
    assert settle(run) >= 1
    line = next(line for line in read_ledger(reports / 'forecasts.jsonl') if (line.what, line.approach) == ('memory_gb', 'lora'))
    assert (line.measured, line.measured_in) == (2.0, 'done')
    assert next(line for line in read_ledger(reports / 'forecasts.jsonl') if line.approach == 'full').measured is None


@pytest.mark.slow
def test_requirements_that_nothing_meets_get_a_clear_no_with_the_nearest_miss(recipe_of, tmp_path):
    done = cli('plan', recipe_of(tmp_path / 'recipe', requirements={'memory_gb': 1e-6}), '--name', 'no', '--reports', tmp_path / 'reports')
    assert done.returncode == 2 and 'Nearest miss' in done.stderr and (tmp_path / 'reports' / 'no' / 'report.html').is_file()


@pytest.mark.slow
def test_a_task_that_examples_in_the_prompt_solve_is_not_to_be_trained(tmp_path):
    "The starter repeats a word once it has seen three that were repeated; that is all this task asks."
    from finetune_nb.selection.choose import choose
    from finetune_nb.selection.design import designed
    from finetune_nb.selection.untrained import ask_untrained
    words = ('apple river candle window garden silver mountain ticket basket pencil orange bridge winter pocket mirror castle forest button '
             'letter summer rocket island pepper jacket tunnel flower needle marble ladder hammer cotton kitten').split()
    rows = [make_row([turn('user', f'Repeat this word and write nothing else: {word}'), turn('assistant', word)], line=n) for n, word in enumerate(words)]
    curated = SimpleNamespace(train=rows[:16], validation=rows[16:], test=[])
    recipe = Recipe(name='echo', data={'sources': [{'path': 'x.jsonl'}]}, folder=tmp_path, gates={'Q6': {'floor': 10}}, requirements={'floor': .6},
                    selection={'rows': 16}, evaluate={'metric': 'exact_match', 'max_new_tokens': 12})
    run = Run(tmp_path / 'plan', recipe)
    choice, untrained = choose(run, curated), ask_untrained(run, curated, 'starter')
    plan = designed(run, curated, choice, [], untrained)
    assert plan.advice['recommendation'] in ('zero_shot', 'few_shot'), untrained.scores
    assert 'do not fine-tune' in plan.advice['because'] and 'already reaches your floor' in plan.advice['because']
    strict = Run(tmp_path / 'strict', recipe.model_copy(update={'requirements': recipe.requirements.model_copy(update={'floor': .999})}))
    assert designed(strict, curated, choice, [], untrained).advice['recommendation'] == 'lora'
