"Bases that are broken in ways that load without a word: named, and never before a sound one."
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_nb.core.rows import make_row

LLAMA3 = ("{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
ASKED = ['My parcel has not arrived and it was due on Monday', 'I was charged twice for one order, please refund me', 'How do I change my password?',
         'The app crashes whenever I open the settings page', 'Where is my order number 1234?', 'Why is there a second payment on my card?',
         'I cannot log in any more', 'The picture does not load on my phone']
LABELS = ['shipping', 'billing', 'account', 'technical']


def rows_of(answers):
    turns = [[{'role': 'user', 'content': said}, {'role': 'assistant', 'content': answers[n % len(answers)]}] for n, said in enumerate(ASKED)]
    return [make_row(said, line=n) for n, said in enumerate(turns)]


def changed(source: Path, folder: Path, change) -> Path:
    "A copy of a model whose tensors were changed."
    from safetensors.torch import load_file, save_file
    shutil.copytree(source, folder)
    file = next(folder.glob('*.safetensors'))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={'format': 'pt'})
    return folder


def spoken(source: Path, folder: Path, template: str) -> Path:
    "A copy of a model with another chat template."
    from finetune_nb.model.loading import load_tokenizer
    shutil.copytree(source, folder)
    (folder / 'chat_template.jinja').unlink(missing_ok=True)
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def chosen(tmp_path, bases, answers=LABELS):
    "What the stage's step makes of some bases."
    from finetune_nb.core.recipe import Recipe
    from finetune_nb.core.run import Run
    from finetune_nb.selection.choose import choose
    recipe = Recipe(name='bases', data={'sources': [{'path': 'x.jsonl'}]}, base_models=[str(base) for base in bases], folder=tmp_path,
                    train={'approach': 'lora', 'batch_size': 4, 'validation_rows': 8, 'max_tokens': 256})
    rows = rows_of(answers)
    choice = choose(Run(tmp_path / 'run', recipe), SimpleNamespace(train=rows, validation=rows, test=[]))
    return choice, {Path(record['name']).name: record for record in choice.candidates}


def noise(tensors, names, seed=0):
    "Random numbers of the same size in place of what was learnt."
    import torch
    dice = torch.Generator().manual_seed(seed)
    for name in names: tensors[name].copy_(torch.randn(tensors[name].shape, generator=dice) * tensors[name].float().std())


@pytest.fixture(scope='module')
def deep(tmp_path_factory):
    "Eight small layers whose rows differ in size, as training makes them."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from finetune_nb.model.tiny import tiny_tokenizer
    folder, tokenizer = tmp_path_factory.mktemp('deep') / 'model', tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
                                         tie_word_embeddings=True))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if 'proj' in name: weight.mul_(torch.linspace(.3, 1.7, len(weight))[torch.randperm(len(weight))][:, None])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


DOWN = 'model.layers.{}.mlp.down_proj.weight'

@pytest.mark.parametrize('change, said', [
    (lambda t: t[DOWN.format(5)].zero_(), f'{DOWN.format(5)} is all zeros'),
    (lambda t: t[DOWN.format(5)].fill_(.1), f'all numbers of {DOWN.format(5)} are 0.1'),
    (lambda t: t[DOWN.format(5)].mul_(20), f'{DOWN.format(5)} is '),
    (lambda t: noise(t, [DOWN.format(5)]), f'{DOWN.format(5)} looks like random numbers'),
    (lambda t: t[DOWN.format(5)][3, :7].fill_(float('nan')), f'7 of 8,192 numbers of {DOWN.format(5)}'),
    (lambda t: t.pop(DOWN.format(5)), f'{DOWN.format(5)} is missing'),
    (lambda t: t.update({DOWN.format(5): t[DOWN.format(5)][:9].clone()}), f'{DOWN.format(5)} has the shape (9, 128), not (64, 128)')])
def test_what_happened_to_one_tensor_is_said_with_its_name(deep, tmp_path, change, said):
    from finetune_nb.selection.damage import weight_damage
    found = weight_damage(changed(deep, tmp_path / 'model', change))
    named = [line for lines in found.values() for line in lines]
    assert len(named) == 1 and said in named[0] and named[0].count('.weight') == 1, found


def test_sound_weights_are_not_blamed(deep, tiny_model):
    from finetune_nb.selection.damage import weight_damage
    assert weight_damage(deep) == weight_damage(tiny_model) == {'broken': [], 'odd': []}


def test_a_candidate_that_cannot_be_loaded_is_a_reason_and_not_the_end(tiny_model, tmp_path):
    "A tensor of another shape makes the loader raise; a missing one it fills with random numbers."
    name = DOWN.format(1)
    bases = [changed(tiny_model, tmp_path / 'cut', lambda t: t.update({name: t[name][:10].clone()})), changed(tiny_model, tmp_path / 'gone', lambda t: t.pop(name)),
             spoken(tiny_model, tmp_path / 'foreign', LLAMA3), tiny_model]
    choice, records = chosen(tmp_path, bases)
    assert choice.base == str(tiny_model)
    assert f'{name} has the shape (10, 512)' in records['cut']['why_not'][0] and f'{name} is missing' in records['gone']['why_not'][0]
    assert '<|start_header_id|>' in records['foreign']['why_not'][0] and 'another tokenizer' in records['foreign']['why_not'][0]


@pytest.fixture(scope='module')
def starter():
    from finetune_nb.core.files import BadInput
    from finetune_nb.model.starter import fetch_starter
    try: return fetch_starter()
    except BadInput as error: pytest.skip(str(error).splitlines()[0])


@pytest.mark.slow
def test_of_three_starters_the_sound_one_is_chosen_and_the_others_are_told_why(starter, tmp_path):
    "One word as answer: by bits alone the damaged and the foreign one would come first."
    names = [f'model.layers.{n}.{kind}.weight' for n in (5, 6, 20) for kind in ('mlp.down_proj', 'self_attn.o_proj')]
    damaged, foreign = changed(starter, tmp_path / 'damaged', lambda t: noise(t, names)), spoken(starter, tmp_path / 'foreign', LLAMA3)
    choice, records = chosen(tmp_path, [damaged, foreign, starter])
    assert choice.base == str(starter) and not records[starter.name]['damage'] and not records[starter.name]['why_not']
    assert 'looks like random numbers' in records['damaged']['damage'][0] and 'another tokenizer' in records['foreign']['why_not'][0]


@pytest.mark.slow
@pytest.mark.parametrize('answers', [['A', 'B', 'C', 'D'], ['yes', 'no'], ['1', '0'], LABELS])
def test_a_sound_base_is_not_called_damaged_because_the_answers_are_short(starter, answers):
    "A table of frequencies needs two bits for A, B, C and D; a base that was not told of them needs forty."
    from finetune_nb.model.loading import load_model
    from finetune_nb.selection.damage import reading_damage
    assert reading_damage(load_model(str(starter)), rows_of(answers)) == []


@pytest.mark.slow
def test_zeroed_layers_of_the_starter_are_named_in_seconds(starter, tmp_path):
    import time
    from finetune_nb.selection.damage import weight_damage
    broken = changed(starter, tmp_path / 'zero', lambda t: [t[DOWN.format(n)].zero_() for n in range(30)])
    started = time.process_time()
    assert weight_damage(starter) == {'broken': [], 'odd': []}
    assert time.process_time() - started < 10
    assert 'is all zeros' in weight_damage(broken)['odd'][0] and '27 more' in weight_damage(broken)['odd'][0]
