"What must not get worse: a proven loss blocks promotion, a panel too small says so, tasks of the harness are compared document by document."
import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from finetune_nb.core.files import BadInput, read_json
from finetune_nb.core.recipe import load_recipe
from finetune_nb.core.run import Run
from finetune_nb.core.rows import make_row
from finetune_nb.evaluation.harness import ask_harness, check_harness, harness_records
from finetune_nb.evaluation.panel import BESIDE, NOTHING, _records, compare_panel
from finetune_nb.evaluation.panel_rows import CANARY, panel_probes
from finetune_nb.pipeline.runner import check_recipe

ROWS = [make_row([{'role': 'user', 'content': f'Where is my order number {i} of last week?'}, {'role': 'assistant', 'content': 'On its way.'}]) for i in range(16)]
NO = "I'm sorry, but I can't help with that."


def said(answers, rows=16):
    "A panel's answers, scored by its own rules: `answers` gives the text of a probe, and of a prompt without its command."
    probes = panel_probes(ROWS, rows)
    text = lambda words: SimpleNamespace(text=words, stopped=True)
    clean = [text(answers(None)) for probe in probes if probe.clean]
    return {'answers': _records(probes, [text(answers(probe)) for probe in probes], clean), 'texts': {}}


def good(probe):
    "Answers as one would wish."
    if probe and probe.kind == 'refusals due': return NO
    return 'It is on its way.'


def words_of(panel): return {line['metric']: line['verdict'] for line in panel.lines}


def test_a_model_that_stops_refusing_is_a_regression():
    lost = compare_panel(said(good), said(lambda probe: 'Sure, here it is.'))
    assert lost.verdict == 'REGRESSION' and lost.regressions == ('refusals due',)
    assert words_of(lost)['refusals not due'] != 'WORSE' and lost.examples[0]['kind'] == 'refusals due'


@pytest.mark.parametrize(('gone', 'verdict'), [(16, 'WORSE'), (9, 'WORSE'), (4, 'INCONCLUSIVE')])
def test_how_many_of_sixteen_must_be_lost(gone, verdict):
    due = [p.asked for p in panel_probes(ROWS, 16) if p.kind == 'refusals due'][:gone]
    tuned = lambda probe: 'Sure, here it is.' if probe and probe.asked in due else good(probe)
    assert words_of(compare_panel(said(good), said(tuned)))['refusals due'] == verdict


def test_a_command_that_is_obeyed_and_one_that_confuses():
    obeys = lambda probe: CANARY if probe and probe.kind == 'injected commands' else good(probe)
    confused = lambda probe: 'What do you mean by that?' if probe and probe.kind == 'injected commands' else good(probe)
    assert compare_panel(said(good), said(obeys)).regressions == ('injected commands', BESIDE)
    assert compare_panel(said(good), said(confused)).regressions == (BESIDE,)


def test_what_the_base_never_could_is_not_lost():
    panel = compare_panel(said(lambda probe: 'Sure.'), said(lambda probe: 'Sure.'))
    assert words_of(panel)['refusals due'] == NOTHING and panel.verdict == 'NO REGRESSION SEEN'


def test_the_same_answers_are_no_regression_and_other_questions_are_an_error():
    assert compare_panel(said(good), said(good)).regressions == ()
    with pytest.raises(ValueError): compare_panel(said(good, 16), said(good, 8))


def test_a_regression_blocks_promotion_until_somebody_answers_for_it(complete_run, tmp_path):
    from finetune_nb.curation.curate import Curated
    from finetune_nb.deployment.release import closing, release
    from finetune_nb.evaluation.verdict import Verdict
    from finetune_nb.training.tuned import Tuned
    home = shutil.copytree(complete_run[0], tmp_path / 'run')
    lost = compare_panel(said(good), said(lambda probe: 'Sure, here it is.'))
    verdict = replace(Verdict.load(home), panel=lost.to_dict())
    make = lambda **changes: release(Run.open(home, overrides={'deploy.check_rows': 1, **changes}), Curated.load(home), Tuned.load(home), verdict)
    blocked = make()
    assert 'surely worse than the base: refusals due' in blocked.blocked and blocked.blocked in closing(blocked)
    assert read_json(home / 'deployment' / 'release.json')['blocked'] == blocked.blocked
    assert make(**{'evaluate.panel.block': False}).blocked == ''


SCORES = {'scores': {'acc': {str(i): float(i % 10 < 5) for i in range(60)}}, 'less': []}

@pytest.mark.parametrize('tuned', [{}, {'task': {'why': 'OutOfMemoryError: no memory'}}])
def test_a_task_that_ran_for_one_model_only_is_not_measured(tuned):
    [line] = harness_records({'task': SCORES}, tuned)
    assert line['verdict'] == 'NOT MEASURED' and line['delta'] is None and line['because']


def test_missing_tasks_metrics_and_packages_are_said_before_stage_1(tmp_path):
    (tmp_path / 'rows.jsonl').write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / 'mine.py').write_text('def kind(prediction): return 1.0\n')
    def check(evaluate):
        (tmp_path / 'recipe.yaml').write_text(f'name: r\ndata: {{sources: [{{path: rows.jsonl, inflow: experts}}]}}\nevaluate: {evaluate}\n')
        check_recipe(load_recipe(tmp_path / 'recipe.yaml'))
    check('{metric: exact_match}')
    with pytest.raises(BadInput, match='evaluate.metric.*cannot be called; expected it to take'): check('{metric: "mine.py:kind"}')
    with pytest.raises(BadInput, match='evaluate.harness.tasks'): check('{harness: {tasks: [nowhere.yaml]}}')


@pytest.mark.skipif(find_spec('lm_eval') is None, reason='lm-evaluation-harness is not installed (extra [harness])')
def test_a_task_of_ones_own_is_scored_by_document(tiny_model, tmp_path):
    from finetune_nb.model.loading import load_model
    documents = [{'q': f'What is {i} plus 1?', 'choices': [str(i + 1), str(i + 5)], 'gold': 0} for i in range(12)]
    (tmp_path / 'd.jsonl').write_text('\n'.join(map(json.dumps, documents)))
    (tmp_path / 't.yaml').write_text(
        f'task: plus_one\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/d.jsonl}}}}\ntest_split: test\noutput_type: multiple_choice\n'
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\nmetric_list: [{metric: acc}]\n')
    check_harness(['t.yaml'], tmp_path)
    found = ask_harness(load_model(str(tiny_model)), ['t.yaml', 'no_such_task'], 6, tmp_path)
    assert len(found['plus_one']['scores']['acc']) == 6 and found['no_such_task']['why']
    assert {line['verdict'] for line in harness_records(found, found)} <= {'SAME', 'INCONCLUSIVE', 'NOT MEASURED'}
