"Objectives beyond the answers' loss: preferences, a teacher's tokens and answers, a reward."
import json
import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from transformers import TrainerCallback

from finetune_nb.core.files import BadInput, read_jsonl
from finetune_nb.core.rows import make_row
from finetune_nb.core.sections import Distillation, Preference, Train
from finetune_nb.model.batches import plan_batches
from finetune_nb.model.loading import load_model, load_tokenizer, resolve
from finetune_nb.model.scripted import scripted
from finetune_nb.training.aims import items_of, make_objective, objective_probes
from finetune_nb.training.approaches import prepare
from finetune_nb.training.distillation import TeacherTokens, divergences
from finetune_nb.training.fit import fit
from finetune_nb.training.grpo import run_grpo
from finetune_nb.training.phases import best_checkpoint, warm_start
from finetune_nb.training.plan import Plan
from finetune_nb.training.preference import REFERENCE, Preferences, pairs_of, reference_logps
from finetune_nb.training.start import take_weights
from finetune_nb.training.taught import ask_teacher
from finetune_nb.training.trainer import validation_loss

THINGS = ('lamp', 'kettle', 'chair', 'desk', 'clock', 'plate', 'shelf', 'mirror')


def turn(role, text): return {'role': role, 'content': text}


def preference(n, thing):
    prompt = [turn('user', f'Order {n}: where is my {thing}?')]
    good, bad = [turn('assistant', f'Your {thing} is on its way.')], [turn('assistant', f'No idea. Ask someone about {n} else.')]
    return make_row(prompt + good, prompt=prompt, chosen=good, rejected=bad)


PAIRS = [preference(n, thing) for n, thing in enumerate(THINGS)]


def plan_of(tiny, rows, settings, approach='preference', held_out=2):
    "A plan for the last rows as validation and the others as training; whatever else a plan has is left empty."
    tokenizer = load_tokenizer(tiny)
    kept, items, _ = items_of(tokenizer, rows, settings, approach)
    items, checked = items[:-held_out], items[-held_out:]
    steps = list(plan_batches([len(item) for item in items], settings.batch_size, 3, 99))[:settings.max_steps]
    known = {'approach': approach, 'ref': resolve(str(tiny)), 'settings': settings, 'rows': kept[:-held_out], 'items': items, 'steps': steps,
             'checked': kept[-held_out:], 'validation': [checked], 'stamp': 'this', 'pad_id': tokenizer.pad_token_id, 'seed': 3, 'rendered': [], 'masks': {}}
    return Plan(**{field.name: known.get(field.name) for field in fields(Plan)})


def settings_of(**changes):
    return Train(**{'max_steps': 6, 'batch_size': 3, 'learning_rate': 5e-3, 'evals': 2, 'rank': 4, 'max_tokens': 160, 'dtype': 'float32', 'warmup_ratio': 0., **changes})


def shaken(tiny, seed=0, rank=4):
    "A model with adapters whose weights are not those of a start."
    torch.manual_seed(seed)
    model = prepare(load_model(str(tiny), 'float32', 'cpu'), 'lora', rank)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad: weight.add_(torch.randn_like(weight) * .05)
    return model


def weights(model): return [w.detach().clone() for w in model.parameters() if w.requires_grad]


# preferences

def test_a_batch_has_the_loss_and_gradient_of_trl(tiny_model, tmp_path):
    trl = pytest.importorskip('trl')
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    tokenizer, base = load_tokenizer(tiny_model), load_model(str(tiny_model), 'float32', 'cpu').model
    _, pairs, _ = pairs_of(tokenizer, PAIRS, 160)
    objective = Preferences(tokenizer.pad_token_id, 0.3, reference_logps(tmp_path, 's', pairs, tokenizer.pad_token_id, 3, base))
    model, part = shaken(tiny_model), objective.collate(pairs)
    ours = objective.loss(model, part, objective.weight(part))
    ours.backward()
    ours = float(ours.detach())
    gradient = [w.grad.clone() for w in model.parameters() if w.requires_grad]

    model = shaken(tiny_model)
    args = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to='none', disable_tqdm=True)
    texts = Dataset.from_list([{name: row[name] for name in ('prompt', 'chosen', 'rejected')} for row in PAIRS])
    # TRL takes an adapter that it is given for the start; what the base says is given as its reference instead
    trainer = trl.DPOTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer)
    cut = [pair.chosen.trained.index(True) for pair in pairs]
    said = [{'prompt_ids': p.chosen.ids[:at], 'chosen_ids': p.chosen.ids[at:], 'rejected_ids': p.rejected.ids[at:],
             'ref_chosen_logps': objective.reference[p.key][0], 'ref_rejected_logps': objective.reference[p.key][1]} for p, at in zip(pairs, cut)]
    trainer.precompute_ref_logps = True
    theirs = trainer.compute_loss(trainer.model, DataCollatorForPreference(tokenizer.pad_token_id)(said))
    theirs.backward()
    assert abs(ours - math.log(2)) > 1e-3   # the weights have moved: not the loss of the start
    assert ours == pytest.approx(float(theirs.detach()), abs=1e-5)
    trained = [w.grad for name, w in trainer.model.named_parameters() if w.grad is not None]
    assert len(trained) == len(gradient)
    assert max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(gradient, trained)) < 1e-3


def test_one_part_or_many_give_the_same_loss(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    _, pairs, _ = pairs_of(tokenizer, PAIRS, 160)
    base = load_model(str(tiny_model), 'float32', 'cpu').model
    objective, model = Preferences(tokenizer.pad_token_id, 0.1, reference_logps(tmp_path, 's', pairs, tokenizer.pad_token_id, 3, base)), shaken(tiny_model)
    with torch.no_grad():
        whole = float(objective.loss(model, objective.collate(pairs), len(pairs)))
        split = sum(float(objective.loss(model, objective.collate([pair]), len(pairs))) for pair in pairs)
    assert whole == pytest.approx(split, abs=1e-5)


def test_the_reference_of_adapters_at_their_start_is_the_base(tiny_model, tmp_path):
    tokenizer, loaded = load_tokenizer(tiny_model), load_model(str(tiny_model), 'float32', 'cpu')
    _, pairs, _ = pairs_of(tokenizer, PAIRS, 160)
    plain = reference_logps(tmp_path / 'a', 's', pairs, 2, 8, loaded.model)
    adapted = reference_logps(tmp_path / 'b', 's', pairs, 2, 3, prepare(loaded, 'lora', 4))
    for key, values in plain.items(): assert adapted[key] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize('moves', ['preference', 'full'])
def test_dpo_learns_and_the_weights_on_disk_measure_the_same(tiny_model, tmp_path, moves):
    plan = plan_of(tiny_model, PAIRS, settings_of(learning_rate=5e-3 if moves == 'preference' else 3e-4))
    make, made = make_objective(plan, tmp_path), []
    fitted = fit(replace(plan, approach=moves), tmp_path, lambda model: made.append(make(model)) or made[0],
                 lambda loaded: objective_probes(made[0], plan.validation))
    first, *_, last = fitted.journal.curve
    assert fitted.journal.lines[0]['loss'] == pytest.approx(math.log(2), abs=1e-5)   # at the start nothing is gained
    assert fitted.journal.lines[-1]['loss'] < .6 and last['validation_loss'] < math.log(2)
    assert last['preference']['accuracy'] == 1 and last['preference']['margin'] > first['preference']['margin'] >= 0
    # later, in another process: the weights of the checkpoint, the reference from its file
    model = load_model(str(tiny_model), 'float32', 'cpu')
    model = prepare(model, moves, 4)
    take_weights(model, best_checkpoint(tmp_path, fitted))
    if moves == 'preference': model = model.merge_and_unload()
    again = make_objective(plan, tmp_path)(None)
    assert validation_loss(model, [again.collate(batch) for batch in plan.validation], again) == pytest.approx(fitted.journal.best['validation_loss'], abs=1e-4)


class Dies(TrainerCallback):
    "Kills a training when a step ends, before anything of it is saved."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise KeyboardInterrupt


def test_both_phases_resume_to_the_same_numbers(tiny_model, tmp_path):
    plan = plan_of(tiny_model, PAIRS, settings_of(preference=Preference(sft_steps=4), evals=3, learning_rate=3e-3))

    def both(folder, first=99, second=99):
        start = warm_start(plan, folder, lambda plan, folder: fit(plan, folder, callbacks=[Dies(first)]))
        return fit(plan, folder, make_objective(plan, folder), start=start, callbacks=[Dies(second)])

    whole = both(tmp_path / 'whole')
    assert whole.journal.lines[0]['loss'] == pytest.approx(math.log(2), abs=1e-5)   # the reference is the first phase's end, not the base
    plain = make_objective(plan, tmp_path / 'alone')(load_model(str(tiny_model), 'float32', 'cpu').model)
    assert plain.reference != json.loads((tmp_path / 'whole' / REFERENCE).read_text())['pairs']

    with pytest.raises(KeyboardInterrupt): both(tmp_path / 'broken', first=2)
    with pytest.raises(KeyboardInterrupt): both(tmp_path / 'broken', second=4)
    resumed = both(tmp_path / 'broken')
    assert resumed.resumed_at == 2
    timeless = lambda path: [{k: v for k, v in line.items() if k != 'seconds'} for line in read_jsonl(path)]
    for log in ('log.jsonl', 'supervised/log.jsonl'): assert timeless(tmp_path / 'whole' / log) == timeless(tmp_path / 'broken' / log)
    assert resumed.journal.curve == whole.journal.curve


def test_a_lost_reference_is_computed_again_from_the_start(tiny_model, tmp_path):
    plan = plan_of(tiny_model, PAIRS, settings_of(evals=3))
    train = lambda folder, step=99: fit(plan, folder, make_objective(plan, folder), callbacks=[Dies(step)])
    whole = train(tmp_path / 'whole')
    with pytest.raises(KeyboardInterrupt): train(tmp_path / 'broken', 5)
    (tmp_path / 'broken' / REFERENCE).unlink()
    resumed = train(tmp_path / 'broken')
    assert resumed.resumed_at > 0
    assert [line['loss'] for line in resumed.journal.lines] == [line['loss'] for line in whole.journal.lines]


def test_rows_that_are_no_pairs_are_named(tiny_model):
    tokenizer, settings = load_tokenizer(tiny_model), settings_of()
    judged = make_row(PAIRS[0]['messages'], file='likes.jsonl', line=4, label=True)
    with pytest.raises(BadInput, match=r'likes.jsonl:4: label: one answer judged alone \(as for KTO\)'): items_of(tokenizer, [judged], settings, 'preference')
    with pytest.raises(BadInput, match='not one of 1 rows is a usable pair'): items_of(tokenizer, [make_row(PAIRS[0]['messages'])], settings, 'preference')
    assert len(items_of(tokenizer, [PAIRS[0], make_row(PAIRS[0]['messages'])], settings, 'preference')[2]) == 1


def test_earlier_answers_of_a_conversation_are_prompt(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    before = [turn('user', 'Hello'), turn('assistant', 'Good day.'), turn('user', 'Where is it?')]
    row = make_row(before + [turn('assistant', 'Here.')], prompt=before, chosen=[turn('assistant', 'Here.')], rejected=[turn('assistant', 'Gone.')])
    _, (pair,), _ = pairs_of(tokenizer, [row], 99)
    learned = [tokenizer.decode([i for i, on in zip(side.ids, side.trained) if on]) for side in (pair.chosen, pair.rejected)]
    assert learned == ['Here.<|im_end|>', 'Gone.<|im_end|>']


# a teacher's tokens

def test_divergence_and_its_gradient_equal_the_textbook_in_slices():
    torch.manual_seed(0)
    said, taught, labels = torch.randn(23, 40, requires_grad=True), torch.randn(23, 40), torch.randint(40, (23,))
    found = divergences(said, taught, labels, 3., slice_=5)
    p, q = torch.softmax(taught / 3, -1), torch.softmax(said / 3, -1)
    assert torch.allclose(found[0], (p * (p / q).log()).sum(-1), atol=1e-6)
    assert torch.allclose(found[1], torch.nn.functional.cross_entropy(said, labels, reduction='none'))
    found[0].sum().backward()
    assert torch.allclose(said.grad, (q - p) / 3, atol=1e-6)   # of KL towards the student's scores, known in closed form


def test_the_student_approaches_its_teacher(tiny_model, tmp_path):
    from finetune_nb.model.tiny import tiny_model as make
    teacher = make(tmp_path / 'teacher', seed=9, tokenizer=tiny_model)
    settings = settings_of(max_steps=30, batch_size=6, learning_rate=2e-3, distillation=Distillation(teacher='teacher', learn='tokens', temperature=2., weight=1.))
    plan, made = plan_of(tiny_model, PAIRS, settings, 'distillation'), []
    make_it = make_objective(plan, tmp_path, tmp_path, 'cpu')
    fitted = fit(replace(plan, approach='full'), tmp_path / 'training', lambda model: made.append(make_it(model)) or made[0],
                 lambda loaded: objective_probes(made[0], plan.validation))
    parts = [made[0].collate(batch) for batch in plan.validation]
    before = made[0].measures(load_model(str(tiny_model), 'float32', 'cpu').model, parts)
    assert fitted.journal.curve[-1]['distillation']['kl'] < before['kl'] / 2
    assert made[0].measures(load_model(str(teacher), 'float32', 'cpu').model, parts)['kl'] == 0
    assert make_it(None) is made[0]   # the teacher is loaded once


def test_weight_and_temperature_mix_as_said(tiny_model):
    tokenizer, student = load_tokenizer(tiny_model), shaken(tiny_model)
    _, items, _ = items_of(tokenizer, PAIRS, settings_of(), 'lora')
    part = TeacherTokens(2, student).collate(items)
    loss = lambda weight, temperature: float(TeacherTokens(2, load_model(str(tiny_model), 'float32', 'cpu').model, temperature, weight).loss(student, part, 1.).detach())
    soft, hard = TeacherTokens(2, load_model(str(tiny_model), 'float32', 'cpu').model, 2.).apart(student, part).sum(1).tolist()
    assert loss(.25, 2.) == pytest.approx(.25 * 4 * soft + .75 * hard, rel=1e-5)


def test_another_tokenizer_is_refused_by_name(tiny_model, tmp_path):
    from finetune_nb.model.tiny import tiny_model as make
    make(tmp_path / 'other', ('a vocabulary of its very own',))
    plan = plan_of(tiny_model, PAIRS, settings_of(distillation=Distillation(teacher='other', learn='tokens')), 'distillation')
    with pytest.raises(BadInput, match='other: .*teacher.* learn: answers'): make_objective(plan, tmp_path, tmp_path)(None)


# a teacher's answers

def test_a_teacher_is_asked_once(tmp_path):
    seen, rows = [], [make_row(row['messages']) for row in PAIRS]
    script = lambda body: body['messages'][-1]['content'].replace('where is my', 'I have found the').replace('?', '.')
    with scripted(script, seen) as url:
        how = Distillation(teacher={'url': url, 'model': 'wise'})
        first = ask_teacher(how, rows, cache=tmp_path / 'replies.jsonl')
        asked, again = len(seen), ask_teacher(how, rows, cache=tmp_path / 'replies.jsonl')
    assert asked == len(rows) and len(seen) == asked and again.rows == first.rows
    assert first.rows[0]['messages'][-1]['content'] == 'Order 0: I have found the lamp.'
    assert {row['inflow'] for row in first.rows} == {'synthetic'} and all('wise' in row['answered_by'] for row in first.rows)


def test_a_teacher_of_whom_nothing_can_be_used_stops_the_run():
    with scripted(lambda body: "I'm sorry, but I can't help with that.") as url, pytest.raises(BadInput, match='8 left out .refusal 8.. Not one answer'):
        ask_teacher(Distillation(teacher={'url': url, 'model': 'coy'}), [make_row(row['messages']) for row in PAIRS])


# a reward

def letters(prompt, answer, row): return answer.count('e') / max(1, len(answer))


def reward_plan(tiny, **changes):
    return plan_of(tiny, [make_row(row['messages']) for row in PAIRS],
                   settings_of(**{'max_steps': 12, 'batch_size': 4, 'preference': Preference(method='grpo', reward='x', beta=.01, generations=6), **changes}))


def test_a_reward_rises(tiny_model, tmp_path, capsys):
    pytest.importorskip('trl')
    fitted = run_grpo(reward_plan(tiny_model), tmp_path, letters, 8)
    rewards = [line['reward'] for line in fitted.journal.lines]
    assert sum(rewards[-4:]) > 1.5 * sum(rewards[:4])
    assert {'step', 'loss', 'learning_rate', 'tokens', 'trained_tokens', 'seconds', 'reward'} <= fitted.journal.lines[0].keys()
    assert read_jsonl(tmp_path / 'log.jsonl') == fitted.journal.lines
    assert not fitted.notes and 'nothing is learned' not in capsys.readouterr().out
    model = prepare(load_model(str(tiny_model), 'float32', 'cpu'), 'lora', 4)
    start = weights(model)
    take_weights(model, best_checkpoint(tmp_path, fitted))   # an adapter like any other
    assert any(not torch.equal(a, b) for a, b in zip(start, weights(model)))


def test_equal_rewards_are_said_to_teach_nothing(tiny_model, tmp_path, capsys):
    pytest.importorskip('trl')
    fitted = run_grpo(reward_plan(tiny_model, max_steps=2), tmp_path, lambda *_: 0., 4)
    assert 'in 2 of 2 steps all answers to each prompt got the same reward' in fitted.notes[0] and 'sft_steps' in fitted.notes[0]
    assert capsys.readouterr().out.count('nothing is learned') == 1


def test_a_killed_grpo_resumes_to_the_same_numbers(tiny_model, tmp_path):
    pytest.importorskip('trl')
    plan, calls = reward_plan(tiny_model, max_steps=4, evals=2), []

    def dies(prompt, answer, row):
        calls.append(row)
        if len(calls) > 4 * 6 * 2 + 2 + 4 * 6 // 2: raise KeyboardInterrupt   # two steps, an evaluation of two rows, half a step
        return letters(prompt, answer, row)
    whole = run_grpo(plan, tmp_path / 'whole', letters, 4)
    with pytest.raises(KeyboardInterrupt): run_grpo(plan, tmp_path / 'broken', dies, 4)
    resumed = run_grpo(plan, tmp_path / 'broken', letters, 4)
    assert resumed.resumed_at == 2
    timeless = lambda fitted: [{k: v for k, v in line.items() if k != 'seconds'} for line in fitted.journal.lines]
    assert timeless(resumed) == timeless(whole)


def test_grpo_begins_with_the_weights_of_a_first_phase(tiny_model, tmp_path):
    pytest.importorskip('trl')
    plan = reward_plan(tiny_model, max_steps=1, preference=Preference(method='grpo', reward='x', generations=2, sft_steps=2))
    start = warm_start(plan, tmp_path, fit)
    fitted = run_grpo(plan, tmp_path, letters, 4, start)
    assert fitted.journal.lines[0]['step'] == 1 and (start / 'adapter_model.safetensors').is_file()


def test_without_trl_the_extra_is_named(tiny_model, tmp_path, monkeypatch):
    import builtins
    real = builtins.__import__
    def hidden(name, *args, **kwargs):
        if name == 'trl': raise ImportError("No module named 'trl'")
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', hidden)
    with pytest.raises(BadInput, match=r'finetune_nb\[grpo\]'): run_grpo(reward_plan(tiny_model), tmp_path, partial(letters), 4)
