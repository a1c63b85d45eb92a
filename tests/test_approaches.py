"""Each approach learns, moves what it should and nothing else, and comes back from disk as it went."""
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finetune_nb.core.files import BadInput
from finetune_nb.core.recipe import Train
from finetune_nb.model.batches import collate
from finetune_nb.model.generate import generate
from finetune_nb.model.loading import Loaded, load_model
from finetune_nb.model.step import answer_loss, why_padded
from finetune_nb.model.template import prompt_ids, render
from finetune_nb.model.tiny import tiny_model, tiny_tokenizer
from finetune_nb.training.approaches import APPROACHES, load_base, moving, prepare, training_tokenizer
from finetune_nb.training.cards import CARDS
from finetune_nb.training.prompts import PromptRows, add_prompt, first_rows, keep_prompt, learn_prompt, merge_prompt, prompt_tokens

ROWS = [[{'role': 'user', 'content': f'Where is order {n}?'}, {'role': 'assistant', 'content': f'Order {n} is on its way.'}] for n in range(8)]
TRAIN = Train(rank=4, virtual_tokens=8)
needs_bitsandbytes = pytest.mark.skipif(find_spec('bitsandbytes') is None, reason='bitsandbytes is not installed: finetune_nb[qlora]')

# approach, variant, learning rate, share of the first loss that 25 steps on eight rows must take away
CASES = [('full', 'lora', 3e-3, 0.85), ('lora', 'lora', 3e-3, 0.4), ('lora', 'rslora', 3e-3, 0.4), ('lora', 'dora', 3e-3, 0.4), ('preference', 'lora', 3e-3, 0.4),
         ('distillation', 'lora', 3e-3, 0.4), ('prompt_tuning', 'lora', 1e-2, 0.08), pytest.param('qlora', 'lora', 3e-3, 0.4, marks=needs_bitsandbytes)]


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp('tiny'), tuple(turn['content'] for row in ROWS for turn in row))


def batch_of(tokenizer):
    return collate([render(tokenizer, row) for row in ROWS], tokenizer.pad_token_id)


def trained(model, batch, rate, steps=25):
    "Losses of a few steps, the last one after the last of them."
    optimiser, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0), []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return [*losses, loss_of(model, batch)]


def loss_of(model, batch):
    with torch.no_grad(): return answer_loss(model.eval(), batch).item()


def reloaded(approach, folder, tiny):
    "What training saved, on a fresh base: the model."
    if approach == 'full': return AutoModelForCausalLM.from_pretrained(folder)
    if approach == 'prompt_tuning': return merge_prompt(load_model(str(tiny), 'float32', 'cpu'), folder).model
    return PeftModel.from_pretrained(load_base(str(tiny), approach, 'float32', 'cpu').model, folder)


@pytest.mark.parametrize('approach, variant, rate, fall', CASES)
def test_an_approach_learns_moves_only_its_weights_and_comes_back(approach, variant, rate, fall, tiny, tmp_path):
    settings = TRAIN.model_copy(update={'variant': variant})
    torch.manual_seed(0)
    loaded = load_base(str(tiny), approach, 'float32', 'cpu', train=settings, goal='Answer where the order is')
    model, batch = prepare(loaded, approach, settings), batch_of(loaded.tokenizer)
    assert why_padded(model, batch) == '', 'a prompt of tokens, adapters and 4 bits are all packed'
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    losses = trained(model, batch, rate)
    assert losses[-1] < (1 - fall) * losses[0], losses

    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    asked = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert moved == asked
    kinds = {'full': (), 'prompt_tuning': ('trainable_tokens_delta',)}.get(approach, ('lora_',))
    assert all(any(kind in name for kind in kinds) for name in moved) if kinds else moved == set(before)

    model.save_pretrained(tmp_path)
    back = reloaded(approach, tmp_path, tiny)
    assert loss_of(back, batch) == pytest.approx(losses[-1], abs=1e-5)
    if approach in ('lora', 'preference', 'distillation'):
        assert loss_of(back.merge_and_unload(), batch) == pytest.approx(losses[-1], abs=1e-4)


def test_every_approach_of_the_recipe_is_tested_and_has_a_card():
    tested = {case.values[0] if hasattr(case, 'values') else case[0] for case in CASES}
    assert tested == set(APPROACHES) == set(CARDS) - {'few_shot', 'nearest_neighbour'}
    assert set(APPROACHES) == set(Train.model_fields['approach'].annotation.__args__) - {'auto'}


@needs_bitsandbytes
def test_a_base_in_four_bits_is_smaller_and_its_adapter_merges_into_the_whole_base(tiny, tmp_path):
    size = lambda model: sum(p.numel() * p.element_size() for name, p in model.named_parameters() if 'proj' in name)
    torch.manual_seed(0)
    loaded, whole = load_base(str(tiny), 'qlora', 'float32', 'cpu'), load_model(str(tiny), 'float32', 'cpu')
    assert size(loaded.model) * 8 == size(whole.model)   # 4 bits for 32; the scales are no parameters
    model, batch = prepare(loaded, 'qlora', TRAIN), batch_of(loaded.tokenizer)
    assert moving(model)['parameters'] == moving(prepare(load_model(str(tiny), 'float32', 'cpu'), 'lora', TRAIN))['parameters']
    last = trained(model, batch, 3e-3)[-1]
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(whole.model, tmp_path).merge_and_unload()
    assert loss_of(merged, batch) != last, 'the whole base is not the one that was trained on'
    assert loss_of(merged, batch) == pytest.approx(last, rel=0.5)   # near, and therefore measured again after training


def test_without_bitsandbytes_the_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'bitsandbytes', None)
    with pytest.raises(BadInput, match=r"finetune_nb\[qlora\]"): load_base(str(tiny), 'qlora')


FAMILIES = {'llama': {}, 'llama untied': {'tie_word_embeddings': False}, 'gpt2': {'n_embd': 48, 'n_layer': 2, 'n_head': 6, 'n_positions': 256},
            'gemma3_text': {'head_dim': 16}, 'phi': {}, 'spare rows': {'vocab_size': 400}, 'spare rows, untied': {'vocab_size': 400, 'tie_word_embeddings': False}}


def made(family):
    "A random model of a family with the tiny tokenizer, in evaluation mode."
    tokenizer = tiny_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
                 max_position_embeddings=256, pad_token_id=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    kind = family.split()[0] if family.split()[0] in ('llama', 'gpt2', 'gemma3_text', 'phi') else 'llama'
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **FAMILIES[family]}), dtype=torch.float32)
    if kind == 'gpt2':   # a direction that all words share pulls every score below zero, as in GPT-2 itself
        model.transformer.wte.weight.data[:, 0] += 1.0
        model.transformer.ln_f.bias.data[0] -= 8.0
    return Loaded(model.eval(), tokenizer, None)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_learned_prompt_ships_as_a_plain_model(family, tmp_path):
    base = made(family)
    ids, pad = torch.tensor([render(base.tokenizer, ROWS[0]).ids]), base.tokenizer.pad_token_id
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    with torch.no_grad(): old = base.model(ids).logits
    assert family != 'gpt2' or old.max() < 0
    loaded = add_prompt(base, first_rows(base, 5, 'Where is it'))
    new_ids = loaded.tokenizer.convert_tokens_to_ids(prompt_tokens(5))
    with torch.no_grad(): new = loaded.model(ids).logits
    assert torch.allclose(new[..., :vocabulary], old, atol=1e-5), 'known words score as before'
    if vocabulary <= new_ids[0]:
        assert (new[..., new_ids].amax(-1) <= old.amax(-1)).all(), 'a learned token is never the best'
        extra = new.logsumexp(-1) - old.logsumexp(-1)
        assert extra.max() <= torch.log(torch.tensor(1 + 5 / vocabulary)) + 1e-5, 'the bound that the chapter states'

    model, batch = learn_prompt(loaded), batch_of(loaded.tokenizer)
    layer, gradients = model.get_input_embeddings(), {}
    for kind in (PromptRows, TrainableTokensLayer):
        layer.__class__ = kind
        model.zero_grad()
        answer_loss(model.train(), batch).backward() if family != 'gpt2' else answer_loss(model.eval(), batch).backward()
        gradients[kind] = next(p.grad.clone() for p in model.parameters() if p.requires_grad)
    assert gradients[PromptRows].abs().max() > 1e-4
    if 'gemma' not in family: assert torch.allclose(gradients[PromptRows], gradients[TrainableTokensLayer], atol=1e-6)   # there peft's rows are not scaled yet
    layer.__class__ = PromptRows
    last = trained(model.eval(), batch, 1e-2, steps=5)[-1]

    model.save_pretrained(tmp_path / 'checkpoint')
    assert (tmp_path / 'checkpoint/adapter_model.safetensors').stat().st_size < 4 * 5 * 48 + 500, 'no matrix of the base is saved'
    keep_prompt(tmp_path / 'checkpoint', tmp_path / 'adapter', 'a base')
    config = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
    assert (config['peft_type'], config['base_model_name_or_path'], config['num_virtual_tokens']) == ('PROMPT_TUNING', 'a base', 5)
    merged = merge_prompt(made(family), tmp_path / 'adapter')
    merged.model.save_pretrained(tmp_path / 'shipped')
    merged.tokenizer.save_pretrained(tmp_path / 'shipped')
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / 'shipped').eval(), AutoTokenizer.from_pretrained(tmp_path / 'shipped')
    assert [loss_of(one, batch) for one in (merged.model, plain)] == pytest.approx([last, last], abs=1e-5)

    prompt = tokenizer.apply_chat_template(ROWS[0][:1], add_generation_prompt=True, return_tensors='pt', return_dict=False)
    assert prompt[0].tolist() == prompt_ids(merged.tokenizer, ROWS[0][:1])
    greedy = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=pad)[0, prompt.shape[1]:]
    assert tokenizer.decode(greedy, skip_special_tokens=True) == generate(merged, [ROWS[0][:1]], 6, label='')[0].text
    drawn = plain.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=True, top_k=0, temperature=9.0, pad_token_id=pad)
    assert not set(drawn[0, prompt.shape[1]:].tolist()) & set(new_ids), 'nor is it ever drawn'

    untouched = made(family).model
    theirs = PeftModel.from_pretrained(untouched, tmp_path / 'adapter').eval()
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1]:]
        ours = plain(torch.tensor([new_ids + ids[0].tolist()])).logits[0, 5:, :vocabulary]
    assert torch.allclose(found, ours, atol=1e-4), 'peft on the untouched base scores the same'


def test_a_prompt_goes_on_from_a_checkpoint(tiny, tmp_path):
    "As transformers' Trainer does it: load_adapter into a model prepared afresh."
    fresh = lambda: prepare(load_base(str(tiny), 'prompt_tuning', 'float32', 'cpu', train=TRAIN, goal='Orders'), 'prompt_tuning', TRAIN)
    model, again = fresh(), fresh()
    batch = batch_of(training_tokenizer(load_model(str(tiny)).tokenizer, 'prompt_tuning', TRAIN))
    last = trained(model, batch, 3e-2, 5)[-1]
    model.save_pretrained(tmp_path)
    assert loss_of(again, batch) != pytest.approx(last, abs=1e-3)
    again.load_adapter(tmp_path, again.active_adapter, is_trainable=True)
    assert isinstance(again.get_input_embeddings(), PromptRows)
    assert loss_of(again, batch) == last
    assert moving(again)['trainable'] == 8 * 192


def test_bf16_base_learns_a_prompt_in_fp32(tiny):
    loaded = load_base(str(tiny), 'prompt_tuning', 'bfloat16', 'cpu', train=TRAIN)
    model = prepare(loaded, 'prompt_tuning', TRAIN)
    assert moving(model)['dtype'] == 'float32'
    losses = trained(model, batch_of(loaded.tokenizer), 1e-2, steps=4)
    assert losses[-1] < 0.98 * losses[0], losses


def test_a_template_of_several_kinds_gets_the_prompt_in_each(tiny):
    loaded = load_model(str(tiny))
    loaded.tokenizer.chat_template = {'default': loaded.tokenizer.chat_template, 'tool_use': 'tools {{ messages[0].content }}'}
    begun = add_prompt(replace(loaded), first_rows(loaded, 2)).tokenizer.chat_template
    assert all(text.startswith('<|prompt_0|><|prompt_1|>') for text in begun.values())
