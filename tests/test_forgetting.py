"Forgetting is measured on texts nobody trains on, replay gives the dose it is told, and the panel changes no number."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune_nb.core.recipe import Recipe
from finetune_nb.core.rows import make_row
from finetune_nb.core.run import Run
from finetune_nb.core.sections import Forgetting
from finetune_nb.core.similarity import jaccard, row_shingles
from finetune_nb.model.step import token_losses
from finetune_nb.training import fit as fit_module
from finetune_nb.training.fit import fit
from finetune_nb.training.forgetting import changes, forgetting_finding, forgetting_probe
from finetune_nb.training.heldout import ALIKE, HeldOut, held_out
from finetune_nb.training.panel import choose_panel, panel_probe, panel_table
from finetune_nb.training.plan import make_plan
from finetune_nb.training.replay import REPLAY, doses, mix_replay, replay_rows


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch):
    monkeypatch.setattr(fit_module, 'pick_device', lambda *_: 'cpu')


def row(n: int) -> dict:
    return make_row([{'role': 'user', 'content': f'How many is {n} and one?'}, {'role': 'assistant', 'content': f'It is {n + 1}.'}], category='even' if n % 2 else 'odd',
                    file='sums.jsonl', line=n)


@pytest.fixture(scope='module')
def plan(tiny_model, tmp_path_factory):
    "Four steps of a full training, evaluated twice."
    train = {'approach': 'full', 'max_steps': 4, 'batch_size': 4, 'learning_rate': 5e-3, 'evals': 2, 'validation_rows': 4, 'dtype': 'float32',
             'panel_rows': 0, 'forgetting': {'rows': 0}}
    recipe = Recipe(name='sums', data={'sources': [{'path': 'sums.jsonl'}]}, base_models=[str(tiny_model)], train=train)
    rows = SimpleNamespace(train=[row(n) for n in range(40)], validation=[row(n) for n in range(40, 48)], test=[])
    return make_plan(Run(tmp_path_factory.mktemp('run'), recipe), rows, SimpleNamespace(base=str(tiny_model), advice={}))


def curve_of(plan, folder, probes):
    "The journal of a training whose base is asked before the first step."
    asked = {}

    def watching(loaded):
        made = probes(loaded)
        asked.update({name: probe(loaded.model) for name, probe in made.items()})
        return made
    journal = fit(plan, folder, probes=watching).journal
    curve = journal.curve if any(point['step'] == 0 for point in journal.curve) else [{'step': 0, **asked}, *journal.curve]
    return journal.lines, curve


def numbers(lines) -> list:
    return [(line['step'], line['loss'], line['tokens']) for line in lines]


def test_training_is_the_same_to_the_bit_with_and_without_being_asked(plan, tmp_path):
    kept = held_out(Forgetting(rows=4), '.', plan.rows, 1)
    panel = choose_panel(plan.checked, 2, 1)
    ask = lambda loaded: {'forgetting': forgetting_probe(loaded, kept), 'panel': panel_probe(loaded, panel, 8)}
    watched, curve = curve_of(plan, tmp_path / 'watched', ask)
    alone, plain = curve_of(plan, tmp_path / 'alone', lambda loaded: {})
    assert numbers(watched) == numbers(alone)
    assert [p['validation_loss'] for p in curve if p['step']] == [p['validation_loss'] for p in plain if p['step']]
    assert [point['step'] for point in curve] == [0, 2, 4] and all(len(point['panel']) == 2 for point in curve)
    assert {'general', 'neighbours'} == set(curve[-1]['forgetting'])
    assert panel_table(curve, 4).markdown.count('| base |') == 2


def test_panel_puts_everything_back(tiny_model):
    from finetune_nb.model.loading import load_model
    loaded = load_model(str(tiny_model), 'float32', 'cpu')
    loaded.model.train()
    loaded.model.get_decoder().layers[0].eval()
    loaded.model.config.use_cache = False
    modes, state = [m.training for m in loaded.model.modules()], torch.get_rng_state()
    panel_probe(loaded, [row(1), row(2)], 4)(loaded.model)
    assert modes == [m.training for m in loaded.model.modules()]
    assert torch.equal(state, torch.get_rng_state()) and loaded.model.config.use_cache is False


def test_panel_asks_a_learned_prompt_one_at_a_time(tiny_model):
    from peft import PromptTuningConfig, get_peft_model
    from finetune_nb.model.loading import load_model
    loaded = load_model(str(tiny_model), 'float32', 'cpu')
    loaded = replace(loaded, model=get_peft_model(loaded.model, PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4)))
    alone = [panel_probe(loaded, [row(n)], 6)(loaded.model)[0]['answer'] for n in (1, 2, 3)]
    assert [seat['answer'] for seat in panel_probe(loaded, [row(1), row(2), row(3)], 6)(loaded.model)] == alone


def test_a_model_that_learns_one_thing_forgets_another(plan, tmp_path):
    "The neighbouring task is learned first, so that there is something to forget."
    taught = [make_row([{'role': 'user', 'content': f'What is the colour of thing {n}?'}, {'role': 'assistant', 'content': 'Blue, as all things are.'}]) for n in range(12)]
    kept = HeldOut([], taught, [], {})
    from finetune_nb.model.loading import load_model
    loaded = load_model(plan.ref, 'float32', 'cpu', attention='eager')
    probe, steps = forgetting_probe(loaded, kept), torch.optim.AdamW(loaded.model.parameters(), 3e-3)

    def learn(rows, times):
        from finetune_nb.model.batches import collate, encode
        batch = collate(encode(loaded.tokenizer, rows), loaded.tokenizer.pad_token_id)
        for _ in range(times):
            token_losses(loaded.model.train(), batch).mean().backward()
            steps.step()
            steps.zero_grad()
    learn(taught[:6], 15)
    curve = [{'step': 0, 'forgetting': probe(loaded.model)}]
    learn([row(n) for n in range(6)], 20)
    curve.append({'step': 20, 'forgetting': probe(loaded.model)})
    assert [(c.kind, c.verdict) for c in changes(curve)] == [('neighbours', 'FORGOT')]
    assert 'replay: 0.1' in forgetting_finding(curve) and 'General text: NOT MEASURED' in forgetting_finding(curve)


def test_held_out_rows_are_like_no_row_of_the_run_nor_any_that_is_replayed():
    first = held_out(Forgetting(replay=0.2), '.', [], 3)
    own = [{**one, 'id': f'own {n}', 'messages': [*one['messages'][:-1], {'role': 'assistant', 'content': one['messages'][-1]['content'] + ' Yes.'}]}
           for n, one in enumerate([*first.neighbours[:6], *first.replay[:6]])]
    kept = held_out(Forgetting(replay=0.2), '.', own, 3)
    alike = lambda a, b: max((jaccard(row_shingles(x), row_shingles(y)) for x in a for y in b), default=0)
    assert alike(kept.neighbours, own) < ALIKE and alike(kept.replay, own) < ALIKE and alike(kept.neighbours, kept.replay) < ALIKE
    assert len(kept.neighbours) == 24 and not {one['id'] for one in kept.neighbours} & {one['id'] for one in kept.replay}


@pytest.mark.parametrize('share', [0.05, 0.1, 0.3, 0.5])
def test_the_dose_is_exact_at_every_moment_and_no_row_of_the_run_is_lost(share):
    steps = [list(range(at, min(at + 8, 250))) for at in range(0, 250, 8)]
    mixed = mix_replay(steps, range(1000, 1020), share, seed=5)
    given = np.cumsum([sum(item >= 1000 for item in step) for step in mixed])
    assert np.abs(given - share * np.cumsum([len(step) for step in steps])).max() <= 0.5 + 1e-6
    assert [sum(item >= 1000 for item in step) for step in mixed] == doses([len(step) for step in steps], share)
    own = [item for step in mixed for item in step if item < 1000]
    assert sorted(own) == list(range(len(own)))


def test_replay_that_is_trained_is_counted_apart_and_never_validated(plan):
    kept = held_out(Forgetting(replay=0.25), '.', [*plan.rows, *plan.checked], 1)
    again = replay_rows(kept, plan.steps, 0.25)
    assert {one['category'] for one in again} == {REPLAY} and len(again) == 4
    assert not {one['id'] for one in again} & {one['id'] for one in [*plan.checked, *kept.neighbours]}
